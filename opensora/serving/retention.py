"""Deletes results that are too old or too many, uploads that nothing needs, and folders of no job."""

from __future__ import annotations

import asyncio
import time

from opensora.serving import folders
from opensora.serving.state import ServerState
from opensora.serving.store import media_in_use

EVERY_SECONDS = 60.0


async def keep_clean(state: ServerState) -> None:
    """Cleans up at the start and every minute."""
    sweep(state)
    while True:
        await asyncio.sleep(EVERY_SECONDS)
        clean(state)


def clean(state: ServerState) -> None:
    """Deletes what is too old, and the oldest while the disk use is above its limit."""
    now, store = time.time(), state.store
    for job in store.expired(now):
        if job.is_final:
            state.delete(job)
    needed = media_in_use([*store.with_status("queued"), *store.with_status("in_progress")])
    for file in store.files():
        if file.id not in needed and file.created_at + state.limits.keep_seconds < now:
            state.uploads.delete(file)
    excess = store.disk_use() - state.limits.max_disk
    if excess <= 0:
        return
    for job in store.finished_oldest_first():
        if excess <= 0:
            break
        if job.id not in needed:
            excess -= job.bytes
            state.delete(job)


def sweep(state: ServerState) -> None:
    """Deletes the folders and uploads that the database does not know: a stopped server may leave some."""
    known, videos, files = state.store.ids(), state.store.folder / folders.VIDEOS, state.store.folder / folders.FILES
    for folder in videos.iterdir() if videos.is_dir() else ():
        if folder.name not in known:
            folders.remove(folder)
    uploads = {f"{file.id}{file.suffix}" for file in state.store.files()}
    for path in files.iterdir() if files.is_dir() else ():
        if path.name not in uploads:
            path.unlink(missing_ok=True)

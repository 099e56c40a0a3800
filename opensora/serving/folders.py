"""The folders below `--data`. Names are ids that the server made."""

from __future__ import annotations

import shutil
from pathlib import Path

from opensora.serving.job import VideoJob

VIDEOS, FILES = "videos", "files"
NAME = "video"  # of a result, without suffix
STATE = "video.state.safetensors"  # the sampler of a running job
DRAFT = "video.draft.safetensors"  # the sampler of a finished draft
THUMBNAIL, SPRITESHEET = "thumbnail.png", "spritesheet.png"


def folder_of(id: str) -> Path:
    """The folder of a job, below the data folder."""
    return Path(VIDEOS, id)


def media_file(job: VideoJob) -> Path:
    """The video or image of a finished job, below the data folder."""
    return folder_of(job.id) / f"{NAME}{'.draft' if job.draft else ''}{job.suffix}"


def recipe_file(job: VideoJob) -> Path:
    """The recipe of a finished job."""
    return media_file(job).with_suffix(".json")


def size_of(folder: Path) -> int:
    """Bytes of the files in a folder."""
    return sum(file.stat().st_size for file in folder.iterdir() if file.is_file()) if folder.is_dir() else 0


def remove(folder: Path) -> None:
    """Removes a folder of a job."""
    shutil.rmtree(folder, ignore_errors=True)

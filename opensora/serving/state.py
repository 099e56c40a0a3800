"""What the handlers of a server share."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass

from starlette.requests import Request

from opensora.serving import folders
from opensora.serving.dispatcher import Dispatcher
from opensora.serving.errors import ApiError, not_found
from opensora.serving.events import Events
from opensora.serving.job import VideoJob
from opensora.serving.language_model import PromptRefiner
from opensora.serving.limits import Limits
from opensora.serving.models import Models
from opensora.serving.planner import Planner
from opensora.serving.request import Checked
from opensora.serving.store import Store
from opensora.serving.uploads import Uploads, new_id


@dataclass
class ServerState:
    """A running server."""

    limits: Limits
    models: Models
    store: Store
    events: Events
    dispatcher: Dispatcher
    planner: Planner
    uploads: Uploads
    started_at: float
    adapters: list[str]  # names
    refiner: PromptRefiner | None  # of the language model that the operator has named

    def job(self, id: str, owner: str) -> VideoJob:
        """The job of this owner with this id. Raises ApiError 404."""
        job = self.store.get(id, owner)
        if job is None:
            raise not_found("video", id)
        running = self.dispatcher.running.get(id)
        return running.job if running else job

    async def queue(
        self, owner: str, checked: Checked, made_from: dict[str, str], draft_of: VideoJob | None = None
    ) -> VideoJob:
        """Appends a job to the queue, one that continues the draft `draft_of` if given. Raises ApiError."""
        self.check_room(owner)
        job = VideoJob.of(new_id("video"), owner, checked, time.time(), made_from)
        if draft_of is not None:
            self._take_draft(job, draft_of)
        self.store.add(job)
        self.events.publish(owner, "status", self.dispatcher.public(job))
        await self.dispatcher.wake()
        return job

    def _take_draft(self, job: VideoJob, source: VideoJob) -> None:
        """Links the sampler state of a draft into the folder of the job that continues it: either may be deleted."""
        folder = self.store.folder / folders.folder_of(job.id)
        folder.mkdir(parents=True)
        try:
            os.link(self.store.folder / folders.folder_of(source.id) / folders.DRAFT, folder / folders.STATE)
        except OSError:
            folders.remove(folder)
            raise ApiError(409, f"the state of draft '{source.id}' is gone; create it again", code="gone") from None

    def check_room(self, owner: str) -> None:
        """Raises ApiError 429 if the queue is full, for this owner or for all, 503 without any worker."""
        if problem := self.dispatcher.broken:
            raise ApiError(503, f"nothing can be computed: {problem}", code="no_worker", retry_after=30)
        waiting = self.store.waiting()
        own, every = waiting.get(owner, 0), sum(waiting.values())
        if own >= self.limits.max_queued_per_key or every >= self.limits.max_queued:
            after = self.dispatcher.wait_seconds(0)
            raise ApiError(429, f"the queue is full; try again in {after} s", code="queue_full", retry_after=after)
        if self.store.disk_use() > self.limits.max_disk:
            raise ApiError(507, "the disk of the server is full; delete results", code="disk_full")

    def delete(self, job: VideoJob) -> None:
        """Deletes a job and its files; one that runs is cancelled."""
        if not job.is_final:
            self.dispatcher.cancel(job)
        self.store.delete(job.id)
        folders.remove(self.store.folder / folders.folder_of(job.id))
        self.events.publish(job.owner, "deleted", {"id": job.id})


def state_of(request: Request) -> ServerState:
    """The server that a request came to."""
    state: ServerState = request.app.state.server
    return state


def owner_of(request: Request) -> str:
    """The owner of the request's key."""
    owner: str = request.scope["owner"]
    return owner

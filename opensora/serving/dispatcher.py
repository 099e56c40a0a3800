"""Gives queued jobs to the workers, in fair order, and takes their results."""

from __future__ import annotations

import asyncio
import logging
import time
from itertools import islice, zip_longest
from typing import Any

from opensora.serving import folders
from opensora.serving.channel import Message
from opensora.serving.errors import public
from opensora.serving.events import Events
from opensora.serving.job import CANCELLED, COMPLETED, QUEUED, RUNNING, VideoJob
from opensora.serving.limits import Limits
from opensora.serving.process import WorkerProcess
from opensora.serving.store import Store
from opensora.serving.worker_program import WorkerProgram

logger = logging.getLogger("opensora")

RESTART_SECONDS = 1.0  # between a worker's death and its next start, doubled up to a minute
MAX_CANDIDATES = 200  # jobs that are looked at for a batch
MAX_KINDS = 10_000  # of jobs that are remembered
SMOOTHING = 0.2  # of the average duration of a job


class Running:
    """A job that a worker computes."""

    def __init__(self, job: VideoJob, worker: WorkerProcess) -> None:
        self.job, self.worker = job, worker
        self.done, self.total = 0, job.total_steps
        self.preview: dict[str, Any] | None = None  # the latest one, as an event's data
        self.watched = False

    @property
    def progress(self) -> int:
        """Percent of the steps; 100 is reached with the result."""
        return min(99 * self.done // max(self.total, 1), 99)


class Dispatcher:
    """The workers and what they compute. All methods run in the event loop."""

    def __init__(
        self, store: Store, events: Events, limits: Limits, program: WorkerProgram, devices: list[str | None]
    ) -> None:
        self.store, self.events, self.limits = store, events, limits
        self.running: dict[str, Running] = {}
        self.seconds_per_job = 10.0  # an average
        self.finished, self.deaths = 0, 0
        self.ready = 0  # workers that can compute
        self.problem: str | None = None  # why the last worker could not be started
        self._program = program
        self._devices = devices
        self._alone: set[str] = set()  # batch keys of jobs that are no faster together
        self._served: dict[str, int] = {}  # owner -> when its last job was started, as a count
        self._starts = 0
        self._wake = asyncio.Condition()
        self._tasks: list[asyncio.Task[None]] = []
        self._workers: list[WorkerProcess] = []
        events.on_change = self._watch

    @property
    def broken(self) -> str | None:
        """Why nothing can be computed; None while there is a worker, or one is about to start."""
        return None if self.ready else self.problem

    @property
    def worker_pids(self) -> list[int | None]:
        """The ids of the worker processes."""
        return [worker.pid for worker in self._workers]

    # the queue

    def start(self) -> None:
        """Starts a worker for each device."""
        for device in self._devices:
            self._tasks.append(asyncio.create_task(self._serve(device)))

    async def stop(self) -> None:
        """Ends the workers; their jobs go on when the server is started again."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.gather(*(worker.kill() for worker in self._workers))

    async def wake(self) -> None:
        """Tells the workers that there is something in the queue."""
        async with self._wake:
            self._wake.notify_all()

    def cancel(self, job: VideoJob) -> None:
        """Ends a job that is queued or running; its worker stops at the end of the step."""
        running = self.running.pop(job.id, None)
        if running:
            running.worker.send(cancel=job.id)
        job.fail(CANCELLED, "the job was cancelled", time.time())
        self._close(job)

    def wait_seconds(self, ahead: int) -> int:
        """About how long it takes until so many jobs are finished."""
        return min(max(round(self.seconds_per_job * (ahead + 1) / max(self.ready, 1)), 1), 3_600)

    # one worker

    async def _serve(self, device: str | None) -> None:
        worker = WorkerProcess(self._program.module, device=device, **self._program.options)
        self._workers.append(worker)
        pause = RESTART_SECONDS
        while True:
            await worker.start()
            ready = await worker.receive(self.limits.stall_seconds)
            if ready and ready["type"] == "ready":
                pause, self.problem = RESTART_SECONDS, None
                self._start_others(device, ready)
                self.ready += 1
                try:
                    await self._feed(worker)
                finally:
                    self.ready -= 1
            else:
                self.problem = public(ready["message"]) if ready else "a worker cannot be started; see the log"
                logger.error("%s", self.problem)
            await worker.kill()
            self._recover(worker)
            await asyncio.sleep(pause)
            pause = min(2 * pause, 60)

    def _start_others(self, device: str | None, ready: Message) -> None:
        """`auto`: the first worker tells which devices there are."""
        if device is None:
            self._devices[0] = ready["device"]
            others = [name for name in ready["devices"] if name not in self._devices]
            self._devices.extend(others)
            self._tasks.extend(asyncio.create_task(self._serve(name)) for name in others)

    async def _feed(self, worker: WorkerProcess) -> None:
        """Gives jobs to a worker until it dies."""
        while True:
            jobs = self._next_jobs()
            if not jobs:
                async with self._wake:
                    try:
                        await asyncio.wait_for(self._wake.wait(), timeout=1.0)
                    except asyncio.TimeoutError:
                        if worker.pid is None:
                            return
                continue
            self._begin(jobs, worker)
            while True:
                message = await worker.receive(self.limits.stall_seconds)
                if message is None:
                    return
                if message["type"] == "idle":
                    self._learn(jobs[0], message["alone"])
                    break
                self._take(message)

    def _next_jobs(self) -> list[VideoJob]:
        """The next job and those that are computed with it: of the key that was served longest ago, its oldest.

        A job that took its worker down comes alone.
        """
        owners = self.store.waiting()
        if not owners:
            return []
        owner = min(owners, key=lambda one: (self._served.get(one, 0), one))
        first = self.store.oldest_queued(owner)
        if first is None:
            return []
        if first.attempts or first.request.batch_key in self._alone:
            return [first]
        return [first, *self._companions(first)]

    def _companions(self, first: VideoJob) -> list[VideoJob]:
        """Jobs that are computed with `first`; the keys take turns here too."""
        queues: dict[str, list[VideoJob]] = {}
        for job in self.store.companions(first, MAX_CANDIDATES):
            queues.setdefault(job.owner, []).append(job)
        owners = sorted(queues, key=lambda one: (one == first.owner, self._served.get(one, 0), one))
        rounds = (job for round in zip_longest(*(queues[owner] for owner in owners)) for job in round if job)
        return list(islice(rounds, self.limits.max_batch - 1))

    def _learn(self, job: VideoJob, alone: bool) -> None:
        """Notes whether jobs like this one are no faster together: then no other key has to wait for a batch."""
        if alone and job.request.batch_key and len(self._alone) < MAX_KINDS:
            self._alone.add(job.request.batch_key)

    def _begin(self, jobs: list[VideoJob], worker: WorkerProcess) -> None:
        tasks = []
        for job in jobs:
            self._starts += 1
            self._served[job.owner] = self._starts
            job.status, job.started_at = RUNNING, time.time()
            self.store.update(job)
            self.running[job.id] = Running(job, worker)
            media = {entry.partition("#")[0] for entries in job.request.media.values() for entry in entries}
            tasks.append({
                "id": job.id, "request": job.request._asdict(), "batch_key": job.request.batch_key,
                "continues": "continue" in job.made_from, "media": {id: self._media_path(id) for id in media},
            })  # fmt: skip
            self._tell(job)
        self._watch()
        worker.send(jobs=tasks)

    def _media_path(self, id: str) -> str:
        """The path of an upload or a result, below the data folder; the worker says if it is gone."""
        if file := self.store.file(id):
            return file.path
        source = self.store.get(id)
        return str(folders.media_file(source)) if source else f"files/{id}"

    def _take(self, message: Message) -> None:
        """Takes a message of a worker about a job; one of a job that was cancelled is dropped."""
        running = self.running.get(message["id"])
        if running is None:
            return
        job = running.job
        if message["type"] == "step":
            running.done, running.total = message["done"], message["total"]
            self.events.publish(job.owner, "progress", self.progress_of(job))
        elif message["type"] == "preview":
            image = f"data:image/webp;base64,{message['image']}"
            running.preview = {"id": job.id, "step": message["done"], "image": image}
            self.events.publish(job.owner, "preview", running.preview)
        elif message["type"] == "done":
            self._complete(running, message)
        elif message["type"] == "failed":
            del self.running[job.id]
            job.fail(message["code"], public(message["message"]), time.time())
            self._close(job)

    def _complete(self, running: Running, message: Message) -> None:
        job, now = running.job, time.time()
        del self.running[job.id]
        job.status, job.completed_at, job.expires_at = COMPLETED, now, now + self.limits.keep_seconds
        job.num_frames, job.height, job.width = message["num_frames"], message["height"], message["width"]
        job.sha256 = message["sha256"]
        if original := self.store.get(job.made_from.get("replay", "")):
            job.identical = job.sha256 == original.sha256
        self.seconds_per_job += SMOOTHING * (now - (job.started_at or now) - self.seconds_per_job)
        self._close(job)

    def _close(self, job: VideoJob) -> None:
        """Stores a job that is finished, and tells those who listen."""
        self.finished += 1
        folder = self.store.folder / folders.folder_of(job.id)
        job.bytes = folders.size_of(folder)
        if job.expires_at is None:
            job.expires_at = time.time() + self.limits.keep_seconds
        self.store.update(job)
        self._tell(job)

    def _recover(self, worker: WorkerProcess) -> None:
        """Puts the jobs of a dead worker back into the queue, or fails those that keep killing it."""
        lost = [running for running in self.running.values() if running.worker is worker]
        self.deaths += 1
        for running in lost:
            job = running.job
            del self.running[job.id]
            job.attempts = 1 if running.done > job.reached else job.attempts + 1
            job.reached = max(job.reached, running.done)
            if job.attempts >= self.limits.max_attempts:
                job.fail("worker_died", f"its worker ended {job.attempts} times without getting further", time.time())
                self._close(job)
            else:
                job.status = QUEUED
                self.store.update(job)
                self._tell(job)

    # listeners

    def progress_of(self, job: VideoJob) -> dict[str, Any]:
        """The data of a progress event."""
        running = self.running.get(job.id)
        done, total = (running.done, running.total) if running else (0, job.total_steps)
        return {"id": job.id, "step": done, "steps": total, "progress": self.percent(job)}

    def percent(self, job: VideoJob) -> int:
        """How much of a job is done, 0 to 100."""
        running = self.running.get(job.id)
        return 100 if job.status == COMPLETED else running.progress if running else 0

    def public(self, job: VideoJob) -> dict[str, Any]:
        """A job as clients see it."""
        return job.public(self.percent(job))

    def _tell(self, job: VideoJob) -> None:
        self.events.publish(job.owner, "status", self.public(job))

    def _watch(self) -> None:
        """Tells the workers which of their jobs somebody looks at."""
        for running in self.running.values():
            watched = self.events.listens(running.job.owner, running.job.id)
            if watched != running.watched:
                running.watched = watched
                running.worker.send(watch=running.job.id, on=watched)

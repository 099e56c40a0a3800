"""The queue, the jobs and the uploads in SQLite. Only the HTTP process opens it, in one thread."""

from __future__ import annotations

import dataclasses
import fcntl
import json
import sqlite3
from collections.abc import Iterable
from pathlib import Path
from typing import IO, Any, NamedTuple

from opensora.errors import ConfigError
from opensora.serving.job import QUEUED, RUNNING, VideoJob
from opensora.serving.request import VideoRequest

FORMAT = 1
_TABLES = """
CREATE TABLE IF NOT EXISTS jobs (
    seq INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT UNIQUE NOT NULL, owner TEXT NOT NULL, status TEXT NOT NULL,
    batch_key TEXT, expires_at REAL, bytes INTEGER NOT NULL, data TEXT NOT NULL
);
CREATE INDEX IF NOT EXISTS jobs_by_status ON jobs (status, owner, seq);
CREATE INDEX IF NOT EXISTS jobs_by_owner ON jobs (owner, seq);
CREATE INDEX IF NOT EXISTS jobs_by_batch ON jobs (batch_key, status, seq);
CREATE TABLE IF NOT EXISTS files (
    id TEXT PRIMARY KEY, owner TEXT NOT NULL, name TEXT NOT NULL, suffix TEXT NOT NULL, bytes INTEGER NOT NULL,
    frames INTEGER NOT NULL, created_at REAL NOT NULL
);
CREATE INDEX IF NOT EXISTS files_by_owner ON files (owner);
"""


class StoredFile(NamedTuple):
    """An upload: an image (1 frame) or a video."""

    id: str
    owner: str
    name: str  # as the client called it; never part of a path
    suffix: str
    bytes: int
    frames: int
    created_at: float

    @property
    def path(self) -> str:
        """Its path below the data folder."""
        return f"files/{self.id}{self.suffix}"


class Store:
    """Jobs in order of their creation, and uploads."""

    def __init__(self, folder: Path) -> None:
        """Opens or creates the database in `folder`. Raises ConfigError where it cannot, or another server has it."""
        self.folder = folder
        self._lock = _lock(folder)
        try:
            self._db = sqlite3.connect(folder / "queue.sqlite", isolation_level=None)
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA synchronous=NORMAL")
            self._db.executescript(_TABLES)
            [(found,)] = self._db.execute("PRAGMA user_version")
            if found > FORMAT:
                raise ConfigError(f"{folder}: a newer program wrote its queue; update opensora, or give another --data")
            self._db.execute(f"PRAGMA user_version={FORMAT}")
        except sqlite3.Error as error:
            raise ConfigError(f"{folder}: its queue cannot be opened ({error}); give another --data") from error

    def close(self) -> None:
        self._db.close()
        self._lock.close()

    # jobs

    def add(self, job: VideoJob) -> None:
        """Appends a job to the queue."""
        values = (job.id, job.owner, job.status, job.request.batch_key, job.expires_at, job.bytes, _encode(job))
        self._db.execute(
            "INSERT INTO jobs (id, owner, status, batch_key, expires_at, bytes, data) VALUES (?, ?, ?, ?, ?, ?, ?)",
            values,
        )

    def update(self, job: VideoJob) -> bool:
        """Stores the state of a job; False if it has been deleted."""
        values = (job.status, job.expires_at, job.bytes, _encode(job), job.id)
        done = self._db.execute("UPDATE jobs SET status=?, expires_at=?, bytes=?, data=? WHERE id=?", values)
        return done.rowcount == 1

    def get(self, id: str, owner: str | None = None) -> VideoJob | None:
        """The job with this id, of this owner if one is given."""
        rows = self._jobs("WHERE id=?", id)
        return rows[0] if rows and owner in (None, rows[0].owner) else None

    def delete(self, id: str) -> None:
        """Forgets a job."""
        self._db.execute("DELETE FROM jobs WHERE id=?", (id,))

    def page(self, owner: str, after: str | None, limit: int, newest_first: bool) -> tuple[list[VideoJob], bool]:
        """Up to `limit` jobs of an owner behind the job `after`, and whether more follow."""
        sign, order = ("<", "DESC") if newest_first else (">", "ASC")
        behind = f"AND seq {sign} (SELECT seq FROM jobs WHERE id=? AND owner=?)" if after else ""
        values = (owner, after, owner, limit + 1) if after else (owner, limit + 1)
        found = self._jobs(f"WHERE owner=? {behind} ORDER BY seq {order} LIMIT ?", *values)
        return found[:limit], len(found) > limit

    def with_status(self, status: str) -> list[VideoJob]:
        """The jobs of a status, oldest first."""
        return self._jobs("WHERE status=? ORDER BY seq", status)

    def waiting(self) -> dict[str, int]:
        """Owner -> number of its queued jobs."""
        return dict(self._db.execute("SELECT owner, count(*) FROM jobs WHERE status=? GROUP BY owner", (QUEUED,)))

    def position(self, job: VideoJob) -> int:
        """How many queued jobs were created before this one."""
        query = "SELECT count(*) FROM jobs WHERE status=? AND seq < (SELECT seq FROM jobs WHERE id=?)"
        [(count,)] = self._db.execute(query, (QUEUED, job.id))
        return int(count)

    def oldest_queued(self, owner: str) -> VideoJob | None:
        """The next job of an owner."""
        return next(iter(self._jobs("WHERE status=? AND owner=? ORDER BY seq LIMIT 1", QUEUED, owner)), None)

    def companions(self, job: VideoJob, limit: int) -> list[VideoJob]:
        """Queued jobs of any owner that can be computed together with `job`, oldest first."""
        if job.request.batch_key is None or limit < 1:
            return []
        where = "WHERE batch_key=? AND status=? AND id<>? ORDER BY seq LIMIT ?"
        return [one for one in self._jobs(where, job.request.batch_key, QUEUED, job.id, limit) if not one.attempts]

    def requeue_running(self) -> int:
        """Puts the jobs that a stopped server was computing back into the queue; returns how many."""
        running = self.with_status(RUNNING)
        for job in running:
            job.status = QUEUED
            self.update(job)
        return len(running)

    def counts(self) -> dict[str, int]:
        """Status -> number of jobs."""
        return dict(self._db.execute("SELECT status, count(*) FROM jobs GROUP BY status"))

    def expired(self, now: float) -> list[VideoJob]:
        """The jobs whose time is over."""
        return self._jobs("WHERE expires_at < ?", now)

    def finished_oldest_first(self) -> list[VideoJob]:
        """The jobs that are finished."""
        return self._jobs("WHERE status IN ('completed', 'failed') ORDER BY seq")

    def disk_use(self) -> int:
        """Bytes of all results and uploads."""
        query = "SELECT (SELECT coalesce(sum(bytes), 0) FROM jobs) + (SELECT coalesce(sum(bytes), 0) FROM files)"
        [(size,)] = self._db.execute(query)
        return int(size)

    def ids(self) -> set[str]:
        """The ids of all jobs."""
        return {id for (id,) in self._db.execute("SELECT id FROM jobs")}

    def _jobs(self, where: str, *values: Any) -> list[VideoJob]:
        return [_decode(data) for (data,) in self._db.execute(f"SELECT data FROM jobs {where}", values)]

    # uploads

    def add_file(self, file: StoredFile) -> None:
        """Records an upload."""
        self._db.execute("INSERT INTO files VALUES (?, ?, ?, ?, ?, ?, ?)", file)

    def file(self, id: str, owner: str | None = None) -> StoredFile | None:
        """The upload with this id, of this owner if one is given."""
        found = self._files("WHERE id=?", id)
        return found[0] if found and owner in (None, found[0].owner) else None

    def files(self, owner: str | None = None) -> list[StoredFile]:
        """The uploads, of one owner or of all, oldest first."""
        where, values = ("", ()) if owner is None else ("WHERE owner=?", (owner,))
        return self._files(f"{where} ORDER BY created_at", *values)

    def count_files(self, owner: str) -> int:
        """How many uploads an owner has."""
        [(count,)] = self._db.execute("SELECT count(*) FROM files WHERE owner=?", (owner,))
        return int(count)

    def delete_file(self, id: str) -> None:
        """Forgets an upload."""
        self._db.execute("DELETE FROM files WHERE id=?", (id,))

    def _files(self, where: str, *values: Any) -> list[StoredFile]:
        return [StoredFile(*row) for row in self._db.execute(f"SELECT * FROM files {where}", values)]


def media_in_use(jobs: Iterable[VideoJob]) -> set[str]:
    """The ids of uploads and results that jobs read."""
    entries = (entry for job in jobs for entries in job.request.media.values() for entry in entries)
    return {entry.partition("#")[0] for entry in entries}


def _encode(job: VideoJob) -> str:
    return json.dumps({**dataclasses.asdict(job), "request": job.request._asdict()}, ensure_ascii=False)


def _decode(text: str) -> VideoJob:
    data = json.loads(text)
    return VideoJob(**{**data, "request": VideoRequest(**data["request"])})


def _lock(folder: Path) -> IO[str]:
    """Locks the folder for this process. Raises ConfigError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / "lock", "a", encoding="utf-8")  # noqa: SIM115  # held until the server ends
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ConfigError(f"{folder}: another server uses it; stop that one, or give another --data") from None
    except OSError as error:
        problem = f"cannot be written to ({error.strerror})"
        raise ConfigError(f"{folder}: {problem}; give another --data") from error
    return file

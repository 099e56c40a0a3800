"""What one server accepts."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """Bounds of requests, of the queue, and of what is kept."""

    max_queued: int = 500  # jobs that wait, of all keys
    max_queued_per_key: int = 200
    max_upload: int = 256 * 2**20  # bytes of the body of a request with files
    max_json: int = 2**20  # bytes of any other body
    max_files: int = 16  # of a request
    max_stored_files: int = 1_000  # uploads of a key
    max_pixels: int = 2**28  # of a result: frames x height x width x loops; and of a decoded upload at that size
    max_steps: int = 500
    max_upload_frames: int = 1_000
    max_streams: int = 256  # open event streams
    max_streams_per_key: int = 64
    max_plans: int = 32  # plans that wait
    keep_seconds: int = 7 * 86_400  # age at which a result is deleted
    max_disk: int = 20 * 2**30  # bytes of all results and uploads; the oldest are deleted first
    max_attempts: int = 5  # how often a job may take its worker down without getting further
    max_batch: int = 4  # jobs that are computed together
    stall_seconds: float = 3_600  # a worker that reports nothing for so long is killed

"""A job as the queue stores it, and as clients see it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from opensora.serving.request import Checked, VideoRequest

QUEUED, RUNNING, COMPLETED, FAILED = "queued", "in_progress", "completed", "failed"
CANCELLED = "cancelled"  # the error code of a job that its client has stopped
FINAL = (COMPLETED, FAILED)


@dataclass
class VideoJob:
    """A request with its state. Times are Unix seconds."""

    id: str
    owner: str
    request: VideoRequest
    created_at: float
    num_frames: int
    height: int
    width: int
    fps: float
    total_steps: int
    draft: bool = False
    status: str = QUEUED
    started_at: float | None = None
    completed_at: float | None = None
    expires_at: float | None = None
    error: dict[str, str] | None = None  # code and message
    made_from: dict[str, str] = field(default_factory=dict)  # how ("remix", "continue", ...) -> the id of that job
    attempts: int = 0  # how often its worker died since it last got further
    reached: int = 0  # the most steps that were done when a worker died
    bytes: int = 0  # of its files
    sha256: str | None = None  # of its frames
    identical: bool | None = None  # a replay: whether its frames are those of the original

    @classmethod
    def of(cls, id: str, owner: str, checked: Checked, created_at: float, made_from: dict[str, str]) -> VideoJob:
        """A new job for a checked request."""
        total = (checked.request.given.get("steps_until") or checked.steps) * checked.loops
        return cls(
            id, owner, checked.request, created_at, checked.num_frames * checked.loops, checked.height, checked.width,
            checked.fps, total, checked.draft, made_from=made_from,
        )  # fmt: skip

    @property
    def is_final(self) -> bool:
        return self.status in FINAL

    @property
    def suffix(self) -> str:
        """The suffix of the result."""
        return ".png" if self.num_frames == 1 else ".mp4"

    def fail(self, code: str, message: str, now: float) -> None:
        """Ends the job with an error."""
        self.status, self.error, self.completed_at = FAILED, {"code": code, "message": message}, now

    def public(self, progress: int = 0) -> dict[str, Any]:
        """The job in the shape of OpenAI's interface, with further fields of our own."""
        given = {name: value for name, value in self.request.given.items() if name != "prompt"}
        return {
            "id": self.id,
            "object": "video",
            "model": self.request.model,
            "status": self.status,
            "progress": 100 if self.status == COMPLETED else progress,
            "created_at": int(self.created_at),
            "started_at": self.started_at and int(self.started_at),
            "completed_at": self.completed_at and int(self.completed_at),
            "expires_at": self.expires_at and int(self.expires_at),
            "error": self.error,
            "prompt": self.request.given["prompt"],
            "remixed_from_video_id": self.made_from.get("remix"),
            "seconds": f"{self.num_frames / self.fps:g}",
            "size": f"{self.width}x{self.height}",
            "num_frames": self.num_frames,
            "fps": self.fps,
            "draft": self.draft,
            "made_from": self.made_from,
            "settings": given,
            "media": self.request.media,
            "sha256": self.sha256,
            "identical": self.identical,
        }

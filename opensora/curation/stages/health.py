"""Black, frozen and repeated frames, and black bars."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from opensora.curation.clip import Clip, evenly
from opensora.curation.stages.stage import Columns, Stage

MAX_FRAMES = 4096  # that are compared
SIDE = 64  # of the thumbnails


@dataclass(frozen=True)
class Health(Stage):
    """Fractions of frames that are black (`black`) or repeat the one before (`repeated`), `real_fps` and `bars`.

    A repeated frame differs from the one before by at most `still` levels on average; `frozen` is the longest run of
    them in seconds. Bars are rows and columns at the border that stay below `dark` levels in all sampled frames, as
    `top left height width` of the picture within them, empty if there are none.
    """

    dark: int = 20
    still: float = 0.4
    samples: int = 8

    name: ClassVar[str] = "health"
    columns: ClassVar[tuple[str, ...]] = ("black", "repeated", "frozen", "real_fps", "bars")

    def process(self, clip: Clip) -> Columns:
        thumbnails, fps = clip.frames(lambda total: evenly(total, MAX_FRAMES), thumbnail)
        frames = np.stack(thumbnails).astype(np.float32)  # [T, SIDE, SIDE]
        black = frames.reshape(len(frames), -1).max(1) < self.dark
        changes = np.abs(np.diff(frames, axis=0)).mean((1, 2))  # [T - 1]
        repeated = changes <= self.still
        share = float(repeated.mean()) if len(repeated) else 0.0
        return {
            "black": round(float(black.mean()), 4), "repeated": round(share, 4),
            "frozen": round(_longest_run(repeated) / fps, 3) if fps else None,
            "real_fps": round(fps * (1 - share), 3) if fps else None,
            "bars": self._bars(clip),
        }  # fmt: skip

    def _bars(self, clip: Clip) -> str:
        """The rectangle within black bars."""
        brightest: np.ndarray | None = None
        frames, _ = clip.sampled(self.samples, lambda frame: frame.max(-1))
        for frame in frames:
            brightest = frame if brightest is None else np.maximum(brightest, frame)
        assert brightest is not None
        height, width = brightest.shape
        lit = brightest >= self.dark  # single bright pixels of compression noise do not count
        rows, columns = np.flatnonzero(lit.mean(1) > 0.01), np.flatnonzero(lit.mean(0) > 0.01)
        if not len(rows) or not len(columns):
            return ""
        top, bottom, left, right = rows[0], rows[-1] + 1, columns[0], columns[-1] + 1
        if bottom - top > 0.97 * height and right - left > 0.97 * width:
            return ""
        return f"{top} {left} {bottom - top} {right - left}"


def thumbnail(frame: np.ndarray) -> np.ndarray:
    """The luminance of a frame [H, W, 3], averaged over blocks: at most [SIDE, SIDE]."""
    height, width = frame.shape[:2]
    rows, columns = min(SIDE, height), min(SIDE, width)
    luminance = frame.astype(np.float32) @ np.array([0.299, 0.587, 0.114], np.float32)
    cropped = luminance[: height // rows * rows, : width // columns * columns]
    return cropped.reshape(rows, height // rows, columns, width // columns).mean((1, 3))


def _longest_run(flags: np.ndarray) -> int:
    longest = run = 0
    for flag in flags:
        run = run + 1 if flag else 0
        longest = max(longest, run)
    return longest

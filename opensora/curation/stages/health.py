"""Black, frozen and repeated frames, and black bars."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from opensora.curation.clip import Clip
from opensora.curation.stages.bars import DARK, SAMPLES, find_picture
from opensora.curation.stages.stage import Columns, Stage
from opensora.curation.stages.thumbnails import luminance, thumbnail

SIDE = 64  # of the pictures that are compared
WHOLE = 0.97  # share of the height and width from which there are no bars


@dataclass(frozen=True)
class Health(Stage):
    """Fractions of frames that are black (`black`) or repeat the one before (`repeated`), `real_fps` and `bars`.

    A repeated frame differs from the one before by at most `still` levels on average; `frozen` is the longest run of
    them in seconds. Bars are rows and columns at the border that stay below `dark` levels in all sampled frames, as
    `top left height width` of the picture within them, empty if there are none.
    """

    dark: int = DARK
    still: float = 0.4
    samples: int = SAMPLES

    name: ClassVar[str] = "health"
    columns: ClassVar[tuple[str, ...]] = ("black", "repeated", "frozen", "real_fps", "bars")

    def process(self, clip: Clip) -> Columns:
        previous: np.ndarray | None = None

        def measure(frame: np.ndarray) -> tuple[float, float, tuple[int, ...]]:
            """The brightest level, the change since the last frame, and the shape."""
            nonlocal previous
            before, previous = previous, thumbnail(luminance(frame), SIDE, SIDE)
            change = np.inf if before is None or before.shape != previous.shape else np.abs(previous - before).mean()
            return float(previous.max()), float(change), frame.shape

        measured, fps = clip.frames(range, measure)  # changes are between neighbours: all frames are compared
        brightest, changes, shapes = zip(*measured, strict=True)
        repeated = np.array(changes[1:]) <= self.still  # the first frame has none before it
        share = float(repeated.mean()) if len(repeated) else 0.0
        return {
            "black": round(float((np.array(brightest) < self.dark).mean()), 4), "repeated": round(share, 4),
            "frozen": round(_longest_run(repeated) / fps, 3) if fps else None,
            "real_fps": round(fps * (1 - share), 3) if fps else None,
            "bars": self._bars(clip, *shapes[0][:2]),
        }  # fmt: skip

    def _bars(self, clip: Clip, height: int, width: int) -> str:
        """The picture within black bars, if it is smaller than the frame."""
        within = find_picture(clip, self.samples, self.dark)
        if within is None or (within.height > WHOLE * height and within.width > WHOLE * width):
            return ""
        return str(within)


def _longest_run(flags: np.ndarray) -> int:
    """The length of the longest run of true flags."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], flags.astype(np.int8), [0]])))
    return int((edges[1::2] - edges[::2]).max(initial=0))

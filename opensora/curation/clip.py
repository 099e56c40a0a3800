"""A virtual clip: a span of a source file, by content and presentation times. Nothing is cut or copied."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from opensora.curation.tables.stream import Cell
from opensora.datasets.file_content import content_key
from opensora.datasets.video.container import opened_video, rate_of
from opensora.datasets.video.frame_times import frame_times
from opensora.datasets.video.reader import Span, read_span
from opensora.errors import MediaError

_FIRST = -(2**62)  # before all presentation times
MAX_SAMPLES = 4096  # frames of one call


class Crop(NamedTuple):
    """A rectangle in pixels of the source."""

    top: int
    left: int
    height: int
    width: int


@dataclass(frozen=True)
class Clip:
    """A span [start_pts, end_pts) of the video at `path`, in units of its track; the whole file without a span.

    `row` holds the columns known so far.
    """

    path: str
    span: Span | None = None
    crop: Crop | None = None
    row: dict[str, Cell] | None = None

    @cached_property
    def source_hash(self) -> str:
        """The hash of the source's content. Raises MediaError if it cannot be read."""
        key = content_key(self.path)
        if not key.any():
            raise MediaError(f"{self.path}: cannot be read; check the path")
        return key.tobytes().hex()

    @property
    def key(self) -> str:
        """Names the content of the clip, wherever its file lies."""
        span = "" if self.span is None else f":{self.span.start}-{self.span.end}"
        crop = "" if self.crop is None else f":{','.join(map(str, self.crop))}"
        return f"{self.source_hash}{span}{crop}"

    def frames_per_second(self) -> float:
        """The frame rate of the source."""
        with opened_video(self.path) as video:
            return rate_of(video)

    def times(self) -> list[int]:
        """The presentation times of its frames. Raises MediaError if some have none."""
        with opened_video(self.path) as video:
            shown = frame_times(video).shown
        within = (self.span or Span(_FIRST)).locate(shown, self.path)
        return [time for time in shown[within.start : within.stop] if time is not None]

    def frames(
        self, choose: Callable[[int], Sequence[int]], convert: Callable[[np.ndarray], Any] = np.asarray
    ) -> tuple[list[Any], float]:
        """The frames at `choose(number of frames)` [H, W, 3] uint8, cropped and converted, and the frame rate.

        Raises MediaError for damaged files.
        """

        def cropped(frame: np.ndarray) -> Any:
            if self.crop is not None:
                top, left, height, width = self.crop
                frame = frame[top : top + height, left : left + width]
            return convert(frame)

        return read_span(self.path, choose, cropped, self.span)

    def sampled(self, count: int, convert: Callable[[np.ndarray], Any] = np.asarray) -> tuple[list[Any], float]:
        """`count` frames at equal distances, fewer if the clip is shorter."""
        return self.frames(lambda total: evenly(total, min(count, MAX_SAMPLES)), convert)


def evenly(total: int, count: int) -> list[int]:
    """The indices of at most `count` of `total` frames: the middles of equal parts."""
    count = min(total, count)
    return [(2 * number + 1) * total // (2 * count) for number in range(count)]

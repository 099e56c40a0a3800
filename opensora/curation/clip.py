"""A virtual clip: a span of a source file, by content and presentation times. Nothing is cut or copied."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from opensora.curation.tables.stream import Cell
from opensora.datasets.file_content import content_key
from opensora.datasets.video import Crop, Span, is_image, read_image, read_span, shown_times
from opensora.errors import MediaError

MAX_SAMPLES = 4096  # frames of one call


@dataclass(frozen=True)
class Clip:
    """A span [start_pts, end_pts) of the video at `path`, in units of its track; the whole file without a span.

    A still image is a clip of one frame, without a rate and times.

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

    @cached_property
    def still(self) -> bool:
        """Whether the source is a still image."""
        return self.span is None and is_image(self.path)

    def part(self, span: Span) -> Clip:
        """A span of the same source, whose hash is not computed again."""
        part = replace(self, span=span)
        vars(part)["source_hash"] = self.source_hash
        return part

    def frames_per_second(self) -> float:
        """The frame rate of the source; 0 of a still image."""
        return self.frames(lambda total: [0], np.shape)[1]

    def times(self) -> list[int]:
        """The presentation times of its frames. Raises MediaError if some have none."""
        shown = shown_times(self.path, self.span)
        times = [time for time in shown if time is not None]
        if len(times) < len(shown):
            raise MediaError(f"{self.path}: has frames without a time; re-encode it")
        return times

    def frames(
        self, choose: Callable[[int], Sequence[int]], convert: Callable[[np.ndarray], Any] = np.asarray,
        restart: Callable[[], None] = lambda: None,
    ) -> tuple[list[Any], float]:  # fmt: skip
        """The frames at `choose(number of frames)` [H, W, 3] uint8, cropped and converted, and the frame rate.

        A still image is one frame, of rate 0. `restart` is called before frames are converted once more. Raises
        MediaError for damaged files.
        """

        def cropped(frame: np.ndarray) -> Any:
            return convert(frame if self.crop is None else self.crop.of(frame, self.path))

        if self.still:
            image = read_image(self.path)
            return [cropped(image) for _ in choose(1)], 0.0
        return read_span(self.path, choose, cropped, self.span, restart)

    def sampled(self, count: int, convert: Callable[[np.ndarray], Any] = np.asarray) -> tuple[list[Any], float]:
        """`count` frames at equal distances, fewer if the clip is shorter."""
        return self.frames(lambda total: evenly(total, min(count, MAX_SAMPLES)), convert)


def evenly(total: int, count: int) -> list[int]:
    """The indices of at most `count` of `total` frames: the middles of equal parts."""
    count = min(total, count)
    return [(2 * number + 1) * total // (2 * count) for number in range(count)]

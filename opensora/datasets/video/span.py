"""A part of a video: a span of presentation times, and a rectangle of the picture."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple, cast

import numpy as np

from opensora.datasets.video.container import OpenedVideo, opened_video
from opensora.datasets.video.frame_times import FrameTimes, packets_are_frames
from opensora.errors import MediaError


class Span(NamedTuple):
    """The frames shown from `start` on and before `end` (None: to the last one), in units of the video track."""

    start: int
    end: int | None = None

    def locate(self, shown: Sequence[int | None], path: str | Path) -> range:
        """The indices of its frames among all frames, shown at these times.

        Raises MediaError if there are none, or if the span begins before the first frame or ends after the last one.
        """
        if None in shown:
            raise MediaError(f"{path}: has frames without a time, so that {self} cannot be found; re-encode it")
        times = cast(Sequence[int], shown)
        found = range(bisect_left(times, self.start), len(times) if self.end is None else bisect_left(times, self.end))
        there = f"it has {len(times)}, at {times[0]} to {times[-1]}"
        if not found:
            raise MediaError(f"{path}: shows no frame in {self}; {there}")
        longest = max((after - before for before, after in zip(times, times[1:], strict=False)), default=self.end or 0)
        if self.start < times[0] or (self.end or 0) > times[-1] + longest:
            raise MediaError(f"{path}: {self} goes beyond its frames; {there}")
        return found

    def __contains__(self, time: object) -> bool:
        return isinstance(time, int) and self.start <= time and (self.end is None or time < self.end)

    def __str__(self) -> str:
        return f"[{self.start}, {'end' if self.end is None else self.end})"


class Crop(NamedTuple):
    """A rectangle in pixels."""

    top: int
    left: int
    height: int
    width: int

    def of(self, frame: np.ndarray, path: str | Path) -> np.ndarray:
        """This part of a frame [H, W, ...] of a file. Raises MediaError if it reaches beyond the frame."""
        height, width = frame.shape[:2]
        if self.top + self.height > height or self.left + self.width > width:
            raise MediaError(f"{path}: is {height}x{width} pixels, and the crop {self} reaches beyond; correct it")
        return frame[self.top : self.top + self.height, self.left : self.left + self.width]

    def __str__(self) -> str:
        return " ".join(map(str, self))


def span_times(path: str | Path, span: Span) -> FrameTimes | None:
    """The frames of a span and the key frames before them, from the packets around it alone.

    None if these do not tell: at the end of the file, and where packets are not frames or have no times.
    """
    import av

    if span.end is None:
        return None
    with opened_video(path) as video:
        if video.animated or not packets_are_frames(video):
            return None
        with suppress(av.FFmpegError):  # damaged, or a place that the file does not have
            return _read_packets(video, span)
    return None


def _read_packets(video: OpenedVideo, span: Span) -> FrameTimes | None:
    assert span.end is not None
    video.container.seek(span.start, stream=video.stream)
    shown, keys, lead = [], [], 0
    for packet in video.container.demux(video.stream):
        if packet.pts is None or packet.dts is None or packet.is_corrupt:  # or the end of the file
            return None
        lead = max(lead, packet.dts - packet.pts)
        if packet.is_keyframe:
            keys.append(packet.pts)
        if not keys or keys[0] > span.start:
            return None
        if packet.pts in span and not packet.is_discard:
            shown.append(packet.pts)
        if packet.dts - lead >= span.end:  # later packets are shown later
            return FrameTimes(sorted(shown), keys) if shown and len(set(shown)) == len(shown) else None
    return None

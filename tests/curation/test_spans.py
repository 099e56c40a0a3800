"""Spans of videos by presentation times: the frames of a decoder, without cutting the file."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from opensora.datasets.video import Span, read_span, read_video
from opensora.errors import MediaError
from tests.full import some

FRAMES = 30


@pytest.fixture(params=["b_frames.mp4", "short_gop.mkv", "all_keys.mov", "cut.ts"])
def video(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    path = tmp_path / request.param
    options = {
        "b_frames.mp4": {"bf": "3", "g": "12"},
        "short_gop.mkv": {"g": "5", "bf": "0"},
        "all_keys.mov": {"g": "1"},
    }
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=Fraction(24000, 1001), options=options.get(path.name, {"g": "8"}))
        stream.width, stream.height, stream.pix_fmt = 48, 32, "yuv420p"
        for number in range(FRAMES):
            frame = np.full((32, 48, 3), number * 8, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return path


def shown_times(path: Path) -> list[int]:
    with av.open(str(path)) as container:
        return [frame.pts for frame in container.decode(video=0)]


@pytest.mark.parametrize(("first", "last"), [(0, 30), (0, 1), (7, 19), (29, 30), (12, 13), (3, 28)])
@some(12)
def test_frames_of_a_span(video: Path, first: int, last: int) -> None:
    whole, _ = read_video(video)
    times = shown_times(video)
    assert len(times) == len(whole) == FRAMES
    counted: list[int] = []
    span = Span(times[first], times[last] if last < FRAMES else None)
    found, _ = read_span(video, lambda total: counted.append(total) or list(range(total)), span=span)
    assert counted == [last - first] and np.array_equal(np.stack(found), whole[first:last])
    some, _ = read_span(video, lambda total: [total // 2], span=span)
    assert np.array_equal(some[0], whole[first + (last - first) // 2])


def test_bounds_between_frames(video: Path) -> None:
    times = shown_times(video)
    found, _ = read_span(video, lambda total: range(total), span=Span(times[3] - 1, times[5] + 1))
    assert len(found) == 3


@pytest.mark.parametrize(("start", "end"), [(10**9, None), (10**9, 10**10), (5, 5), (7, 2)])
def test_spans_without_frames(video: Path, start: int, end: int | None) -> None:
    with pytest.raises(MediaError, match=r"shows no frame in \["):
        read_span(video, lambda total: [0], span=Span(start, end))

"""Dense optical flow of a clip by OpenCV's DIS (Kroeger et al. 2016, arXiv:1603.03590)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from opensora.curation.clip import Clip
from opensora.errors import ConfigError, MediaError

HEIGHT, WIDTH = 180, 320  # of the frames that flow is computed on, whatever their shape
BLOCK = 15  # pixels around a point whose levels are looked at
DETAIL = 2.0  # levels of their standard deviation, from which motion shows


class FlowField(NamedTuple):
    """The displacement [H, W, 2] (right, down) between two frames in shares of the width and height.

    `seconds` lie between the frames; `followed` [H, W] says where there is detail; `aspect` is height / width.
    """

    displacement: np.ndarray
    seconds: float
    followed: np.ndarray
    aspect: float


def opencv() -> Any:
    """The module cv2. Raises ConfigError without OpenCV."""
    try:
        import cv2
    except ImportError as error:
        raise ConfigError("optical flow needs opencv-python-headless; pip install 'opensora[data]'") from error
    return cv2


def flow_fields(clip: Clip, seconds: float, pairs: int) -> Iterator[FlowField]:
    """The flow of at most `pairs` pairs of frames that lie about `seconds` apart, spread over the clip.

    Raises MediaError for clips of one frame.
    """
    cv2 = opencv()
    fps = clip.frames_per_second()
    steps: list[tuple[int, int]] = []

    def choose(total: int) -> list[int]:
        if total < 2:
            raise MediaError(f"{clip.path}: has one frame, which shows no motion; filter by num_frames first")
        gap = min(max(1, round(seconds * fps)), total - 1)
        starts = np.unique(np.linspace(0, total - 1 - gap, min(pairs, total - gap)).round().astype(int))
        steps[:] = [(int(start), int(start) + gap) for start in starts]
        return sorted({index for step in steps for index in step})

    def small(frame: np.ndarray) -> tuple[np.ndarray, float]:
        scaled = cv2.resize(frame, (WIDTH, HEIGHT), interpolation=cv2.INTER_AREA)
        return cv2.cvtColor(scaled, cv2.COLOR_RGB2GRAY), frame.shape[0] / frame.shape[1]

    frames, _ = clip.frames(choose, small)
    by_index = dict(zip(sorted({index for step in steps for index in step}), frames, strict=True))
    dis = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    for start, end in steps:
        first, aspect = by_index[start]
        flow = dis.calc(first, by_index[end][0], None) / np.array([WIDTH, HEIGHT], np.float32)
        yield FlowField(flow, (end - start) / fps, _detailed(first), aspect)


def _detailed(grey: np.ndarray) -> np.ndarray:
    """Where the levels around a pixel [H, W] vary, so that its motion shows: not in black bars or clear sky."""
    cv2 = opencv()
    levels = grey.astype(np.float32)
    mean, square = cv2.blur(levels, (BLOCK, BLOCK)), cv2.blur(levels**2, (BLOCK, BLOCK))
    return square - mean**2 > DETAIL**2

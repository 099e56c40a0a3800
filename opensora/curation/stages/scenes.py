"""Scene cuts: a video becomes one clip per scene."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from opensora.curation.clip import Clip
from opensora.curation.stages.stage import Columns, Stage
from opensora.errors import ConfigError

SIDE = 256  # frames are shrunk to at most this many pixels a side
DETECTORS = ("adaptive", "content")


@dataclass(frozen=True)
class Scenes(Stage):
    """Cuts by PySceneDetect, as spans of presentation times; columns scene, start_pts, end_pts, num_frames.

    adaptive: a frame differs `threshold` times as much from the one before as its neighbours do (default 3.0);
    content: it differs by `threshold` levels (default 27.0). Scenes have at least `min_frames` frames.
    """

    detector: str = "adaptive"
    threshold: float | None = None
    min_frames: int = 15

    name: ClassVar[str] = "scenes"
    columns: ClassVar[tuple[str, ...]] = ("scene", "start_pts", "end_pts", "num_frames")
    splits: ClassVar[bool] = True

    def setup(self) -> None:
        if self.detector not in DETECTORS:
            raise ConfigError(f"scenes.detector '{self.detector}' is not known; choose {' or '.join(DETECTORS)}")
        try:
            import scenedetect  # noqa: F401
        except ImportError as error:
            raise ConfigError("scenes need scenedetect-headless; pip install 'opensora[data]'") from error

    def process(self, clip: Clip) -> list[Columns]:
        cuts = self.cuts(clip)
        times = clip.times()
        starts = [0, *cuts]
        ends = [*cuts, len(times)]
        end_of_all = None if clip.span is None else clip.span.end
        return [
            {
                "scene": number, "start_pts": times[start], "num_frames": end - start,
                "end_pts": times[end] if end < len(times) else end_of_all,
            }
            for number, (start, end) in enumerate(zip(starts, ends, strict=True))
        ]  # fmt: skip

    def cuts(self, clip: Clip) -> list[int]:
        """The indices of the frames at which a new scene begins, without 0."""
        from scenedetect import FrameTimecode

        detector = self._detector()
        found: list[Any] = []
        fps, number = 25.0, 0  # frames are counted; the rate has no influence

        def restart() -> None:
            nonlocal detector, number
            detector, number = self._detector(), 0
            found.clear()

        def detect(frame: np.ndarray) -> None:
            nonlocal number
            found.extend(detector.process_frame(FrameTimecode(number, fps), _shrunk(frame)))
            number += 1

        clip.frames(range, detect, restart)
        found.extend(detector.post_process(FrameTimecode(max(number - 1, 0), fps)))
        return sorted({int(cut.frame_num) for cut in found if 0 < cut.frame_num < number})

    def _detector(self) -> Any:
        from scenedetect.detectors import AdaptiveDetector, ContentDetector

        if self.detector == "content":
            threshold = 27.0 if self.threshold is None else self.threshold
            return ContentDetector(threshold=threshold, min_scene_len=self.min_frames)
        threshold = 3.0 if self.threshold is None else self.threshold
        return AdaptiveDetector(adaptive_threshold=threshold, min_scene_len=self.min_frames)


def _shrunk(frame: np.ndarray) -> np.ndarray:
    """A frame [H, W, 3] as BGR of at most SIDE pixels a side, every nth pixel taken."""
    step = max(1, -(-max(frame.shape[:2]) // SIDE))
    return np.ascontiguousarray(frame[::step, ::step, ::-1])

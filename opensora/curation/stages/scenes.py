"""Scene cuts, fades and dissolves: a video becomes one clip per scene."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np

from opensora.curation.clip import Clip
from opensora.curation.stages.bars import cropped, find_picture
from opensora.curation.stages.stage import Columns, Stage
from opensora.curation.stages.thumbnails import thumbnail
from opensora.curation.stages.transitions import Look, Transition, find_transitions, look
from opensora.errors import ConfigError, MediaError

ROWS, COLUMNS = 27, 48  # of the pictures whose contents are compared
DETECTORS = ("adaptive", "content")
MARGIN = 2  # frames around a transition in which a cut is a part of it


class Scene(NamedTuple):
    """The frames [start, end), and how they begin: "" at the start of the video, cut, fade or dissolve."""

    start: int
    end: int
    transition: str


@dataclass(frozen=True)
class Scenes(Stage):
    """Scenes as spans of presentation times; columns scene, start_pts, end_pts, num_frames, transition.

    Cuts are found by PySceneDetect. adaptive: a frame differs `threshold` times as much from the one before as its
    neighbours do (default 3.0); content: it differs by `threshold` levels (default 27.0). With `fades`, the frames of
    fades and dissolves belong to no scene. Scenes of fewer than `min_frames` frames are left out. `transition` says
    how a scene begins: cut, fade, dissolve, or empty at the start of the video.
    """

    detector: str = "adaptive"
    threshold: float | None = None
    min_frames: int = 15
    fades: bool = True

    name: ClassVar[str] = "scenes"
    columns: ClassVar[tuple[str, ...]] = ("scene", "start_pts", "end_pts", "num_frames", "transition")
    splits: ClassVar[bool] = True

    def setup(self) -> None:
        if self.detector not in DETECTORS:
            raise ConfigError(f"scenes.detector '{self.detector}' is not known; choose {' or '.join(DETECTORS)}")
        try:
            import scenedetect  # noqa: F401
        except ImportError as error:
            raise ConfigError("scenes need scenedetect-headless; pip install 'opensora[data]'") from error

    def process(self, clip: Clip) -> list[Columns]:
        if clip.still:
            return [{"scene": 0, "start_pts": None, "num_frames": 1, "end_pts": None, "transition": ""}]
        times = clip.times()
        end_of_all = None if clip.span is None else clip.span.end
        return [
            {
                "scene": number, "start_pts": times[scene.start], "num_frames": scene.end - scene.start,
                "end_pts": times[scene.end] if scene.end < len(times) else end_of_all, "transition": scene.transition,
            }
            for number, scene in enumerate(self.scenes(clip, len(times)))
        ]  # fmt: skip

    def scenes(self, clip: Clip, num_frames: int) -> list[Scene]:
        """The scenes of a clip in order. Raises MediaError if all are shorter than `min_frames`."""
        found = split(num_frames, self.changes(clip))
        if len(found) < 2:
            return found
        long = [scene for scene in found if scene.end - scene.start >= self.min_frames]
        if not long:
            raise MediaError(
                f"{clip.path}: has no scene of {self.min_frames} frames, only {len(found)} shorter ones; "
                "lower scenes.min_frames"
            )
        return long

    def changes(self, clip: Clip) -> list[Transition]:
        """The changes of scene in order; cuts have start = end."""
        picture, search = find_picture(clip), CutSearch(self._detector())

        def restart() -> None:
            nonlocal search
            search = CutSearch(self._detector())

        def see(frame: np.ndarray) -> Look | None:
            part = cropped(frame, picture)
            search.see(part)
            return look(part) if self.fades else None

        looks, _ = clip.frames(range, see, restart)
        gradual = find_transitions([one for one in looks if one is not None])
        inside = {at for _, start, end in gradual for at in range(start - MARGIN, end + MARGIN + 1)}
        cuts = [Transition("cut", at, at) for at in search.cuts() if at not in inside]
        return sorted([*gradual, *cuts], key=lambda change: change.start)

    def _detector(self) -> Any:
        from scenedetect.detectors import AdaptiveDetector, ContentDetector

        if self.detector == "content":
            return ContentDetector(threshold=27.0 if self.threshold is None else self.threshold, min_scene_len=1)
        return AdaptiveDetector(adaptive_threshold=3.0 if self.threshold is None else self.threshold, min_scene_len=1)


class CutSearch:
    """A detector of PySceneDetect, fed with small pictures of frames."""

    def __init__(self, detector: Any) -> None:
        self.detector, self.num_frames = detector, 0
        self.found: list[Any] = []

    def see(self, frame: np.ndarray) -> None:
        """Takes the next frame [H, W, 3]."""
        small = np.stack([thumbnail(frame[..., channel], ROWS, COLUMNS) for channel in (2, 1, 0)], -1)
        self.found += self.detector.process_frame(self._time(self.num_frames), small.round().astype(np.uint8))
        self.num_frames += 1

    def cuts(self) -> list[int]:
        """The indices of the frames at which a new scene begins, without 0."""
        found = [*self.found, *self.detector.post_process(self._time(max(self.num_frames - 1, 0)))]
        return sorted({int(cut.frame_num) for cut in found if 0 < cut.frame_num < self.num_frames})

    @staticmethod
    def _time(number: int) -> Any:
        from scenedetect import FrameTimecode

        return FrameTimecode(number, 25.0)  # frames are counted; the rate has no influence


def split(num_frames: int, changes: Sequence[Transition]) -> list[Scene]:
    """The runs of frames between changes of scene, those without frames left out."""
    scenes, start, transition = [], 0, ""
    for change in (*changes, Transition("", num_frames, num_frames)):
        if change.start > start:
            scenes.append(Scene(start, change.start, transition))
        start, transition = change.end, change.kind
    return scenes

"""Motion scores."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from opensora.curation.clip import Clip
from opensora.curation.stages.optical_flow import flow_fields, opencv
from opensora.curation.stages.stage import Columns, Stage

REFERENCE = np.array([576, 320], np.float32)  # width and height of the frames that the unit refers to
SECONDS = 1 / 3  # 10 frames at 30 fps


@dataclass(frozen=True)
class Motion(Stage):
    """flow: the mean absolute displacement (both directions) in a third of a second, in pixels of 576x320 frames.

    The unit of Open-Sora's `flow`, which is measured over 10 frames; here it does not depend on the frame rate.
    """

    pairs: int = 8

    name: ClassVar[str] = "motion"
    columns: ClassVar[tuple[str, ...]] = ("flow",)

    def setup(self) -> None:
        opencv()

    def process(self, clip: Clip) -> Columns:
        scores = [
            float(np.abs(field.displacement * REFERENCE).mean()) * SECONDS / field.seconds
            for field in flow_fields(clip, SECONDS, self.pairs)
        ]
        return {"flow": round(float(np.mean(scores)), 4)}

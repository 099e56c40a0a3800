"""Camera motion from optical flow: a similarity transform of the background, fitted robustly."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import numpy as np

from opensora.curation.clip import Clip
from opensora.curation.stages.optical_flow import HEIGHT, WIDTH, FlowField, flow_fields, opencv
from opensora.curation.stages.stage import Columns, Stage

GRID = 10  # pixels between the points that are fitted
MIN_POINTS = 12  # with detail, of 576
SECONDS = 0.2  # between the frames of a pair


class CameraMotion(NamedTuple):
    """Motion of the picture per second: right and down in shares of its width, growth, and rotation in degrees."""

    right: float
    down: float
    growth: float
    roll: float


@dataclass(frozen=True)
class Camera(Stage):
    """cmotion: pan left, pan right, tilt up, tilt down, zoom in, zoom out, roll left, roll right, joined by `+`,
    or static: the words of Open-Sora 1.2.

    A word applies from `shift` of the width (pan, tilt), `zoom` of the size or `roll` degrees per second.
    """

    shift: float = 0.03
    zoom: float = 0.04
    roll: float = 3.0
    pairs: int = 12

    name: ClassVar[str] = "camera"
    columns: ClassVar[tuple[str, ...]] = ("cmotion",)

    def setup(self) -> None:
        opencv()

    def process(self, clip: Clip) -> Columns:
        fields = flow_fields(clip, SECONDS, self.pairs)
        motions = np.array([camera_motion(field) for field in fields])
        return {"cmotion": self.words(CameraMotion(*np.median(motions, axis=0).tolist()))}

    def words(self, motion: CameraMotion) -> str:
        """The words of a motion. The picture moves against the camera: to the right when it pans left."""
        words = []
        if abs(motion.right) >= self.shift:
            words.append("pan left" if motion.right > 0 else "pan right")
        if abs(motion.down) >= self.shift:
            words.append("tilt up" if motion.down > 0 else "tilt down")
        if abs(motion.growth) >= self.zoom:
            words.append("zoom in" if motion.growth > 0 else "zoom out")
        if abs(motion.roll) >= self.roll:
            words.append("roll left" if motion.roll > 0 else "roll right")
        return "+".join(words) or "static"


def camera_motion(field: FlowField) -> CameraMotion:
    """The similarity transform that most of the flow follows (RANSAC, then least squares), per second."""
    cv2 = opencv()
    rows, columns = (axis.ravel() for axis in np.mgrid[GRID // 2 : HEIGHT : GRID, GRID // 2 : WIDTH : GRID])
    inside = field.followed[rows, columns]
    if inside.sum() < MIN_POINTS:
        return CameraMotion(0, 0, 0, 0)
    rows, columns = rows[inside], columns[inside]
    sides = np.array([WIDTH, WIDTH * field.aspect], np.float32)  # square pixels, so that a rotation is one
    points = (np.stack([(columns + 0.5) / WIDTH, (rows + 0.5) / HEIGHT], 1).astype(np.float32) - 0.5) * sides
    flow = field.displacement[rows, columns] * sides
    cv2.setRNGSeed(0)
    matrix, _ = cv2.estimateAffinePartial2D(
        points, points + flow, method=cv2.RANSAC, ransacReprojThreshold=0.75, maxIters=500
    )
    if matrix is None:
        return CameraMotion(0, 0, 0, 0)
    scale = float(np.hypot(matrix[0, 0], matrix[1, 0]))
    angle = float(np.degrees(np.arctan2(matrix[1, 0], matrix[0, 0])))
    right, down = matrix[:, 2] / WIDTH
    return CameraMotion(right / field.seconds, down / field.seconds, (scale - 1) / field.seconds, angle / field.seconds)

"""Writes one clip into a file of its own."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from opensora.curation.clip import Clip
from opensora.curation.stages.stage import Columns, Stage
from opensora.datasets.file_content import content_key
from opensora.datasets.folder_table import media_size
from opensora.datasets.video import Span, is_image, read_metadata, read_span
from opensora.datasets.video.stream_copy import copy_span, copy_suffix
from opensora.datasets.video.writer import VideoEncoder
from opensora.errors import MediaError
from opensora.files import atomic_create, error_message

RECIPE = "opensora_cut"  # metadata of the files
MAX_STEM = 80  # characters that a name takes from its source


@dataclass(frozen=True)
class Cut(Stage):
    """Writes clips into `folder`; columns as of `opensora data edit --info`, or an empty path if it is too short.

    copy: copy the stream from the first key frame of the clip on, instead of encoding it; lossless: keep every pixel;
    min_seconds, max_seconds: leave shorter clips out, shorten longer ones; target_fps, shorter_size: lower the frame
    rate and the shorter side of the picture to this.
    """

    folder: str = "."
    copy: bool = False
    lossless: bool = False
    min_seconds: float = 0.0
    max_seconds: float | None = None
    target_fps: float | None = None
    shorter_size: int | None = None

    name: ClassVar[str] = "cut"
    columns: ClassVar[tuple[str, ...]] = (
        "path", "num_frames", "width", "height", "aspect_ratio", "resolution", "fps", "source_hash",
    )  # fmt: skip

    def process(self, clip: Clip) -> Columns:
        if is_image(clip.path):
            raise MediaError(f"{clip.path}: is an image, which has nothing to cut")
        if self.min_seconds and len(clip.times()) < self.min_seconds * clip.frames_per_second():
            return dict.fromkeys(self.columns)
        suffix = copy_suffix(clip.path) if self.copy else ".mp4"
        target, recipe = Path(self.folder, clip_name(clip) + suffix), self._recipe(clip)
        if target.exists():
            _check_kept(target, recipe)
        else:
            self._write(clip, target, recipe)
        size = media_size(target)
        return {
            "path": str(target), "num_frames": size.num_frames, "width": size.width, "height": size.height,
            "aspect_ratio": size.aspect_ratio, "resolution": size.resolution, "fps": size.fps,
            "source_hash": content_key(str(target)).tobytes().hex(),
        }  # fmt: skip

    def _recipe(self, clip: Clip) -> str:
        """What decides the content of the file, as JSON."""
        settings = {name: value for name, value in asdict(self).items() if name not in ("folder", "min_seconds")}
        return json.dumps({"clip": clip.key, **settings}, sort_keys=True)

    def _write(self, clip: Clip, target: Path, recipe: str) -> None:
        try:
            with atomic_create(target) as ([temporary], _):
                if self.copy:
                    self._copy(clip, temporary, target.suffix, recipe)
                else:
                    self._encode(clip, temporary, recipe)
        except OSError as error:
            raise MediaError(
                f"{target}: cannot be written ({error_message(error)}); see to it and start again"
            ) from error

    def _copy(self, clip: Clip, temporary: Path, suffix: str, recipe: str) -> None:
        if clip.crop is not None:
            raise MediaError(f"{clip.path}: has a crop, which a copy cannot have; cut it without --copy")
        times = clip.times()
        count, span = self._count(len(times), clip.frames_per_second()), clip.span or Span(times[0])
        if count < len(times):
            span = Span(span.start, times[count])
        first = copy_span(clip.path, temporary, suffix, span, {RECIPE: recipe})
        if not np.array_equal(_first_frame(clip.path, Span(first, span.end)), _first_frame(temporary)):
            raise MediaError(f"{clip.path}: a copy shows other frames; cut it without --copy")

    def _encode(self, clip: Clip, temporary: Path, recipe: str) -> None:
        fps = clip.frames_per_second()
        rate = min(fps, self.target_fps or fps)

        def choose(total: int) -> list[int]:
            count = self._count(total, fps)
            return [int(number * fps / rate) for number in range(max(1, round(count * rate / fps)))]

        size = self._size(clip)
        with VideoEncoder(temporary, rate, {RECIPE: recipe}, lossless=self.lossless, size=size) as encoder:
            clip.frames(choose, encoder.add, encoder.restart)

    def _count(self, total: int, fps: float) -> int:
        """The number of source frames that are kept of `total`."""
        return total if self.max_seconds is None else max(1, min(total, round(self.max_seconds * fps)))

    def _size(self, clip: Clip) -> tuple[int, int] | None:
        """Even (height, width) of the file if the picture is scaled."""
        if self.shorter_size is None:
            return None
        now = media_size(Path(clip.path), clip.span, clip.crop)
        scale = self.shorter_size / min(now.height, now.width)
        return None if scale >= 1 else (_even(now.height * scale), _even(now.width * scale))


def clip_name(clip: Clip) -> str:
    """The name of its file without suffix: stem of the source, scene, and a hash of the source's path and the part."""
    stem = re.sub(r"[^\w.-]+", "_", Path(clip.path).stem)[:MAX_STEM].strip(".") or "clip"
    scene = str((clip.row or {}).get("scene") or "0")
    part = repr((clip.path, clip.span, clip.crop)).encode("utf-8", "surrogatepass")
    number = f"_scene-{int(scene):04d}" if re.fullmatch(r"[0-9]{1,9}", scene) and clip.span else ""
    return f"{stem}{number}_{hashlib.sha256(part).hexdigest()[:12]}"


def _check_kept(target: Path, recipe: str) -> None:
    """Raises MediaError if a file is not the one that would be written."""
    metadata: dict[str, Any] = {key.lower(): value for key, value in read_metadata(target).items()}
    if metadata.get(RECIPE) != recipe:
        raise MediaError(f"{target} exists and was not cut from this clip with these settings; name another folder")


def _first_frame(path: str | Path, span: Span | None = None) -> np.ndarray:
    [frame], _ = read_span(path, lambda total: [0], span=span)
    return frame


def _even(side: float) -> int:
    return max(2, 2 * round(side / 2))

"""Writes H.264 videos and PNG images with text metadata."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from opensora.datasets.video.container import DEFAULT_FPS, SIZE_KEY
from opensora.errors import MediaError
from opensora.files import atomic_write, error_message

if TYPE_CHECKING:
    import torch

CRF = 10
ENCODING = {"mbtree": "0"}  # x264's macroblock tree makes the bytes depend on uninitialized memory
SMPTE170M = 6  # the color matrix of ITU-R BT.601, stored so that players need not guess


def to_uint8(video: torch.Tensor) -> np.ndarray:
    """Converts a float video [1 or 3, T, H, W] in [-1, 1] to frames uint8 [T, H, W, 3]. Raises MediaError on NaN."""
    if video.ndim != 4 or video.shape[0] not in (1, 3):
        raise ValueError(f"a video is [3 or 1, T, H, W], not {list(video.shape)}")
    frames = np.empty((*video.shape[1:], 3), np.uint8)
    for index, frame in enumerate(video.detach().unbind(1)):  # one at a time, to save memory
        if frame.isnan().any():
            raise MediaError(f"frame {index} of the video holds NaN; try --dtype fp32, or check the weights")
        levels = frame.float().clamp(-1, 1).add(1).div(2).mul(255).add(0.5)
        frames[index] = levels.byte().permute(1, 2, 0).cpu().numpy()
    return frames


def write_video(
    frames: np.ndarray, path: str | Path, fps: float, metadata: dict[str, str] | None = None, crf: int = CRF
) -> Path:
    """Writes frames uint8 [T, H, W, 3] atomically as H.264 yuv420p; equal input gives equal bytes. Returns the path.

    Odd sides are padded by repeating the edge; `read_video` removes the padding. `fps` 0 means 24; `crf` is x264's
    quality: 0 is lossless, 23 its default. Raises MediaError if the file cannot be written.
    """
    with atomic_write(path) as [temporary]:
        encode_video(frames, temporary, fps, metadata, crf)
    return Path(path)


def write_image(frame: np.ndarray, path: str | Path, metadata: dict[str, str] | None = None) -> Path:
    """Writes a frame uint8 [H, W, 3] atomically as PNG with text metadata. Returns the path."""
    with atomic_write(path) as [temporary]:
        encode_image(frame, temporary, metadata)
    return Path(path)


def fit_within(frame: np.ndarray, max_side: int) -> np.ndarray:
    """A frame uint8 [H, W, 3], shrunk to at most `max_side` pixels a side."""
    from PIL import Image

    image = Image.fromarray(np.ascontiguousarray(frame))
    image.thumbnail((max_side, max_side), Image.Resampling.BICUBIC)
    return np.asarray(image)


def encode_jpeg(frame: np.ndarray, quality: int = 85) -> bytes:
    """A frame uint8 [H, W, 3] as JPEG."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(frame).save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def encode_video(
    frames: np.ndarray, path: Path, fps: float, metadata: dict[str, str] | None = None, crf: int = CRF
) -> None:
    """`write_video` without the atomic rename, for use inside `atomic_write`. Raises OSError."""
    _check_frames(frames, num_dims=4)
    with VideoEncoder(path, fps, metadata, crf) as encoder:
        for frame in frames:
            encoder.add(frame)


class VideoEncoder:
    """Encodes frames uint8 [H, W, 3] one by one as `write_video` does, within a `with` block. Raises OSError.

    lossless: store RGB, so that `read_video` returns the frames that were added; few players show such files
    size: scale the frames to this (height, width)
    """

    def __init__(
        self, path: Path, fps: float, metadata: dict[str, str] | None = None, crf: int = CRF, *,
        lossless: bool = False, size: tuple[int, int] | None = None,
    ) -> None:  # fmt: skip
        if not (math.isfinite(fps) and fps >= 0):
            raise MediaError(f"a frame rate of {fps} is not possible; choose a positive number")
        self.path, self.rate, self.metadata = path, Fraction(fps or DEFAULT_FPS).limit_denominator(1001), metadata or {}
        self.crf, self.lossless, self.size = 0 if lossless else crf, lossless, size
        self._container: Any = None
        self._stream: Any = None

    def __enter__(self) -> VideoEncoder:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._container is None:
            return
        try:
            if kind is None:
                with _as_os_errors():
                    self._container.mux(self._stream.encode())
        finally:
            self.restart()

    def restart(self) -> None:
        """Drops the frames that were added; the file is written anew."""
        if self._container is not None:
            with _as_os_errors():
                self._container.close()
        self._container = None

    def add(self, frame: np.ndarray) -> None:
        """Encodes a frame; all have the size of the first."""
        import av

        _check_frames(frame, num_dims=3)
        if self.size is None:
            picture = av.VideoFrame.from_ndarray(_even(frame), format="rgb24")
        else:
            height, width = self.size
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
            picture = picture.reformat(width=width, height=height, interpolation="BICUBIC")
        if not self.lossless:  # a pixel of chroma is the mean of four: the default filter blurs colored edges
            picture = picture.reformat(format="yuv420p", interpolation="AREA", dst_colorspace="ITU601")
        with _as_os_errors():
            if self._container is None:
                self._open(frame.shape[:2] if self.size is None else self.size)
            self._container.mux(self._stream.encode(picture))

    def _open(self, size: Sequence[int]) -> None:
        import av

        height, width = size
        options = {"movflags": "use_metadata_tags+faststart"}
        container = self._container = av.open(str(self.path), "w", format="mp4", options=options)
        container.metadata.update(self.metadata)
        if height % 2 or width % 2:
            container.metadata[SIZE_KEY] = f"{height}x{width}"
        codec = "libx264rgb" if self.lossless else "libx264"
        stream: Any = container.add_stream(codec, rate=self.rate, options={**ENCODING, "crf": str(self.crf)})
        self._stream = stream
        stream.height, stream.width = height + height % 2, width + width % 2
        stream.pix_fmt = "rgb24" if self.lossless else "yuv420p"
        if not self.lossless:
            stream.codec_context.colorspace = SMPTE170M
        stream.codec_context.thread_count = 1  # with more threads the bytes depend on the machine


@contextmanager
def _as_os_errors() -> Iterator[None]:
    import av

    try:
        yield
    except av.FFmpegError as error:
        raise OSError(error.errno, error_message(error)) from error


def _even(frame: np.ndarray) -> np.ndarray:
    """A frame with even sides, its edges repeated."""
    height, width = frame.shape[:2]
    return np.pad(frame, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge") if height % 2 or width % 2 else frame


def encode_image(frame: np.ndarray, path: Path, metadata: dict[str, str] | None = None) -> None:
    """`write_image` without the atomic rename, for use inside `atomic_write`. Raises OSError."""
    from PIL import Image, PngImagePlugin

    text = PngImagePlugin.PngInfo()
    for key, value in (metadata or {}).items():
        text.add_text(key, value)
    Image.fromarray(_check_frames(frame, num_dims=3)).save(path, format="png", pnginfo=text)


def encode_animation(frames: np.ndarray, fps: float = 8) -> bytes:
    """Frames uint8 [T, H, W, 3] as an animated WebP that loops, for previews: small, not exact."""
    from PIL import Image

    first, *others = map(Image.fromarray, _check_frames(frames, num_dims=4))
    buffer = io.BytesIO()
    options = {"save_all": True, "append_images": others, "duration": round(1000 / fps), "loop": 0}
    first.save(buffer, format="webp", quality=60, method=0, **options)
    return buffer.getvalue()


def _check_frames(frames: np.ndarray, num_dims: int) -> np.ndarray:
    if frames.dtype != np.uint8 or frames.ndim != num_dims or frames.shape[-1] != 3 or 0 in frames.shape:
        raise ValueError(f"frames are uint8 [T, H, W, 3], an image [H, W, 3]; not {frames.dtype} {list(frames.shape)}")
    return frames

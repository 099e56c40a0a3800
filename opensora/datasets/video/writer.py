"""Writes H.264 videos and PNG images with text metadata."""

from __future__ import annotations

import io
import math
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

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


def encode_video(
    frames: np.ndarray, path: Path, fps: float, metadata: dict[str, str] | None = None, crf: int = CRF
) -> None:
    """`write_video` without the atomic rename, for use inside `atomic_write`. Raises OSError."""
    import av

    if not (math.isfinite(fps) and fps >= 0):
        raise MediaError(f"a frame rate of {fps} is not possible; choose a positive number")
    height, width = _check_frames(frames, num_dims=4).shape[1:3]
    rate = Fraction(fps or DEFAULT_FPS).limit_denominator(1001)
    try:
        with av.open(str(path), "w", format="mp4", options={"movflags": "use_metadata_tags+faststart"}) as container:
            container.metadata.update(metadata or {})
            if height % 2 or width % 2:
                container.metadata[SIZE_KEY] = f"{height}x{width}"
                frames = np.pad(frames, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge")
            stream = container.add_stream("libx264", rate=rate, options={**ENCODING, "crf": str(crf)})
            stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv420p"
            stream.codec_context.colorspace = SMPTE170M
            stream.codec_context.thread_count = 1  # with more threads the bytes depend on the machine
            for frame in frames:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
            container.mux(stream.encode())
    except av.FFmpegError as error:
        raise OSError(error.errno, error_message(error)) from error


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

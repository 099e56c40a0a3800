"""Media in and out: H.264 videos and PNG images with text metadata. The only module that opens media files."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch

from opensora.errors import MediaError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
DEFAULT_FPS = 24
SIZE_KEY = "opensora_size"  # "HxW" before padding to even sides; present only where padding took place
# Quality of x264: 0 is lossless, 23 its default. Its macroblock tree makes the bytes depend on uninitialised memory.
ENCODING = {"crf": "10", "mbtree": "0"}
SMPTE170M = 6  # the colour matrix of ITU-R BT.601, noted in the file so that players need not guess


def to_uint8(video: torch.Tensor) -> np.ndarray:
    """Frames uint8 [T, H, W, 3] of a float video [1 or 3, T, H, W] in [-1, 1], clamped; MediaError on NaN."""
    if video.ndim != 4 or video.shape[0] not in (1, 3):
        raise ValueError(f"a video is [3 or 1, T, H, W], not {list(video.shape)}")
    frames = np.empty((*video.shape[1:], 3), np.uint8)
    for index, frame in enumerate(video.detach().unbind(1)):  # one at a time, to spare memory
        if frame.isnan().any():
            raise MediaError(f"frame {index} of the video holds NaN; try --dtype fp32, or check the weights")
        levels = frame.float().clamp(-1, 1).add(1).div(2).mul(255).add(0.5)
        frames[index] = levels.byte().permute(1, 2, 0).cpu().numpy()
    return frames


def write_video(frames: np.ndarray, path: str | Path, fps: float, metadata: dict[str, str] | None = None) -> Path:
    """Writes frames uint8 [T, H, W, 3] as H.264 yuv420p and returns the path; the same input gives the same bytes.

    Odd sides are padded by repeating the edge; `read_video` removes that again. `fps` 0 means 24. The file appears
    complete or not at all. Raises MediaError where it cannot be written.
    """
    with replacing(path) as [temporary]:
        encode_video(frames, temporary, fps, metadata)
    return Path(path)


def write_image(frame: np.ndarray, path: str | Path, metadata: dict[str, str] | None = None) -> Path:
    """Writes a frame uint8 [H, W, 3] as PNG with text metadata and returns the path; complete or not at all."""
    with replacing(path) as [temporary]:
        encode_image(frame, temporary, metadata)
    return Path(path)


def read_video(path: str | Path) -> tuple[np.ndarray, float]:
    """All frames of a video as uint8 [T, H, W, 3], and its frames per second; MediaError if it is broken or empty."""
    with _opened(path, "a video") as container:
        stream = container.streams.video[0]
        frames, num_packets = [], 0
        for packet in container.demux(stream):
            num_packets += packet.size > 0 and not packet.is_corrupt
            frames += [frame.to_ndarray(format="rgb24") for frame in packet.decode()]
        if "mp4" in container.format.name and num_packets < stream.frames:
            raise MediaError(f"{path}: is cut off; {num_packets} of its {stream.frames} frames are there")
        fps = stream.average_rate or stream.guessed_rate or DEFAULT_FPS
        size = container.metadata.get(SIZE_KEY)
    if not frames:
        raise MediaError(f"{path}: holds no frames; the file is empty or cut off")
    height, width = (int(side) for side in size.split("x")) if size else frames[0].shape[:2]
    return np.stack([frame[:height, :width] for frame in frames]), float(fps)


def read_image(path: str | Path) -> np.ndarray:
    """An image of any common format as uint8 [H, W, 3]; MediaError if it is broken."""
    with _opened(path, "an image") as image:
        return np.array(image.convert("RGB"))


def read_metadata(path: str | Path) -> dict[str, str]:
    """The text metadata of an image or video (the suffix tells which); MediaError if the file is broken."""
    if Path(path).suffix.lower() in IMAGE_SUFFIXES:
        with _opened(path, "an image") as image:
            image.load()  # text after the pixels counts too
            return {key: value for key, value in image.info.items() if isinstance(value, str)}
    with _opened(path, "a video") as container:
        return dict(container.metadata)


def contact_sheet(frames: np.ndarray, columns: int | None = None, most: int = 12, side: int = 160) -> np.ndarray:
    """One image uint8 [H, W, 3] with up to `most` evenly spaced frames of uint8 [T, H, W, 3], row by row.

    Frames whose long side is below `side` pixels are enlarged by a whole factor, those above three times it reduced.
    """
    indices = np.unique(np.linspace(0, len(frames) - 1, most).round().astype(int))
    long_side = max(frames.shape[1:3])
    enlarge, reduce = max(1, math.ceil(side / long_side)), max(1, long_side // (3 * side))
    tiles = frames[indices][:, ::reduce, ::reduce].repeat(enlarge, axis=1).repeat(enlarge, axis=2)
    return tile(tiles, columns or min(len(tiles), 4))


def tile(images: Sequence[np.ndarray], columns: int, gap: int = 4) -> np.ndarray:
    """Images uint8 [H, W, 3] of one size laid out in a grid on dark grey, `gap` pixels apart."""
    blank = -len(images) % columns
    tiles = np.pad(np.stack(images), ((0, blank), (gap, 0), (gap, 0), (0, 0)), constant_values=40)
    rows = [np.hstack(tiles[first : first + columns]) for first in range(0, len(tiles), columns)]
    return np.pad(np.vstack(rows), ((0, gap), (0, gap), (0, 0)), constant_values=40)


@contextmanager
def replacing(*paths: str | Path) -> Iterator[list[Path]]:
    """Temporary paths to write to, renamed to `paths` when the block ends: all or none, even after Ctrl-C.

    Raises MediaError where the operating system refuses (full disk, no permission).
    """
    pairs = [(path.with_name(f".{os.getpid()}.{path.name}"), path) for path in map(Path, paths)]
    try:
        yield [temporary for temporary, _ in pairs]
        try:
            for temporary, final in pairs:
                os.replace(temporary, final)
        except BaseException:
            for temporary, final in pairs:
                if not temporary.exists():
                    final.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise MediaError(f"{pairs[0][1]}: cannot be written ({_reason(error)})") from error
    finally:
        for temporary, _ in pairs:
            with suppress(OSError):
                temporary.unlink()


def encode_video(frames: np.ndarray, path: Path, fps: float, metadata: dict[str, str] | None = None) -> None:
    """`write_video` to a path of its own, for use within `replacing`: not atomic, OSError where writing fails."""
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
            stream = container.add_stream("libx264", rate=rate, options=ENCODING)
            stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv420p"
            stream.codec_context.colorspace = SMPTE170M
            stream.codec_context.thread_count = 1  # more threads would change the bytes from machine to machine
            for frame in frames:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
            container.mux(stream.encode())
    except av.FFmpegError as error:
        raise OSError(error.errno, _reason(error)) from error


def encode_image(frame: np.ndarray, path: Path, metadata: dict[str, str] | None = None) -> None:
    """`write_image` to a path of its own, for use within `replacing`: not atomic, OSError where writing fails."""
    from PIL import Image, PngImagePlugin

    text = PngImagePlugin.PngInfo()
    for key, value in (metadata or {}).items():
        text.add_text(key, value)
    Image.fromarray(_check_frames(frame, num_dims=3)).save(path, format="png", pnginfo=text)


def _check_frames(frames: np.ndarray, num_dims: int) -> np.ndarray:
    if frames.dtype != np.uint8 or frames.ndim != num_dims or frames.shape[-1] != 3 or 0 in frames.shape:
        raise ValueError(f"frames are uint8 [T, H, W, 3], an image [H, W, 3]; not {frames.dtype} {list(frames.shape)}")
    return frames


@contextmanager
def _opened(path: str | Path, what: str) -> Iterator[Any]:
    """The Pillow image or PyAV container of "an image" or "a video"; MediaError where opening or reading it fails."""
    import av
    from PIL import Image

    if not Path(path).is_file():
        raise MediaError(f"{path}: no such file")
    try:
        with Image.open(path) if what == "an image" else av.open(str(path), metadata_errors="replace") as media:
            if what == "a video" and not media.streams.video:
                raise MediaError(f"{path}: holds no video")
            yield media
    except (av.FFmpegError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise MediaError(f"{path}: cannot be read as {what} ({_reason(error)})") from error


def _reason(error: Exception) -> str:
    return str(getattr(error, "strerror", None) or error)

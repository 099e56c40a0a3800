"""Media in and out: H.264 videos and PNG images with text metadata. The only module that opens media files."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from opensora.errors import MediaError

if TYPE_CHECKING:
    import av
    import PIL.Image
    import torch

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
VIDEO_SUFFIXES = (".mp4", ".avi", ".mov", ".mkv")
DEFAULT_FPS = 24
SIZE_KEY = "opensora_size"  # "HxW" before padding to even sides; present only where padding took place
CRF = "10"  # quality of x264: 0 is lossless, 23 its default
SMPTE170M = 6  # the colour matrix of ITU-R BT.601, noted in the file so that players need not guess


def to_uint8(video: torch.Tensor, value_range: tuple[float, float] = (-1.0, 1.0)) -> np.ndarray:
    """Frames uint8 [T, H, W, C] of a float video [C, T, H, W]; values outside `value_range` are clamped.

    One channel (grey) becomes three. Works frame by frame to spare memory. MediaError if a value is not a number.
    """
    if video.ndim != 4 or video.shape[0] not in (1, 3):
        raise ValueError(f"a video is [3 or 1, T, H, W], not {list(video.shape)}")
    low, high = value_range
    frames = np.empty((*video.shape[1:], 3), np.uint8)
    for index, frame in enumerate(video.detach().unbind(1)):
        share = frame.float().clamp(low, high).sub(low).div(high - low)
        levels = share.mul(255).add(0.5).permute(1, 2, 0).cpu().numpy()
        if np.isnan(levels).any():
            raise MediaError(f"frame {index} of the video holds NaN; try --dtype fp32, or check the weights")
        frames[index] = levels.clip(0, 255).astype(np.uint8)
    return frames


def write_video(frames: np.ndarray, path: str | Path, fps: float, metadata: dict[str, str] | None = None) -> Path:
    """Writes frames uint8 [T, H, W, 3] as H.264 yuv420p and returns the path; the same input gives the same bytes.

    Odd sides are padded to even by repeating the edge; `read_video` removes the padding again. `fps` 0 means 24.
    The file appears complete or not at all. Raises MediaError where the file cannot be written.
    """
    with replacing(path) as (temporary,):
        encode_video(frames, temporary, fps, metadata)
    return Path(path)


def write_image(frame: np.ndarray, path: str | Path, metadata: dict[str, str] | None = None) -> Path:
    """Writes a frame uint8 [H, W, 3] as PNG with text metadata and returns the path; complete or not at all."""
    with replacing(path) as (temporary,):
        encode_image(frame, temporary, metadata)
    return Path(path)


def read_video(path: str | Path) -> tuple[np.ndarray, float]:
    """All frames of a video as uint8 [T, H, W, 3], and its frames per second; MediaError if it is broken or empty."""
    with _open_video(path) as container:
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


def read_image(path: str | Path, allow_truncated: bool = False) -> np.ndarray:
    """An image of any common format as uint8 [H, W, 3]; MediaError if it is broken.

    `allow_truncated` accepts a file that was cut off; the missing part is grey.
    """
    from PIL import ImageFile

    before = ImageFile.LOAD_TRUNCATED_IMAGES
    ImageFile.LOAD_TRUNCATED_IMAGES = allow_truncated
    try:
        with _open_image(path) as image:
            return np.array(image.convert("RGB"))
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = before


def read_metadata(path: str | Path) -> dict[str, str]:
    """The text metadata of an image or video (the suffix tells which); MediaError if the file is broken."""
    if Path(path).suffix.lower() in IMAGE_SUFFIXES:
        with _open_image(path) as image:
            image.load()  # text after the pixels counts too
            return {key: value for key, value in image.info.items() if isinstance(value, str)}
    with _open_video(path) as container:
        return dict(container.metadata)


def contact_sheet(frames: np.ndarray, columns: int | None = None, most: int = 12, side: int = 160) -> np.ndarray:
    """One image uint8 [H, W, 3] with up to `most` evenly spaced frames of uint8 [T, H, W, 3], row by row.

    Frames whose long side is below `side` pixels are enlarged by a whole factor, those above three times it reduced.
    """
    indices = np.unique(np.linspace(0, len(frames) - 1, min(most, len(frames))).round().astype(int))
    long_side = max(frames.shape[1:3])
    enlarge, reduce = max(1, math.ceil(side / long_side)), max(1, long_side // (3 * side))
    tiles = frames[indices][:, ::reduce, ::reduce].repeat(enlarge, axis=1).repeat(enlarge, axis=2)
    return tile(tiles, columns or min(len(tiles), 4))


def tile(images: Sequence[np.ndarray], columns: int, gap: int = 4, fill: int = 40) -> np.ndarray:
    """Images uint8 [H, W, 3] of one size laid out in a grid, `gap` pixels apart."""
    height, width = images[0].shape[:2]
    rows = math.ceil(len(images) / columns)
    sheet = np.full((rows * (height + gap) + gap, columns * (width + gap) + gap, 3), fill, np.uint8)
    for index, image in enumerate(images):
        top = gap + index // columns * (height + gap)
        left = gap + index % columns * (width + gap)
        sheet[top : top + height, left : left + width] = image
    return sheet


@contextmanager
def replacing(*paths: str | Path) -> Iterator[list[Path]]:
    """Temporary paths to write to, renamed to `paths` when the block ends: all or none, and nothing left behind.

    Holds for Ctrl-C, too. Raises MediaError where the operating system refuses (full disk, no permission).
    """
    finals = [Path(path) for path in paths]
    temporaries = [path.with_name(f".{os.getpid()}.{path.name}") for path in finals]
    try:
        yield temporaries
        try:
            for temporary, final in zip(temporaries, finals, strict=True):
                os.replace(temporary, final)
        except BaseException:
            _remove(final for temporary, final in zip(temporaries, finals, strict=True) if not temporary.exists())
            raise
    except OSError as error:
        raise MediaError(f"{finals[0]}: cannot be written ({error.strerror or error})") from error
    finally:
        _remove(temporaries)


def _remove(paths: Iterable[Path]) -> None:
    for path in paths:
        with suppress(OSError):
            path.unlink()


def encode_video(frames: np.ndarray, path: Path, fps: float, metadata: dict[str, str] | None = None) -> None:
    """`write_video` to a path of its own, for use within `replacing`: not atomic, OSError where writing fails."""
    import av

    if not (math.isfinite(fps) and fps >= 0):
        raise MediaError(f"a frame rate of {fps} is not possible; choose a positive number")
    height, width = _check_frames(frames, num_dims=4).shape[1:3]
    padding = ((0, height % 2), (0, width % 2), (0, 0))
    rate = Fraction(fps or DEFAULT_FPS).limit_denominator(1001)
    try:
        with av.open(str(path), "w", format="mp4", options={"movflags": "use_metadata_tags+faststart"}) as container:
            container.metadata.update(metadata or {})
            if height % 2 or width % 2:
                container.metadata[SIZE_KEY] = f"{height}x{width}"
            stream = container.add_stream("libx264", rate=rate, options={"crf": CRF})
            stream.width, stream.height, stream.pix_fmt = width + width % 2, height + height % 2, "yuv420p"
            stream.codec_context.colorspace = SMPTE170M
            stream.codec_context.thread_count = 1  # more threads would change the bytes from machine to machine
            for frame in frames:
                picture = av.VideoFrame.from_ndarray(np.pad(frame, padding, mode="edge"), format="rgb24")
                container.mux(stream.encode(picture))
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
def _open_video(path: str | Path) -> Iterator[av.container.InputContainer]:
    import av

    _require_file(path)
    try:
        with av.open(str(path), metadata_errors="replace") as container:
            if not container.streams.video:
                raise MediaError(f"{path}: holds no video")
            yield container
    except (av.FFmpegError, OSError) as error:
        raise MediaError(f"{path}: cannot be read as a video ({_reason(error)})") from error


@contextmanager
def _open_image(path: str | Path) -> Iterator[PIL.Image.Image]:
    from PIL import Image

    _require_file(path)
    try:
        with Image.open(path) as image:
            yield image
    except Image.UnidentifiedImageError as error:
        raise MediaError(f"{path}: cannot be read as an image (its format is not known)") from error
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise MediaError(f"{path}: cannot be read as an image ({_reason(error)})") from error


def _require_file(path: str | Path) -> None:
    if not Path(path).is_file():
        raise MediaError(f"{path}: no such file")


def _reason(error: Exception) -> str:
    return str(getattr(error, "strerror", None) or error)

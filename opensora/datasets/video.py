"""Media in and out: H.264 videos and PNG images with text metadata. `decoding` opens the files."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from opensora.datasets import webp
from opensora.datasets.decoding import (
    DEFAULT_FPS,
    Video,
    check_pixels,
    num_packets,
    opened_image,
    opened_video,
    rate_of,
    timeline,
)
from opensora.datasets.decoding import frames as _frames
from opensora.errors import MediaError
from opensora.files import replacing, why

if TYPE_CHECKING:
    from PIL.Image import Image

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
VIDEO_SUFFIXES = (".mp4", ".avi", ".mov", ".mkv")  # those documented; content tells the others
SIZE_KEY = "opensora_size"  # "HxW" before padding to even sides; present only where padding took place
# Quality of x264: 0 is lossless, 23 its default. Its macroblock tree makes the bytes depend on uninitialised memory.
ENCODING = {"crf": "10", "mbtree": "0"}
MAX_PIXELS = 2**31  # of all frames that `read_video` returns: 6 GiB
MAX_DECODED = 2**33  # pixels of all frames that `iterate_video` decodes: 4,096 frames of 1080x1920
PREDICTED = (2, 3)  # kinds of pictures that FFmpeg makes of others: P, B
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


def read_video(path: str | Path, max_frames: int | None = None) -> tuple[np.ndarray, float]:
    """All frames of a video or animated image as uint8 [T, H, W, 3], and its frames per second on average.

    Frames are turned upright, transparency is dropped, deeper colours become 8-bit. MediaError for a file that is
    broken, cut off or empty, has no video, or exceeds 8192 pixels a side, `max_frames`, or 2**31 pixels in all.
    """
    if moving := webp.find(path):
        pictures, fps, height, width = webp.frames(path), moving.fps, moving.height, moving.width
        most = _most_frames(height, width, max_frames)
        return np.stack(list(_counted(pictures, path, most))), fps
    with opened_video(path) as video:
        most = _most_frames(video.stream.height, video.stream.width, max_frames)
        pictures = (_upright(video, frame) for frame in _frames(video))
        return np.stack(list(_counted(pictures, path, most))), rate_of(video)


def iterate_video(path: str | Path, max_frames: int) -> Iterator[np.ndarray]:
    """The frames of `read_video` one by one, uint8 [H, W, 3].

    MediaError before anything is decoded for more than 2**33 pixels in all, or 2**29 of an animated image.
    """
    if webp.find(path):
        yield from _counted(webp.frames(path), path, max_frames)
        return
    with opened_video(path) as video:
        count, size = num_packets(video), (video.stream.height, video.stream.width)
        if video.animated:
            check_pixels(path, count, *size)
        check_pixels(path, min(count, max_frames), *size, MAX_DECODED)
        yield from _counted((_upright(video, frame) for frame in _frames(video)), path, max_frames)


def count_frames(path: str | Path) -> int:
    """The number of frames of `read_video`, of which few are decoded. MediaError as from `read_span`."""
    if moving := webp.find(path):
        return moving.num_frames
    with opened_video(path) as video:
        return len(timeline(video).shown)


def read_span(
    path: str | Path,
    choose: Callable[[int], Sequence[int]],
    convert: Callable[[np.ndarray], Any] = np.asarray,
) -> tuple[list[Any], float]:
    """Some frames of a video or animated image, each as `convert` makes it of uint8 [H, W, 3], and its average rate.

    `choose` gets the number of frames and returns the indices wanted, ascending; it is asked again if that number
    turns out to be smaller. Only what lies between the key frame before the first of them and the last is decoded, one
    frame held at a time. MediaError as from `read_video`, also where the times in the file are broken.
    """
    if moving := webp.find(path):
        indices = list(choose(moving.num_frames))
        found, _ = _pick(webp.frames(path), indices, convert)
        return _whole(found, indices, path), moving.fps
    with opened_video(path) as video:
        shown, keys = timeline(video)
        fps, total = rate_of(video), len(shown)
        indices = list(choose(total))
        if None not in shown and len(set(shown)) == total and indices[-1] < total:
            times = [shown[index] for index in indices]
            before = [key for key in keys if key <= times[0]]
            if before and (found := _span_from_key(video, max(before), times, convert)) is not None:
                return found, fps
    found, count = _span_from_start(path, indices, convert)
    if len(found) < len(indices) and count < total:
        found, _ = _span_from_start(path, indices := list(choose(count)), convert)
    return _whole(found, indices, path), fps


def read_image(path: str | Path) -> np.ndarray:
    """An image of any common format as uint8 [H, W, 3]; MediaError if it is broken or over 8192 pixels a side.

    It is upright (the rotation in the file is applied), transparency is dropped, and 16-bit levels become 8-bit.
    """
    with opened_image(path) as image:
        return image_levels(image, path)


def image_levels(image: Image, where: str | Path) -> np.ndarray:
    """A Pillow image as uint8 [H, W, 3], converted as `read_image` says. Raises MediaError, which `where` opens."""
    from PIL import Image, ImageOps

    image = ImageOps.exif_transpose(image)
    if image.mode in ("I", "F"):
        raise MediaError(f"{where}: holds 32-bit levels; save it with 8 or 16 bits")
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    return np.array(image.convert("RGB"))


def is_image(path: str | Path) -> bool:
    """Whether a file is a still image rather than a video or animated image, by its content, or else by its suffix."""
    with suppress(MediaError), opened_image(path) as image:
        return image.format not in ("GIF", "PNG", "WEBP") or not getattr(image, "is_animated", False)
    if Path(path).suffix.lower() not in IMAGE_SUFFIXES:
        return False
    with suppress(MediaError), opened_video(path):
        return False
    return True


def read_metadata(path: str | Path) -> dict[str, str]:
    """The text metadata of an image or video (the suffix tells which); MediaError if the file is broken."""
    if Path(path).suffix.lower() in IMAGE_SUFFIXES:
        with opened_image(path) as image:
            image.load()  # text after the pixels counts too
            return {key: value for key, value in image.info.items() if isinstance(value, str)}
    with opened_video(path) as video:
        return dict(video.container.metadata)


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
        raise OSError(error.errno, why(error)) from error


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


def _most_frames(height: int, width: int, max_frames: int | None) -> int:
    most = MAX_PIXELS // max(4096, height * width)
    return most if max_frames is None else min(most, max_frames)


def _counted(pictures: Iterator[np.ndarray], path: str | Path, max_frames: int) -> Iterator[np.ndarray]:
    """MediaError once there are more than `max_frames`."""
    for count, picture in enumerate(pictures, start=1):
        if count > max_frames:
            raise MediaError(f"{path}: holds more than {max_frames} frames, the limit here; make it shorter")
        yield picture


def _upright(video: Video, frame: Any) -> np.ndarray:
    """A frame of PyAV as uint8 [H, W, 3], without padding, turned as the file says."""
    height, width = _true_size(video.container.metadata.get(SIZE_KEY), frame.height, frame.width)
    return np.rot90(frame.to_ndarray(format="rgb24")[:height, :width], round(frame.rotation / 90))


def _span_from_key(video: Video, key: int, times: list[int], convert: Callable[[np.ndarray], Any]) -> list[Any] | None:
    """The frames shown at `times` (ascending), decoded from a key frame; None where that does not lead to them."""
    import av

    found: list[Any] = []
    with suppress(MediaError, av.FFmpegError):  # the caller starts anew, and says what is wrong
        video.container.seek(key, stream=video.stream)
        for frame in _frames(video, whole=False, wanted=frozenset(times)):
            if frame.pts is None or frame.pts > times[len(found)]:
                return None
            if frame.pts == key and frame.pict_type in PREDICTED:
                return None  # what it shows is made of frames before it
            if frame.pts == times[len(found)]:
                if frame.is_corrupt:
                    return None
                found.append(convert(_upright(video, frame)))
                if len(found) == len(times):
                    return found
    return None


def _span_from_start(
    path: str | Path, indices: Sequence[int], convert: Callable[[np.ndarray], Any]
) -> tuple[list[Any], int]:
    """The frames at `indices` (ascending) as far as there are any, and how many were decoded for them."""
    with opened_video(path) as video:
        return _pick(_frames(video, whole=False), indices, lambda frame: convert(_upright(video, frame)))


def _pick(pictures: Iterable[Any], indices: Sequence[int], convert: Callable[[Any], Any]) -> tuple[list[Any], int]:
    found, count = [], 0
    for count, picture in enumerate(pictures, start=1):
        if count - 1 == indices[len(found)]:
            found.append(convert(picture))
            if len(found) == len(indices):
                break
    return found, count


def _whole(found: list[Any], indices: Sequence[int], path: str | Path) -> list[Any]:
    if len(found) < len(indices):
        raise MediaError(f"{path}: frame {indices[len(found)]} cannot be decoded; the file is damaged")
    return found


def _true_size(text: str | None, height: int, width: int) -> tuple[int, int]:
    """The size before padding to even sides as `text` says, unless that cannot come from padding."""
    sizes = ((height - down, width - right) for down in (0, 1) for right in (0, 1))
    return next((size for size in sizes if text == f"{size[0]}x{size[1]}"), (height, width))

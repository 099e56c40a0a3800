"""Media in and out: H.264 videos and PNG images with text metadata. The only module that opens media files."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch

from opensora.errors import MediaError
from opensora.files import replacing, why

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
VIDEO_SUFFIXES = (".mp4", ".avi", ".mov", ".mkv")  # those documented; content tells the others
DEFAULT_FPS = 24
SIZE_KEY = "opensora_size"  # "HxW" before padding to even sides; present only where padding took place
# Quality of x264: 0 is lossless, 23 its default. Its macroblock tree makes the bytes depend on uninitialised memory.
ENCODING = {"crf": "10", "mbtree": "0"}
MAX_SIDE = 8192  # pixels; a file that claims more is refused before it is decoded
MAX_PIXELS = 2**31  # of all frames that `read_video` returns: 6 GiB
# What files from strangers may be: no playlists, which lead to other files, and nothing that starts a program.
IMAGE_FORMATS = ("JPEG", "PNG", "PPM", "BMP", "TIFF", "WEBP", "GIF")
VIDEO_FORMATS = "mov,matroska,avi,gif,apng,mpegts,mpeg,flv,asf,ogg,yuv4mpegpipe"
_VIDEO_OPTIONS = {
    "options": {"format_whitelist": VIDEO_FORMATS, "protocol_whitelist": "file"}, "metadata_errors": "replace",
}  # fmt: skip
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
    """All frames of a video as uint8 [T, H, W, 3], and its frames per second on average.

    Frames are turned upright, transparency is dropped, deeper colours become 8-bit. MediaError for a file that is
    broken, cut off or empty, has no video, or exceeds 8192 pixels a side, `max_frames`, or 2**31 pixels in all.
    """
    with _opened(path, "a video") as container:
        stream = _video_stream(container)
        most = MAX_PIXELS // max(4096, stream.width * stream.height)
        frames = list(_decoded(container, path, most if max_frames is None else min(most, max_frames)))
        fps = stream.average_rate or stream.guessed_rate or DEFAULT_FPS
    return np.stack(frames), float(fps)


def iterate_video(path: str | Path, max_frames: int) -> Iterator[np.ndarray]:
    """The frames of `read_video` one by one, uint8 [H, W, 3], without a limit to their pixels in all."""
    with _opened(path, "a video") as container:
        yield from _decoded(container, path, max_frames)


def read_span(
    path: str | Path,
    choose: Callable[[int], Sequence[int]],
    convert: Callable[[np.ndarray], Any] = np.asarray,
) -> tuple[list[Any], float]:
    """Some frames of a video, each as `convert` makes it of uint8 [H, W, 3], and its frames per second on average.

    `choose` gets the number of frames and returns the indices wanted, ascending. Only what lies between the key frame
    before the first of them and the last is decoded, one frame held at a time. MediaError as from `read_video`.
    """
    with _opened(path, "a video") as container:
        stream = _video_stream(container)
        fps = float(stream.average_rate or stream.guessed_rate or DEFAULT_FPS)
        shown, keys = _timeline(container, path)
        if not shown:
            raise MediaError(f"{path}: holds no frames; the file is empty or cut off")
        indices = list(choose(len(shown)))
        if None not in shown and len(set(shown)) == len(shown):
            times = [shown[index] for index in indices]
            before = [key for key in keys if key <= times[0]]
            if before and (found := _span_from_key(container, path, max(before), times, convert)) is not None:
                return found, fps
    with _opened(path, "a video") as container:
        return _span_from_start(container, path, indices, convert), fps


def read_image(path: str | Path) -> np.ndarray:
    """An image of any common format as uint8 [H, W, 3]; MediaError if it is broken or over 8192 pixels a side.

    It is upright (the rotation in the file is applied), transparency is dropped, and 16-bit levels become 8-bit.
    """
    from PIL import Image, ImageOps

    with _opened(path, "an image") as image:
        image = ImageOps.exif_transpose(image)
        if image.mode in ("I", "F"):
            raise MediaError(f"{path}: holds 32-bit levels; save it with 8 or 16 bits")
        if image.mode.startswith("I;16"):
            image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        return np.array(image.convert("RGB"))


def is_image(path: str | Path) -> bool:
    """Whether a file is an image rather than a video or moving picture, by its content, or else by its suffix."""
    with suppress(MediaError), _opened(path, "an image") as image:
        return image.format not in ("GIF", "PNG", "WEBP") or not getattr(image, "is_animated", False)
    with suppress(MediaError), _opened(path, "a video"):
        return False
    return Path(path).suffix.lower() in IMAGE_SUFFIXES


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


def _decoded(container: Any, path: str | Path, max_frames: int) -> Iterator[np.ndarray]:
    """The frames uint8 [H, W, 3] of an opened video; MediaError where `read_video` says so."""
    for count, frame in enumerate(_frames(container, path), start=1):
        if count > max_frames:
            raise MediaError(f"{path}: holds more than {max_frames} frames, the limit here; make it shorter")
        yield _upright(container, frame)


def _frames(
    container: Any, path: str | Path, whole: bool = True, wanted: Collection[int] | None = None
) -> Iterator[Any]:
    """The frames of PyAV from where the container stands; MediaError if they differ in size or the file is cut off.

    Whether it is cut off can only be told if all of it is read: `whole`. Frames shown at other times than the `wanted`
    may be missing where no other frame needs them.
    """
    stream, size, count, num_packets = _video_stream(container), None, 0, 0
    stream.codec_context.options = {"max_pixels": str(MAX_SIDE**2)}  # a frame may be larger than the header says
    for packet in container.demux(stream):
        num_packets += packet.size > 0 and not packet.is_corrupt
        if wanted is not None:
            stream.codec_context.skip_frame = "DEFAULT" if packet.pts is None or packet.pts in wanted else "NONREF"
        for frame in packet.decode():
            count, size = count + 1, size or (frame.height, frame.width)
            if size != (frame.height, frame.width):
                raise MediaError(f"{path}: its frames differ in size; convert it to one size")
            yield frame
    if not count:
        raise MediaError(f"{path}: holds no frames; the file is empty or cut off")
    if whole:
        _check_whole(container, path, num_packets)


def _upright(container: Any, frame: Any) -> np.ndarray:
    """A frame of PyAV as uint8 [H, W, 3], without padding, turned as the file says."""
    height, width = _true_size(container.metadata.get(SIZE_KEY), frame.height, frame.width)
    return np.rot90(frame.to_ndarray(format="rgb24")[:height, :width], round(frame.rotation / 90))


def _check_whole(container: Any, path: str | Path, num_packets: int) -> None:
    """Raises MediaError if the file has fewer packets or bytes than its head says."""
    expected = _video_stream(container).frames
    if "mp4" in container.format.name and num_packets < expected:
        raise MediaError(f"{path}: is cut off; {num_packets} of its {expected} frames are there")
    with open(path, "rb") as file:
        if os.path.getsize(path) < (declared := _declared_size(file.read(128))):
            raise MediaError(f"{path}: is cut off; it should have {declared} bytes")


def _timeline(container: Any, path: str | Path) -> tuple[list[int | None], list[int]]:
    """When each frame is shown, in order, and each key frame; nothing is decoded. MediaError for a file cut off."""
    shown, keys, num_packets = [], [], 0
    for packet in container.demux(_video_stream(container)):
        if packet.size:
            num_packets += not packet.is_corrupt
            shown += [] if packet.is_discard else [packet.pts]
            keys += [packet.pts] if packet.is_keyframe and packet.pts is not None else []
    _check_whole(container, path, num_packets)
    return (shown if None in shown else sorted(shown)), keys


def _span_from_key(
    container: Any, path: str | Path, key: int, times: list[int], convert: Callable[[np.ndarray], Any]
) -> list[Any] | None:
    """The frames shown at `times` (ascending), decoded from a key frame; None where that does not lead to them."""
    import av

    found: list[Any] = []
    with suppress(MediaError, av.FFmpegError):  # the caller starts anew, and says what is wrong
        container.seek(key, stream=_video_stream(container))
        for frame in _frames(container, path, whole=False, wanted=frozenset(times)):
            if frame.pts is None or frame.pts > times[len(found)]:
                return None
            if frame.pts == times[len(found)]:
                if frame.is_corrupt:
                    return None
                found.append(convert(_upright(container, frame)))
                if len(found) == len(times):
                    return found
    return None


def _span_from_start(
    container: Any, path: str | Path, indices: Sequence[int], convert: Callable[[np.ndarray], Any]
) -> list[Any]:
    """The frames at `indices` (ascending); all before them are decoded too."""
    found: list[Any] = []
    for index, frame in enumerate(_frames(container, path, whole=False)):
        if index == indices[len(found)]:
            found.append(convert(_upright(container, frame)))
            if len(found) == len(indices):
                return found
    raise MediaError(f"{path}: frame {indices[len(found)]} cannot be decoded; the file is damaged")


def _true_size(text: str | None, height: int, width: int) -> tuple[int, int]:
    """The size before padding to even sides as `text` says, unless that cannot come from padding."""
    sizes = ((height - down, width - right) for down in (0, 1) for right in (0, 1))
    return next((size for size in sizes if text == f"{size[0]}x{size[1]}"), (height, width))


def _declared_size(head: bytes) -> int:
    """The bytes that an AVI or Matroska file should have by its head; 0 where that does not say."""
    if head.startswith(b"RIFF"):
        return int.from_bytes(head[4:8], "little") + 8
    segment = re.match(rb"\x1a\x45\xdf\xa3.*?\x18\x53\x80\x67\x01(.{7})", head, re.DOTALL)
    length = int.from_bytes(segment[1], "big") if segment else 0
    return segment.end() + length if segment and length < 2**56 - 1 else 0  # all ones: not known


def _video_stream(container: Any) -> Any | None:
    """The first video stream that is not the cover of a piece of music."""
    return next((s for s in container.streams.video if not s.disposition & type(s.disposition).attached_pic), None)


@contextmanager
def _opened(path: str | Path, what: str) -> Iterator[Any]:
    """The Pillow image or PyAV container of "an image" or "a video"; MediaError where opening or reading it fails."""
    import av
    from PIL import Image, UnidentifiedImageError

    if not os.path.isfile(path):
        raise MediaError(f"{path}: no such file")
    image = what == "an image"
    try:
        with Image.open(path, formats=IMAGE_FORMATS) if image else av.open(f"file:{path}", **_VIDEO_OPTIONS) as media:
            stream = media if image else _video_stream(media)
            if stream is None or not (image or stream.codec_context):
                raise MediaError(f"{path}: holds no video that can be read")
            if max(stream.width, stream.height) > MAX_SIDE:
                size = f"{stream.height}x{stream.width}"
                raise MediaError(f"{path}: is {size} pixels, over the limit of {MAX_SIDE} a side; make it smaller")
            yield media
    except MediaError:
        raise
    except Exception as error:  # decoders raise anything for a file made to break them
        unknown = f"it is none of {', '.join(IMAGE_FORMATS)}" if isinstance(error, UnidentifiedImageError) else ""
        reason, remedy = unknown or why(error), f"save it anew as {'PNG' if image else 'MP4'}"
        raise MediaError(f"{path}: cannot be read as {what} ({reason}); {remedy}") from error

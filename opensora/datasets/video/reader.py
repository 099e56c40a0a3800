"""Reads images and videos as uint8 frames."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from opensora.datasets.video import webp
from opensora.datasets.video.container import (
    IMAGE_SUFFIXES,
    SIZE_KEY,
    OpenedVideo,
    check_pixels,
    decode_frames,
    num_packets,
    opened_image,
    opened_video,
    rate_of,
)
from opensora.datasets.video.frame_times import frame_times
from opensora.datasets.video.span import Span, span_times
from opensora.errors import MediaError

if TYPE_CHECKING:
    from PIL.Image import Image

MAX_PIXELS = 2**31  # of all frames that `read_video` returns: 6 GiB
MAX_DECODED = 2**33  # of all frames that `iterate_video` decodes: 4,096 frames of 1080x1920
PREDICTED = (2, 3)  # FFmpeg's picture types P and B


def read_video(path: str | Path, max_frames: int | None = None) -> tuple[np.ndarray, float]:
    """All frames of a video or animated image as uint8 [T, H, W, 3], and its average frame rate.

    Rotation is applied, transparency dropped, deeper colors become 8-bit. Raises MediaError for a file that is damaged,
    truncated or empty, has no video track, or exceeds 8192 pixels a side, `max_frames`, or 2**31 pixels in total.
    """
    if moving := webp.probe(path):
        pictures, fps, height, width = webp.frames(path), moving.fps, moving.height, moving.width
        most = _most_frames(height, width, max_frames)
        return np.stack(list(_counted(pictures, path, most))), fps
    with opened_video(path) as video:
        most = _most_frames(video.stream.height, video.stream.width, max_frames)
        pictures = (_upright(video, frame) for frame in decode_frames(video))
        return np.stack(list(_counted(pictures, path, most))), rate_of(video)


def iterate_video(path: str | Path, max_frames: int) -> Generator[np.ndarray, None, None]:
    """Yields the frames of `read_video` one by one, uint8 [H, W, 3].

    Raises MediaError before decoding for more than 2**33 pixels in total, or 2**29 of an animated image.
    """
    if webp.probe(path):
        yield from _counted(webp.frames(path), path, max_frames)
        return
    with opened_video(path) as video:
        count, size = num_packets(video), (video.stream.height, video.stream.width)
        if video.animated:
            check_pixels(path, count, *size)
        check_pixels(path, min(count, max_frames), *size, MAX_DECODED)
        yield from _counted((_upright(video, frame) for frame in decode_frames(video)), path, max_frames)


def count_frames(path: str | Path) -> int:
    """The number of frames of `read_video`, decoding only a few. Raises MediaError as `read_span` does."""
    if moving := webp.probe(path):
        return moving.num_frames
    with opened_video(path) as video:
        return len(frame_times(video).shown)


def shown_times(path: str | Path, span: Span | None = None) -> list[int | None]:
    """The presentation times of the frames of a video, or of a span of it, in units of its track; None if unknown.

    Raises MediaError as `read_span` does.
    """
    if span is not None and (part := span_times(path, span)) is not None:
        return part.shown
    with opened_video(path) as video:
        shown = frame_times(video).shown
    found = range(len(shown)) if span is None else span.locate(shown, path)
    return shown[found.start : found.stop]


def read_span(
    path: str | Path,
    choose: Callable[[int], Sequence[int]],
    convert: Callable[[np.ndarray], Any] = np.asarray,
    span: Span | None = None,
    restart: Callable[[], None] = lambda: None,
) -> tuple[list[Any], float]:
    """Selected frames of a video or animated image, each converted from uint8 [H, W, 3]; and its frame rate.

    `choose` maps the number of frames, of the file or of `span`, to ascending indices; it is called again if the file
    turns out to have fewer. Decodes only from the key frame before the first index to the last one, one frame in memory
    at a time. `restart` is called before frames are converted once more, where seeking does not lead to them. Raises
    MediaError as `read_video` does, and for a broken time table or a span without frames.
    """
    if moving := webp.probe(path):
        if span is not None:
            raise MediaError(f"{path}: is an animated WebP, which has no spans; convert it to MP4")
        indices = list(choose(moving.num_frames))
        found, _ = _pick(webp.frames(path), indices, convert)
        return _complete(found, indices, path), moving.fps
    if span is not None and (part := _span_from_packets(path, span, choose, convert)) is not None:
        return part
    restart()
    with opened_video(path) as video:
        shown, keys = frame_times(video)
        fps = rate_of(video)
        within = range(len(shown)) if span is None else span.locate(shown, path)
        indices = [within.start + index for index in choose(len(within))]
        known = [time for time in shown if time is not None]
        if len(set(known)) == len(shown) and indices[-1] < len(shown):
            times = [known[index] for index in indices]
            before = [key for key in keys if key <= times[0]]
            if before and (frames := _span_from_key(video, max(before), times, convert)) is not None:
                return frames, fps
    restart()
    found, count = _span_from_start(path, indices, convert)
    if len(found) < len(indices) and within.start < count < within.stop:
        indices = [within.start + index for index in choose(count - within.start)]
        restart()
        found, _ = _span_from_start(path, indices, convert)
    return _complete(found, indices, path), fps


def read_image(path: str | Path) -> np.ndarray:
    """An image as uint8 [H, W, 3]. Raises MediaError if it is damaged or exceeds 8192 pixels a side.

    EXIF rotation is applied, transparency dropped, 16-bit levels become 8-bit.
    """
    with opened_image(path) as image:
        return image_to_uint8(image, path)


def image_to_uint8(image: Image, where: str | Path) -> np.ndarray:
    """Converts a Pillow image to uint8 [H, W, 3] as `read_image` does. Raises MediaError, beginning with `where`."""
    from PIL import Image, ImageOps

    image = ImageOps.exif_transpose(image)
    if image.mode in ("I", "F"):
        raise MediaError(f"{where}: has 32-bit pixels; save it with 8 or 16 bits")
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    return np.array(image.convert("RGB"))


def is_image(path: str | Path) -> bool:
    """Whether a file is a still image, not a video or animated image: by content, or else by suffix."""
    with suppress(MediaError), opened_image(path) as image:
        return image.format not in ("GIF", "PNG", "WEBP") or not getattr(image, "is_animated", False)
    if Path(path).suffix.lower() not in IMAGE_SUFFIXES:
        return False
    with suppress(MediaError), opened_video(path):
        return False
    return True


def read_metadata(path: str | Path) -> dict[str, str]:
    """The text metadata of an image or video, told apart by suffix. Raises MediaError if the file is damaged."""
    if Path(path).suffix.lower() in IMAGE_SUFFIXES:
        with opened_image(path) as image:
            image.load()  # also reads text chunks after the pixels
            return {key: value for key, value in image.info.items() if isinstance(value, str)}
    with opened_video(path) as video:
        return dict(video.container.metadata)


def _most_frames(height: int, width: int, max_frames: int | None) -> int:
    most = MAX_PIXELS // max(4096, height * width)
    return most if max_frames is None else min(most, max_frames)


def _counted(pictures: Iterator[np.ndarray], path: str | Path, max_frames: int) -> Iterator[np.ndarray]:
    """Yields pictures; raises MediaError after `max_frames`."""
    for count, picture in enumerate(pictures, start=1):
        if count > max_frames:
            raise MediaError(f"{path}: holds more than {max_frames} frames, the limit; make it shorter")
        yield picture


def _upright(video: OpenedVideo, frame: Any) -> np.ndarray:
    """A PyAV frame as uint8 [H, W, 3], without padding, with the file's rotation applied."""
    height, width = _true_size(video.container.metadata.get(SIZE_KEY), frame.height, frame.width)
    pixels = video.reformatter.reformat(frame, format="rgb24").to_ndarray()
    return np.rot90(pixels[:height, :width], round(frame.rotation / 90))


def _span_from_packets(
    path: str | Path, span: Span, choose: Callable[[int], Sequence[int]], convert: Callable[[np.ndarray], Any]
) -> tuple[list[Any], float] | None:
    """The chosen frames of a span and the frame rate, from the packets around it; None if these do not suffice."""
    part = span_times(path, span)
    if part is None:
        return None
    shown = [time for time in part.shown if time is not None]
    times = [shown[index] for index in choose(len(shown))]
    with opened_video(path) as video:
        key = max(key for key in part.keys if key <= times[0])
        frames = _span_from_key(video, key, times, convert)
        return None if frames is None else (frames, rate_of(video))


def _span_from_key(
    video: OpenedVideo, key: int, times: list[int], convert: Callable[[np.ndarray], Any]
) -> list[Any] | None:
    """The frames at `times` (ascending), decoded from a key frame; None if seeking does not find them."""
    import av

    found: list[Any] = []
    with suppress(MediaError, av.FFmpegError):  # the caller decodes from the start, and reports errors
        video.container.seek(key, stream=video.stream)
        for frame in decode_frames(video, whole=False, wanted=frozenset(times)):
            if frame.pts is None or frame.pts > times[len(found)]:
                return None
            if frame.pts == key and frame.pict_type in PREDICTED:
                return None  # predicted from earlier frames: not a real key frame
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
    """The frames at `indices` (ascending) that exist, and the number of frames decoded."""
    with opened_video(path) as video:
        return _pick(decode_frames(video, whole=False), indices, lambda frame: convert(_upright(video, frame)))


def _pick(pictures: Iterable[Any], indices: Sequence[int], convert: Callable[[Any], Any]) -> tuple[list[Any], int]:
    found: list[Any] = []
    count = 0
    for count, picture in enumerate(pictures, start=1):
        if count - 1 == indices[len(found)]:
            found.append(convert(picture))
            if len(found) == len(indices):
                break
    return found, count


def _complete(found: list[Any], indices: Sequence[int], path: str | Path) -> list[Any]:
    if len(found) < len(indices):
        raise MediaError(f"{path}: frame {indices[len(found)]} cannot be decoded; the file is damaged")
    return found


def _true_size(text: str | None, height: int, width: int) -> tuple[int, int]:
    """The size before padding to even sides, as stored in `text`, if it is plausible."""
    sizes = ((height - down, width - right) for down in (0, 1) for right in (0, 1))
    return next((size for size in sizes if text == f"{size[0]}x{size[1]}"), (height, width))

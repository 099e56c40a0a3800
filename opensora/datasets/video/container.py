"""Opened images and videos: which files are accepted, which track is read, and the frames that it decodes to."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from opensora.errors import MediaError
from opensora.files import error_message

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
VIDEO_SUFFIXES = (".mp4", ".avi", ".mov", ".mkv")  # the documented ones; others are recognized by content
SIZE_KEY = "opensora_size"  # metadata: "HxW" before padding to even sides; absent if there was no padding
DEFAULT_FPS = 24
MAX_FPS, MAX_SECONDS = 1000, 3600  # per frame; beyond these, the times in a file are meaningless
MAX_SIDE = 8192  # pixels
MAX_ANIMATED = 2**29  # pixels of all frames of an animated image, about 15 s of decoding
MAX_IMAGE_BYTES = 2**30
# Accepted formats: no playlists, which refer to other files, and nothing that starts a program.
IMAGE_FORMATS = ("JPEG", "PNG", "PPM", "BMP", "TIFF", "WEBP", "GIF")
VIDEO_FORMATS = "mov,matroska,avi,gif,apng,mpegts,mpeg,flv,asf,ogg,yuv4mpegpipe"
_ANIMATED_FORMATS = ("gif", "apng")
_PHOTO_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"mif1", b"avif")  # FFmpeg would read their tiles as videos
_VIDEO_OPTIONS = {"format_whitelist": VIDEO_FORMATS, "protocol_whitelist": "file"}


class OpenedVideo(NamedTuple):
    """An opened file, its selected video track, and what converts its frames: making one costs more than a frame."""

    path: str | Path
    container: Any
    stream: Any
    reformatter: Any

    @property
    def animated(self) -> bool:
        """Whether the file is an animated image."""
        return self.container.format.name in _ANIMATED_FORMATS


@contextmanager
def opened_image(path: str | Path) -> Iterator[Any]:
    """Opens an image with Pillow. Raises MediaError if it cannot be read or exceeds 8192 pixels a side."""
    from PIL import Image, UnidentifiedImageError

    try:
        _check_file(path)
        if os.path.getsize(path) > MAX_IMAGE_BYTES:
            raise MediaError(
                f"{path}: is larger than {MAX_IMAGE_BYTES:,} bytes, the limit of an image; make it smaller"
            )
        with Image.open(path, formats=IMAGE_FORMATS) as image:
            check_side(path, image.height, image.width)
            yield image
    except MediaError:
        raise
    except Exception as error:  # decoders raise anything on malicious files
        reason = (
            f"it is none of {', '.join(IMAGE_FORMATS)}"
            if isinstance(error, UnidentifiedImageError)
            else error_message(error)
        )
        raise MediaError(f"{path}: cannot be read as an image ({reason}); re-save it as PNG") from error


@contextmanager
def opened_video(path: str | Path) -> Iterator[OpenedVideo]:
    """Opens a video and selects its track. Raises MediaError if it cannot be read or exceeds 8192 pixels a side."""
    try:
        _check_file(path)
        _refuse_photos(path)
        with _container(path) as container:
            stream = _track(container, path)
            if stream is None:
                raise MediaError(f"{path}: holds no video that can be read")
            check_side(path, stream.height, stream.width)
            stream.codec_context.options = {"max_pixels": str(MAX_SIDE**2)}  # the header may be wrong
            yield OpenedVideo(path, container, stream, _reformatter())
    except MediaError:
        raise
    except Exception as error:  # decoders raise anything on malicious files
        raise MediaError(f"{path}: cannot be read as a video ({error_message(error)}); re-save it as MP4") from error


def _reformatter() -> Any:
    from av.video.reformatter import VideoReformatter

    return VideoReformatter()


def check_side(path: str | Path, height: int, width: int) -> None:
    """Raises MediaError for more than 8192 pixels a side."""
    if max(height, width) > MAX_SIDE:
        raise MediaError(f"{path}: is {height}x{width} pixels, over the limit of {MAX_SIDE} a side; make it smaller")


def check_pixels(path: str | Path, num_frames: int, height: int, width: int, most: int = MAX_ANIMATED) -> None:
    """Raises MediaError for more than `most` pixels in all frames together."""
    if (pixels := num_frames * height * width) > most:
        problem = f"{num_frames} frames of {height}x{width}, {pixels:,} pixels in all, over the limit of {most:,}"
        raise MediaError(f"{path}: holds {problem}; make it smaller or shorter")


def rate_of(video: OpenedVideo) -> float:
    """Average frames per second. Raises MediaError for an impossible rate."""
    stated = [rate for rate in (video.stream.average_rate, video.stream.guessed_rate) if rate]
    for rate in stated:
        if 1 / MAX_SECONDS <= rate <= MAX_FPS:
            return float(rate)
    if stated and video.stream.frames != 1:
        raise _broken_times(video.path, f"its frame rate would be {float(stated[0]):.3g}")
    return float(DEFAULT_FPS)


def decode_frames(video: OpenedVideo, whole: bool = True, wanted: Collection[int] | None = None) -> Iterator[Any]:
    """Decodes PyAV frames from the current position. Raises MediaError if sizes differ or the file is truncated.

    Skips packets before the first key frame. Truncation is only checked if the file is read to its end: `whole`. With
    `wanted` times, the decoder may skip frames at other times that no other frame refers to.
    """
    stream, size, count, intact, shown, begun = video.stream, None, 0, 0, 0, False
    for packet in video.container.demux(stream):
        intact += packet.size > 0 and not packet.is_corrupt
        shown += packet.size > 0 and not packet.is_discard
        begun = begun or packet.is_keyframe or not packet.size
        if not begun:
            continue
        if wanted is not None:
            stream.codec_context.skip_frame = "DEFAULT" if packet.pts is None or packet.pts in wanted else "NONREF"
        for frame in packet.decode():
            count, size = count + 1, size or (frame.height, frame.width)
            if size != (frame.height, frame.width):
                raise MediaError(f"{video.path}: its frames differ in size; convert it to one size")
            yield frame
    if not count:
        raise MediaError(f"{video.path}: holds no frames; {no_frames_reason(intact)}")
    if whole:
        check_complete(video, intact, shown)


def num_packets(video: OpenedVideo) -> int:
    """The number of packets of a video, an upper bound of its frames, without decoding."""
    with _container(video.path) as container:
        return sum(packet.size > 0 for packet in container.demux(container.streams[video.stream.index]))


def no_frames_reason(count: int) -> str:
    if count:
        return f"none of its {count} packets can be decoded without a key frame; cut it at a key frame"
    return "the file is empty or cut off"


def check_complete(video: OpenedVideo, intact: int, shown: int) -> None:
    """Raises MediaError if the file has fewer packets or bytes than its header says, or its times are invalid."""
    path, expected = video.path, video.stream.frames
    rate_of(video)
    if "mp4" in video.container.format.name:
        if shown < expected:
            _check_edits(video)
        if intact < expected:
            raise MediaError(f"{path}: is cut off; {intact} of its {expected} frames are there")
    with open(path, "rb") as file:
        if os.path.getsize(path) < (declared := _declared_size(file.read(128))):
            raise MediaError(f"{path}: is cut off; it should have {declared} bytes")


def _check_edits(video: OpenedVideo) -> None:
    """Raises MediaError if frames are hidden because their times exceed the duration of their track."""
    with _container(video.path, ignore_editlist="1") as container:
        stream = container.streams[video.stream.index]
        times = [(packet.pts, packet.duration or 0) for packet in container.demux(stream) if packet.size]
        longest = max((duration for _, duration in times), default=0)
        if stream.duration and sum(duration for _, duration in times) > 1.01 * stream.duration + longest:
            raise _broken_times(video.path, "its frames last longer than the track that holds them")
        if len({time for time, _ in times}) < len(times) / 2:
            raise _broken_times(video.path, "most of its frames are shown at one time")


def _broken_times(path: str | Path, problem: str) -> MediaError:
    return MediaError(f"{path}: its timestamps are invalid, {problem}; re-encode it")


def _declared_size(head: bytes) -> int:
    """The size in bytes that the header of an AVI or Matroska file declares; 0 if it declares none."""
    if head.startswith(b"RIFF"):
        return int.from_bytes(head[4:8], "little") + 8
    segment = re.match(rb"\x1a\x45\xdf\xa3.*?\x18\x53\x80\x67\x01(.{7})", head, re.DOTALL)
    length = int.from_bytes(segment[1], "big") if segment else 0
    return segment.end() + length if segment and length < 2**56 - 1 else 0  # all ones: unknown


def _track(container: Any, path: str | Path) -> Any | None:
    """Selects the video track: moving pictures before stills, the default track before others, then the longest."""
    tracks = [track for track in container.streams.video if track.codec_context and not _is_cover(track.disposition)]
    if len(tracks) < 2:
        return tracks[0] if tracks else None
    counts = dict.fromkeys((track.index for track in tracks), 0)
    with _container(path) as again:
        for packet in again.demux(*(again.streams[index] for index in counts)):
            counts[packet.stream.index] += packet.size > 0 and not packet.is_discard

    def rank(track: Any) -> tuple[bool, bool, int]:
        count = counts[track.index]
        return count > 1, bool(track.disposition & type(track.disposition).default), count

    return max(tracks, key=rank)  # the first one wins a tie


def _is_cover(disposition: Any) -> bool:
    return bool(disposition & (type(disposition).attached_pic | type(disposition).timed_thumbnails))


def _container(path: str | Path, **options: str) -> Any:
    import av

    return av.open(f"file:{path}", options={**_VIDEO_OPTIONS, **options}, metadata_errors="replace")


def _check_file(path: str | Path) -> None:
    if not os.path.isfile(path):
        raise MediaError(f"{path}: no such file")


def _refuse_photos(path: str | Path) -> None:
    with open(path, "rb") as file:
        head = file.read(12)
    if head[4:8] == b"ftyp" and head[8:] in _PHOTO_BRANDS:
        raise MediaError(f"{path}: is a HEIC or AVIF photo, which is not supported; re-save it as PNG")

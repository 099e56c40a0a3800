"""Opened media files, and the frames that decoders make of them. Besides `video`, the only module that opens media.

A frame counts if a decoder makes it. Before the first key frame, and among the pictures that are stored behind it and
shown before it, packets may refer to frames that a cut took away; decoding so far tells which. From there on every
packet is a frame, but in containers that hold packets of other kinds: these are decoded to their end.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from opensora.errors import MediaError
from opensora.files import why

DEFAULT_FPS = 24
MAX_FPS, MAX_SECONDS = 1000, 3600  # of a frame; beyond, the times in a file mean nothing
MAX_SIDE = 8192  # pixels; a file that claims more is refused before it is decoded
MAX_ANIMATED = 2**29  # pixels of all frames of an animated image, of which each needs those before it: 15 s to decode
MAX_IMAGE_BYTES = 2**30  # of the file
# What files from strangers may be: no playlists, which lead to other files, and nothing that starts a program.
IMAGE_FORMATS = ("JPEG", "PNG", "PPM", "BMP", "TIFF", "WEBP", "GIF")
VIDEO_FORMATS = "mov,matroska,avi,gif,apng,mpegts,mpeg,flv,asf,ogg,yuv4mpegpipe"
_ANIMATED_FORMATS = ("gif", "apng")
_LOOSE_FORMATS = ("mpegts", "mpeg", "ogg")  # fields, halves and repetitions may be packets of their own
_LOOSE_CODECS = ("vp8",)  # some of its packets are never shown
_PHOTO_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"mif1", b"avif")  # whose tiles would be taken for videos
_VIDEO_OPTIONS = {"format_whitelist": VIDEO_FORMATS, "protocol_whitelist": "file"}


class Video(NamedTuple):
    """An opened file and the track of it that is read."""

    path: str | Path
    container: Any
    stream: Any

    @property
    def animated(self) -> bool:
        """Whether it is an animated image."""
        return self.container.format.name in _ANIMATED_FORMATS


class Timeline(NamedTuple):
    """When each frame is shown, in order, and each key frame; in the track's own units, None where it is not said."""

    shown: list[int | None]
    keys: list[int]


@contextmanager
def opened_image(path: str | Path) -> Iterator[Any]:
    """The Pillow image in a file. MediaError where opening or reading it fails, or over 8192 pixels a side."""
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
    except Exception as error:  # decoders raise anything for a file made to break them
        reason = (
            f"it is none of {', '.join(IMAGE_FORMATS)}" if isinstance(error, UnidentifiedImageError) else why(error)
        )
        raise MediaError(f"{path}: cannot be read as an image ({reason}); save it anew as PNG") from error


@contextmanager
def opened_video(path: str | Path) -> Iterator[Video]:
    """A video and its track. MediaError where opening or reading it fails, or over 8192 pixels a side."""
    try:
        _check_file(path)
        _refuse_photos(path)
        with _container(path) as container:
            stream = _track(container, path)
            if stream is None:
                raise MediaError(f"{path}: holds no video that can be read")
            check_side(path, stream.height, stream.width)
            stream.codec_context.options = {"max_pixels": str(MAX_SIDE**2)}  # a frame may be larger than the head says
            yield Video(path, container, stream)
    except MediaError:
        raise
    except Exception as error:  # decoders raise anything for a file made to break them
        raise MediaError(f"{path}: cannot be read as a video ({why(error)}); save it anew as MP4") from error


def check_side(path: str | Path, height: int, width: int) -> None:
    """Raises MediaError for a file of more than 8192 pixels a side."""
    if max(height, width) > MAX_SIDE:
        raise MediaError(f"{path}: is {height}x{width} pixels, over the limit of {MAX_SIDE} a side; make it smaller")


def check_pixels(path: str | Path, num_frames: int, height: int, width: int, most: int = MAX_ANIMATED) -> None:
    """Raises MediaError for more than `most` pixels of all frames."""
    if (pixels := num_frames * height * width) > most:
        problem = f"{num_frames} frames of {height}x{width}, {pixels:,} pixels in all, over the limit of {most:,}"
        raise MediaError(f"{path}: holds {problem}; make it smaller or shorter")


def rate_of(video: Video) -> float:
    """Frames per second on average. MediaError for a rate that no video has."""
    said = [rate for rate in (video.stream.average_rate, video.stream.guessed_rate) if rate]
    for rate in said:
        if 1 / MAX_SECONDS <= rate <= MAX_FPS:
            return float(rate)
    if said and video.stream.frames != 1:
        raise _broken_times(video.path, f"its frame rate would be {float(said[0]):.3g}")
    return float(DEFAULT_FPS)


def frames(video: Video, whole: bool = True, wanted: Collection[int] | None = None) -> Iterator[Any]:
    """The frames of PyAV from where the container stands; MediaError if they differ in size or the file is cut off.

    What comes before a key frame is skipped. Whether the file is cut off can only be told if all of it is read:
    `whole`. Frames shown at other times than the `wanted` may be missing where no other frame needs them.
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
        raise MediaError(f"{video.path}: holds no frames; {_no_frames(intact)}")
    if whole:
        _check_whole(video, intact, shown)


def timeline(video: Video) -> Timeline:
    """The frames that decoders make of a video, of which only the first are decoded, or all if nothing else tells.

    MediaError for a file that is cut off, holds no frame, or whose times are broken, and for an animated image of more
    than 2**29 pixels in all.
    """
    if video.animated:
        check_pixels(video.path, num_packets(video), video.stream.height, video.stream.width)
    start, packets, intact = _Start(video), [], 0
    for packet in video.container.demux(video.stream):
        if packet.size:
            intact += not packet.is_corrupt
            packets.append((packet.pts, packet.is_keyframe, packet.is_discard))
        start.add(packet, len(packets) - 1)
    shown = [pts for number, (pts, _, hidden) in enumerate(packets) if not hidden and not start.lacks(number)]
    _check_whole(video, intact, len(shown))
    if not shown:
        raise MediaError(f"{video.path}: holds no frames; {_no_frames(len(packets))}")
    keys = [pts for number, (pts, key, _) in enumerate(packets) if key and pts is not None and not start.lacks(number)]
    return Timeline(shown if None in shown else sorted(shown), keys)


class _Start:
    """Decodes the packets of a video up to where each later one is a frame, and knows which of them are none."""

    def __init__(self, video: Video) -> None:
        self.video, self.made = video, set()  # packets of which frames came
        self.sent: dict[int, int | None] = {}  # packets that were decoded: when each is shown
        self.key: tuple[int, int | None] | None = None  # the first key frame: its number and time
        self.num_decoded: int | None = None  # once that is settled
        container, codec = video.container.format.name.split(",")[0], video.stream.codec_context
        self.to_the_end = container in _LOOSE_FORMATS or codec.name in _LOOSE_CODECS

    def add(self, packet: Any, number: int) -> None:
        """Decodes a packet if that is needed still; one without content ends the file."""
        if self.num_decoded is not None:
            return
        if packet.size and self.key is None and packet.is_keyframe:
            self.key = number, packet.pts
        if packet.size and self.key is None:
            return
        if packet.size:
            self.sent[number], packet.pts = packet.pts, number  # its frame has the number, also where no time is said
        if self._take(packet.decode()) or not packet.size:
            if packet.size:
                self._take(self.video.stream.codec_context.decode(None))
            self.num_decoded = number + 1

    def _take(self, decoded: list[Any]) -> bool:
        """Notes of which packets frames came; whether what follows can be told without decoding."""
        numbers = [frame.pts for frame in decoded if frame.pts in self.sent]
        self.made.update(numbers)
        return not self.to_the_end and any(self._behind_key(number) for number in numbers)

    def _behind_key(self, number: int) -> bool:
        first, time = self.key
        shown = self.sent[number]
        return number >= first and (number == first or None in (time, shown) or shown >= time)

    def lacks(self, number: int) -> bool:
        """Whether a packet is no frame."""
        return self.num_decoded is not None and number < self.num_decoded and number not in self.made


def num_packets(video: Video) -> int:
    """The number of packets of a video, at most one a frame; nothing is decoded."""
    with _container(video.path) as container:
        return sum(packet.size > 0 for packet in container.demux(container.streams[video.stream.index]))


def _no_frames(count: int) -> str:
    if count:
        return f"none of its {count} packets can be decoded without a key frame; cut it anew, at one"
    return "the file is empty or cut off"


def _check_whole(video: Video, intact: int, shown: int) -> None:
    """Raises MediaError if the file has fewer packets or bytes than its head says, or its times mean nothing."""
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


def _check_edits(video: Video) -> None:
    """Raises MediaError if frames are hidden because their times go beyond the end of their own track."""
    with _container(video.path, ignore_editlist="1") as container:
        stream = container.streams[video.stream.index]
        times = [(packet.pts, packet.duration or 0) for packet in container.demux(stream) if packet.size]
        longest = max((duration for _, duration in times), default=0)
        if stream.duration and sum(duration for _, duration in times) > 1.01 * stream.duration + longest:
            raise _broken_times(video.path, "its frames last longer than the track that holds them")
        if len({time for time, _ in times}) < len(times) / 2:
            raise _broken_times(video.path, "most of its frames are shown at one time")


def _broken_times(path: str | Path, problem: str) -> MediaError:
    return MediaError(f"{path}: its time table is broken, {problem}; encode it anew")


def _declared_size(head: bytes) -> int:
    """The bytes that an AVI or Matroska file should have by its head; 0 where that does not say."""
    if head.startswith(b"RIFF"):
        return int.from_bytes(head[4:8], "little") + 8
    segment = re.match(rb"\x1a\x45\xdf\xa3.*?\x18\x53\x80\x67\x01(.{7})", head, re.DOTALL)
    length = int.from_bytes(segment[1], "big") if segment else 0
    return segment.end() + length if segment and length < 2**56 - 1 else 0  # all ones: not known


def _track(container: Any, path: str | Path) -> Any | None:
    """The video track to read: moving pictures before stills, the default one before others, then the longest."""
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

    return max(tracks, key=rank)  # the first of equals


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
        raise MediaError(f"{path}: is a HEIC or AVIF photo, which is not read here; save it anew as PNG")

"""The frames of a video and their times, determined with as little decoding as possible.

A frame counts if a decoder outputs it. Before the first key frame, and among pictures that are stored after it but
shown before it, packets may refer to frames that a cut removed; decoding so far shows which. After that every packet is
a frame, except in containers that also hold packets of other kinds: these are decoded to the end.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from opensora.datasets.video.container import OpenedVideo, check_complete, check_pixels, no_frames_reason, num_packets
from opensora.errors import MediaError

_LOOSE_FORMATS = ("mpegts", "mpeg", "ogg")  # fields, partial frames and repetitions may be packets of their own
_LOOSE_CODECS = ("vp8",)  # some of its packets are never shown


class FrameTimes(NamedTuple):
    """Presentation times of all frames, in order, and of the key frames, in units of the track; None if unknown."""

    shown: list[int | None]
    keys: list[int]


def packets_are_frames(video: OpenedVideo) -> bool:
    """Whether every packet from a key frame on is a frame."""
    container, codec = video.container.format.name.split(",")[0], video.stream.codec_context.name
    return container not in _LOOSE_FORMATS and codec not in _LOOSE_CODECS


def frame_times(video: OpenedVideo) -> FrameTimes:
    """Determines the frames of a video, decoding only its start, or all of it if packets are not frames.

    Raises MediaError for a file that is truncated, has no frames or a broken time table, and for an animated image of
    more than 2**29 pixels in total.
    """
    if video.animated:
        check_pixels(video.path, num_packets(video), video.stream.height, video.stream.width)
    start, packets, intact = _StartDecoder(video), [], 0
    for packet in video.container.demux(video.stream):
        if packet.size:
            intact += not packet.is_corrupt
            packets.append((packet.pts, packet.is_keyframe, packet.is_discard))
        start.add(packet, len(packets) - 1)
    shown = [pts for number, (pts, _, hidden) in enumerate(packets) if not hidden and not start.lacks(number)]
    check_complete(video, intact, len(shown))
    if not shown:
        raise MediaError(f"{video.path}: holds no frames; {no_frames_reason(len(packets))}")
    keys = [pts for number, (pts, key, _) in enumerate(packets) if key and pts is not None and not start.lacks(number)]
    return FrameTimes(shown if None in shown else sorted(shown), keys)


class _StartDecoder:
    """Decodes the packets of a video until every later packet is a frame; knows which earlier ones are not."""

    def __init__(self, video: OpenedVideo) -> None:
        self.video = video
        self.decoded: set[int] = set()  # packets that gave frames
        self.sent: dict[int, int | None] = {}  # decoded packets: their presentation time
        self.key: tuple[int, int | None] | None = None  # the first key frame: number and time
        self.num_decoded: int | None = None  # None until it is known
        self.to_the_end = not packets_are_frames(video)

    def add(self, packet: Any, number: int) -> None:
        """Decodes a packet if still needed; an empty packet ends the file."""
        if self.num_decoded is not None:
            return
        if packet.size and self.key is None and packet.is_keyframe:
            self.key = number, packet.pts
        if packet.size and self.key is None:
            return
        if packet.size:
            self.sent[number], packet.pts = packet.pts, number  # marks its frame with the packet number
        if self._take(packet.decode()) or not packet.size:
            if packet.size:
                self._take(self.video.stream.codec_context.decode(None))
            self.num_decoded = number + 1

    def _take(self, decoded: list[Any]) -> bool:
        """Records which packets gave frames; returns whether the remaining packets are all frames."""
        numbers = [frame.pts for frame in decoded if frame.pts in self.sent]
        self.decoded.update(numbers)
        return not self.to_the_end and any(self._behind_key(number) for number in numbers)

    def _behind_key(self, number: int) -> bool:
        assert self.key is not None
        (first, time), shown = self.key, self.sent[number]
        return number >= first and (number == first or time is None or shown is None or shown >= time)

    def lacks(self, number: int) -> bool:
        """Whether a packet gives no frame."""
        return self.num_decoded is not None and number < self.num_decoded and number not in self.decoded

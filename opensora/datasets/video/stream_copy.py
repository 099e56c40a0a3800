"""Copies a span of a video without encoding it again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from opensora.datasets.video.container import OpenedVideo, opened_video
from opensora.datasets.video.span import Span
from opensora.errors import MediaError
from opensora.files import error_message

FORMATS = {".mp4": "mp4", ".mkv": "matroska"}


def copy_suffix(path: str | Path) -> str:
    """The suffix of stream copies of a video: that of a container which holds its codec."""
    with opened_video(path) as video:
        return ".mp4" if "mp4" in video.container.format.name else ".mkv"


def copy_span(path: str | Path, target: Path, suffix: str, span: Span, metadata: dict[str, str]) -> int:
    """Copies the packets from the first key frame at or after `span.start` on, as far as they are shown within it.

    Returns the time of that key frame. Sound and other tracks are left out. Raises MediaError if the span has no key
    frame, and OSError.
    """
    import av

    with opened_video(path) as video:
        try:
            with av.open(str(target), "w", format=FORMATS[suffix], options=_options(suffix)) as out:
                out.metadata.update(metadata)
                return _copy(video, out, span)
        except av.FFmpegError as error:
            raise OSError(error.errno, error_message(error)) from error


def _options(suffix: str) -> dict[str, str]:
    return {"movflags": "use_metadata_tags+faststart"} if suffix == ".mp4" else {}


def _copy(video: OpenedVideo, out: Any, span: Span) -> int:
    stream = out.add_stream_from_template(video.stream)
    video.container.seek(span.start, stream=video.stream)
    first: int | None = None
    for packet in video.container.demux(video.stream):
        if not packet.size or (span.end is not None and packet.pts is not None and packet.pts >= span.end):
            break  # packets before this one refer to none after it
        if first is None and packet.is_keyframe and packet.pts is not None and packet.pts >= span.start:
            first = packet.pts
        if first is None or packet.pts is None or packet.pts < first:
            continue
        packet.pts, packet.dts = packet.pts - first, None if packet.dts is None else packet.dts - first
        packet.stream = stream
        out.mux(packet)
    if first is None:
        raise MediaError(f"{video.path}: has no key frame in {span}; cut it without --copy")
    return first

"""Reference images and videos of a prompt: checked before long work, and read at the requested size."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from pathlib import Path

from torch import Tensor

from opensora.config.schema import shown
from opensora.errors import ConfigError, MediaError
from opensora.pipeline.in_memory_media import InMemoryMedia
from opensora.pipeline.media_reader import MediaReader, max_frames
from opensora.pipeline.reference_path import Reference, is_url, parse_references, split_references, urls

MAX_CACHED_BYTES = 2**29  # of decoded frames


class References:
    """Reads references at one size (H, W). Each source is decoded once, as long as a bounded cache holds its frames."""

    def __init__(
        self, size: tuple[int, int], *, offline: bool = False, allow_private: bool = False,
        media: Iterable[InMemoryMedia] = (),
    ) -> None:  # fmt: skip
        self.size, self.offline = size, offline
        self.reader = MediaReader(media, allow_private=allow_private)
        self._cached: OrderedDict[str, Tensor] = OrderedDict()  # source -> frames, the most recently used last
        self._available: dict[str, int] = {}  # source -> number of frames

    def check(self, text: str | None) -> list[int | None]:
        """The number of frames of each reference of "a.png;b.mp4", None for a URL, which is not contacted.

        Files are decoded completely, so that unreadable files are reported before long work. Raises what `read`
        raises, and ConfigError for a URL if `offline`.
        """
        if self.offline and (found := urls(text)):
            raise ConfigError(f"reference {found[0]!r} is a URL, but offline is set; download it and give its path")
        return [self._check(reference) for reference in parse_references(text)]

    def counts(self, text: str | None) -> list[int]:
        """The number of frames of each reference."""
        return [self._count(reference) for reference in parse_references(text)]

    def read(self, text: str | None) -> list[Tensor]:
        """The frames of each reference as `read_reference` returns them; none for None and ""."""
        return [_select(reference, self._frames(reference.source)) for reference in parse_references(text)]

    def hashes(self, text: str | None) -> dict[str, str]:
        """The SHA-256 of each source, as `content_hashes` returns them."""
        return _hashes(text, self.reader)

    def _check(self, reference: Reference) -> int | None:
        if is_url(reference.source):
            self.reader.check_url(reference.source)
            return None
        return self._count(reference)

    def _count(self, reference: Reference) -> int:
        if reference.source not in self._available:
            self._frames(reference.source)
        return _num_frames(reference, self._available[reference.source], self.size)

    def _frames(self, source: str) -> Tensor:
        if source in self._cached:
            self._cached.move_to_end(source)
            return self._cached[source]
        frames = self.reader.read(source, self.size)
        self._available[source], self._cached[source] = frames.shape[1], frames
        while sum(one.nbytes for one in self._cached.values()) > MAX_CACHED_BYTES:
            self._cached.popitem(last=False)
        return frames


def read_references(
    text: str | None, size: tuple[int, int], *, cache: str | Path | None = None, allow_private: bool = False
) -> list[Tensor]:
    """Each reference of "a.png;b.mp4" as `read_reference` returns it; none for None and ""."""
    return [read_reference(one, size, cache=cache, allow_private=allow_private) for one in split_references(text)]


def read_reference(
    text: str, size: tuple[int, int], transform: str = "resize_crop", *,
    cache: str | Path | None = None, allow_private: bool = False,
) -> Tensor:  # fmt: skip
    """An image (T = 1) or a video as float32 [3, T, H, W] in [-1, 1] at `size` (H, W); an animated image is a video.

    `cache` is the folder of downloads; `allow_private` permits URLs with private addresses. Raises ConfigError for a
    URL that is refused, MediaError for a source that cannot be fetched or read: broken or empty media are
    an error.
    """
    reference = Reference.parse(text)
    reader = MediaReader(cache=cache, allow_private=allow_private)
    return _select(reference, reader.read(reference.source, size, transform))


def content_hashes(
    text: str | None, *, allow_private: bool = False, media: Iterable[InMemoryMedia] = ()
) -> dict[str, str]:
    """The SHA-256 of each source: of the bytes of a file or URL, of the pixels of media in memory.

    Raises MediaError for a source that does not exist.
    """
    return _hashes(text, MediaReader(media, allow_private=allow_private))


def _num_frames(reference: Reference, available: int, size: tuple[int, int]) -> int:
    """The number of frames taken of a source with `available` frames of `size`. Raises MediaError for too few."""
    if reference.kind == "hold" and reference.length > (most := max_frames(size)):
        problem = f"#hold={reference.length} is above {most}, the most frames of {size[0]}x{size[1]}"
        raise MediaError(f"reference {shown(reference.source)}: {problem}; give fewer")
    if reference.kind == "hold" and available > 1:
        problem = f"has {available} frames where an image is needed; give an image"
        raise MediaError(f"reference {shown(reference.source)}: {problem}")
    if reference.kind == "last" and available < reference.length:
        problem = f"has {available} frames, and {reference.length} are to be kept; give a longer video"
        raise MediaError(f"reference {shown(reference.source)}: {problem}")
    return {"hold": reference.length, None: available}.get(reference.kind, min(reference.length, available))


def _select(reference: Reference, frames: Tensor) -> Tensor:
    """The frames taken of all frames [3, T, H, W] of the source."""
    count = _num_frames(reference, frames.shape[1], (frames.shape[2], frames.shape[3]))
    if reference.kind == "hold":
        return frames.expand(-1, count, -1, -1)
    return frames[:, -count:] if reference.kind == "last" else frames[:, :count]


def _hashes(text: str | None, reader: MediaReader) -> dict[str, str]:
    sources = dict.fromkeys(reference.source for reference in parse_references(text))
    return {source: reader.sha256(source) for source in sources}

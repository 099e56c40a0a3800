"""Reference images and videos of a prompt: parsed, checked before long work, and read at the requested size.

A `reference_path` lists sources separated by `;`: paths, URLs, or names of media in memory. `#first=17` or `#last=17`
after a source takes that many frames of a video, `#hold=17` repeats an image.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from opensora.config.schema import shown
from opensora.errors import ConfigError, MediaError
from opensora.pipeline.in_memory_media import MAX_FRAMES, InMemoryMedia
from opensora.pipeline.media_reader import MediaReader, max_frames
from opensora.pipeline.remote_media import is_url

MAX_REFERENCES = 100  # of a prompt
MAX_CACHED_BYTES = 2**29  # of frames between their check and their use
_SELECTION = re.compile(r"(.+)#(first|last|hold)=([1-9]\d*)")


class Reference(NamedTuple):
    """A source and which of its frames are taken: all, the `first` or `last` ones, or an image on `hold`."""

    source: str
    kind: str | None = None
    length: int = 0

    @classmethod
    def parse(cls, text: str) -> Reference:
        """Raises ConfigError for a number of frames beyond the limit, and for two selections of one source."""
        match = _SELECTION.fullmatch(text)
        if match is None:
            return cls(text)
        if _SELECTION.fullmatch(match[1]):
            raise ConfigError(f"reference {shown(text)}: takes a part of a part; give one of #first, #last, #hold")
        if len(match[3]) > 9 or int(match[3]) > MAX_FRAMES:
            raise ConfigError(f"reference {shown(text)}: #{match[2]} takes at most {MAX_FRAMES} frames")
        return cls(match[1], match[2], int(match[3]))

    def num_frames(self, available: int, size: tuple[int, int]) -> int:
        """The number of frames taken of a source with `available` frames of `size`. Raises MediaError for too few."""
        if self.kind == "hold" and self.length > (most := max_frames(size)):
            problem = f"#hold={self.length} is above {most}, the most frames of {size[0]}x{size[1]}"
            raise MediaError(f"reference {shown(self.source)}: {problem}; give fewer")
        if self.kind == "hold" and available > 1:
            problem = f"has {available} frames where an image is needed; give an image"
            raise MediaError(f"reference {shown(self.source)}: {problem}")
        if self.kind == "last" and available < self.length:
            problem = f"has {available} frames, and {self.length} are to be kept; give a longer video"
            raise MediaError(f"reference {shown(self.source)}: {problem}")
        return {"hold": self.length, None: available}.get(self.kind, min(self.length, available))

    def select(self, frames: Tensor) -> Tensor:
        """The frames taken of all frames [3, T, H, W] of the source."""
        count = self.num_frames(frames.shape[1], (frames.shape[2], frames.shape[3]))
        if self.kind == "hold":
            return frames.expand(-1, count, -1, -1)
        return frames[:, -count:] if self.kind == "last" else frames[:, :count]


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

        Files are decoded to their end, so that what `read` would refuse is refused before long work. Raises what `read`
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
        return [reference.select(self._frames(reference.source)) for reference in parse_references(text)]

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
        return reference.num_frames(self._available[reference.source], self.size)

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
    URL that is refused, MediaError for a source that cannot be fetched or read: broken or empty media never count as no
    reference.
    """
    reference = Reference.parse(text)
    reader = MediaReader(cache=cache, allow_private=allow_private)
    return reference.select(reader.read(reference.source, size, transform))


def content_hashes(
    text: str | None, *, allow_private: bool = False, media: Iterable[InMemoryMedia] = ()
) -> dict[str, str]:
    """The SHA-256 of each source: of the bytes of a file or URL, of the pixels of media in memory.

    Raises MediaError for a source that does not exist.
    """
    return _hashes(text, MediaReader(media, allow_private=allow_private))


def _hashes(text: str | None, reader: MediaReader) -> dict[str, str]:
    sources = dict.fromkeys(reference.source for reference in parse_references(text))
    return {source: reader.sha256(source) for source in sources}


def urls(text: str | None) -> list[str]:
    """The references that are URLs."""
    return [one for one in split_references(text) if is_url(one)]


def parse_references(text: str | None) -> list[Reference]:
    """The references of "a.png;b.mp4#last=17". Raises ConfigError as `split_references` and `Reference.parse` do."""
    return [Reference.parse(one) for one in split_references(text)]


def split_references(text: str | None) -> list[str]:
    """The texts between the `;` of "a.png;b.mp4". Raises ConfigError for an empty one, and for more than a hundred."""
    if text and (count := text.count(";") + 1) > MAX_REFERENCES:
        raise ConfigError(f"reference_path {shown(text)} has {count:,} entries; give at most {MAX_REFERENCES}")
    sources = text.split(";") if text else []
    if not all(source.strip() for source in sources):
        raise ConfigError(f"reference_path {shown(text)} has an empty entry; remove the ';' too many")
    return sources

"""The text of a `reference_path`: sources separated by `;`, that is paths, URLs, or names of media in memory.

`#first=17` or `#last=17` after a source takes that many frames of a video, `#hold=17` repeats an image.
"""

from __future__ import annotations

import os
import re
from typing import NamedTuple

from opensora.config.schema import shown
from opensora.errors import ConfigError, MediaError

MAX_REFERENCES = 100  # of a prompt
MAX_FRAMES = 4096  # of a reference
_SELECTION = re.compile(r"(.+)#(first|last|hold)=([1-9]\d*)")
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_IN_MEMORY = re.compile(r"memory:[0-9a-f]{16}")


class Reference(NamedTuple):
    """A source and the frames to use: all, the `first` or `last` ones, or an image repeated (`hold`)."""

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


def check_exist(text: str | None) -> None:
    """Raises MediaError for a reference that is neither a URL, nor in memory, nor a file, and what parsing raises."""
    for source in (reference.source for reference in parse_references(text)):
        if not is_url(source) and not is_in_memory(source) and not _exists(source):
            raise MediaError(f"reference {source!r}: no such file; give another")


def _exists(source: str) -> bool:
    try:
        os.stat(source)
    except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: a NUL in the name
        return False
    except OSError:  # it may exist: reading it tells why it cannot be read
        return True
    return True


def is_url(source: str) -> bool:
    """Whether a reference is a URL, of whatever scheme, rather than a path."""
    return _URL.match(source) is not None


def is_in_memory(source: str) -> bool:
    """Whether a source is the name of media in memory."""
    return _IN_MEMORY.fullmatch(source) is not None


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

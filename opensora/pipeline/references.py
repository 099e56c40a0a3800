"""Reference images and videos: checked, downloaded where they are URLs, and read at the size that is made.

References come from strangers. A URL is fetched only over http(s) and only from public addresses, within limits of
size, time and redirects. No proxy is asked, since it would look the host up by itself.
"""

from __future__ import annotations

import hashlib
import http.client
import os
import re
import socket
import ssl
import stat
import tempfile
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from contextlib import closing
from functools import cache
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, TypeVar
from urllib.parse import SplitResult, quote, urljoin, urlsplit

import numpy as np
import torch
from torch import Tensor

from opensora.config.schema import shown
from opensora.datasets.transforms import get_transform
from opensora.datasets.video import is_image, iterate_video, read_image
from opensora.errors import ConfigError, MediaError, printable
from opensora.files import why
from opensora.pipeline.in_memory_media import InMemoryMedia, is_in_memory

MAX_REFERENCES = 100  # of a prompt
MAX_FRAMES = 4096  # of a reference, and of a part of one
MAX_PIXELS = 2**30  # of all its frames at the size that is made: 12 GiB
MAX_HELD = 2**29  # bytes of frames that are held between their check and their use
MAX_FILE_BYTES = 2**34  # of a local file
MAX_BYTES = 200 * 10**6
MAX_REDIRECTS = 5
TOTAL_SECONDS = 60.0
CONNECT_SECONDS = 10.0

T = TypeVar("T")
_NAT64 = ip_network("64:ff9b::/96")
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_PART = re.compile(r"(.+)#(first|last|hold)=([1-9]\d*)")  # of a reference: its first or last frames, or a still of many


class References:
    """Frames of references at one size (H, W), each decoded once, as long as all that are held stay within bounds."""

    def __init__(
        self, size: tuple[int, int], *, offline: bool = False, allow_private: bool = False,
        media: Iterable[InMemoryMedia] = (),
    ) -> None:  # fmt: skip
        self.size, self.offline, self.allow_private = size, offline, allow_private
        self.media = {one.name: one for one in media}
        self.held: OrderedDict[str, Tensor] = OrderedDict()  # source -> frames, the latest last
        self.frames: dict[str, int] = {}  # source -> how many it has

    def check(self, text: str | None) -> list[int | None]:
        """The number of frames of each reference of "a.png;b.mp4", None for a URL, which is not contacted.

        Files are decoded to their end, so that what `read` would refuse is refused before long work. Raises what `read`
        raises, and ConfigError for a URL if `offline`.
        """
        if self.offline and (found := urls(text)):
            raise ConfigError(
                f"reference {found[0]!r} is a URL, but offline asks nobody; download it and give its path"
            )
        return [self._check(Part.of(one)) for one in split(text)]

    def counts(self, text: str | None) -> list[int]:
        """The number of frames of each reference."""
        return [self._count(part) for part in map(Part.of, split(text))]

    def read(self, text: str | None) -> list[Tensor]:
        """Each reference as `read_reference` gives it; None and "" have none."""
        return [part.of_frames(self._whole(part.source)) for part in map(Part.of, split(text))]

    def hashes(self, text: str | None) -> dict[str, str]:
        """`content_hashes`."""
        return content_hashes(text, allow_private=self.allow_private, media=self.media)

    def _check(self, part: Part) -> int | None:
        if _URL.match(part.source):
            _parse(part.source, self.allow_private)
            return None
        return self._count(part)

    def _count(self, part: Part) -> int:
        if part.source not in self.frames:
            self._whole(part.source)
        return part.count_of(self.frames[part.source], self.size)

    def _whole(self, source: str) -> Tensor:
        if source in self.held:
            self.held.move_to_end(source)
            return self.held[source]
        frames = _read(source, self.size, allow_private=self.allow_private, media=self.media)
        self.frames[source], self.held[source] = frames.shape[1], frames
        while sum(one.nbytes for one in self.held.values()) > MAX_HELD:
            self.held.popitem(last=False)
        return frames


class Part(NamedTuple):
    """A reference: the file or URL, and which of its frames: the "first" or "last" so many, or a still to "hold"."""

    source: str
    kind: str | None = None
    count: int = 0

    @classmethod
    def of(cls, reference: str) -> Part:
        """Raises ConfigError for a number of frames that no reference has, and for parts of parts."""
        match = _PART.fullmatch(reference)
        if match is None:
            return cls(reference)
        if _PART.fullmatch(match[1]):
            raise ConfigError(f"reference {shown(reference)}: takes a part of a part; give one of #first, #last, #hold")
        if len(match[3]) > 9 or int(match[3]) > MAX_FRAMES:
            raise ConfigError(f"reference {shown(reference)}: #{match[2]} takes at most {MAX_FRAMES} frames")
        return cls(match[1], match[2], int(match[3]))

    def count_of(self, frames: int, size: tuple[int, int]) -> int:
        """How many of a source's `frames` of `size` these are. Raises MediaError where it has not that many."""
        if self.kind == "hold" and self.count > (most := MAX_PIXELS // (size[0] * size[1])):
            problem = f"#hold={self.count} is above {most}, the most frames of {size[0]}x{size[1]}"
            raise MediaError(f"reference {shown(self.source)}: {problem}; give fewer")
        if self.kind == "hold" and frames > 1:
            problem = f"has {frames} frames where an image is needed; give an image"
            raise MediaError(f"reference {shown(self.source)}: {problem}")
        if self.kind == "last" and frames < self.count:
            problem = f"has {frames} frames, and {self.count} are to be kept; give a longer video"
            raise MediaError(f"reference {shown(self.source)}: {problem}")
        return {"hold": self.count, None: frames}.get(self.kind, min(self.count, frames))

    def of_frames(self, frames: Tensor) -> Tensor:
        """These of the frames [3, T, H, W] of the source."""
        count = self.count_of(frames.shape[1], (frames.shape[2], frames.shape[3]))
        if self.kind == "hold":
            return frames.expand(-1, count, -1, -1)
        return frames[:, -count:] if self.kind == "last" else frames[:, :count]


def read_references(text: str | None, size: tuple[int, int], **options: Any) -> list[Tensor]:
    """Each reference of "a.png;b.mp4" as `read_reference` gives it; None and "" have none."""
    return [read_reference(source, size, **options) for source in split(text)]


def read_reference(source: str, size: tuple[int, int], **options: Any) -> Tensor:
    """An image (T = 1) or a whole video as float32 [3, T, H, W] in [-1, 1] at `size` (H, W).

    `source` is a path, a URL, or the name of media in memory; `#first=17` or `#last=17` after it takes so many frames
    of a video, `#hold=17` repeats an image. An animated image is a video. Options: `transform`, "resize_crop" by
    default; `cache`, the folder of downloads; `allow_private`, for URLs; `media`, media in memory by name. Raises
    ConfigError for a URL that is refused, MediaError for what cannot be fetched or read: broken or empty media never
    count as no reference.
    """
    part = Part.of(source)
    return part.of_frames(_read(part.source, size, **options))


def _read(
    source: str, size: tuple[int, int], transform: str = "resize_crop", cache: str | Path | None = None,
    allow_private: bool = False, media: Mapping[str, InMemoryMedia] = MappingProxyType({}),
) -> Tensor:  # fmt: skip
    """All frames of a source. A download that cannot be used is not kept."""
    to_size = get_transform(transform)
    if is_in_memory(source):
        return _read_in_memory(_in_memory(source, media), to_size, size)
    remote = bool(_URL.match(source))
    path = str(fetch(source, cache, allow_private)) if remote else _regular(source)
    try:
        if is_image(path):
            return to_size(read_image(path), size)
        most = min(MAX_FRAMES, MAX_PIXELS // (size[0] * size[1]))
        return torch.cat([to_size(frame[None], size) for frame in iterate_video(path, most)], dim=1)
    except MediaError as error:
        if remote:
            Path(path).unlink(missing_ok=True)
            fetch.cache_clear()
        raise _named(source, path, error) from error


def _read_in_memory(
    media: InMemoryMedia, to_size: Callable[[np.ndarray, tuple[int, int]], Tensor], size: tuple[int, int]
) -> Tensor:
    """All frames of media in memory, by the transforms of files: that of images for a single frame."""
    frames = media.frames
    if len(frames) > (most := MAX_PIXELS // (size[0] * size[1])):
        problem = f"holds {len(frames)} frames, over the limit of {most} at {size[0]}x{size[1]}"
        raise MediaError(f"reference '{media.name}': {problem}; give fewer")
    try:
        pictures = [frames[0]] if len(frames) == 1 else [frames[index : index + 1] for index in range(len(frames))]
        return torch.cat([to_size(picture, size) for picture in pictures], dim=1)
    except MediaError as error:
        raise _named(media.name, media.name, error) from error


def _in_memory(name: str, media: Mapping[str, InMemoryMedia]) -> InMemoryMedia:
    if name not in media:
        remedy = "give the same array through the Python interface"
        raise MediaError(f"reference '{name}' was given as pixels in memory, which no file holds; {remedy}")
    return media[name]


def urls(text: str | None) -> list[str]:
    """Those of the references that would be fetched."""
    return [source for source in split(text) if _URL.match(source)]


def content_hashes(
    text: str | None, *, allow_private: bool = False, media: Mapping[str, InMemoryMedia] = MappingProxyType({})
) -> dict[str, str]:
    """The SHA-256 of each source that references name: of its bytes, or of its pixels if it is in memory.

    Raises MediaError for a source that does not exist.
    """
    sources = dict.fromkeys(Part.of(one).source for one in split(text))
    return {
        source: _in_memory(source, media).sha256 if is_in_memory(source) else _content_hash(source, allow_private)
        for source in sources
    }


def _content_hash(source: str, allow_private: bool) -> str:
    path, digest = fetch(source, None, allow_private) if _URL.match(source) else _regular(source), hashlib.sha256()
    try:
        with open(path, "rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
    except OSError as error:
        raise MediaError(f"reference {source!r}: cannot be read ({why(error)}); give another") from error
    return digest.hexdigest()


def _regular(source: str) -> str:
    """The path of a local file. Raises MediaError for a folder, device or pipe, and what is not there or too large."""
    try:
        found = os.stat(source)
    except PermissionError as error:
        raise MediaError(f"reference {source!r}: cannot be read ({why(error)}); give another") from error
    except (OSError, ValueError) as error:  # the last of a NUL in the name
        raise MediaError(f"reference {source!r}: no such file; give another") from error
    if not stat.S_ISREG(found.st_mode):
        raise MediaError(f"reference {source!r}: no such file, but a folder, device or pipe; give an image or a video")
    if found.st_size > MAX_FILE_BYTES:
        raise MediaError(f"reference {source!r}: is larger than {MAX_FILE_BYTES:,} bytes; cut out what is needed")
    return source


def split(text: str | None) -> list[str]:
    """The references of "a.png;b.mp4". Raises ConfigError for an empty one, and for more than a hundred."""
    if text and (count := text.count(";") + 1) > MAX_REFERENCES:
        raise ConfigError(f"reference_path {shown(text)} has {count:,} entries; give at most {MAX_REFERENCES}")
    sources = text.split(";") if text else []
    if not all(source.strip() for source in sources):
        raise ConfigError(f"reference_path {shown(text)} has an empty entry; remove the ';' too many")
    return sources


def _named(source: str, path: str, error: MediaError) -> MediaError:
    reason = str(error).removeprefix(f"{path}: ")
    return MediaError(f"reference {source!r}: {reason}" + ("" if ";" in reason else "; give another"))


@cache
def fetch(url: str, folder: str | Path | None = None, allow_private: bool = False) -> Path:
    """Downloads a URL to `folder`/SHA-256 of the content + suffix, whole or not at all; once in a process.

    `folder` is ~/.cache/opensora/references by default. What is no image or video is not kept, nor what took too long.
    Raises ConfigError for a URL that is malformed, not http(s), or leads (also by a redirect) to an address that is not
    public without `allow_private`; else MediaError.
    """
    default = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "opensora", "references")
    folder = Path(folder or default).expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".", ignore_cleanup_errors=True) as workspace:
            body, name = _in_time(lambda: _follow(url, Path(workspace), allow_private))
            os.replace(body, folder / name)
            return folder / name
    except ConfigError:
        raise
    except Exception as error:  # of sockets, TLS, HTTP and files
        reason = printable(" ".join(str(error).split())[:200]) or type(error).__name__
        raise MediaError(f"reference {url!r}: {reason}; download it yourself and give its path") from error


def _in_time(work: Callable[[], T]) -> T:
    """What `work` gives; MediaError where that takes too long: it is left alone then."""
    outcome: list[T | Exception] = []

    def run() -> None:
        try:
            outcome.append(work())
        except Exception as error:
            outcome.append(error)

    thread = threading.Thread(target=run, daemon=True)  # bounds what no timeout covers, such as a header that drips
    thread.start()
    thread.join(TOTAL_SECONDS)
    result = outcome[0] if outcome else MediaError(f"takes longer than {TOTAL_SECONDS:.0f} s")
    if isinstance(result, Exception):
        raise result
    return result


def _follow(url: str, folder: Path, allow_private: bool) -> tuple[Path, str]:
    """The body that a URL leads to as a file in `folder`, and the name it shall have."""
    deadline = time.monotonic() + TOTAL_SECONDS
    for _ in range(MAX_REDIRECTS + 1):
        parts = _parse(url, allow_private)
        connection = _connect(parts, allow_private)
        try:
            query = f"?{parts.query}" if parts.query else ""
            connection.request("GET", quote((parts.path or "/") + query, safe="/%:=&~+!$,;@'()*?"))
            with connection.getresponse() as response:
                location = response.headers["Location"]
                if response.status == 200:
                    return _store(response, folder, Path(parts.path).suffix, deadline)
                if response.status not in (301, 302, 303, 307, 308) or not location:
                    raise MediaError(f"the server answers {response.status}")
                url = urljoin(url, location)
        finally:
            connection.close()
    raise MediaError(f"redirects more than {MAX_REDIRECTS} times")


def _parse(url: str, allow_private: bool) -> SplitResult:
    """The parts of a URL; ConfigError unless it is an http(s) URL with a host that may be asked."""
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError as error:
        raise ConfigError(f"reference {url!r} is no valid URL ({error}); correct it") from error
    if parts.scheme not in ("http", "https"):
        raise ConfigError(f"reference {url!r}: only http and https URLs are fetched; give a path instead")
    if not host or parts.username is not None or re.search(r"[\x00-\x20\x7f\\]", url):
        raise ConfigError(f"reference {url!r} is no valid URL (no host, a user name, or spaces in it); correct it")
    try:
        address = str(ip_address(host))
    except ValueError:
        return parts  # a name, which is looked up later
    if not allow_private:
        _check_public(host, address)
    return parts


def _check_public(host: str, address: str) -> None:
    """Raises ConfigError for an address that is private, loopback, link-local, multicast or reserved."""
    ip = ip_address(address.split("%")[0])
    if isinstance(ip, IPv6Address):  # some hold the IPv4 address that will be reached
        ip = IPv4Address(int(ip) & 0xFFFFFFFF) if ip in _NAT64 else ip.ipv4_mapped or ip.sixtofour or ip
    if not ip.is_global or ip.is_multicast or ip.is_reserved or getattr(ip, "is_site_local", False):
        raise ConfigError(f"reference host '{host}' has the address {address}, which is not public; give a path")


def _connect(parts: SplitResult, allow_private: bool) -> http.client.HTTPConnection:
    """A connection to an address that was checked: the name is not looked up a second time."""
    secure, host = parts.scheme == "https", parts.hostname or ""
    port = parts.port or (443 if secure else 80)
    connection = (http.client.HTTPSConnection if secure else http.client.HTTPConnection)(host, port)
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    addresses = list(dict.fromkeys(str(entry[4][0]) for entry in found))
    for address in addresses if not allow_private else ():
        _check_public(host, address)
    for address in addresses:
        try:
            sock = socket.create_connection((address, port), timeout=CONNECT_SECONDS)
            connection.sock = ssl.create_default_context().wrap_socket(sock, server_hostname=host) if secure else sock
            return connection
        except OSError as error:
            failure = error
    raise failure


def _store(response: http.client.HTTPResponse, folder: Path, suffix: str, deadline: float) -> tuple[Path, str]:
    """Writes the body to a file in `folder`; the name it shall have is its hash.

    Raises MediaError if it is too long, too short or too slow, and if it is no image or video.
    """
    promised, digest, size = response.length or 0, hashlib.sha256(), 0
    suffix = suffix.lower() if re.fullmatch(r"\.[A-Za-z0-9]{1,5}", suffix) else ""
    path = folder / f"body{suffix}"
    with path.open("xb") as file:
        while max(promised, size) <= MAX_BYTES and (chunk := response.read1(1 << 16)):
            if time.monotonic() > deadline:
                raise MediaError(f"takes longer than {TOTAL_SECONDS:.0f} s")
            size += len(chunk)
            digest.update(chunk)
            file.write(chunk)
    if max(promised, size) > MAX_BYTES:
        raise MediaError(f"is larger than {MAX_BYTES // 10**6} MB")
    if size < max(promised, 1):
        raise MediaError(f"ends after {size} of {promised} bytes" if promised else "is empty")
    try:
        _look_into(path)
    except MediaError as error:
        raise MediaError(str(error).removeprefix(f"{path}: ")) from error
    return path, digest.hexdigest() + suffix


def _look_into(path: Path) -> None:
    """Raises MediaError for a file that is no image, nor a video of which a frame can be decoded."""
    if is_image(path):
        read_image(path)
    else:
        with closing(iterate_video(path, MAX_FRAMES)) as frames:
            next(frames, None)

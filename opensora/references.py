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
import tempfile
import threading
import time
from functools import cache
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult, quote, urljoin, urlsplit

import torch
from torch import Tensor

from opensora.datasets.transforms import get_transform
from opensora.datasets.video import is_image, iterate_video, read_image
from opensora.errors import ConfigError, MediaError
from opensora.files import file_digest

MAX_FRAMES = 4096  # of a reference
MAX_PIXELS = 2**30  # of all its frames at the size that is made: 12 GiB
MAX_BYTES = 200 * 10**6  # of a download
MAX_FILE_BYTES = 2**32  # of a file that is here
MAX_REDIRECTS = 5
TOTAL_SECONDS = 60.0
CONNECT_SECONDS = 10.0

_NAT64 = ip_network("64:ff9b::/96")
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_PART = re.compile(r"(.+)#(first|last|hold)=([1-9]\d*)")  # of a reference: its first or last frames, or a still of many


def read_references(text: str | None, size: tuple[int, int], **options: Any) -> list[Tensor]:
    """Each reference of "a.png;b.mp4" as `read_reference` gives it; None and "" have none."""
    return [read_reference(source, size, **options) for source in _split(text)]


def read_reference(
    source: str,
    size: tuple[int, int],
    *,
    transform: str = "resize_crop",
    cache: str | Path | None = None,
    allow_private: bool = False,
) -> Tensor:
    """An image (T = 1) or a whole video as float32 [3, T, H, W] in [-1, 1] at `size` (H, W).

    `source` is a path or a URL; `#first=17` or `#last=17` after it takes so many frames of a video, `#hold=17` repeats
    an image. Raises ConfigError for a URL that is refused, MediaError for what cannot be fetched or read: broken or
    empty media never count as no reference.
    """
    if match := _PART.fullmatch(source):
        whole = read_reference(match[1], size, transform=transform, cache=cache, allow_private=allow_private)
        indices = _indices(match[2], int(match[3]), whole.shape[1], match[1])
        return whole[:, torch.tensor(indices)]
    to_size = get_transform(transform)
    path = str(fetch(source, cache, allow_private)) if _URL.match(source) else source
    try:
        if is_image(path):
            return to_size(read_image(path), size)
        most = min(MAX_FRAMES, MAX_PIXELS // (size[0] * size[1]))
        return torch.cat([to_size(frame[None], size) for frame in iterate_video(path, most)], dim=1)
    except MediaError as error:
        raise _named(source, path, error) from error


def check_references(text: str | None, *, allow_private: bool = False, offline: bool = False) -> list[int | None]:
    """The number of frames of each reference, None for a URL, which is not contacted, and refused if `offline`.

    Files are decoded to their end, so that what `read_references` would refuse is refused before long work.
    """
    if offline and (found := urls(text)):
        raise ConfigError(f"reference {found[0]!r} is a URL, but offline asks nobody; download it and give its path")
    return [_check(source, allow_private) for source in _split(text)]


def urls(text: str | None) -> list[str]:
    """Those of the references that would be fetched."""
    return [source for source in _split(text) if _URL.match(source)]


def content_hashes(text: str | None, *, allow_private: bool = False) -> dict[str, str]:
    """The SHA-256 of the bytes of each file or URL that references name. Raises MediaError where there are none.

    Only regular files of at most 4 GiB are read.
    """
    files = dict.fromkeys(match[1] if (match := _PART.fullmatch(one)) else one for one in _split(text))
    return {file: _content_hash(file, allow_private) for file in files}


def _content_hash(source: str, allow_private: bool) -> str:
    path = str(fetch(source, None, allow_private)) if _URL.match(source) else source
    try:
        return file_digest(path, MAX_FILE_BYTES)
    except MediaError as error:
        raise _named(source, path, error) from error


def _split(text: str | None) -> list[str]:
    sources = text.split(";") if text else []
    if not all(source.strip() for source in sources):
        raise ConfigError(f"reference_path {text!r} has an empty entry; remove the ';' too many")
    return sources


def _indices(part: str, count: int, frames: int, source: str) -> list[int]:
    """Which of a reference's `frames` a part of it holds. Raises MediaError where it has not that many."""
    if part == "hold" and frames > 1:
        raise MediaError(f"reference {source!r}: has {frames} frames where an image is needed; give an image")
    if part == "last" and frames < count:
        raise MediaError(f"reference {source!r}: has {frames} frames, and {count} are to be kept; give a longer video")
    chosen = {"first": range(min(count, frames)), "last": range(frames - count, frames), "hold": [0] * count}
    return list(chosen[part])


def _check(source: str, allow_private: bool) -> int | None:
    if match := _PART.fullmatch(source):
        frames = _check(match[1], allow_private)
        return frames and len(_indices(match[2], int(match[3]), frames, match[1]))
    if _URL.match(source):
        _parse(source, allow_private)
        return None
    try:
        return len([read_image(source)]) if is_image(source) else sum(1 for _ in iterate_video(source, MAX_FRAMES))
    except MediaError as error:
        raise _named(source, source, error) from error


def _named(source: str, path: str, error: MediaError) -> MediaError:
    reason = str(error).removeprefix(f"{path}: ")
    return MediaError(f"reference {source!r}: {reason}" + ("" if ";" in reason else "; give another"))


@cache
def fetch(url: str, folder: str | Path | None = None, allow_private: bool = False) -> Path:
    """Downloads a URL to `folder`/SHA-256 of the content + suffix, whole or not at all; once in a process.

    `folder` is ~/.cache/opensora/references by default. Raises ConfigError for a URL that is malformed, not http(s),
    or leads (also by a redirect) to an address that is not public without `allow_private`; else MediaError.
    """
    default = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "opensora", "references")
    outcome: list[Path | Exception] = []

    def run() -> None:
        try:
            outcome.append(_follow(url, Path(folder or default).expanduser(), allow_private))
        except Exception as error:
            outcome.append(error)

    thread = threading.Thread(target=run, daemon=True)  # bounds what no timeout covers, such as a header that drips
    thread.start()
    thread.join(TOTAL_SECONDS)
    result = outcome[0] if outcome else MediaError(f"takes longer than {TOTAL_SECONDS:.0f} s")
    if isinstance(result, Path):
        return result
    if isinstance(result, ConfigError):
        raise result
    reason = " ".join(str(result).split())[:200] or type(result).__name__
    raise MediaError(f"reference {url!r}: {reason}; download it yourself and give its path") from result


def _follow(url: str, folder: Path, allow_private: bool) -> Path:
    """The file that a URL leads to."""
    folder.mkdir(parents=True, exist_ok=True)
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


def _store(response: http.client.HTTPResponse, folder: Path, suffix: str, deadline: float) -> Path:
    """Writes the body to `folder` under its hash; MediaError if it is too long, too short or too slow."""
    promised, digest, size = response.length or 0, hashlib.sha256(), 0
    descriptor, temporary = tempfile.mkstemp(dir=folder, prefix=".")
    try:
        with open(descriptor, "wb") as file:
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
        path = folder / (digest.hexdigest() + (suffix.lower() if re.fullmatch(r"\.[A-Za-z0-9]{1,5}", suffix) else ""))
        os.replace(temporary, path)
        return path
    finally:
        Path(temporary).unlink(missing_ok=True)

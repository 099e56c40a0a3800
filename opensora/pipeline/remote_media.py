"""Downloads reference images and videos from untrusted URLs.

Only http and https URLs with public addresses are fetched, within limits of size, time and redirects. A host name is
resolved once, and the connection goes to the address that was checked. No proxy is used: it would resolve the name
itself.
"""

from __future__ import annotations

import hashlib
import http.client
import os
import re
import socket
import ssl
import tempfile
import time
from contextlib import closing
from functools import cache
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network
from pathlib import Path
from urllib.parse import SplitResult, quote, urljoin, urlsplit

from opensora.datasets.video import is_image, iterate_video, read_image
from opensora.errors import ConfigError, MediaError, printable
from opensora.files import cache_path
from opensora.pipeline.reference_path import MAX_FRAMES
from opensora.remote.timeout import call_with_timeout

MAX_BYTES = 200 * 10**6
MAX_REDIRECTS = 5
TOTAL_SECONDS = 60.0
CONNECT_SECONDS = 10.0

_NAT64 = ip_network("64:ff9b::/96")


@cache
def fetch(url: str, folder: str | Path | None = None, allow_private: bool = False) -> Path:
    """Downloads a URL to `folder`/SHA-256 of the content + suffix, atomically and once per process.

    `folder` is ~/.cache/opensora/references by default. Content that is no image or video is deleted. Raises
    ConfigError for a URL that is malformed or not http(s), and for one that leads, also by a redirect, to a private
    address without `allow_private`; MediaError for everything else that goes wrong.
    """
    folder = Path(folder or cache_path("references")).expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".", ignore_cleanup_errors=True) as workspace:
            body, name = call_with_timeout(lambda: _download(url, Path(workspace), allow_private), TOTAL_SECONDS)
            os.replace(body, folder / name)
            return folder / name
    except ConfigError:
        raise
    except Exception as error:  # of sockets, TLS, HTTP and files
        reason = printable(" ".join(str(error).split())[:200]) or type(error).__name__
        raise MediaError(f"reference {url!r}: {reason}; download it yourself and give its path") from error


def check_url(url: str, allow_private: bool) -> SplitResult:
    """The parts of an http(s) URL. Raises ConfigError for any other, without contacting anyone.

    A literal address is checked here, a host name when it is resolved.
    """
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError as error:
        raise ConfigError(f"reference {url!r} is not a valid URL ({error}); correct it") from error
    if parts.scheme not in ("http", "https"):
        raise ConfigError(f"reference {url!r}: only http and https URLs are fetched; give a path instead")
    if not host or parts.username is not None or re.search(r"[\x00-\x20\x7f\\]", url):
        raise ConfigError(f"reference {url!r} is not a valid URL (no host, a user name, or spaces in it); correct it")
    try:
        address = str(ip_address(host))
    except ValueError:
        return parts
    if not allow_private:
        _check_public(host, address)
    return parts


def _check_public(host: str, address: str) -> None:
    """Raises ConfigError for an address that is private, loopback, link-local, multicast or reserved."""
    ip = ip_address(address.split("%")[0])
    if isinstance(ip, IPv6Address):  # some embed the IPv4 address that is reached
        ip = IPv4Address(int(ip) & 0xFFFFFFFF) if ip in _NAT64 else ip.ipv4_mapped or ip.sixtofour or ip
    if not ip.is_global or ip.is_multicast or ip.is_reserved or getattr(ip, "is_site_local", False):
        raise ConfigError(f"reference host '{host}' has the address {address}, which is not public; give a path")


def _download(url: str, folder: Path, allow_private: bool) -> tuple[Path, str]:
    """Follows redirects and writes the body to `folder`; its path, and its file name in the cache."""
    deadline = time.monotonic() + TOTAL_SECONDS
    for _ in range(MAX_REDIRECTS + 1):
        parts = check_url(url, allow_private)
        connection = _connect(parts, allow_private)
        try:
            query = f"?{parts.query}" if parts.query else ""
            connection.request("GET", quote((parts.path or "/") + query, safe="/%:=&~+!$,;@'()*?"))
            with connection.getresponse() as response:
                location = response.headers["Location"]
                if response.status == 200:
                    return _save_body(response, folder, Path(parts.path).suffix, deadline)
                if response.status not in (301, 302, 303, 307, 308) or not location:
                    raise MediaError(f"the server answers {response.status}")
                url = urljoin(url, location)
        finally:
            connection.close()
    raise MediaError(f"redirects more than {MAX_REDIRECTS} times")


def _connect(parts: SplitResult, allow_private: bool) -> http.client.HTTPConnection:
    """A connection to a checked address: the name is not resolved a second time, which DNS rebinding relies on."""
    secure, host = parts.scheme == "https", parts.hostname or ""
    port = parts.port or (443 if secure else 80)
    connection = (http.client.HTTPSConnection if secure else http.client.HTTPConnection)(host, port)
    resolved = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    addresses = list(dict.fromkeys(str(entry[4][0]) for entry in resolved))
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


def _save_body(response: http.client.HTTPResponse, folder: Path, suffix: str, deadline: float) -> tuple[Path, str]:
    """Writes the body to a file in `folder`; its path, and its file name in the cache, which is its hash.

    Raises MediaError for a body that is too long, too short, too slow, or no image or video.
    """
    content_length, digest, size = response.length or 0, hashlib.sha256(), 0
    suffix = suffix.lower() if re.fullmatch(r"\.[A-Za-z0-9]{1,5}", suffix) else ""
    path = folder / f"body{suffix}"
    with path.open("xb") as file:
        while max(content_length, size) <= MAX_BYTES and (chunk := response.read1(1 << 16)):
            if time.monotonic() > deadline:
                raise MediaError(f"takes longer than {TOTAL_SECONDS:.0f} s")
            size += len(chunk)
            digest.update(chunk)
            file.write(chunk)
    if max(content_length, size) > MAX_BYTES:
        raise MediaError(f"is larger than {MAX_BYTES // 10**6} MB")
    if size < max(content_length, 1):
        raise MediaError(f"ends after {size} of {content_length} bytes" if content_length else "is empty")
    try:
        _check_decodes(path)
    except MediaError as error:
        raise MediaError(str(error).removeprefix(f"{path}: ")) from error
    return path, digest.hexdigest() + suffix


def _check_decodes(path: Path) -> None:
    """Raises MediaError unless a file is an image, or a video whose first frame can be decoded."""
    if is_image(path):
        read_image(path)
    else:
        with closing(iterate_video(path, MAX_FRAMES)) as frames:
            next(frames, None)

"""References from URLs. The only address ever contacted is a server of the test's own, on this machine."""

from __future__ import annotations

import hashlib
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch

from opensora.datasets.video import write_image
from opensora.errors import ConfigError, MediaError, OpenSoraError
from opensora.pipeline import remote_media
from opensora.pipeline.references import References, content_hashes, read_reference, read_references
from opensora.pipeline.remote_media import fetch

pytestmark = pytest.mark.timeout(60)
SIZE = (16, 24)
FRAMES = np.random.default_rng(0).integers(0, 256, (1, 32, 48, 3), np.uint8)


class Handler(BaseHTTPRequestHandler):
    """Answers as the function of the path's first part says."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.server.asked.append(self.path)
        self.close_connection = True
        try:
            getattr(self, self.path.split("/")[1].split(".")[0].split("?")[0])()
        except OSError:  # the client has hung up, as it should
            self.server.hung_up.set()

    def log_message(self, *args: object) -> None:
        pass

    def answer(self, status: int = 200, body: bytes = b"", **headers: object) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        self.wfile.write(body)

    def picture(self) -> None:
        self.answer(body=self.server.content, Content_Length=len(self.server.content))

    def without_length(self) -> None:
        self.answer(body=self.server.content, Connection="close")

    def chunks(self) -> None:
        body = b"".join(b"%x\r\n%s\r\n" % (len(c), c) for c in (self.server.content[:100], self.server.content[100:]))
        self.answer(body=body + b"0\r\n\r\n", Transfer_Encoding="chunked")

    def cut_chunks(self) -> None:
        self.answer(body=b"ffff\r\n" + self.server.content[:100], Transfer_Encoding="chunked")

    def short(self) -> None:
        self.answer(body=self.server.content[:-10], Content_Length=len(self.server.content))

    def short_words(self) -> None:
        self.answer(body=b"half of", Content_Length=1000)

    def long(self) -> None:
        self.answer(body=self.server.content + b"more", Content_Length=len(self.server.content))

    def nonsense_length(self) -> None:
        self.answer(body=self.server.content, Content_Length="many", Connection="close")

    def nothing(self) -> None:
        self.answer(Content_Length=0)

    def page(self) -> None:
        self.answer(body=b"<html>not here</html>", Content_Length=21)

    def half_picture(self) -> None:
        self.answer(body=self.server.content[:60], Content_Length=60)

    def words(self) -> None:
        self.answer(body=b"no picture" * 100, Content_Length=1000)

    def colours(self) -> None:
        self.wfile.write(b"HTTP/1.1 \x1b[31mred\x9b2J\x07 \xe2\x80\xae OK\r\n\r\n")

    def title(self) -> None:
        self.wfile.write(b"\x1b]0;title\x07\r\n\r\n")

    def backspace(self) -> None:
        self.wfile.write(b"HTTP/1.1 2x0 \x08\x08\x08\x7f\r\n\r\n")

    def absent(self) -> None:
        self.answer(404, b"no", Content_Length=2)

    def partial(self) -> None:
        self.answer(206, self.server.content[:10], Content_Length=10)

    def huge(self) -> None:
        self.answer(Content_Length=10**12)

    def endless(self) -> None:
        self.answer(Connection="close")
        while True:
            self.wfile.write(bytes(1 << 16))

    def silent(self) -> None:
        self.server.hung_up.wait()

    def drip(self) -> None:
        self.answer(Content_Length=10**6)
        while not self.server.hung_up.wait(0.1):
            self.wfile.write(b".")

    def drip_header(self) -> None:
        self.wfile.write(b"HTTP/1.1 200 OK\r\nX-Slow: ")
        while not self.server.hung_up.wait(0.1):
            self.wfile.write(b".")

    def garbage(self) -> None:
        self.wfile.write(b"\x00\xff not HTTP at all\r\n\r\n")

    def hang_up(self) -> None:
        self.connection.shutdown(socket.SHUT_RDWR)

    def hop(self) -> None:
        """/hop/3 leads to /hop/2 and so on; /hop/0 to the picture."""
        left = int(self.path.split("/")[2])
        self.answer(302, Location=f"/hop/{left - 1}" if left else "/picture.png", Content_Length=0)

    def lost(self) -> None:
        self.answer(302, Content_Length=0)

    def to(self) -> None:
        """/to/URL leads to URL."""
        self.answer(301, Location=self.path.removeprefix("/to/"), Content_Length=0)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[ThreadingHTTPServer]:
    running = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    running.daemon_threads, running.asked, running.hung_up = True, [], threading.Event()
    running.url = f"http://127.0.0.1:{running.server_port}"
    running.content = write_image(FRAMES[0], tmp_path / "served.png").read_bytes()
    thread = threading.Thread(target=running.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    yield running
    running.hung_up.set()
    running.shutdown()
    running.server_close()


@pytest.fixture(autouse=True)
def only_this_machine(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Connecting elsewhere fails the test that does it; gives the addresses that were connected to."""
    fetch.cache_clear()
    connect, contacted = socket.create_connection, []

    def checked(address: tuple[str, int], *args: object, **options: object) -> socket.socket:
        contacted.append(address[0])
        assert address[0] == "127.0.0.1", f"{address} was about to be contacted"
        return connect(address, *args, **options)

    monkeypatch.setattr(remote_media.socket, "create_connection", checked)
    return contacted


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """names(host=addresses, ...) makes the resolver know these hosts and no others; gives the names asked for."""

    def install(**known: list[str]) -> list[str]:
        asked = []

        def look_up(host: str, port: int, *args: object, **options: object) -> list:
            if host == "127.0.0.1":  # asked for when connecting
                return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (host, port))]
            asked.append(host)
            answers = known.get(host.replace(".", "_").replace("-", "_"))
            if answers is None:
                raise socket.gaierror(-2, "Name or service not known")
            return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in answers]

        monkeypatch.setattr(remote_media.socket, "getaddrinfo", look_up)
        return asked

    return install


def check_references(text: str | None, **options: bool) -> list[int | None]:
    return References(SIZE, **options).check(text)


def files(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir()) if folder.exists() else []


def refused(url: str, folder: Path, error: type[OpenSoraError], reason: str, **options: bool) -> None:
    with pytest.raises(error, match=reason) as caught:
        read_reference(url, SIZE, cache=folder, **options)
    assert "\n" not in str(caught.value) and "reference" in str(caught.value)
    assert files(folder) == []


@pytest.mark.parametrize("path", ["picture", "without_length", "chunks", "nonsense_length", "long", "hop/4"])
def test_download(path, server, tmp_path):
    url, folder = f"{server.url}/{path}{'' if '/' in path else '.PNG'}", tmp_path / "cache"
    out = read_reference(url, SIZE, cache=folder, allow_private=True)
    assert torch.equal(out, read_reference(str(tmp_path / "served.png"), SIZE))
    assert files(folder) == [f"{hashlib.sha256(server.content).hexdigest()}.png"]


def test_downloaded_once_and_stored_by_content(server, tmp_path):
    url, folder = f"{server.url}/picture.png?a=1&b=%20x", tmp_path / "cache"
    for _ in range(3):
        read_references(f"{url};{tmp_path / 'served.png'}", SIZE, cache=folder, allow_private=True)
    assert server.asked == ["/picture.png?a=1&b=%20x"]
    path = fetch(f"{server.url}/hop/0", folder, True)
    assert path == folder / f"{hashlib.sha256(server.content).hexdigest()}.png"
    assert [path.name] == files(folder)


@pytest.mark.parametrize("suffix", ["", ".p%2Fng", ".verylongsuffix", ".p ng", ".;rm", "/..", ".\\x"])
def test_odd_names_lead_nowhere_else(suffix, server, tmp_path):
    url, folder = f"{server.url}/picture{suffix}", tmp_path / "deep" / "cache"
    with suppress(OpenSoraError):
        read_reference(url, SIZE, cache=folder, allow_private=True)
    assert set(files(folder)) <= {hashlib.sha256(server.content).hexdigest()}
    assert files(tmp_path / "deep") in ([], ["cache"]) and files(tmp_path) in (["served.png"], ["deep", "served.png"])


def test_default_folder(server, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert fetch(f"{server.url}/picture.png", allow_private=True).parent == tmp_path / "xdg" / "opensora" / "references"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    folder = tmp_path / "home" / ".cache" / "opensora" / "references"
    assert fetch(f"{server.url}/picture.png?2", allow_private=True).parent == folder


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("short.png", "ends after"),
        ("short_words.png", "ends after 7 of 1000 bytes"),
        ("cut_chunks.png", "IncompleteRead"),
        ("nothing.png", "is empty"),
        ("absent.png", "answers 404"),
        ("partial.png", "answers 206"),
        ("lost.png", "answers 302"),
        ("garbage.png", "HTTP"),
        ("hang_up.png", "closed|reset"),
        ("huge.png", "larger than 200 MB"),
        ("hop/5", "redirects more than 5 times"),
        ("hop/1000", "redirects more than 5 times"),
    ],
)
def test_server_misbehaves(path, reason, server, tmp_path):
    refused(f"{server.url}/{path}", tmp_path / "cache", MediaError, reason, allow_private=True)
    assert len(server.asked) <= remote_media.MAX_REDIRECTS + 1


def test_a_page_is_no_picture(server, tmp_path):
    with pytest.raises(MediaError, match=r"page\.png': cannot be read as an image"):
        read_reference(f"{server.url}/page.png", SIZE, cache=tmp_path / "cache", allow_private=True)


@pytest.mark.parametrize("path", ["page.png", "page.mp4", "page", "words.gif", "half_picture.png", "half_picture"])
def test_a_body_that_is_no_media_does_not_stay(path, server, tmp_path):
    refused(f"{server.url}/{path}", tmp_path / "cache", MediaError, "cannot be read", allow_private=True)
    with pytest.raises(MediaError, match="cannot be read"):
        fetch(f"{server.url}/{path}", tmp_path / "cache", True)
    assert files(tmp_path / "cache") == []


def test_a_body_that_cannot_be_used_does_not_stay(server, tmp_path, monkeypatch):
    server.content = write_image(np.zeros((1, 4000, 3), np.uint8), tmp_path / "thin.png").read_bytes()
    refused(f"{server.url}/picture.png", tmp_path / "cache", MediaError, "too long and thin", allow_private=True)


@pytest.mark.parametrize("path", ["colours.png", "title.png", "backspace.png"])
def test_what_a_server_says_cannot_steer_a_terminal(path, server, tmp_path):
    with pytest.raises(MediaError) as caught:
        fetch(f"{server.url}/{path}", tmp_path / "cache", True)
    assert str(caught.value).isprintable()
    assert files(tmp_path / "cache") == []


def test_endless_body(server, tmp_path, monkeypatch):
    monkeypatch.setattr(remote_media, "MAX_BYTES", 10**6)
    refused(f"{server.url}/endless.png", tmp_path / "cache", MediaError, "larger than 1 MB", allow_private=True)
    assert server.hung_up.wait(60)


@pytest.mark.parametrize(
    ("path", "reason"), [("silent.png", "timed out"), ("drip.png", "longer"), ("drip_header.png", "longer")]
)
def test_slow_server(path, reason, server, tmp_path, monkeypatch):
    monkeypatch.setattr(remote_media, "CONNECT_SECONDS" if path == "silent.png" else "TOTAL_SECONDS", 0.5)
    with pytest.raises(MediaError, match=reason):
        read_reference(f"{server.url}/{path}", SIZE, cache=tmp_path / "cache", allow_private=True)
    assert files(tmp_path / "cache") == []  # already: a program that ends now leaves nothing


def test_slow_look_up(names, tmp_path, monkeypatch):
    given_up = threading.Event()
    monkeypatch.setattr(remote_media, "TOTAL_SECONDS", 0.3)
    monkeypatch.setattr(remote_media.socket, "getaddrinfo", lambda *args, **options: given_up.wait())
    refused("http://example.org/a.png", tmp_path / "cache", MediaError, "takes longer")
    given_up.set()


def test_nobody_listens(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/a.png"
        refused(url, tmp_path / "cache", MediaError, "refused|download it yourself", allow_private=True)


def test_not_tls(server, tmp_path):
    url = f"{server.url}/picture.png".replace("http:", "https:")
    refused(url, tmp_path / "cache", MediaError, "SSL|TLS", allow_private=True)
    assert server.asked == []


def test_folder_cannot_be_made(server, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(MediaError, match="reference"):
        read_reference(f"{server.url}/picture.png", SIZE, cache=tmp_path / "file", allow_private=True)


def test_unknown_host(names, tmp_path):
    names()
    refused("http://nowhere.example/a.png", tmp_path / "cache", MediaError, "not known")


@pytest.mark.parametrize(
    "url",
    [
        "ftp://example.org/a.png", "file:///etc/hostname", "s3://bucket/a.png", "gopher://127.0.0.1/a",
        "http://", "http:///a.png", "https://?a.png", "http://user:secret@example.org/a.png", "http://[::1/a.png",
        "http://example.org:99999/a.png", "http://example.org:port/a.png", "http://example.org/a b.png",
        "http://example.org/a\r\nHost: x", "http://example.org\\@127.0.0.1/a.png", "http://127.0.0.1/a.png",
        "http://10.1.2.3/a.png", "http://192.168.0.1/a.png", "http://172.16.0.9/a.png", "http://169.254.169.254/a.png",
        "http://0.0.0.0/a.png", "http://100.64.0.1/a.png", "http://224.0.0.1/a.png", "http://239.255.255.250/a.png",
        "http://240.0.0.1/a.png", "http://255.255.255.255/a.png", "http://[::1]/a.png", "http://[::]/a.png",
        "http://[fe80::1]/a.png", "http://[fc00::1]/a.png", "http://[fec0::1]/a.png", "http://[ff02::1]/a.png",
        "http://[::ffff:127.0.0.1]/a.png", "http://[2002:7f00:1::]/a.png", "http://[64:ff9b::7f00:1]/a.png",
        "http://[2001:db8::1]/a.png", "http://[::7f00:1]/a.png",
    ],
)  # fmt: skip
def test_urls_refused_unseen(url, tmp_path, only_this_machine):
    refused(url, tmp_path / "cache", ConfigError, "reference")
    with pytest.raises(ConfigError, match="reference"):
        check_references(url)
    assert only_this_machine == []


def test_offline_asks_nobody(names, only_this_machine):
    asked = names()
    for url in ("https://example.org/a.png", "http://8.8.8.8/a.mp4#first=17"):
        with pytest.raises(ConfigError, match="is a URL, but offline is set; download it and give its path"):
            check_references(f"a.png;{url}", offline=True)
    assert check_references("", offline=True) == check_references(None, offline=True) == []
    assert asked == only_this_machine == []


def test_content_hashes(tmp_path, server, monkeypatch):
    still = tmp_path / "a.png"
    write_image(FRAMES[0], still)
    digest = hashlib.sha256(still.read_bytes()).hexdigest()
    assert content_hashes(f"{still}#hold=17;{still}") == {str(still): digest}
    assert content_hashes(None) == content_hashes("") == {}
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    url = f"{server.url}/picture.png"
    assert content_hashes(url, allow_private=True) == {url: hashlib.sha256(server.content).hexdigest()}
    with pytest.raises(MediaError, match=r"reference '.*b.png': no such file"):
        content_hashes(str(tmp_path / "b.png"))


def test_check_contacts_nobody(names, only_this_machine):
    asked = names()
    urls = "https://example.org/a.png;http://8.8.8.8:81/b.mp4;HTTPS://EXAMPLE.ORG"
    assert check_references(urls) == [None, None, None]
    assert check_references("http://127.0.0.1/a.png", allow_private=True) == [None]
    assert asked == only_this_machine == []


@pytest.mark.parametrize(
    "addresses",
    [
        ["127.0.0.1"], ["10.0.0.1"], ["::1"], ["fe80::1%2"], ["8.8.8.8", "127.0.0.1"], ["::ffff:10.0.0.1"],
        ["169.254.0.1"],
    ],
)  # fmt: skip
def test_names_of_private_addresses(addresses, names, tmp_path, only_this_machine):
    names(inside_example=addresses)
    refused("http://inside.example/a.png", tmp_path / "cache", ConfigError, "not public")
    assert only_this_machine == []


@pytest.mark.parametrize("host", ["localhost", "127.1", "0x7f.1", "2130706433", "017700000001"])
def test_other_spellings_of_this_machine(host, tmp_path, only_this_machine):
    refused(f"http://{host}/a.png", tmp_path / "cache", OpenSoraError, "reference")
    assert only_this_machine == []


def test_redirect_inwards(server, names, tmp_path, monkeypatch, only_this_machine):
    """A public name (played by this machine) leads to a private one: nothing there is asked."""
    names(public_example=["127.0.0.1"], private_example=["127.0.0.1"])
    check = remote_media._check_public

    def believes_public(host: str, address: str) -> None:
        if host != "public.example":
            check(host, address)

    monkeypatch.setattr(remote_media, "_check_public", believes_public)
    port = server.server_port
    for target in (f"http://127.0.0.1:{port}/picture.png", f"http://private.example:{port}/picture.png"):
        url = f"http://public.example:{port}/to/{target}"
        refused(url, tmp_path / "cache", ConfigError, "not public")
    for target in ("file:///etc/hostname", "ftp://127.0.0.1/a"):
        refused(f"http://public.example:{port}/to/{target}", tmp_path / "cache", ConfigError, "only http and https")
    assert len(only_this_machine) == 4 and all(path.startswith("/to/") for path in server.asked)


def test_the_address_that_was_checked_is_the_one_contacted(server, monkeypatch, tmp_path):
    """A name that is public when it is checked and private when it is used (DNS rebinding) has no second look-up."""
    answers, used = ["93.184.216.34", "127.0.0.1"], []
    monkeypatch.setattr(
        remote_media.socket,
        "getaddrinfo",
        lambda host, port, **options: [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (answers.pop(0), port))],
    )

    def connect(address: tuple[str, int], **options: object) -> socket.socket:
        used.append(address[0])
        raise ConnectionRefusedError(111, "Connection refused")

    monkeypatch.setattr(remote_media.socket, "create_connection", connect)
    refused(f"http://rebinding.example:{server.server_port}/picture.png", tmp_path / "cache", MediaError, "refused")
    assert used == ["93.184.216.34"] and answers == ["127.0.0.1"] and server.asked == []


def test_the_next_address_is_tried(server, names, tmp_path, monkeypatch):
    names(two_example=["8.8.8.8", "127.0.0.1"])
    real = socket.create_connection

    def connect(address: tuple[str, int], **options: object) -> socket.socket:
        if address[0] == "8.8.8.8":
            raise TimeoutError("timed out")
        return real(address, **options)

    monkeypatch.setattr(remote_media.socket, "create_connection", connect)
    url = f"http://two.example:{server.server_port}/picture.png"
    assert read_reference(url, SIZE, cache=tmp_path / "c", allow_private=True).shape == (3, 1, *SIZE)


def test_proxies_are_not_asked(server, tmp_path, monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    fetch(f"{server.url}/picture.png", tmp_path / "cache", True)
    assert server.asked == ["/picture.png"]

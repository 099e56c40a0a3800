"""What programs print: streams that are broken, full, closed or for few characters; nothing foreign unescaped."""

from __future__ import annotations

import json
import logging
import os
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from opensora import cli
from opensora.cli.program import run_program
from opensora.distributed.ranks import ranks, world_size
from opensora.errors import ConfigError, MediaError, WeightsError
from tests.full import count, some

ROOT = Path(__file__).parents[1]
HOSTILE = ["a\x1b[2Jb", "a\rb", "a\x07\x08b", "a\x9b31mb", "a\u202eb", "a\nerror: b", "a\udcffb", "a\x00b"]


def opensora(*argv: str, shell: str = "{}", stdout: int = subprocess.PIPE, **environment: str):
    """A program in a process of its own, as a shell starts it."""
    words = f"'{sys.executable}' -m opensora " + " ".join(f"'{word}'" for word in argv)
    known = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run(
        ["bash", "-c", shell.format(words)], stdout=stdout, stderr=subprocess.PIPE, text=True, env=known, timeout=100
    )


@pytest.mark.parametrize("argv", [("models",), ("--help",), ("generate", "--help-all"), ("--version",)][: count(2, 4)])
def test_a_pipe_that_nobody_reads_is_quiet(argv: tuple[str, ...]) -> None:
    read, write = os.pipe()
    os.close(read)
    try:
        ended = opensora(*argv, stdout=write)
    finally:
        os.close(write)
    assert (ended.returncode, ended.stderr) == (141, "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no full device")
@pytest.mark.parametrize("argv", [("models",), ("train", "--help"), ("--help",)][: count(1, 3)])
def test_a_full_disk_is_told_in_one_line(argv: tuple[str, ...]) -> None:
    ended = opensora(*argv, shell="{} >/dev/full")
    assert ended.returncode == 1
    assert ended.stderr == "error: standard output cannot be written to (No space left on device)\n"


@pytest.mark.parametrize("shell", ["{} >&-", "{} >&- 2>&-", "{} <&- >&- 2>&-", "{} 2>/dev/full >/dev/null"])
@pytest.mark.parametrize(("argv", "status"), [(("inspect", "gone.mp4"), 1), (("models",), 0)][: count(1, 2)])
@some(2)
def test_streams_that_are_closed_end_in_no_traceback(shell: str, argv: tuple[str, ...], status: int) -> None:
    ended = opensora(*argv, shell=shell)
    assert ended.returncode == status and ended.stderr.count("\n") == (status if shell == "{} >&-" else 0)


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252"])
@some(1)
def test_output_for_few_characters(encoding: str) -> None:
    code = "from opensora.cli.program import run_program\nrun_program(lambda: print('каt→é.mp4'))"
    known = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": encoding}
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, env=known, timeout=100)
    assert ended.returncode == 0 and ended.stderr == b""
    assert ended.stdout.startswith(b"\\u043a\\u0430t\\u2192") and ended.stdout.endswith(b".mp4\n")


def shown(text: str) -> bool:
    """Whether a terminal may show a text."""
    return not any((ord(one) < 32 and one not in "\n\t") or 0x7F <= ord(one) < 0xA0 for one in text) and (
        "\u202e" not in text and "\udcff" not in text
    )


@pytest.mark.parametrize("text", HOSTILE, ids=ascii)
@pytest.mark.parametrize("kind", [ConfigError, WeightsError, MediaError])
def test_an_error_is_one_line_that_may_be_shown(capsys: pytest.CaptureFixture, text: str, kind: type) -> None:
    def program() -> None:
        raise kind(f"{text}: HTTP/1.1 500 {text}")

    assert run_program(program) == 1
    error = capsys.readouterr().err
    assert shown(error) and error.count("\n") == 1 and error.startswith("error: a")


@pytest.mark.parametrize("text", HOSTILE, ids=ascii)
def test_what_is_printed_may_be_shown(capsys: pytest.CaptureFixture, text: str) -> None:
    assert run_program(lambda: print(f"tensor {text} float32\nend")) == 0
    out = capsys.readouterr().out
    assert shown(out) and out.endswith("float32\nend\n")


@pytest.mark.parametrize("text", HOSTILE, ids=ascii)
def test_what_is_logged_may_be_shown(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setattr(logging.root, "handlers", [])

    def program() -> None:
        logging.getLogger("opensora").warning("a server said %s", text)
        logging.getLogger("elsewhere").error(f"it said {text}")

    assert run_program(program) == 0
    error = capsys.readouterr().err
    assert shown(error) and error.count("\n") == 2 + ("\n" in text)
    assert error.startswith("a server said a") and "\nit said a" in error


@pytest.mark.parametrize("name", ["a\x1b[2Jb.mp4", "a\rb.png", "a\x9bb.json"])
def test_names_of_files_may_be_shown(
    capsys: pytest.CaptureFixture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path(name).write_text("{}")
    for verb in ("inspect", "replay"):
        assert cli.main([verb, name]) == 1
        error = capsys.readouterr().err
        assert shown(error) and error.count("\n") == 1 and error.startswith("error: a\\")


@pytest.mark.parametrize("name", ["a\x1b[2Jb", "a\rb", "a\x9bb", "a\u202eb"])
def test_names_of_tensors_may_be_shown(capsys: pytest.CaptureFixture, tmp_path: Path, name: str) -> None:
    """In the summary of weights, and in the line that says why they fit nothing."""
    header = json.dumps({name: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    for suffix, content in ((".safetensors", len(header).to_bytes(8, "little") + header + bytes(4)), (".json", b"{}")):
        (tmp_path / f"x{suffix}").write_bytes(content)
    config = tmp_path / "config.py"
    config.write_text("_base_ = {!r}\n".format(str(ROOT / "configs/embedded/inference/sample.py")))
    convert = ["convert", f"{tmp_path}/x.safetensors", f"{tmp_path}/y.pt", "--to", "pt", "--config", str(config)]
    for argv in (["inspect", f"{tmp_path}/x.safetensors"], convert):
        cli.main(argv)
        out, error = capsys.readouterr()
        assert shown(out) and shown(error) and out + error
        assert "Traceback" not in error


@pytest.mark.parametrize("reason", ["bad\x1b[2J thing", "\x9b31m", "a\x08\x07b", "\x1b]0;title\x07"])
def test_the_status_line_of_a_server_may_be_shown(capsys: pytest.CaptureFixture, reason: str) -> None:
    from opensora.pipeline.remote_media import fetch

    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer() -> None:
            client, _ = listener.accept()
            with client:
                client.recv(65536)
                client.sendall(f"HTTP/1.1 500 {reason}\r\nContent-Length: 0\r\n\r\n".encode("latin-1"))

        threading.Thread(target=answer, daemon=True).start()
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/x.png"
        assert run_program(lambda: fetch(url, None, True)) == 1
    error = capsys.readouterr().err
    assert shown(error) and error.count("\n") == 1 and "500" in error


@pytest.mark.parametrize("word", ["o\udcff", "caf\udce9.mp4", "\udc80", "a\0b"])
@pytest.mark.parametrize(
    "argv",
    [
        ["generate", "a cat", "--save-dir"], ["generate", "a cat", "--sample-name"], ["generate"], ["plan", "--prompt"],
        ["generate", "a cat", "--reference-path"], ["generate", "a cat", "--ckpt-path"], ["generate", "x", "--model"],
        ["continue"], ["replay"], ["inspect"], ["convert", "--to", "pt", "x"], ["export", "x"], ["train"],
        ["train-vae"], ["table", "."], ["buckets"], ["extract"], ["search-bs"], ["benchmark", "a cat", "--image"],
        ["replay", "x.mp4", "--save-dir"], ["train", "x", "--load"],
    ],
    ids=" ".join,
)  # fmt: skip
def test_names_that_are_not_utf8_are_refused_before_any_work(
    capsys: pytest.CaptureFixture, argv: list[str], word: str
) -> None:
    assert cli.main([*argv, word]) == 1
    out, error = capsys.readouterr()
    assert out == "" and error.count("\n") == 1 and ("is not UTF-8 text" in error or "NUL" in error)


@pytest.mark.parametrize("value", ["x", "0", "-1", "1.5", "2 ", "", "9" * 5000, "²", "1e3"])
def test_a_world_size_that_is_no_number(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    monkeypatch.setenv("WORLD_SIZE", value)
    if not value:
        assert world_size() == 1
        return
    assert cli.main(["generate", "a cat"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: WORLD_SIZE is ") and error.count("\n") == 1 and "torchrun" in error


@pytest.mark.parametrize(
    ("environment", "problem"),
    [
        ({}, "WORLD_SIZE is 2, but RANK is not set; start the ranks with torchrun"),
        ({"RANK": "0"}, "MASTER_ADDR is not set"),
        ({"RANK": "0", "MASTER_ADDR": "localhost"}, "MASTER_PORT is not set"),
        ({"RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "port"}, "MASTER_PORT is 'port'"),
        ({"RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "70000"}, "MASTER_PORT is '70000'"),
        ({"RANK": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}, "RANK is '2', not an integer from 0 to 1"),
        ({"RANK": "one", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}, "RANK is 'one'"),
        ({"RANK": "0", "LOCAL_RANK": "x", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}, "LOCAL_RANK is 'x'"),
    ],
)
def test_ranks_that_lack_something(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], problem: str
) -> None:
    for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"WORLD_SIZE": "2", **environment}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError) as refused:
        ranks(connecting=True)
    assert problem in str(refused.value)
    assert cli.main(["generate", "a cat"]) == 1
    error = capsys.readouterr().err
    assert problem in error and error.count("\n") == 1


@pytest.mark.parametrize("length", [1, 1_400, 1_600, 100_000])
def test_a_message_stays_short_and_keeps_its_remedy(capsys: pytest.CaptureFixture, length: int):
    def program() -> None:
        raise ConfigError(f"reference {'x' * length}: no such file; give another")

    assert run_program(program) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: reference x") and error.endswith("; give another\n") and len(error) < 1_600

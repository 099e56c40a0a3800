"""A program that is told to end: every stop signal, once and again, leaves nothing half-written."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from opensora.cli.program import run_program
from opensora.files import atomic_write
from opensora.signals import STOPPING, Stopped, defer_stop_signals, handle_stop_signals
from tests.full import count

ROOT = Path(__file__).parents[1]
SAID = "interrupted; nothing half-written was left\n"
PROGRAM = """
import os, sys
from contextlib import contextmanager
from opensora.files import atomic_write
from opensora.cli.program import run_program

number, folder = int(sys.argv[1]), sys.argv[2]

@contextmanager
def begun():
    os.mkdir(folder)
    try:
        yield
    finally:
        os.kill(os.getpid(), number)
        os.rmdir(folder)

def program():
    with begun(), atomic_write(f"{folder}/x.mp4", f"{folder}/x.json") as paths:
        for path in paths:
            path.write_text("half")
        os.kill(os.getpid(), number)
        print("went on")

sys.exit(run_program(program))
"""


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    handlers = {one: signal.getsignal(one) for one in STOPPING}
    yield
    for one, handler in handlers.items():
        signal.signal(one, handler)


@pytest.mark.parametrize("number", STOPPING[: count(2, 3)], ids=lambda number: number.name)
def test_what_it_has_begun_is_put_in_order(tmp_path: Path, number: int) -> None:
    """As a process of its own, with a second signal while it is putting things in order."""
    command = [sys.executable, "-c", PROGRAM, str(int(number)), str(tmp_path / "new")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    ended = subprocess.run(command, capture_output=True, text=True, timeout=100, env=environment)
    assert ended.returncode == 128 + number and ended.stdout == ""
    assert ended.stderr == ("" if number == signal.SIGTERM else SAID)  # torchrun ends the other ranks by that
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("again", [0, 1, 5])
@pytest.mark.parametrize("number", STOPPING, ids=lambda number: number.name)
def test_the_status_tells_which(capsys: pytest.CaptureFixture, number: int, again: int) -> None:
    left: list[str] = []

    def program() -> None:
        try:
            os.kill(os.getpid(), number)
        finally:
            left.append("begun")
            for _ in range(again):
                os.kill(os.getpid(), number)
            left.clear()

    assert run_program(program) == 128 + number
    assert not left and capsys.readouterr().err == ("" if number == signal.SIGTERM else SAID)


@pytest.mark.parametrize("swallows", [KeyboardInterrupt, BaseException])
def test_a_signal_that_a_library_has_swallowed_does_not_make_a_program_deaf(swallows: type[BaseException]) -> None:
    def program() -> None:
        with contextlib.suppress(swallows):
            os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    assert run_program(program) == 130


@pytest.mark.parametrize("number", STOPPING, ids=lambda number: number.name)
def test_what_is_ignored_stays_so(number: int) -> None:
    """As under nohup."""
    signal.signal(number, signal.SIG_IGN)

    def program() -> int:
        os.kill(os.getpid(), number)
        return 7

    assert run_program(program) == 7


@pytest.mark.parametrize("number", STOPPING, ids=lambda number: number.name)
def test_a_signal_waits_for_what_must_not_be_torn_apart(number: int) -> None:
    done = []
    with pytest.raises(Stopped) as stop, handle_stop_signals():
        with defer_stop_signals():
            with defer_stop_signals():
                os.kill(os.getpid(), number)
            done.append("inner")
        done.append("after")
    assert done == ["inner"] and stop.value.status == 128 + number


@pytest.mark.parametrize("moment", range(8))
def test_a_result_and_its_recipe_appear_together_whenever_a_signal_comes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: int
) -> None:
    """At the n-th call that changes the folder, and once more at each one after it."""
    names, calls = [tmp_path / name for name in ("a.mp4", "a.json")], 0
    for path in names:
        path.write_text("old")

    def told(real: object) -> object:
        def call(*args: object, **kwargs: object) -> object:
            nonlocal calls
            calls += 1
            if calls > moment:
                os.kill(os.getpid(), signal.SIGINT)
            return real(*args, **kwargs)

        return call

    for name in ("replace", "unlink", "fsync"):
        monkeypatch.setattr(os, name, told(getattr(os, name)))

    def program() -> None:
        with atomic_write(*names) as temporary:
            for path in temporary:
                path.write_text("new")

    assert run_program(program) == 130
    monkeypatch.undo()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", "a.mp4"]
    assert len({path.read_text() for path in names}) == 1


def test_other_threads_are_left_alone() -> None:
    found: list[int] = []

    def program() -> None:
        with defer_stop_signals(), handle_stop_signals():
            found.append(run_program(lambda: 5))

    thread = threading.Thread(target=program)
    thread.start()
    thread.join()
    assert found == [5]

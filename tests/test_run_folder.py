"""Folders of runs: made without races, locked, gone on in only by the run whose folder it is; full and busy disks."""

from __future__ import annotations

import dataclasses
import errno
import json
import logging
import os
import resource
import shutil
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from opensora.distributed.process_group import RankLayout
from opensora.errors import ConfigError, WeightsError
from opensora.training import run_folder
from opensora.training.checkpoint import folders, write
from opensora.training.checkpoint.snapshot import take_snapshot
from opensora.training.data.history import DataHistory
from opensora.training.ema import EMA
from opensora.training.lock import Lock, holder
from opensora.training.run_folder import publish, refuse_running
from tests.test_trainer import assert_same_end, log, names, trainer

ALL = {"keep_checkpoints": 10}


class TestNewFolders:
    @pytest.mark.parametrize("types", [["A"], ["A", "B/2"], ["x", "y", "z"]])
    def test_many_at_once_have_numbers_of_their_own(self, tmp_path: Path, types: list[str]) -> None:
        with ThreadPoolExecutor(8) as pool:
            made = list(pool.map(lambda n: folders.new_run_folder(str(tmp_path), types[n % len(types)]), range(120)))
        numbers = [int(path.name[:3]) for path in made]
        assert len(set(numbers)) == 120 and all(path.is_dir() for path in made)
        assert sorted(path.name for path in tmp_path.iterdir()) == sorted(path.name for path in made)

    @pytest.mark.parametrize("there", ["file", "file/below", "link/x"])
    def test_where_none_can_be(self, tmp_path: Path, there: str) -> None:
        (tmp_path / "file").write_text("x")
        (tmp_path / "link").symlink_to("link")
        with pytest.raises(WeightsError, match=r"cannot create a run folder .*; see --outputs"):
            trainer(tmp_path / there)


class TestRotation:
    def gathered(self, tmp_path: Path, *how: str) -> Path:
        """A folder with checkpoints of two runs, or copies of all that one has."""
        runs = [trainer(tmp_path / name, seed=number, **ALL) for number, name in enumerate("ab")]
        for run in runs:
            run.run()
        if "copy" in how:
            return shutil.copytree(runs[0].folder, tmp_path / "gathered" / runs[0].folder.name, symlinks=True)
        folder = tmp_path / "gathered"
        for run, name in ((runs[0], "epoch0-global_step4"), (runs[1], "epoch1-global_step8")):
            shutil.copytree(run.folder / name, folder / name)
        if "with run.json" in how:
            shutil.copyfile(runs[1].folder / "run.json", folder / "run.json")
        if "into a run" in how:
            target = runs[1].folder / "epoch0-global_step3"
            shutil.copytree(runs[0].folder / "epoch0-global_step4", target)
            return runs[1].folder
        return folder

    @pytest.mark.parametrize("how", [["bare"], ["with run.json"], ["copy"], ["into a run"]], ids=str)
    def test_gathered_checkpoints_stay(self, tmp_path: Path, how: list[str], caplog: pytest.LogCaptureFixture) -> None:
        folder, seed = self.gathered(tmp_path, *how), 0 if how == ["copy"] else 1
        before = sorted(path for path in folder.rglob("*"))
        caplog.set_level(logging.INFO, "opensora")
        run = trainer(tmp_path / "new", load=str(folders.checkpoints(folder)[-1]), seed=seed, max_steps=14)
        run.run()
        assert run.folder == tmp_path / "new" / "000-Linear-1" and names(run.folder)[-1] == "epoch2-global_step14"
        assert sorted(path for path in folder.rglob("*")) == before
        assert "is not the end of a run in its own folder: continuing in" in caplog.text

    def test_of_an_earlier_version(self, tmp_path: Path) -> None:
        """It does not say who wrote its checkpoints."""
        run = trainer(tmp_path, **ALL)
        run.run()
        for checkpoint in folders.checkpoints(run.folder):
            (checkpoint / "optimizer/manifest.json").unlink()
        (run.folder / "run.json").unlink()
        rest = trainer(tmp_path, load=str(run.folder), max_steps=14)
        rest.run()
        assert rest.folder == tmp_path / "001-Linear-1" and len(names(run.folder)) == 5

    @pytest.mark.parametrize(("first", "second", "kept"), [(10, None, 7), (3, None, 3), (None, None, 2), (2, 4, 4),
                                                           (10, 1, 1)])  # fmt: skip
    def test_the_number_that_is_kept_belongs_to_the_run(
        self, tmp_path: Path, first: int | None, second: int | None, kept: int
    ) -> None:
        run = trainer(tmp_path, keep_checkpoints=first)
        run.run()
        rest = trainer(tmp_path, load=str(run.folder), keep_checkpoints=second, max_steps=14)
        rest.run()
        assert rest.folder == run.folder and len(names(run.folder)) == kept
        again = trainer(tmp_path, load=str(run.folder), max_steps=16)
        again.run()
        assert len(names(run.folder)) == min(second or first or 2, kept + 1)

    def test_a_run_that_moved_is_still_itself(self, tmp_path: Path) -> None:
        run = trainer(tmp_path / "before")
        run.run()
        (tmp_path / "before").rename(tmp_path / "after")
        folder = tmp_path / "after" / run.folder.name
        assert trainer(tmp_path / "new", load=str(folder)).folder == folder

    @pytest.mark.parametrize("content", ["[]", "null", "{", '{"run": 1}', '{"run": "x", "folder": "y", "inode": 3}'])
    def test_a_damaged_name_is_no_name(self, tmp_path: Path, content: str) -> None:
        run = trainer(tmp_path)
        run.run()
        (run.folder / "run.json").write_text(content)
        rest = trainer(tmp_path, load=str(run.folder))
        assert rest.folder == tmp_path / "001-Linear-1" and rest.step == 10


@contextmanager
def locked_by_another(folder: Path) -> Iterator[int]:
    """Another process has the lock of a folder."""
    ready, told = os.pipe()
    wait, go = os.pipe()
    child = os.fork()
    if not child:
        os.close(go)
        held = Lock(folder)
        os.write(told, b"x" if held else b"")
        os.read(wait, 1)
        os._exit(0)
    os.close(wait)
    os.read(ready, 1)
    try:
        yield child
    finally:
        os.close(go)
        os.waitpid(child, 0)


class TestLock:
    @pytest.mark.parametrize("source", ["{folder}", "{folder}/latest", "{folder}/epoch2-global_step10", "auto"])
    def test_a_second_trainer_is_refused(self, tmp_path: Path, source: str) -> None:
        run = trainer(tmp_path)
        run.run()
        load = source.format(folder=run.folder)
        with locked_by_another(run.folder) as other:
            with pytest.raises(WeightsError, match=rf"000-Linear-1: is already being trained, by process {other} on "):
                trainer(tmp_path, load=load, max_steps=20)
            if source != "auto":
                with pytest.raises(WeightsError, match="is already being trained"):
                    refuse_running(trainer(tmp_path / "x", load=load, start_from_scratch=True).settings.__class__(
                        model={"type": "Linear/1"}, load=load))  # fmt: skip
            assert trainer(tmp_path).folder.name == "001-Linear-1", "a run of its own may begin"
        assert names(run.folder)[-1] == "epoch2-global_step10"
        assert trainer(tmp_path, load=str(run.folder)).folder == run.folder, "a process that is gone has no lock"

    def test_a_run_holds_it_until_its_end(self, tmp_path: Path) -> None:
        def free() -> bool:
            if child := os.fork():
                return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
            try:
                Lock(run.folder)
            except WeightsError:
                os._exit(1)
            os._exit(0)

        run, seen = trainer(tmp_path), []
        run.callbacks.append(lambda run: seen.append(free()) if run.step in (1, 7) else None)
        run.run()
        assert seen == [False, False] and free()

    @pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
    def test_a_file_system_without_locks(
        self, tmp_path: Path, number: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        def none(*_: Any) -> None:
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr("fcntl.lockf", none)
        trainer(tmp_path, max_steps=2).run()
        assert "no locks there" in caplog.text

    @pytest.mark.parametrize("content", ["", "{", "[]", '{"host": 1}', '{"host": "\\u001b[2J", "pid": 3}'])
    def test_a_damaged_lock_file_names_nobody(self, tmp_path: Path, content: str) -> None:
        run = trainer(tmp_path)
        run.run()
        with locked_by_another(run.folder):
            (run.folder / "run.lock").write_text(content)
            with pytest.raises(WeightsError, match="is already being trained") as raised:
                trainer(tmp_path, load=str(run.folder))
            assert "\x1b" not in str(raised.value)


class TestAuto:
    def test_begins_where_there_is_nothing(self, tmp_path: Path) -> None:
        run = trainer(tmp_path, load="auto")
        assert run.step == 0 and run.folder == tmp_path / "000-Linear-1"
        run.run()
        again = trainer(tmp_path, load="auto", max_steps=12)
        assert again.step == 10 and again.folder == run.folder

    def test_takes_the_newest_that_is_whole_and_fits(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        clock = iter(range(1000, 10**6))
        monkeypatch.setattr("opensora.training.checkpoint.manifest.time.time", lambda: next(clock))
        one, two = {"fingerprint": {"lr": "0.1"}}, {"fingerprint": {"lr": "0.2"}}
        runs = [trainer(tmp_path, **prints) for prints in (one, one, two)]
        for run in runs:
            run.run()
        (folders.checkpoints(runs[1].folder)[-1] / "ema.pt").write_bytes(b"")
        caplog.set_level(logging.INFO, "opensora")
        rest = trainer(tmp_path, load="auto", max_steps=12, **one)
        assert rest.step == 8 and rest.resumed_from == runs[1].folder.resolve()
        assert "001-Linear-1/epoch2-global_step10/ema.pt: has changed" in caplog.text
        caplog.clear()
        assert trainer(tmp_path, load="auto", fingerprint={"lr": "0.3"}).step == 0
        assert "lr was 0.2 and is 0.3" in caplog.text and "no checkpoint below" in caplog.text
        assert trainer(tmp_path, load="auto", fingerprint={"lr": "0.3"}, accept_changes=True).step == 10

    def test_ends_like_the_uninterrupted_run(self, tmp_path: Path) -> None:
        whole = trainer(tmp_path / "whole", log_every=3)
        whole.run()
        for stop in (3, 7, None):
            with pytest.raises(KeyboardInterrupt) if stop else contextmanager(lambda: (yield))():
                run = trainer(tmp_path / "auto", load="auto", log_every=3, interrupt_at=stop)
                run.run()
        assert_same_end(run, whole)

    def test_not_from_scratch(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match=r"--load auto resumes .* remove --start-from-scratch"):
            trainer(tmp_path, load="auto", start_from_scratch=True)


class TestRestarts:
    @pytest.fixture(autouse=True)
    def _started(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "abc")

    def crash(self, outputs: Path, **how: Any) -> Any:
        run = trainer(outputs, interrupt_at=5, **how)
        with pytest.raises(KeyboardInterrupt):
            run.run()
        return run

    @pytest.mark.parametrize("name", ["abc", "none", ""])
    @pytest.mark.parametrize("load", [None, "auto", "elsewhere", "from scratch"])
    def test_a_restarted_run_goes_on(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, load: str | None
    ) -> None:
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", name)
        how: dict[str, Any] = {"load": load}
        if load not in (None, "auto"):
            how = {"load": str(trainer(tmp_path / "x", max_steps=2).run()), "start_from_scratch": load != "elsewhere"}
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", name)
        first = self.crash(tmp_path / "runs", **how)
        shutil.rmtree(tmp_path / "x", ignore_errors=True) if load == "from scratch" else None
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
        rest = trainer(tmp_path / "runs", **how)
        assert rest.step == 4 and rest.folder.samefile(first.folder)
        assert rest.run().parent.samefile(first.folder) and rest.step == 10

    @pytest.mark.parametrize("change", [{"TORCHELASTIC_RUN_ID": "other"}, {"TORCHELASTIC_RESTART_COUNT": "0"}, {}])
    def test_another_start_begins(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, str]
    ) -> None:
        self.crash(tmp_path)
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
        for key, value in change.items():
            monkeypatch.setenv(key, value)
        if not change:
            monkeypatch.delenv("TORCHELASTIC_RUN_ID")
        assert trainer(tmp_path).step == 0

    @pytest.mark.parametrize("value", ["x", "-1", "1.5", ""])
    def test_a_count_that_is_none(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: str) -> None:
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", value)
        with pytest.raises(ConfigError, match="TORCHELASTIC_RESTART_COUNT"):
            trainer(tmp_path)


class TestResult:
    def result(self, folder: Path, text: str) -> Path:
        (folder / "ema").mkdir(parents=True, exist_ok=True)
        (folder / "ema" / "config.json").write_text(text)
        return publish(folder)

    def test_that_of_another_run_stays(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        assert self.result(tmp_path / "000-A", "first") == tmp_path / "ema"
        assert self.result(tmp_path / "001-A", "second") == tmp_path / "001-A" / "ema"
        assert (tmp_path / "ema" / "config.json").read_text() == "first" and "belongs to another run" in caplog.text
        assert self.result(tmp_path / "000-A", "first again") == tmp_path / "ema"
        assert (tmp_path / "ema" / "config.json").read_text() == "first again"

    @pytest.mark.parametrize("there", ["folder", "file", "link"])
    def test_what_no_run_made_stays(self, tmp_path: Path, there: str) -> None:
        link = tmp_path / "ema"
        if there == "folder":
            link.mkdir()
        elif there == "file":
            link.write_text("x")
        else:
            (tmp_path / "elsewhere").mkdir()
            link.symlink_to("elsewhere")
        assert self.result(tmp_path / "000-A", "x") == tmp_path / "000-A" / "ema"
        assert link.is_symlink() == (there == "link") and not (link / "config.json").exists()

    def test_the_result_of_a_run_that_was_removed_does_not(self, tmp_path: Path) -> None:
        self.result(tmp_path / "000-A", "x")
        shutil.rmtree(tmp_path / "000-A")
        assert self.result(tmp_path / "001-A", "y") == tmp_path / "ema"
        assert (tmp_path / "ema" / "config.json").read_text() == "y"

    def test_without_links(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def none(*_: Any) -> None:
            raise OSError(errno.EPERM, "no links")

        monkeypatch.setattr(Path, "symlink_to", none)
        assert self.result(tmp_path / "000-A", "x") == tmp_path / "000-A" / "ema" and not (tmp_path / "ema").exists()


def save(folder: Path, step: int, width: int = 200) -> Path:
    """A checkpoint of four times 160 kB."""
    folder.mkdir(exist_ok=True)
    model = nn.Linear(width, width)
    optimizer, scaler = torch.optim.AdamW(model.parameters()), torch.amp.GradScaler("cpu", enabled=False)
    model(torch.ones(1, width)).sum().backward()
    optimizer.step()
    position = {"epoch": 0, "step": step, "global_step": step}
    snapshot = take_snapshot(model, EMA(model, 0.9), optimizer, scaler, RankLayout())
    return write.write_checkpoint(folder, snapshot, {}, position, keep=2)


@pytest.fixture
def small_disk(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Path]:
    """A file system of so many kB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={request.param}k", "tmpfs", str(folder)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no file system can be mounted here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


class TestDisk:
    @pytest.mark.parametrize("looks", [True, False], ids=["looked", "not looked"])
    @pytest.mark.parametrize("small_disk", [750, 900, 1050, 1250], indirect=True)
    def test_a_full_one_is_called_that(self, small_disk: Path, monkeypatch: pytest.MonkeyPatch, looks: bool) -> None:
        """The second checkpoint does not fit: at its model, its averages, or its optimizer."""
        first = save(small_disk, 1)
        if not looks:
            monkeypatch.setattr(write, "_require_space", lambda *_: None)
        with pytest.raises(
            WeightsError, match=r"step2: cannot be written: the disk is full \(.*make room, then .*--load"
        ):
            save(small_disk, 2)
        assert names(small_disk) == [first.name] and not list(small_disk.glob(".*"))

    @pytest.mark.parametrize("kilobytes", [1, 100, 250])
    def test_a_limit_on_files(self, tmp_path: Path, kilobytes: int) -> None:
        first, before = save(tmp_path, 1), resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (kilobytes * 1000, before[1]))
        try:
            with pytest.raises(WeightsError, match=r"step2: cannot be written: files may not become that large here"):
                save(tmp_path, 2)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert names(tmp_path) == [first.name] and not list(tmp_path.glob(".*"))

    @pytest.mark.parametrize(
        "words", ["unexpected pos 64 vs 0", "I/O error: no room (os error 28)", "quota (os error 122)"]
    )
    def test_words_of_libraries(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: str) -> None:
        def fail(*_: Any) -> None:
            monkeypatch.setattr(write, "_free_bytes", lambda _: 10)
            raise RuntimeError(f"[enforce fail at inline_container.cc:672] . {words}")

        monkeypatch.setattr(torch, "save", fail)
        with pytest.raises(WeightsError, match="the disk is full"):
            save(tmp_path, 1)

    def test_a_run_ends_with_its_earlier_checkpoints(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        run = trainer(tmp_path, max_steps=6)
        free = iter([10**9, 10**9, 0, 0, 0, 0])
        monkeypatch.setattr(write, "_free_bytes", lambda _: next(free))
        with pytest.raises(WeightsError, match=r"step6: cannot be written: the disk is full .*--load .*000-Linear-1"):
            run.run()
        assert names(run.folder) == ["epoch0-global_step2", "epoch0-global_step4"]
        assert not list(run.folder.glob(".*"))

    @pytest.mark.parametrize("number", [errno.EBUSY, errno.EPERM, errno.ESTALE])
    @pytest.mark.parametrize("what", ["rename", "rmtree"])
    def test_an_old_checkpoint_that_stays_is_a_warning(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, number: int, what: str
    ) -> None:
        def fails(own: Any, names: tuple[str, ...]) -> Any:
            def call(path: Any, *args: Any, **how: Any) -> Any:
                if Path(path).name.strip(".").startswith(names) and not Path(path).name.endswith(".tmp"):
                    raise OSError(number, os.strerror(number))
                return own(path, *args, **how)

            return call

        busy = ("epoch0-global_step2", "epoch0-global_step4")
        target = (Path, "rename") if what == "rename" else (shutil, "rmtree")
        monkeypatch.setattr(*target, fails(getattr(*target), busy))
        run = trainer(tmp_path)
        run.run()
        assert names(run.folder)[-2:] == ["epoch1-global_step8", "epoch2-global_step10"]
        assert "cannot be removed" in caplog.text and "training continues" in caplog.text

    def test_the_log_and_its_boards_do_without_room(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        class Full:
            def step(self, *_: Any) -> None:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

            close = step

        run = trainer(tmp_path)
        run.tracker.backends.append(Full())
        (run.folder / "log.jsonl").mkdir()
        run.run()
        assert run.step == 10 and run.tracker.backends == []
        assert caplog.text.count("lines are missing") == 1 and caplog.text.count("Full is left out") == 1


def test_damaged_lines_of_a_log_are_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = trainer(tmp_path)
    run.run()
    lines = (run.folder / "log.jsonl").read_bytes().splitlines(keepends=True)
    spoilt = [
        lines[0],
        b"\x00" * 40 + b"\n",
        b'{"step": "x"}\n',
        b"[1]}\n",
        b'{"loss": 1}\n',
        b"\xff}\n",
        *lines[1:],
        b"{",
    ]
    (run.folder / "log.jsonl").write_bytes(b"".join(spoilt))
    rest = trainer(tmp_path, load=str(run.folder))
    assert [line["step"] for line in log(rest.folder)] == list(range(1, 11))
    assert "5 damaged lines are left out" in caplog.text


@pytest.mark.parametrize(
    ("first", "setting"),
    [
        ({"max_steps": 10}, "max_steps than 10"),
        ({"max_steps": None, "epochs": 2}, "epochs than 2"),
        ({"max_steps": 3}, "max_steps than 3"),
    ],
)
def test_a_finished_run_says_what_to_raise(
    tmp_path: Path, first: dict[str, Any], setting: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "opensora")
    run = trainer(tmp_path, **first)
    run.run()
    assert (
        f"step {run.step} is done, saved in {run.saved}; resume with --load {run.folder} and more {setting}"
        in caplog.text
    )
    caplog.clear()
    again = trainer(tmp_path, load=str(run.folder), **first)
    assert again.run().samefile(run.saved)
    assert f"step {run.step} is done" in caplog.text and f"and more {setting}" in caplog.text


def test_who_has_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "a" * 5000)
    held = Lock(tmp_path)
    assert holder(tmp_path).pid == os.getpid() and len(holder(tmp_path).launcher) == 1024
    held.release()
    assert holder(tmp_path / "nowhere") is None
    assert json.loads((tmp_path / "run.lock").read_text())["pid"] == os.getpid()


def test_keep_is_not_lost_in_a_new_folder(tmp_path: Path) -> None:
    run = trainer(tmp_path, keep_checkpoints=7)
    run.run()
    rest = trainer(tmp_path, load=str(folders.checkpoints(run.folder)[0]))
    assert rest.folder != run.folder and run_folder.identify(rest.folder).keep_checkpoints == 7


@pytest.mark.parametrize("words", [{}, {"the table": "3 rows of it are others"}, {"lr": "unused"}])
def test_changes_are_told_in_words(tmp_path: Path, words: dict[str, str]) -> None:
    run = trainer(tmp_path, fingerprint={"the table": "a" * 64})
    run.run()
    asked = dataclasses.replace(run.settings, load=str(run.folder))
    told = words.get("the table", "the table was aaa")

    class Explained(DataHistory):
        def explain_changes(self, folder: Path, fingerprint: Any) -> dict[str, str]:
            return words

    with pytest.raises(ConfigError, match=told):
        run.__class__(
            asked, nn.Linear(4, 4), run.train_step.loss, torch.device("cpu"), 5,
            fingerprint={"the table": "b" * 64}, history=Explained(RankLayout()),
        )  # fmt: skip

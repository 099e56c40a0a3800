"""A Ray cluster of this machine gives the table of every other executor, and loses nothing with a worker."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from opensora.cli import main
from opensora.curation.clip import Clip
from opensora.curation.curate import CurationReport, CurationSettings, curate
from opensora.curation.execution.settings import ExecutorSettings
from opensora.curation.stages import registry
from opensora.curation.stages.stage import Columns, Place, Stage
from opensora.datasets.video import write_image
from opensora.errors import ConfigError
from tests.curation.footage import footage
from tests.full import FULL
from tests.ray_cluster import ray_cluster

RAY = ExecutorSettings("ray")


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    with ray_cluster(num_cpus=2) as ray:
        yield ray


def run(target: Path, source: Path, stages: tuple[str, ...], **how: Any) -> tuple[CurationReport, str, str]:
    """The report, the sorted lines of the table, and those of its quarantine."""
    report = curate(CurationSettings(str(source), str(target), stages, **how))
    texts = [file.read_text() for file in (target, Path(f"{target}.quarantine.jsonl"))]
    return report, *("\n".join(sorted(text.splitlines())) for text in texts)


def test_all_executors_write_the_same_table(cluster: Any, tmp_path: Path) -> None:
    source = tmp_path / "in"
    source.mkdir()
    footage(source / "three.mp4", (30, 25, 40), seed=1)
    footage(source / "one.mp4", (20,), seed=10)
    (source / "broken.mp4").write_bytes((source / "three.mp4").read_bytes()[:3000])
    stages = ("probe", "scenes", "health", *(("motion", "camera") if FULL else ()))
    serial = run(tmp_path / "serial.csv", source, stages, executor=ExecutorSettings(workers=0))
    assert serial[0] == CurationReport(4, 1, 17 if FULL else 9)
    if FULL:  # tests/curation/test_curate.py compares the pool of two
        assert run(tmp_path / "pool.csv", source, stages, executor=ExecutorSettings(workers=2)) == serial
    assert run(tmp_path / "ray.csv", source, stages, executor=RAY) == serial
    shards = [tmp_path / f"{shard}.csv" for shard in (0, 1)]
    for shard, target in enumerate(shards):
        run(target, source, stages, executor=ExecutorSettings(workers=0), shard=(shard, 2))
    ledgers = tuple(f"{target}.ledger" for target in shards)
    merged = run(tmp_path / "merged.csv", source, stages, other_ledgers=ledgers)
    assert merged == (serial[0]._replace(computed=0), *serial[1:])


@dataclass(frozen=True)
class Deadly(Stage):
    """Ends its own process, or the Ray worker that started it, as the name of a file says."""

    on_accelerator: bool = False

    name: ClassVar[str] = "deadly"
    columns: ClassVar[tuple[str, ...]] = ("fine",)

    @property
    def place(self) -> Place:
        return "accelerator" if self.on_accelerator else "processor"

    def process(self, clip: Clip) -> Columns:
        kind = Path(clip.path).name.split("_")[0]
        if kind in ("child", "worker"):
            os.kill(os.getpid() if kind == "child" else os.getppid(), signal.SIGKILL)
        return {"fine": 1}


@pytest.mark.skipif(not FULL, reason="tests/curation/test_curate.py kills local workers: set OPENSORA_FULL=1")
@pytest.mark.parametrize("on_accelerator", [False, True])
def test_what_kills_a_worker_is_left_out_by_name(
    cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, on_accelerator: bool
) -> None:
    """Ray Core tasks and actors alike; without GPUs an actor takes a core."""
    monkeypatch.setitem(registry.STAGES, "deadly", Deadly)
    for number, name in enumerate(("good", "child", "worker", "other")):
        write_image(np.full((16, 16, 3), number, np.uint8), tmp_path / f"{name}_{number}.png")
    target = tmp_path / "out.csv"
    options = {"deadly": {"on_accelerator": on_accelerator}}
    report = curate(CurationSettings(str(tmp_path), str(target), ("deadly",), options, executor=RAY))
    assert (report.rows, report.quarantined) == (2, 2)
    lines = map(json.loads, Path(f"{target}.quarantine.jsonl").read_text().splitlines())
    errors = {Path(bad["path"]).name.split("_")[0]: bad for bad in lines}
    assert "given up after 2 attempts; its process ended (signal 9)" in errors["child"]["error"]
    assert "given up after 2 attempts; its Ray worker ended" in errors["worker"]["error"]
    assert {bad["attempts"] for bad in errors.values()} == {2}


@pytest.mark.skipif(not FULL, reason="starts workers for one line; OPENSORA_FULL=1")
def test_a_stage_without_its_package_is_one_line(cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry.STAGES, "lacking", Lacking)
    write_image(np.zeros((16, 16, 3), np.uint8), tmp_path / "a.png")
    with pytest.raises(ConfigError, match="no such package here"):
        curate(CurationSettings(str(tmp_path), str(tmp_path / "out.csv"), ("lacking",), executor=RAY))


@dataclass(frozen=True)
class Lacking(Stage):
    """Cannot be set up on workers."""

    name: ClassVar[str] = "lacking"
    columns: ClassVar[tuple[str, ...]] = ("fine",)

    def check(self) -> None:
        pass

    def setup(self) -> None:
        raise ConfigError("no such package here")

    def process(self, clip: Clip) -> Columns:
        raise AssertionError


def test_without_ray(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    write_image(np.zeros((16, 16, 3), np.uint8), tmp_path / "a.png")
    assert main(["data", "curate", str(tmp_path), str(tmp_path / "out.csv"), "--executor", "ray"]) == 1
    assert "pip install 'opensora[ray]'" in capsys.readouterr().err and not (tmp_path / "out.csv").exists()


def test_settings_that_contradict_each_other() -> None:
    settings = CurationSettings("in", "out.csv", executor=replace(RAY, kind="local", address="auto"))
    with pytest.raises(ConfigError, match="--executor ray"):
        curate(settings)

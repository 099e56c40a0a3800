"""From files to a table: stages, ledger, executors, and what cannot be used."""

from __future__ import annotations

import csv
import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from opensora.curation.clip import Clip
from opensora.curation.curate import CurationReport, CurationSettings, curate
from opensora.curation.execution.ledger import open_ledger
from opensora.curation.execution.settings import ExecutorSettings, Limits
from opensora.curation.stages import registry
from opensora.curation.stages.names import STAGE_NAMES
from opensora.curation.stages.stage import Columns, Stage
from opensora.datasets.video import write_image, write_video
from opensora.errors import ConfigError, MediaError
from tests.curation.footage import HEIGHT, WIDTH, footage, scene
from tests.full import count

STAGES = ("probe", "scenes", "health")
SERIAL, POOL = ExecutorSettings(workers=0), ExecutorSettings(workers=2)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("footage")
    footage(folder / "three.mp4", (30, 25, 40), seed=1)
    footage(folder / "one.mp4", (20,), seed=10)
    (folder / "one.txt").write_text("a square")
    (folder / "again.mp4").write_bytes((folder / "one.mp4").read_bytes())
    (folder / "broken.mp4").write_bytes((folder / "three.mp4").read_bytes()[:3000])
    return folder


@pytest.fixture
def settings(source: Path, tmp_path: Path) -> CurationSettings:
    return CurationSettings(str(source), str(tmp_path / "out.csv"), STAGES, executor=SERIAL)


def rows(settings: CurationSettings) -> list[dict[str, str]]:
    with open(settings.target, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def quarantine(settings: CurationSettings) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(f"{settings.target}.quarantine.jsonl").read_text().splitlines()]


def test_scenes_become_rows(settings: CurationSettings) -> None:
    assert curate(settings) == CurationReport(5, 1, 9)
    found = rows(settings)
    assert [Path(row["path"]).name for row in found] == ["again.mp4", "one.mp4", "three.mp4", "three.mp4", "three.mp4"]
    assert [row["num_frames"] for row in found] == ["20", "20", "30", "25", "40"]
    assert [row["scene"] for row in found[2:]] == ["0", "1", "2"]
    assert found[2]["end_pts"] == found[3]["start_pts"] and found[4]["end_pts"] == ""
    assert found[1]["text"] == "a square" and found[0]["height"] == str(HEIGHT) and found[0]["width"] == str(WIDTH)
    [bad] = quarantine(settings)
    assert bad["stage"] == "probe" and "broken.mp4" in bad["path"] and "broken.mp4" in bad["error"]
    with open_ledger(f"{settings.target}.ledger") as ledger:
        tools = {stage: tool for (stage, _), tool in ledger.tools().items()}
    assert tools["scenes"]["settings"]["detector"] == "adaptive" and set(tools) == set(STAGES)


def test_only_what_has_changed_is_computed(settings: CurationSettings, source: Path) -> None:
    assert curate(settings).computed == 9
    again = replace(settings, force=True)
    first = Path(settings.target).read_bytes()
    assert curate(again).computed == 0 and Path(settings.target).read_bytes() == first
    assert curate(replace(again, options={"health": {"dark": 30}})).computed == 4
    assert curate(replace(again, retry_errors=True)).computed == 1


@dataclass(frozen=True)
class Trouble(Stage):
    """Does what the first letter of a file name says."""

    name: ClassVar[str] = "trouble"
    columns: ClassVar[tuple[str, ...]] = ("fine",)

    def process(self, clip: Clip) -> Columns:
        kind = Path(clip.path).name.split("_")[0]
        if kind == "crash":
            os.kill(os.getpid(), signal.SIGSEGV)
        elif kind == "exit":
            os._exit(3)
        elif kind == "hang":
            time.sleep(60)
        elif kind == "hog":
            held = [np.ones(2**24) for _ in range(8)]  # 1 GiB
            time.sleep(60 + len(held) * 0)
        elif kind == "bug":
            raise KeyError("x")
        elif kind == "media":
            raise MediaError(f"{clip.path}: has no colour; give it one")
        return {"fine": 1}


def run_trouble(tmp_path: Path, names: tuple[str, ...], limits: Limits) -> tuple[CurationReport, list[dict[str, Any]]]:
    """The report and the quarantine of pictures with these names, on two workers."""
    folder = tmp_path / "in"
    folder.mkdir()
    for number, name in enumerate(names):
        write_image(np.full((16, 16, 3), number, np.uint8), folder / f"{name}_{number}.png")
    executor = replace(POOL, limits=limits)
    settings = CurationSettings(str(folder), str(tmp_path / "out.csv"), ("trouble",), executor=executor)
    return curate(settings), quarantine(settings)


def test_trouble_ends_one_item_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry.STAGES, "trouble", Trouble)
    names = ("crash", "exit", "hang", "bug", "media", "good", "other")
    report, bad = run_trouble(tmp_path, names, Limits(seconds=4))
    assert (report.rows, report.quarantined) == (2, 5)
    errors = {Path(one["path"]).name.split("_")[0]: (one["error"], one["attempts"]) for one in bad}
    assert "signal 11" in errors["crash"][0] and errors["crash"][1] == 2
    assert "status 3" in errors["exit"][0] and "more than 4 s" in errors["hang"][0] and "KeyError" in errors["bug"][0]
    assert errors["media"] == (f"{tmp_path}/in/media_4.png: has no colour; give it one", 1)


def test_too_much_memory_ends_one_item_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry.STAGES, "trouble", Trouble)
    report, [bad] = run_trouble(tmp_path, ("hog", "good"), Limits(memory_mib=700))
    assert (report.rows, report.quarantined) == (1, 1)
    assert "hog_0.png" in bad["error"] and "more than 700 MiB" in bad["error"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"stages": ("prob",)}, "did you mean 'probe'"), ({"stages": ("probe", "probe")}, "named twice"),
        ({"options": {"scenes": {"detektor": "x"}}}, "no setting 'detektor'"), ({"target": "x.txt"}, "is a .csv"),
        ({"options": {"scenes": {"detector": "x"}}}, "is not known"),
        ({"options": {"scenes": {"threshold": "x"}}}, "scenes.threshold"),
        ({"options": {"health": {"dark": 1.5}}}, "health.dark"), ({"source": "gone.csv"}, "cannot be read"),
    ],
)  # fmt: skip
def test_what_is_refused_at_once(settings: CurationSettings, change: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        curate(replace(settings, **change))
    assert not Path(settings.target).exists()


def test_health(tmp_path: Path) -> None:
    from opensora.curation.stages.health import Health

    def health(frames: np.ndarray, fps: float = 10) -> Columns:
        return Health().process(Clip(str(write_video(frames, tmp_path / "h.mp4", fps))))

    moving = scene(5, 20)
    assert health(moving)["repeated"] == 0 and health(moving)["bars"] == ""
    doubled = health(np.repeat(moving[:10], 2, 0))
    assert doubled["repeated"] == pytest.approx(10 / 19, abs=0.01) and doubled["real_fps"] == pytest.approx(
        4.7, abs=0.1
    )
    frozen = health(np.concatenate([moving, np.repeat(moving[-1:], 15, 0)]))
    assert frozen["frozen"] == pytest.approx(1.5, abs=0.11)
    assert health(np.concatenate([moving[:10], np.zeros_like(moving[:10])]))["black"] == 0.5
    barred = np.zeros((10, HEIGHT + 40, WIDTH, 3), np.uint8)
    barred[:, 20:-20] = moving[:10]
    assert health(barred)["bars"] in (f"20 0 {HEIGHT} {WIDTH}", f"19 0 {HEIGHT + 2} {WIDTH}")


def test_the_list_of_names_is_complete() -> None:
    assert tuple(registry.STAGES) == STAGE_NAMES


@pytest.mark.parametrize("number", range(count(1, 30)))
def test_a_killed_run_goes_on(source: Path, settings: CurationSettings, tmp_path: Path, number: int) -> None:
    """The table is that of an undisturbed run, and nothing is computed twice but what was in flight."""
    curate(settings)
    whole = Path(settings.target).read_bytes()
    target = tmp_path / "killed.csv"
    argv = [sys.executable, "-m", "opensora", "data", "curate", str(source), str(target), "--workers", "2"]
    argv += ["--stages", ",".join(STAGES), "--force"]
    ledger = Path(f"{target}.ledger")
    process = subprocess.Popen(argv, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    moment = random.Random(f"{os.environ.get('OPENSORA_TEST_SEED', '0')}/{number}")
    results, seconds = moment.randrange(9), moment.uniform(0, 0.3)
    while process.poll() is None and stored(ledger) < results:
        time.sleep(0.02)
    time.sleep(seconds)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    computed = stored(ledger)
    report = curate(replace(settings, target=str(target), force=True))
    assert target.read_bytes() == whole
    assert computed + report.computed == 9


def stored(ledger: Path) -> int:
    """The number of results in a ledger that another process writes."""
    try:
        with sqlite3.connect(f"file:{ledger}?mode=ro", uri=True) as connection:
            return int(connection.execute("SELECT count(*) FROM results").fetchone()[0])
    except sqlite3.OperationalError:
        return 0

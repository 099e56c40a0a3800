"""A published table without its videos: the same data set on another machine."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import torch

from opensora.cli import main
from opensora.curation.curate import CurationSettings, curate
from opensora.curation.execution.settings import ExecutorSettings
from opensora.datasets.datasets import VideoTextDataset
from opensora.datasets.table import read_table
from opensora.training.data.data_record import cells_of, record_of_table
from tests.curation.footage import footage


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with footage in `raw`, the table `clips.csv` of its scenes, and `published.csv` with relative paths."""
    folder = tmp_path_factory.mktemp("published")
    (folder / "raw/deep").mkdir(parents=True)
    footage(folder / "raw/three.mp4", (20, 18), seed=1)
    footage(folder / "raw/deep/one.mp4", (20,), seed=10)
    footage(folder / "raw/deep/three.mp4", (16,), seed=20)
    settings = CurationSettings(
        str(folder / "raw"), str(folder / "clips.csv"), ("probe", "scenes"), executor=ExecutorSettings(workers=0)
    )
    assert curate(settings).rows == 4
    arguments = ["--relpath", str(folder / "raw"), "--output", str(folder / "published.csv")]
    assert main(["data", "edit", str(folder / "clips.csv"), *arguments]) == 0
    return folder


def find(published: Path, root: Path, capsys: pytest.CaptureFixture, *more: str) -> tuple[int, str, str]:
    arguments = ["--root", str(root), "--output", str(root.parent / "found.csv"), *more]
    status = main(["data", "paths", str(published), *arguments])
    return status, *capsys.readouterr()


def copies(published: Path, root: Path, **names: str) -> None:
    for file, name in names.items():
        target = root / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes((published / "raw" / f"{file.replace('__', '/')}.mp4").read_bytes())


@pytest.mark.parametrize("moved", [False, True])
def test_the_same_data_set_elsewhere(
    moved: bool, published: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    root = tmp_path / "mine"
    names = {"three": "x.mp4", "deep__one": "y/z.mp4", "deep__three": "three.mp4"}
    if not moved:
        names = {name: f"{name.replace('__', '/')}.mp4" for name in names}
    copies(published, root, **names)
    assert find(published / "published.csv", root, capsys)[0] == 0
    tables = published / "clips.csv", tmp_path / "found.csv"
    here, there = (VideoTextDataset(path, 4, 2, (32, 32), seed=3) for path in tables)
    assert all(torch.equal(here[row]["video"], there[row]["video"]) for row in range(4))
    digests = {record_of_table(table, cells_of(table)).digest for table in map(read_table, tables)}
    assert len(digests) == 1
    assert (tmp_path / "found.csv.quarantine.jsonl").read_text() == ""


def test_sources_that_are_missing_or_differ_are_named(
    published: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    root = tmp_path / "mine"
    copies(published, root, three="three.mp4", deep__one="deep/three.mp4")
    status, printed, _ = find(published / "published.csv", root, capsys)
    assert status == 0 and "found.csv: 3 rows" in printed
    assert f"deep/three.mp4: {root}/deep/three.mp4 differs from the source" in printed
    [left] = [json.loads(line) for line in (tmp_path / "found.csv.quarantine.jsonl").read_text().splitlines()]
    assert left["path"] == "deep/three.mp4"
    with (tmp_path / "found.csv").open(newline="") as file:
        assert {row["path"] for row in csv.DictReader(file)} == {f"{root}/three.mp4", f"{root}/deep/three.mp4"}
    (root / "deep/three.mp4").unlink()
    status, printed, _ = find(published / "published.csv", root, capsys, "--force")
    assert status == 0 and "deep/one.mp4: is missing" in printed and "found.csv: 2 rows" in printed


def test_without_any_source_nothing_is_written(published: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    footage(tmp_path / "other.mp4", (16,), seed=99)
    (tmp_path / "mine").mkdir()
    (tmp_path / "other.mp4").rename(tmp_path / "mine/other.mp4")
    status, _, told = find(published / "published.csv", tmp_path / "mine", capsys)
    assert status != 0 and "none of its sources is below" in told and not (tmp_path / "found.csv").exists()


@pytest.mark.parametrize(
    ("paths", "found"),
    [
        (["three.mp4"], ["three.mp4"]), (["/data/videos/deep/one.mp4"], ["deep/one.mp4"]),
        (["C:\\videos\\deep\\one.mp4"], ["deep/one.mp4"]), (["../raw/three.mp4", "three.mp4"], ["three.mp4"]),
        (["a/three.mp4", "b/three.mp4", "deep/one.mp4"], ["three.mp4", "deep/one.mp4"]),
        (["deep/../three.mp4", "./three.mp4"], ["three.mp4"]),
    ],
)  # fmt: skip
def test_tables_without_hashes(
    paths: list[str], found: list[str], published: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    table = tmp_path / "table.csv"
    with table.open("w", newline="") as file:
        csv.writer(file).writerows([["path"], *([path] for path in paths)])
    output = tmp_path / "found.csv"
    assert main(["data", "paths", str(table), str(published / "raw"), str(output)]) == 0
    with output.open(newline="") as file:
        assert [row["path"] for row in csv.DictReader(file)] == [str(published / "raw" / name) for name in found]

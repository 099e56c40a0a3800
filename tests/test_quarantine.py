"""The files of a run that cannot be read: listed once, counted over ranks and resumes, and not too many of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from opensora.datasets.quarantine import Quarantine, UnreadableRow
from opensora.datasets.table import Table, TextColumn
from opensora.errors import MediaError


def test_quarantine_names_each_file_once(tmp_path, caplog):
    path = tmp_path / "broken.jsonl"
    broken = [UnreadableRow(row, f"{row}\n.mp4", "is cut off") for row in range(4)]
    quarantine = Quarantine(path, num_rows=100, most=0.03)
    quarantine.add(broken[:2])
    quarantine.add(broken[:3])
    assert len(quarantine) == 3
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {**one._asdict(), "key": "0" * 32} for one in broken[:3]
    ]
    with pytest.raises(MediaError, match=r"4 of 100 files cannot be read, over the limit of 3.*broken.jsonl"):
        quarantine.add(broken[3:])
    path.write_bytes(path.read_bytes()[:-9])  # as a crash leaves it
    again = Quarantine(path, num_rows=100)
    again.add(broken)
    lines = path.read_text().splitlines()
    assert len(again) == 4 and len(lines) == 5 and json.loads(lines[4])["path"] == broken[3].path
    assert "is skipped: is cut off" in caplog.text


@pytest.mark.parametrize(("num_rows", "may_be"), [(1, 0), (2, 1), (10, 1), (100, 5)])
def test_how_many_may_be_broken(num_rows, may_be, tmp_path):
    quarantine = Quarantine(tmp_path / "broken.jsonl", num_rows)
    broken = [UnreadableRow(row, f"{row}.mp4", "is cut off") for row in range(num_rows)]
    quarantine.add(broken[:may_be])
    with pytest.raises(MediaError, match="over the limit"):
        quarantine.add(broken[: may_be + 1])


def test_quarantine_that_cannot_be_written(tmp_path):
    quarantine = Quarantine(tmp_path / "no folder" / "broken.jsonl", 10)
    with pytest.raises(MediaError, match="cannot be written"):
        quarantine.add([UnreadableRow(0, "a.mp4", "is cut off")])


def listed(folder: Path, name: str, *paths: Path) -> Path:
    """A list of broken files, as a run left it."""
    folder.mkdir(exist_ok=True)
    quarantine = Quarantine(folder / name, num_rows=100)
    quarantine.add(UnreadableRow(row, str(path), "is cut off") for row, path in enumerate(paths))
    return folder


@pytest.mark.parametrize("names", [["quarantine.jsonl"], ["quarantine.1.jsonl", "quarantine.rank2.jsonl"]])
@pytest.mark.parametrize("former", [False, True])
def test_the_limit_is_that_of_a_run_over_ranks_and_resumes(names: list[str], former: bool, tmp_path: Path) -> None:
    for number, name in enumerate(names):
        listed(tmp_path / "run", name, *[tmp_path / f"{number}{row}.mp4" for row in range(4)][number:])
    folder = tmp_path / "next" if former else tmp_path / "run"
    folder.mkdir(exist_ok=True)
    how = {"former": [tmp_path / "run"]} if former else {}
    again = Quarantine(folder / "quarantine.jsonl", 100, **how)
    assert len(again) == 4
    again.add([UnreadableRow(10, "new.mp4", "is cut off")])
    with pytest.raises(MediaError, match="6 of 100 files cannot be read, over the limit of 5"):
        again.add([UnreadableRow(11, "newer.mp4", "is cut off")])
    with pytest.raises(MediaError, match="6 of 100"):
        Quarantine(folder / "quarantine.jsonl", 100).check()


@pytest.mark.parametrize("remedy", ["mended", "taken out", "removed"])
def test_what_was_mended_no_longer_counts(remedy: str, tmp_path: Path) -> None:
    paths = [tmp_path / f"{row}.mp4" for row in range(4)]
    [path.write_bytes(b"cut off") for path in paths[:2]]
    listed(tmp_path, "quarantine.jsonl", *paths)
    table = Table("table.csv", TextColumn(map(str, paths)))
    assert len(Quarantine(tmp_path / "quarantine.jsonl", 100, table=table)) == 4
    if remedy == "mended":
        [path.write_bytes(b"whole") for path in paths[1:3]]
    elif remedy == "taken out":
        table = Table("table.csv", TextColumn(map(str, paths[:2])))
    else:
        [path.unlink() for path in paths[:2]]
    again = Quarantine(tmp_path / "quarantine.jsonl", 100, table=table)
    left = 4 if remedy == "removed" else 2  # a file that is gone is not mended
    assert len(again) == left
    again.add([UnreadableRow(1, table.path[1], "is cut off")])
    assert len(Quarantine(tmp_path / "quarantine.jsonl", 100, table=table)) == left + (remedy == "mended")


@pytest.mark.parametrize(
    "line",
    [b"[]", b"null", b"{", b'{"path": 3}', b'{"row": -1, "path": "a", "reason": ""}', b"\xff\xfe", b"[" * 10**5,
     b'{"row": ' + b"9" * 5000 + b', "path": "a", "reason": "b"}'],
    ids=lambda line: repr(line[:12]),
)  # fmt: skip
def test_a_damaged_line_names_nothing(line: bytes, tmp_path: Path) -> None:
    whole = b'{"row": 3, "path": "gone.mp4", "reason": "x"}\n'
    (tmp_path / "quarantine.jsonl").write_bytes(whole + line + b"\n")
    assert Quarantine(tmp_path / "quarantine.jsonl", 100).rows == {3}

"""What a run learns from, item by item: contents count, names do not, and what has changed is named."""

from __future__ import annotations

import csv
import os
from pathlib import Path

import numpy as np
import pytest

from opensora.datasets.table import read_table
from opensora.training.data.data_record import FILE, DataRecord, cells_of, read_record, record_of_table

ROWS = [("a.mp4", "one", 20), ("b.mp4", "two", 30), ("c.mp4", "three", 40)]


def record(folder: Path, rows: list[tuple], contents: dict[str, bytes | None] | None = None) -> DataRecord:
    """Of a table of these rows; each file holds its name unless `contents` say otherwise."""
    folder.mkdir(exist_ok=True)
    for path, *_ in rows:
        content = (contents or {}).get(path, path.encode())
        (folder / path).unlink(missing_ok=True)
        if content is not None:
            (folder / path).write_bytes(content)
    with (folder / "table.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("path", "text", "num_frames"), *((folder / row[0], *row[1:]) for row in rows)])
    table = read_table(folder / "table.csv")
    return record_of_table(table, cells_of(table))


@pytest.mark.parametrize(
    ("rows", "contents", "words"),
    [
        (ROWS, {"b.mp4": b"other"}, ["1 rows changed: ", "b.mp4 (its file)"]),
        (ROWS, {"b.mp4": None}, ["1 rows changed: ", "b.mp4 (its file is not there)"]),
        ([("a.mp4", "new", 20), *ROWS[1:]], {}, ["1 rows changed: ", "a.mp4 (its cells)"]),
        ([("a.mp4", "one", 21), *ROWS[1:]], {"a.mp4": b"other"}, ["a.mp4 (its cells and its file)"]),
        ([*ROWS, ("d.mp4", "four", 1)], {}, ["1 rows added: ", "d.mp4"]),
        (ROWS[1:], {}, ["1 rows removed: ", "a.mp4"]),
        ([*ROWS, *[(f"{n}.mp4", "x", 1) for n in range(5)]], {}, ["5 rows added: ", " and 2 more"]),
        ([ROWS[1], ROWS[0], ROWS[2]], {}, ["the rows are in another order"]),
        ([*ROWS, ROWS[0]], {}, ["1 rows added: ", "a.mp4"]),
        ([ROWS[1], ("d.mp4", "four", 1)], {}, ["1 rows added: ", "d.mp4", "2 rows removed: ", "a.mp4", "c.mp4"]),
    ],
)  # fmt: skip
def test_what_has_changed_is_named(rows: list, contents: dict, words: list[str], tmp_path: Path) -> None:
    before = record(tmp_path / "data", ROWS)
    (tmp_path / "run").mkdir()
    before.save(tmp_path / "run")
    now = record(tmp_path / "data", rows, contents)
    told = now.changes_since(read_record(tmp_path / "run", "row"))
    assert all(word in told for word in words) and now.digest != before.digest


def test_the_size_and_time_of_a_file_are_not_its_content(tmp_path: Path) -> None:
    before = record(tmp_path, ROWS)
    times = os.stat(tmp_path / "a.mp4")
    (tmp_path / "a.mp4").write_bytes(b"A.mp4")  # as long
    os.utime(tmp_path / "a.mp4", ns=(times.st_atime_ns, times.st_mtime_ns))
    table = read_table(tmp_path / "table.csv")
    assert "a.mp4 (its file)" in record_of_table(table, cells_of(table)).changes_since(before)
    (tmp_path / "a.mp4").write_bytes(b"a.mp4")
    assert record_of_table(table, cells_of(table)).changes_since(before) == ""


def test_what_is_moved_has_not_changed(tmp_path: Path) -> None:
    before, now = record(tmp_path / "one", ROWS), record(tmp_path / "two", ROWS)
    assert before.digest == now.digest and now.changes_since(before) == ""


@pytest.mark.parametrize("damage", [b"", b"\x08" + b"\0" * 7 + b"{}      ", b"text" * 100, None])
def test_a_damaged_record_is_none(damage: bytes | None, tmp_path: Path) -> None:
    record(tmp_path, ROWS).save(tmp_path)
    assert len(read_record(tmp_path, "row")) == 3
    content = (tmp_path / FILE).read_bytes()
    (tmp_path / FILE).write_bytes(content[:-40] if damage is None else damage)
    assert read_record(tmp_path, "row") is None


def test_many_rows_are_compared_at_once() -> None:
    cells = np.arange(2**17 * 2, dtype=np.uint64).view(np.uint8).reshape(-1, 16)
    before = DataRecord("row", [""] * len(cells), cells, np.ones_like(cells))
    files = np.ones_like(cells)
    files[77] = 2
    now = DataRecord("row", [""] * len(cells), cells, files)
    assert now.changes_since(before) == "1 rows changed:  (its file)"

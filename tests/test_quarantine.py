"""The files of a run that cannot be read: listed once, counted over ranks and resumes, and not too many of them."""

from __future__ import annotations

import json

import pytest

from opensora.datasets.quarantine import Broken, Quarantine
from opensora.errors import MediaError


def test_quarantine_names_each_file_once(tmp_path, caplog):
    path = tmp_path / "broken.jsonl"
    broken = [Broken(row, f"{row}\n.mp4", "is cut off") for row in range(4)]
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
    broken = [Broken(row, f"{row}.mp4", "is cut off") for row in range(num_rows)]
    quarantine.add(broken[:may_be])
    with pytest.raises(MediaError, match="over the limit"):
        quarantine.add(broken[: may_be + 1])


def test_quarantine_that_cannot_be_written(tmp_path):
    quarantine = Quarantine(tmp_path / "no folder" / "broken.jsonl", 10)
    with pytest.raises(MediaError, match="cannot be written"):
        quarantine.add([Broken(0, "a.mp4", "is cut off")])

"""The table that is made of a folder: its rows, its texts, and files that cannot be read."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest

from opensora import cli
from opensora.datasets.clips import make_clip
from opensora.datasets.table import read_table
from opensora.datasets.video import write_image, write_video
from opensora.errors import ConfigError, MediaError
from opensora.video_table import find_media, make_table, read_row


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two videos, one of them with a text, an image below, and what does not count."""
    monkeypatch.chdir(tmp_path)
    videos = Path("videos")
    (videos / "more").mkdir(parents=True)
    write_video(make_clip(0, 0, 9, 32, 48).video, videos / "boat_on_a_lake.mp4", 12)
    write_video(make_clip(0, 1, 5, 33, 17).video, videos / "b.mp4", 30)
    (videos / "b.txt").write_text('a "boat", \n  going home\n', encoding="utf-8")
    write_image(np.zeros((20, 30, 3), np.uint8), videos / "more" / "dark.png")
    (videos / "readme.md").write_text("not this")
    write_image(np.zeros((20, 30, 3), np.uint8), videos / "more" / ".hidden.png")
    return videos


def rows_of(table: str) -> list[dict[str, str]]:
    with open(table, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_every_column(folder: Path) -> None:
    made = make_table(folder, "out/videos.csv")
    assert (made.num_rows, made.broken, made.num_captions) == (3, [], 1)
    b, boat, dark = rows_of("out/videos.csv")
    names = ["path", "text", "num_frames", "width", "height", "aspect_ratio", "resolution", "fps"]
    assert list(b) == names
    assert list(b.values()) == ["videos/b.mp4", 'a "boat", going home', "5", "17", "33", "1.9412", "561", "30.0"]
    assert list(boat.values())[1:] == ["boat on a lake", "9", "48", "32", "0.6667", "1536", "12.0"]
    assert list(dark.values()) == ["videos/more/dark.png", "dark", "1", "30", "20", "0.6667", "600", ""]


def test_training_reads_it(folder: Path) -> None:
    make_table(folder, "videos.csv")
    table = read_table("videos.csv")
    assert [table.path[row] for row in range(3)] == [
        "videos/b.mp4",
        "videos/boat_on_a_lake.mp4",
        "videos/more/dark.png",
    ]
    assert table.text[0] == 'a "boat", going home'
    assert [column.tolist() for column in table.sizes()] == [[5, 9, 1], [33, 32, 20], [17, 48, 30]]


def test_broken_files_are_named_and_left_out(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    whole = (folder / "boat_on_a_lake.mp4").read_bytes()
    (folder / "cut.mp4").write_bytes(whole[: len(whole) // 2])
    (folder / "text.png").write_text("no picture")
    (folder / "more" / "dark.txt").write_bytes(b"\xff\xfe\x00")
    made = make_table(folder, "videos.csv")
    assert made.num_rows == 2
    assert [problem.split(":")[0] for problem in made.broken] == [
        "videos/cut.mp4",
        "videos/more/dark.png",
        "videos/text.png",
    ]
    assert "dark.txt cannot be read; save it as UTF-8" in made.broken[1]
    assert all(problem in caplog.text for problem in made.broken)
    assert "cut.mp4" not in Path("videos.csv").read_text()


def test_a_folder_of_broken_files(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_text("nothing")
    with pytest.raises(MediaError, match=r"nothing in .* of 1 found; the first: .*a\.mp4: cannot be read as a video"):
        make_table(tmp_path, tmp_path / "videos.csv")
    assert not (tmp_path / "videos.csv").exists()


def test_what_is_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match="no such folder"):
        make_table("nowhere", "videos.csv")
    Path("empty").mkdir()
    with pytest.raises(ConfigError, match=r"holds no videos or images \(.*\.mp4.*\); name another folder"):
        make_table("empty", "videos.csv")
    with pytest.raises(ConfigError, match=r"videos\.xlsx: the table is written as CSV"):
        make_table(folder, "videos.xlsx")


def test_a_table_that_is_there_stays(folder: Path) -> None:
    Path("videos.csv").write_text("mine")
    with pytest.raises(ConfigError, match=r"is there already; .* --force"):
        make_table(folder, "videos.csv")
    assert Path("videos.csv").read_text() == "mine"
    assert make_table(folder, "videos.csv", force=True).num_rows == 3
    assert len(rows_of("videos.csv")) == 3


def test_a_table_appears_whole_or_not_at_all(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("csv.writer", stop)
    with pytest.raises(KeyboardInterrupt):
        make_table(folder, "videos.csv")
    assert [path.name for path in Path().iterdir()] == ["videos"]


def test_only_the_first_frame_is_decoded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    own = read_row.__globals__["read_span"]

    def counting(path: Path, choose: object, convert: object) -> object:
        return own(path, choose, lambda frame: (seen.append(1), convert(frame))[1])

    monkeypatch.setattr("opensora.video_table.read_span", counting)
    assert read_row(folder / "boat_on_a_lake.mp4").num_frames == 9
    assert len(seen) == 1


def test_other_files_are_mentioned(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    assert [file.name for file in find_media(folder)] == ["b.mp4", "boat_on_a_lake.mp4", "dark.png"]
    assert "left alone, because of their suffixes: 1, such as videos/readme.md" in caplog.text


def test_the_verb(folder: Path, capsys: pytest.CaptureFixture) -> None:
    assert cli.main(["table", "videos", "videos.csv"]) == 0
    assert capsys.readouterr().out == "videos.csv: 3 rows, 1 of them with a text of their own\n"
    assert cli.main(["table", "videos", "videos.csv"]) == 1
    assert "--force" in capsys.readouterr().err

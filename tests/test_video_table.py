"""The table that is made of a folder: its rows, its texts, and files that cannot be read."""

from __future__ import annotations

import csv
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from opensora import cli
from opensora.datasets.folder_table import find_media, make_table, read_row
from opensora.datasets.synthetic.render import make_clip
from opensora.datasets.table import read_table
from opensora.datasets.video import write_image, write_video
from opensora.errors import ConfigError, MediaError


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
    assert "dark.txt: cannot be read; save it as UTF-8" in made.broken[1]
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
    with pytest.raises(ConfigError, match=r"already exists; .* --force"):
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

    def counting(path: Path, choose: object, convert: object, span: object) -> object:
        return own(path, choose, lambda frame: (seen.append(1), convert(frame))[1], span)

    monkeypatch.setattr("opensora.datasets.folder_table.read_span", counting)
    assert read_row(folder / "boat_on_a_lake.mp4").num_frames == 9
    assert len(seen) == 1


def test_other_files_are_mentioned(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    assert [file.name for file in find_media(folder)] == ["b.mp4", "boat_on_a_lake.mp4", "dark.png"]
    assert "ignored because of their suffixes: 1, such as videos/readme.md" in caplog.text


def test_texts_made_of_names_are_counted_and_can_be_refused(
    folder: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture
) -> None:
    assert make_table(folder, "videos.csv").num_named == 2
    assert "captions from file names: 2, such as 'boat on a lake' of videos/boat_on_a_lake.mp4" in caplog.text
    assert cli.main(["table", "videos", "new.csv", "--captions", "required"]) == 1
    error = capsys.readouterr().err
    assert "2 of 3 files have no caption, such as videos/boat_on_a_lake.mp4" in error
    assert "write it into boat_on_a_lake.txt" in error and not Path("new.csv").exists()
    (folder / "boat_on_a_lake.txt").write_text("a boat")
    (folder / "more" / "dark.txt").write_text("")
    with pytest.raises(ConfigError, match=r"1 of 3 .* such as videos/more/dark\.png"):
        make_table(folder, "new.csv", captions="required")
    assert make_table(folder, "new.csv").summary() == "3 rows, 2 with a caption of their own, 1 with an empty one"
    (folder / "more" / "dark.txt").write_text("night")
    assert make_table(folder, "new.csv", force=True, captions="required").num_captions == 3


@pytest.mark.parametrize(
    ("names", "texts", "named", "refused", "example"),
    [
        (["clip 00.mp4"], {}, 1, 1, "'clip 00' of videos/clip 00.mp4"),
        (["A_b-c.png", "z.png"], {}, 2, 2, "'A b-c' of videos/A_b-c.png"),
        (["IMG_0001.webp", "a.png", "b.png"], {"a": "a cat", "b": ""}, 1, 2, "'IMG 0001' of videos/IMG_0001.webp"),
        (["x/東京.png", "y.png"], {"y": "night"}, 1, 1, "'東京' of videos/x/東京.png"),
    ],
    ids=["clip", "pictures", "empty text", "other letters"],
)
def test_texts_made_of_names_of_other_kinds(
    names: list[str], texts: dict[str, str], named: int, refused: int, example: str, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    for name in names:
        file = Path("videos") / name
        file.parent.mkdir(parents=True, exist_ok=True)
        if file.suffix == ".mp4":
            write_video(make_clip(0, 0, 5, 16, 24).video, file, 12)
        else:
            Image.fromarray(np.zeros((20, 30, 3), np.uint8)).save(file)
    for name, text in texts.items():
        (Path("videos") / f"{name}.txt").write_text(text)
    assert make_table("videos", "videos.csv").num_named == named
    assert f"captions from file names: {named}, such as {example}" in caplog.text
    with pytest.raises(ConfigError, match=rf"^{refused} of {len(names)} files have no caption"):
        make_table("videos", "new.csv", captions="required")
    assert not Path("new.csv").exists()


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"\xef\xbb\xbfa boat\r\n", "a boat"),
        ("a boat, café".encode("utf-16"), "a boat, café"),
        (b" \n ", ""),
        (b"207", "207"),
    ],
)
def test_texts_as_editors_save_them(content: bytes, text: str, folder: Path) -> None:
    (folder / "b.txt").write_bytes(content)
    assert read_row(folder / "b.mp4").text == text


def test_a_text_without_end_is_left_out(folder: Path) -> None:
    (folder / "b.txt").write_text("a" * 100_001)
    (folder / "more" / "dark.txt").write_text("a" * 500_000)
    [first, second] = make_table(folder, "videos.csv").broken
    assert "b.txt: its caption cannot be used, the value must be at most 100000 characters long" in first
    assert "dark.txt: is larger than" in second


def test_what_folders_hold_besides_good_files(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each has its line, and the table is written."""
    (folder / "zero.mp4").touch()
    (folder / "loop.mp4").symlink_to("loop.mp4")
    (folder / "gone.png").symlink_to("nowhere.png")
    (folder / "again").symlink_to("..")
    (folder / "photo.heic").write_bytes(b"\0\0\0\x18ftypheic" + bytes(100))
    (folder / "pages.mp4").write_text("<html>")
    (folder / "more" / "closed").mkdir()
    scan = os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: refuse(path) if str(path).endswith("closed") else scan(path))
    made = make_table(folder, "videos.csv")
    assert made.num_rows == 3
    lines = {Path(line.split(":")[0]).name: line for line in made.broken}
    assert len(lines) == len(made.broken) == 7
    for name, words in {
        "zero.mp4": "cannot be read", "loop.mp4": "broken link", "gone.png": "broken link", "again": "not followed",
        "photo.heic": "HEIC", "pages.mp4": "cannot be read", "closed": "cannot be read (Permission denied)",
    }.items():  # fmt: skip
        assert words in lines[name]


def refuse(path: object) -> None:
    raise PermissionError(13, "Permission denied", str(path))


@pytest.mark.parametrize("name", [b"caf\xe9", b"\xff\xfe", b'a\x80b, "c"', b" blanks ", b"#hash", b"a;b|c\td"])
def test_folders_of_any_name_make_tables_that_can_be_read(name: bytes, folder: Path) -> None:
    videos = folder.rename(os.fsdecode(name))
    (videos / os.fsdecode(name + b".png")).write_bytes((videos / "more" / "dark.png").read_bytes())
    made = make_table(videos, "videos.csv")
    assert made.num_rows == 4 and not made.broken
    table = read_table("videos.csv")
    assert all(os.path.isfile(table.file(row)) for row in range(4)) and not len(table.missing().rows)
    assert table.num_frames.tolist().count(1) == 2


def test_the_verb(folder: Path, capsys: pytest.CaptureFixture) -> None:
    assert cli.main(["table", "videos", "videos.csv"]) == 0
    counts = "3 rows, 1 with a caption of their own, 2 with one from their file names"
    assert capsys.readouterr().out == f"videos.csv: {counts}\n"
    assert cli.main(["table", "videos", "videos.csv"]) == 1
    assert "--force" in capsys.readouterr().err

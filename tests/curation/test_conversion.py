"""`opensora data convert` and `webdataset`: each kind, tars from anyone."""

from __future__ import annotations

import csv
import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest

from opensora.cli import main
from opensora.datasets.video import write_image, write_video


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def convert(*argv: str) -> list[dict[str, str]]:
    assert main(["data", "convert", *argv, "--output", "out.csv", "--force"]) == 0
    with open("out.csv", newline="", encoding="utf-8", errors="surrogateescape") as file:
        return list(csv.DictReader(file))


def refused(capsys: pytest.CaptureFixture, *argv: str) -> str:
    """The single line of a refusal, which leaves nothing."""
    before = sorted(Path().rglob("*"))
    assert main(["data", *argv]) == 1
    assert sorted(Path().rglob("*")) == before
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


def touch(*names: str) -> None:
    for name in names:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).touch()


def test_folders_are_listed_by_kind_and_sorted(here: Path) -> None:
    touch("m/b/x.mp4", "m/a.MOV", "m/c.png", "m/b/y.gif", "m/.hidden.mp4", "m/note.doc", "m/\udcff.avi")
    rows = convert("video", "m")
    assert [row["relpath"] for row in rows] == ["a.MOV", "b/x.mp4", "b/y.gif", "\udcff.avi"]
    assert rows[1] == {"path": "m/b/x.mp4", "id": "x", "relpath": "b/x.mp4"}
    assert [row["path"] for row in convert("image", "m")] == ["m/c.png"]


def test_classes_become_captions(here: Path) -> None:
    touch("ucf/videos/ApplyEyeMakeup/v_1.avi", "ucf/videos/TaiChi/v_2.avi", "i/train/n01440764/a.JPEG", "j/cat/1.png")
    assert [row["text"] for row in convert("ucf101", "ucf")] == ["Apply Eye Makeup", "Tai Chi"]
    Path("i/LOC_synset_mapping.txt").write_text("n01440764 tench, Tinca tinca\n")
    assert convert("imagenet", "i") == [{"path": "i/train/n01440764/a.JPEG", "text": "tench, Tinca tinca"}]
    assert convert("imagenet", "j") == [{"path": "j/cat/1.png", "text": "cat"}]
    touch("i/val/n01440764/b.JPEG")
    assert [row["path"] for row in convert("imagenet", "i", "--split", "val")] == ["i/val/n01440764/b.JPEG"]


def test_prompts_of_vidprom_are_found_by_uuid(here: Path) -> None:
    first, second = "0a1b2c3d-0000-1111-2222-333344445555", "0a1b2c3d-0000-1111-2222-333344445556"
    touch(f"v/pika-{first}.mp4", f"v/ms-{second.upper()}.mp4", "v/other.mp4")
    Path("p.csv").write_text(f"uuid,prompt\n{second},two\n{first},one\n")
    rows = convert("vidprom", "v", "--info", "p.csv")
    assert [(row["path"][2:4], row["text"]) for row in rows] == [("ms", "two"), ("pi", "one")]


def test_tables_with_other_names(here: Path) -> None:
    Path("d").mkdir()
    lines = [{"video_path": "a.mp4", "caption": "one", "score": 2}, {"image_path": "/x/b.png", "caption": "two"}]
    Path("d/t.jsonl").write_text("\n".join(map(json.dumps, lines)))
    rows = convert("jsonl", "d/t.jsonl")
    assert rows == [{"path": "d/a.mp4", "text": "one", "score": "2"}, {"path": "/x/b.png", "text": "two", "score": ""}]
    Path("d/metadata.csv").write_text("file_name,text\nsub/a.mp4,one\n")
    assert convert("hf", "d") == [{"path": "d/sub/a.mp4", "text": "one"}]


def make_media() -> None:
    write_video(np.zeros((5, 16, 24, 3), np.uint8), Path("a.mp4"), 8)
    write_image(np.zeros((20, 30, 3), np.uint8), Path("b.png"))
    Path("t.csv").write_text('path,text,aes,note\na.mp4,"a cat, sleeping",5.5,x\nb.png,,,"y  z"\na.mp4,again,4,\n')


def test_tars_and_back(here: Path) -> None:
    make_media()
    assert main(["data", "webdataset", "t.csv", "--output", "tars", "--rows-per-tar", "2"]) == 0
    assert [file.name for file in sorted(Path("tars").iterdir())] == ["00000.tar", "00001.tar"]
    with tarfile.open("tars/00000.tar") as tar:
        assert tar.getnames() == [f"00000000{n}" for n in ("0.mp4", "0.txt", "0.json", "1.png", "1.json")]
    rows = convert("webdataset", "tars", "--media", "files")
    assert [(row["path"], row["text"], row["aes"], row["note"]) for row in rows] == [
        ("files/00000/0000000.mp4", "a cat, sleeping", "5.5", "x"), ("files/00000/0000001.png", "", "", "y  z"),
        ("files/00001/0000000.mp4", "again", "4", ""),
    ]  # fmt: skip
    assert Path(rows[0]["path"]).read_bytes() == Path("a.mp4").read_bytes()
    assert main(["data", "webdataset", "t.csv", "--output", "again", "--rows-per-tar", "2"]) == 0
    assert Path("again/00001.tar").read_bytes() == Path("tars/00001.tar").read_bytes()


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["convert", "video", "gone"], "no such"), (["convert", "vidoe", "."], "did you mean 'video'"),
        (["convert", "image", "."], "holds no images"), (["convert", "ucf101", "m"], "is in no folder of a class"),
        (["convert", "video", "m", "--split", "gone"], "no such folder"), (["convert", "vidprom", "m"], "needs --info"),
        (["convert", "vidprom", "m", "--info", "p.csv"], "none of 1 videos has a prompt"),
        (["convert", "imagenet", "i"], "has no name; put LOC_synset_mapping.txt"),
        (["convert", "hf", "out"], "leaves the folder"), (["convert", "hf", "up"], "leaves the folder"),
        (["convert", "hf", "m"], "without metadata"), (["convert", "jsonl", "both.jsonl"], "different values in"),
        (["convert", "jsonl", "p.csv"], "has no column 'path'"), (["convert", "webdataset", "m"], "holds no .tar"),
        (["convert", "video", "m", "--output", "p.csv"], "--force"),
        (["webdataset", "empty.csv", "--output", "x"], "has no rows"),
        (["webdataset", "lost.csv", "--output", "x"], "cannot be read"),
        (["webdataset", "odd.csv", "--output", "x"], "no video or image"),
        (["webdataset", "lost.csv", "--output", "m"], "exists"),
        (["webdataset", "lost.csv", "--output", "x", "--rows-per-tar", "0"], "at least 1"),
    ],
)  # fmt: skip
def test_what_is_refused_leaves_nothing(here: Path, capsys: pytest.CaptureFixture, argv: list[str], words: str) -> None:
    touch("m/a.mp4", "i/n01440764/a.png", "out/x", "up/x")
    Path("p.csv").write_text("uuid,prompt\nx,y\n")
    Path("out/metadata.csv").write_text("file_name,text\n/etc/passwd,x\n")
    Path("up/metadata.jsonl").write_text('{"file_name": "a/../../secret.mp4"}\n')
    Path("both.jsonl").write_text('{"video": "a.mp4", "image": "b.png"}')
    for name, path in {"lost.csv": "gone.mp4", "odd.csv": "p.csv"}.items():
        Path(name).write_text(f"path\n{path}\n")
    Path("empty.csv").write_text("path\n")
    output = [] if "--output" in argv else ["--output", "new.csv"]
    if argv[:2] == ["convert", "image"]:
        Path("i/n01440764/a.png").unlink()
    assert words in refused(capsys, *argv, *output)


def tar_of(path: str, *members: tuple[str, bytes] | tarfile.TarInfo) -> None:
    with tarfile.open(path, "w") as tar:
        for member in members:
            info = member if isinstance(member, tarfile.TarInfo) else tarfile.TarInfo(member[0])
            content = b"" if isinstance(member, tarfile.TarInfo) else member[1]
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def link(name: str, target: str, kind: bytes = tarfile.SYMTYPE) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def test_names_in_a_tar_are_keys_only(here: Path) -> None:
    names = ["../../up.mp4", "/abs/x.mp4", "..", "a/\x1b[31m.mp4", ".mp4", "c" * 300 + ".mp4", "q.seg.mp4"]
    tar_of("t.tar", *((name, b"1") for name in names))
    rows = convert("webdataset", "t.tar", "--media", "files")
    assert [row["path"] for row in rows] == [f"files/00000/000000{n}.mp4" for n in range(5)]
    assert sorted(file.name for file in here.iterdir()) == ["files", "out.csv", "t.tar"]
    assert rows[0]["id"] == "../../up" and rows[-1]["id"] == "q"


HOSTILE = {
    "symbolic link": (lambda: tar_of("t.tar", link("a.mp4", "/etc/passwd")), "no plain file"),
    "hard link": (lambda: tar_of("t.tar", link("a.mp4", "/etc/passwd", tarfile.LNKTYPE)), "no plain file"),
    "device": (lambda: tar_of("t.tar", link("a.mp4", "", tarfile.CHRTYPE)), "no plain file"),
    "pipe": (lambda: tar_of("t.tar", link("a.mp4", "", tarfile.FIFOTYPE)), "no plain file"),
    "two media": (lambda: tar_of("t.tar", ("a.mp4", b"1"), ("a.png", b"1")), "several media"),
    "no media": (lambda: tar_of("t.tar", ("a.txt", b"x")), "holds no sample"),
    "empty": (lambda: tar_of("t.tar"), "holds no sample"),
    "text": (lambda: Path("t.tar").write_bytes(b"not a tar" * 200), "no valid uncompressed tar"),
    "large caption": (lambda: tar_of("t.tar", ("a.mp4", b"1"), ("a.txt", b"x" * 2**19)), "is larger than"),
    "list": (lambda: tar_of("t.tar", ("a.mp4", b"1"), ("a.json", b"[1]")), "must be a JSON object"),
    "deep": (lambda: tar_of("t.tar", ("a.mp4", b"1"), ("a.json", b"[" * 90 + b"]" * 90)), "nested"),
    "many columns": (
        lambda: tar_of("t.tar", ("a.mp4", b"1"), ("a.json", json.dumps(dict.fromkeys(range(2000))).encode())),
        "different keys",
    ),
    "cut": (lambda: cut("t.tar"), "unexpected end of data"),
    "large header": (lambda: header("t.tar", b"x", 2**40), "no valid uncompressed tar"),
    "negative size": (lambda: header("t.tar", b"0", -512), "no valid uncompressed tar"),
    "negative name": (lambda: header("t.tar", b"L", -1024), "no valid uncompressed tar"),
}


def cut(name: str) -> None:
    tar_of(name, ("a.mp4", b"1" * 5000))
    Path(name).write_bytes(Path(name).read_bytes()[:2000])


def header(name: str, kind: bytes, size: int) -> None:
    """A tar with a header of this kind and size, and nothing in it."""
    info = tarfile.TarInfo("a.mp4")
    info.type, info.size = kind, size
    Path(name).write_bytes(info.tobuf(tarfile.GNU_FORMAT) + bytes(4096))


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_tars_are_one_line(here: Path, capsys: pytest.CaptureFixture, case: str) -> None:
    make, words = HOSTILE[case]
    make()
    assert words in refused(capsys, "convert", "webdataset", "t.tar", "--output", "new.csv")

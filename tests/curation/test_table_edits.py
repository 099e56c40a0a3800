"""`opensora data edit`: each operation, the order given, all formats."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest

from opensora.cli import main
from opensora.curation.tables.apply import FUNCTIONS
from opensora.curation.tables.operations import OPERATIONS
from opensora.curation.tables.reading import open_table
from opensora.datasets.video import write_image, write_video
from opensora.errors import ConfigError

TABLE = """path,text,aes,flow,num_frames,resolution,fps,cmotion
clips/a.mp4,The video shows a cat,5.5,3,17,4096,8,pan left
clips/b.mp4,"a dog, see https://x.org/y",4,,34,9216,60,
clips/c.png,,6,10,1,65536,,static
clips/b.mp4,a dog again,9,1,34,9216,60,
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("t.csv").write_text(TABLE)
    return tmp_path


def edit(*argv: str, source: str = "t.csv") -> list[dict[str, str]]:
    assert main(["data", "edit", source, *argv, "--output", "out.csv", "--force"]) == 0
    with open("out.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def names(rows: list[dict[str, str]]) -> str:
    return "".join(row["path"][-5] for row in rows)


def test_every_flag_has_a_function() -> None:
    assert list(OPERATIONS) == list(FUNCTIONS)


@pytest.mark.parametrize(
    ("argv", "kept"),
    [
        (["--where", "aes >= 5 and flow is not None"], "acb"), (["--fmin", "17"], "abb"), (["--fmax", "17"], "ac"),
        (["--hwmax", "9216"], "abb"), (["--fpsmax", "30"], "ac"), (["--aesmin", "5"], "acb"),
        (["--flowmin", "3"], "ac"),
        (["--img-only"], "c"), (["--vid-only"], "abb"), (["--path-subset", "/b"], "bb"),
        (["--remove-empty-path"], "abcb"),
        (["--remove-empty-caption"], "abb"), (["--remove-url"], "acb"), (["--remove-path-duplication"], "abc"),
        (["--remove-text-duplication"], "abcb"), (["--head", "2"], "ab"), (["--sort", "aes"], "bcab"),
        (["--sort-ascending", "aes"], "bacb"), (["--sort", "flow"], "cabb"), (["--sort-ascending", "path"], "abbc"),
        (["--sort", "aes", "--remove-path-duplication"], "bca"),
        (["--remove-path-duplication", "--sort", "aes"], "cab"),
        (["--head", "1", "--sort", "aes"], "a"), (["--sort", "aes", "--head", "1"], "b"), (["--ext"], ""), ([], "abcb"),
        (["--remove-empty-caption", "--lang", "en"], "abb"), (["--remove-empty-caption", "--lang", "fr"], ""),
    ],
)  # fmt: skip
def test_which_rows_stay(here: Path, argv: list[str], kept: str) -> None:
    assert names(edit(*argv)) == kept


def test_shuffles_depend_on_the_seed_alone(here: Path) -> None:
    rows = [f"{n:03}.mp4,x" for n in range(50)]
    Path("many.csv").write_text("path,text\n" + "\n".join(rows))
    one, again, other = (edit("--shuffle", "--seed", seed, source="many.csv") for seed in ("1", "1", "2"))
    assert one == again != other and sorted(names_of(one)) == sorted(names_of(other)) != names_of(one)


def names_of(rows: list[dict[str, str]]) -> list[str]:
    return [row["path"] for row in rows]


def test_sets_of_paths(here: Path) -> None:
    Path("other.csv").write_text("path,text\nclips/b.mp4,new words\nclips/z.mp4,x\n")
    assert names(edit("--difference", "other.csv")) == "ac"
    assert names(edit("--intersection", "other.csv")) == "bb"
    assert [row["text"][:5] for row in edit("--update-text", "other.csv")] == ["The v", "new w", "", "new w"]


def test_clips_of_one_file_are_different_rows(here: Path) -> None:
    source = Path("parts.csv")
    Path("clips").mkdir(exist_ok=True)
    Path("clips/a.mp4").write_bytes(b"a film")
    rows = ("clips/a.mp4,one,0,10,", "clips/a.mp4,two,10,,", "clips/a.mp4,one again,0,10.0,", "clips/a.mp4,all,,,")
    source.write_text("path,text,start_pts,end_pts,crop\n" + "\n".join((*rows, "clips/a.mp4,crop,0,10,0 0 8 8")))
    texts = ["one", "two", "all", "crop"]
    assert [row["text"] for row in edit("--remove-path-duplication", source=source.name)] == texts
    assert [row["text"] for row in edit("--remove-content-duplication", source=source.name)] == texts
    Path("other.csv").write_text("path,text,start_pts,end_pts\nclips/a.mp4,new,10,\nclips/a.mp4,whole,,\n")
    assert [row["text"] for row in edit("--intersection", "other.csv", source=source.name)] == ["two", "all"]
    assert [row["text"] for row in edit("--difference", "other.csv", source=source.name)] == [
        "one",
        "one again",
        "crop",
    ]
    updated = [row["text"] for row in edit("--update-text", "other.csv", source=source.name)]
    assert updated == ["one", "new", "one again", "whole", "crop"]
    Path("paths.csv").write_text("path,text\nclips/a.mp4,of the file\n")
    assert len(edit("--intersection", "paths.csv", source=source.name)) == 5
    assert {row["text"] for row in edit("--update-text", "paths.csv", source=source.name)} == {"of the file"}


def test_captions(here: Path) -> None:
    texts = [row["text"] for row in edit("--refine-llm-caption", "--merge-cmotion", "--append-text", "!")]
    assert texts[0] == "A cat camera motion: pan left.!" and texts[3] == "a dog again!"
    scored = edit("--score-to-text")[0]["text"]
    assert scored == "The video shows a cat aesthetic score: 5.5. motion score: 3.0. camera motion: pan left."
    cleaned = edit("--clean-caption", "--text-len")[1]
    assert cleaned["text"] == "a dog, see" and cleaned["text_len"] == "10"


@pytest.mark.parametrize(
    ("text", "short"),
    [
        ("The video shows a cat", "A cat"), ("This short clip features two dogs.", "Two dogs."),
        ("In the image, we see a red boat", "A red boat"), ("In this scene there are birds", "Birds"),
        ("A video showing cats", "A video showing cats"), ("the photograph depicts an owl", "An owl"),
        ("The video shows ", "The video shows "),
    ],
)  # fmt: skip
def test_openings(text: str, short: str) -> None:
    from opensora.curation.tables.captions import without_opening

    assert without_opening(text) == short


def test_columns(here: Path) -> None:
    assert list(edit("--columns", "text", "path")[0]) == ["text", "path"]
    assert list(edit("--drop", "aes", "flow", "cmotion")[0]) == ["path", "text", "num_frames", "resolution", "fps"]
    assert list(edit("--rename", "aes=score")[0])[2] == "score"
    assert list(edit("--train-column")[0]) == ["path", "text", "num_frames", "fps"]
    assert edit("--path-to-id")[2]["id"] == "c"


def test_files(here: Path) -> None:
    Path("clips").mkdir()
    write_video(np.zeros((17, 32, 48, 3), np.uint8), Path("clips/a.mp4"), 8)
    write_image(np.zeros((20, 30, 3), np.uint8), Path("clips/c.png"))
    Path("clips/c.txt").write_text("from a  file\n")
    Path("clips/b.mp4").write_bytes(b"broken")
    rows = edit("--info", "--filesize", "--load-caption", "txt")
    assert [row["num_frames"] for row in rows] == ["17", "", "1", ""]
    assert (rows[0]["height"], rows[0]["width"], rows[0]["aspect_ratio"], rows[0]["fps"]) == ("32", "48", "0.6667", "8")
    assert [row["filesize"] for row in rows][1] == "6" and [row["text"] for row in rows] == ["", "", "from a file", ""]
    Path("clips/d.mp4").write_bytes(b"broken")
    Path("d.csv").write_text("path\nclips/b.mp4\nclips/d.mp4\nclips/gone.mp4\n")
    assert names_of(edit("--remove-content-duplication", source="d.csv")) == ["clips/b.mp4", "clips/gone.mp4"]
    assert names_of(edit("--relpath", "clips", source="d.csv"))[0] == "b.mp4"
    assert names_of(edit("--abspath", "x", source="d.csv"))[0] == str(here / "x/clips/b.mp4")
    assert names(edit("--ext")) == "abcb"
    Path("ids.csv").write_text("id,text\na,x\nnone,y\n")
    assert main(["data", "paths", "ids.csv", "clips", "found.csv"]) == 0
    assert Path("found.csv").read_text().split() == ["id,text,path", "a,x,clips/a.mp4", "none,y,"]
    Path("clips/a.png").touch()
    assert main(["data", "paths", "ids.csv", "clips", "again.csv"]) == 1 and not Path("again.csv").exists()


def test_formats_keep_the_cells(here: Path) -> None:
    for name in ("a.parquet", "b.jsonl", "c.csv"):
        source = {"a.parquet": "t.csv", "b.jsonl": "a.parquet", "c.csv": "b.jsonl"}[name]
        assert main(["data", "edit", source, "--output", name]) == 0
    with open("c.csv", newline="") as file, open("t.csv", newline="") as first:
        assert list(csv.reader(file)) == list(csv.reader(first))
    assert json.loads(Path("b.jsonl").read_text().splitlines()[0])["num_frames"] == 17


def test_several_tables_become_one(here: Path) -> None:
    Path("u.csv").write_text("text;path;new\nx;u.mp4;1\n")
    rows = edit(source="[tu].csv")
    assert (
        names(rows) == "abcbu"
        and rows[4]["new"] == "1"
        and rows[0]["new"] == ""
        and list(rows[0])[:2] == ["path", "text"]
    )


@pytest.mark.parametrize(("count", "lengths"), [("1", [4]), ("2", [2, 2]), ("3", [2, 1, 1]), ("4", [1] * 4)])
def test_shards_hold_consecutive_rows(here: Path, count: str, lengths: list[int]) -> None:
    assert main(["data", "edit", "t.csv", "--shard", count, "--output", "s.csv"]) == 0
    found = [list(csv.DictReader(Path(f"s_{n}.csv").read_text().splitlines())) for n in range(int(count))]
    assert [len(rows) for rows in found] == lengths and "".join(map(names, found)) == "abcb"


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--sort", "nope"], "has no column 'nope'"), (["--difference", "gone.csv"], "cannot be read"),
        (["--shard", "5"], "fewer than 5 shards"),
        (["--head", "0"], "at least 1"), (["--rename", "aes"], "old=new"), (["--rename", "aes=flow"], "already"),
        (["--relpath", "elsewhere"], "is not below"), (["--matchmin", "1"], "has no column 'match'"),
        (["--output", "x.txt"], "is a .csv"),
        (["--lang", "xx"], "is not known"), (["--count-num-token", "gone"], "no such folder"),
        (["--drop", *TABLE.split()[0].split(",")], "no column"),
    ],
)  # fmt: skip
def test_what_is_refused_leaves_nothing(here: Path, capsys: pytest.CaptureFixture, argv: list[str], words: str) -> None:
    output = [] if "--output" in argv else ["--output", "out.csv"]
    assert main(["data", "edit", "t.csv", *argv, *output]) == 1
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1 and [path.name for path in here.iterdir()] == ["t.csv"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"\xff\xfe\0\0", "has no header"), (b'a,b\n"x', "quotes"), (b"path,path\na,b\n", "rename all but one"),
        (b"\0\1\2", "is not text"),
        (b"path,n\nx,1,2,3\n", "more than the 2 columns"), (b"," * 3000 + b"\n", "has no header"),
        (b"", "has no header"), (b"a,,\n1,2,3\n", "error"), (b"a,,b,,c\n", "without a name"),
    ],
)  # fmt: skip
def test_damaged_tables_are_one_line(here: Path, capsys: pytest.CaptureFixture, content: bytes, words: str) -> None:
    Path("bad.csv").write_bytes(content)
    assert main(["data", "edit", "bad.csv", "--output", "out.csv"]) == 1
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1 and not Path("out.csv").exists()


def test_numbers_are_checked_where_columns_have_types(here: Path, capsys: pytest.CaptureFixture) -> None:
    Path("bad.csv").write_text("path,num_frames\nx,17\ny,many\n")
    assert main(["data", "edit", "bad.csv", "--output", "out.parquet"]) == 1
    assert "row 2, column 'num_frames': 'many' is no number" in capsys.readouterr().err
    assert not Path("out.parquet").exists()


def test_existing_tables_are_not_replaced(here: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["data", "edit", "t.csv", "--output", "t.csv"]) == 1
    assert "--force" in capsys.readouterr().err and Path("t.csv").read_text() == TABLE
    assert main(["data", "edit", "t.csv", "--head", "1", "--output", "t.csv", "--force"]) == 0
    assert Path("t.csv").read_text().count("\n") == 2


def test_names_of_results(here: Path) -> None:
    assert main(["data", "edit", "t.csv", "--fmin", "17", "--sort", "aes", "--format", "parquet"]) == 0
    assert Path("t_fmin17.0_sortaes.parquet").is_file()


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"path": "\\ud800.mp4"}', "half a surrogate pair"),
        ('{"path": "a", "text": "x\\udbff"}', "half a surrogate pair"),
        ('{"path": "a", "\\ud800": 1}', "half a surrogate pair"), ('{"path": "a", "n": 1' + "0" * 500 + "}", "digits"),
        ('{"path": "a", "aes": NaN}', "not valid JSON"), ("[" * 5000, "nested"), ('["a"]', "must be a JSON object"),
        (json.dumps(dict.fromkeys(map(str, range(2000)))), "more than 1,000 different keys"),
        ('{"path": "' + "x" * 200_000 + '"}', "more than 100,000"),
    ],
)  # fmt: skip
def test_hostile_lines_are_one_line(here: Path, capsys: pytest.CaptureFixture, line: str, words: str) -> None:
    Path("bad.jsonl").write_text(line + "\n")
    assert main(["data", "edit", "bad.jsonl", "--output", "out.csv"]) == 1
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1 and len(error) < 2000
    assert not Path("out.csv").exists() and not [path for path in here.iterdir() if path.name.startswith(".")]


@pytest.mark.timeout(60)  # comparing each name with each took minutes
@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_a_hundred_thousand_columns_are_refused_at_once(tmp_path: Path, suffix: str) -> None:
    file, names = tmp_path / f"wide{suffix}", [f"c{number}" for number in range(100_000)]
    file.write_text(",".join(names) + "\n" if suffix == ".csv" else json.dumps(dict.fromkeys(names, 1)) + "\n")
    with pytest.raises(ConfigError, match=r"columns, more than 1,000|more than 1,048,576 characters"):
        open_table(file)

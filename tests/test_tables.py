"""Tables as people have them: separators, spellings, encodings, JSON lines, Parquet, folders; and what is refused."""

from __future__ import annotations

import json
import os
from datetime import timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from opensora import cli
from opensora.datasets.table import Table, read_table
from opensora.errors import ConfigError

CASES = Path(__file__).parent / "cases" / "tables"
TEXTS = ["a red circle, moving; right", 'a "big" blue | square', "line one\nline two", "café 東京\t8"]
NAMES = ("path", "text", "num_frames", "height", "width")


def rows(separator: str, end: str = "\r\n") -> str:
    lines = [separator.join(NAMES)]
    for number, text in enumerate(TEXTS):
        quoted = '"' + text.replace('"', '""') + '"'
        lines.append(separator.join((f"vid/c{number}.mp4", quoted, "24", "64", "96")))
    return end.join([*lines, ""])


def read(folder: Path, content: str | bytes, name: str = "a.csv") -> Table:
    (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
    return read_table(folder / name)


def holds_all(table: Table) -> None:
    assert list(table.path) == [f"vid/c{number}.mp4" for number in range(4)]
    assert list(table.text) == TEXTS
    assert [column.tolist() for column in table.sizes()] == [[24] * 4, [64] * 4, [96] * 4]


# Separators and spreadsheets


@pytest.mark.parametrize("separator", [",", ";", "\t", "|"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_separators(separator, end, tmp_path):
    holds_all(read(tmp_path, rows(separator, end)))


@pytest.mark.parametrize("separator", [",", ";", "\t", "|"])
def test_quotes_keep_separators_and_others_are_text(separator, tmp_path):
    others = "".join(one for one in ",;\t|" if one != separator)
    table = read(tmp_path, f'path{separator}text\na.mp4{separator}x{others}y\nb.mp4{separator}"{separator}"\n')
    assert list(table.text) == [f"x{others}y", separator]


@pytest.mark.parametrize("line", ["sep={0}", '"sep={0}"', "SEP={0}", "sep={0}{0}{0}"])
@pytest.mark.parametrize("separator", [",", ";", "\t", "|", "^", ":"])
def test_a_line_that_names_the_separator(line, separator, tmp_path):
    holds_all(read(tmp_path, line.format(separator) + "\r\n" + rows(separator)))


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le", "utf-32"])
def test_encodings_with_a_mark(encoding, tmp_path):
    mark = b"\xff\xfe" if encoding == "utf-16-le" else b""
    for separator in ",;":
        holds_all(read(tmp_path, mark + rows(separator).encode(encoding)))


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text.replace("\r\n", ",\r\n").replace("one\n", "one\n"),
        lambda text: text.replace("64,96", "64,96,,,"),
        lambda text: text.replace("height,width", "height,width,"),
        lambda text: text + ",,,,\r\n,,,,\r\n",
        lambda text: "\r\n\r\n" + text + "  \r\n",
        lambda text: "# made by a tool, on a day\r\n# \r\n" + text + "# the end\r\n",
        lambda text: text.replace("path,text,", "Path, Text ,"),
        lambda text: text.replace("path,text", '"path","text"').replace("num_frames", "Num Frames"),
    ],
)
def test_what_spreadsheets_add(change, tmp_path):
    holds_all(read(tmp_path, change(rows(","))))


@pytest.mark.parametrize("name", ["comment", "semicolon", "sep", "tab", "trailing_comma"])
def test_cases_of_separators(name):
    table = read_table(CASES / f"{name}.csv")
    assert list(table.path) == [f"vid/c{number}.mp4" for number in (1, 2, 3, 4)]
    assert list(table.text)[:3] == ["a red circle, moving right", 'a "big" blue square', "line one\nline two"]
    assert table.width.tolist() == [64] * 4


@pytest.mark.parametrize(
    ("line", "text"),
    [("a.mp4;a cat, sitting", "a cat, sitting"), ("a.mp4,a cat; sitting", "a cat; sitting"), ("a.mp4\ta, b", "a, b"),
     ("#1.mp4,a cat", "a cat"), ('"a, b.mp4",c', "c")],
)  # fmt: skip
def test_separators_without_a_header(line, text, tmp_path):
    table = read(tmp_path, f"{line}\nb.png{line[5] if line[0] != chr(34) and line[0] != '#' else ','}x\n")
    assert list(table.text) == [text, "x"]


# Columns


@pytest.mark.parametrize("path", ["path", "video_path", "file_name", "file_path", "video", "filename", "Video Path"])
@pytest.mark.parametrize("text", ["text", "caption", "prompt", "Caption"])
def test_spellings_of_columns(path, text, tmp_path):
    for table in (
        read(tmp_path, f"{text},{path}\na cat,a.mp4\n"),
        read(tmp_path, json.dumps({text: "a cat", path: "a.mp4"}), "a.jsonl"),
    ):
        assert (list(table.path), list(table.text)) == (["a.mp4"], ["a cat"])


@pytest.mark.parametrize(
    "names",
    ["path,path", "path,text,text", "video_path,file_name", "path,caption,prompt", "num_frames,path,num_frames"],
)
def test_two_columns_that_may_be_meant_are_asked_back(names, tmp_path):
    with pytest.raises(ConfigError, match=r"has the columns '.*' and '.*', each of which may be its '.*'; remove or"):
        read(tmp_path, f"{names}\na,b,c\n")


def test_the_documented_name_goes_first_and_that_is_said(tmp_path, caplog):
    table = read(tmp_path, "caption,file_name,path,text\nno,no.mp4,a.mp4,yes\n")
    assert (list(table.path), list(table.text)) == (["a.mp4"], ["yes"])
    assert "has 'caption' and 'text'; 'text' is read, as documented" in caplog.text


def test_a_case_of_two_columns():
    pytest.importorskip("pyarrow")
    with pytest.raises(ConfigError, match="'path' and 'path'"):
        read_table(CASES / "dup_path.parquet")


def test_long_headers_are_told_as_headers(tmp_path):
    for names in ("x" * 5000, "x" * 5000 + ",y", ",".join(f"column{number}" for number in range(3000))):
        with pytest.raises(ConfigError, match=r"has no column 'path', only .{1,300}; name one so") as caught:
            read(tmp_path, f"{names}\na,b\n")
        assert len(str(caught.value)) < 600
    with pytest.raises(ConfigError, match="has no column 'path'"):
        read_table(CASES / "long_header.csv")


# Cells


@pytest.mark.parametrize(
    ("content", "name", "message"),
    [
        (f'path,text\na.mp4,b\nc.mp4,"{"x" * 140_000}"\n', "a.csv", "line 3: a cell has more than 131,072 characters"),
        (f'path,aes\na.mp4,"{"x" * 140_000}"\n', "a.csv", "line 2: a cell has more than 131,072 characters"),
        (f'path,text\n\na.mp4,"b\nb"\nc.mp4,{"x" * 100_001}\n', "a.csv", "line 5, column 'text': holds 100,001 char"),
        ("path,text\na.mp4," + "x" * 2**21, "a.csv", "has a line of more than 1,048,576 characters"),
        (json.dumps({"path": "a.mp4", "text": "x" * 100_001}), "a.jsonl", "line 1, column 'text': holds 100,001"),
        (
            b"path,text\na.mp4,b\nb.mp4,caf\xe9\n",
            "a.csv",
            "line 3, column 'text': is not UTF-8 text; save the",
        ),
        ("path,text\n".encode("utf-16-le"), "a.csv", "UTF-16 without a mark; save it as UTF-8"),
        ("path,text\na.mp4,".encode("utf-16")[:-1], "a.csv", "is not UTF-16 text"),
        ('{"path": "a.mp4"}\n[1]\n', "a.jsonl", "line 2: must be a JSON object"),
        ('{"path": "a.mp4"}\n{"path": \n', "a.jsonl", "line 2: cannot be read as JSON"),
        ("[" * 100_000, "a.jsonl", "line 1: cannot be read as JSON"),
        ('{"path": "a.mp4", "num_frames": ' + "9" * 5000 + "}", "a.jsonl", "line 1: .*a number of 5000 digits"),
        ('{"path": "a.mp4"}\n{"text": "b"}\n', "a.jsonl", "line 2: has no column 'path', only text"),
        ('{"path": "a.mp4", "text": "\\ud800"}', "a.jsonl", "line 1, column 'text': is not UTF-8 text"),
        ("", "a.jsonl", "has no rows"),
        ("path;text\na.mp4;b;c\n", "a.csv", "line 2: the row of 'a.mp4' has 3 cells.*put texts with semicolons in quo"),
    ],
)
def test_cells_and_lines_that_are_refused_are_named(content, name, message, tmp_path):
    with pytest.raises(ConfigError, match=message) as caught:
        read(tmp_path, content, name)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


@pytest.mark.parametrize("cell", ["[1]", '{"a": 1}', "1.5", "true", '["a red circle"]'])
@pytest.mark.parametrize("column", ["text", "path"])
def test_texts_of_other_types_are_refused(cell, column, tmp_path):
    other = "path" if column == "text" else "text"
    lines = f'{{"path": "a.mp4", "text": "b"}}\n{{"{other}": "b", "{column}": {cell}}}\n'
    with pytest.raises(ConfigError, match=f"line 2, column '{column}': the value must be a string.*; write text there"):
        read(tmp_path, lines, "a.jsonl")


@pytest.mark.parametrize("cell", ["true", "false", "[24]", '{"frames": 24}'])
@pytest.mark.parametrize("column", ["num_frames", "height"])
def test_sizes_of_other_types_are_refused(cell, column, tmp_path):
    with pytest.raises(ConfigError, match=f"line 1, column '{column}': the value must be .*; write a number there"):
        read(tmp_path, f'{{"path": "a.mp4", "{column}": {cell}}}', "a.jsonl")


def test_cells_that_hold_nothing_and_numbers_for_texts(tmp_path):
    lines = ['{"path": "a.mp4", "text": null}', '{"path": "b.mp4", "text": 207}', '{"path": "c.mp4"}', ""]
    table = read(tmp_path, "\n".join([*lines, '{"path": "d.mp4", "num_frames": "17", "height": null}']), "a.jsonl")
    assert list(table.text) == ["", "207", "", ""] and table.empty_texts() == 3
    np.testing.assert_array_equal(table.num_frames, [np.nan] * 3 + [17])
    assert read(tmp_path, '{"path": "a.mp4"}', "b.jsonl").text is None


def test_rows_that_are_short_and_sizes_that_are_no_numbers_are_said(tmp_path, caplog):
    table = read(
        tmp_path, "path,text,num_frames,height,width\na.mp4\nb.mp4,x,true,n/a,96\nc.mp4,x,,64,96\nd.mp4,x,24\n"
    )
    assert len(table) == 4 and table.empty_texts() == 1
    assert "2 rows, the first in line 2, have fewer cells than the 5 columns" in caplog.text
    for column in ("num_frames", "height"):
        assert f"1 rows, the first in line 3, hold no number in column '{column}'; no bucket takes them" in caplog.text
    assert np.isnan(table.num_frames[:3]).all() and table.num_frames[3] == 24
    caplog.clear()
    assert read_table(CASES / "short_rows.csv").empty_texts() == 20
    assert "20 rows, the first in line 2, have fewer cells" in caplog.text


@pytest.mark.parametrize(
    ("content", "short", "first", "empty"),
    [
        ("path,text,num_frames,height,width\na.mp4\nb.mp4\n", 2, 2, 2),
        ("path;text;num_frames;height;width\na.mp4;x;5;64;96\nb.mp4\n", 1, 3, 1),
        ("path\ttext\tnum_frames\theight\twidth\na.mp4\tx\nb.mp4\ty\t5\t64\t96\nc.mp4\n", 2, 2, 1),
        ("text,path,num_frames,height,width\r\nx,a.mp4\r\n\r\ny,b.mp4,5\r\n", 2, 2, 0),
    ],
    ids=["path only", "semicolon", "tab", "path second"],
)
def test_short_rows_of_every_separator_are_said(content, short, first, empty, tmp_path, caplog):
    table = read(tmp_path, content)
    assert table.empty_texts() == empty
    assert f"{short} rows, the first in line {first}, have fewer cells than the 5 columns" in caplog.text


def test_many_parts_have_one_set_of_columns_and_their_lines(tmp_path):
    lines = [json.dumps({"path": f"{number}.mp4"}) for number in range(5000)]
    table = read(tmp_path, "\n".join([*lines, json.dumps({"path": "z.mp4", "caption": "x"})]), "a.jsonl")
    assert len(table) == len(table.text) == 5001 and table.empty_texts() == 5000
    content = "\n".join(["path,text", *(f"{number}.mp4,x" for number in range(5000)), "y.mp4,x,y"])
    with pytest.raises(ConfigError, match=r"line 5002: the row of 'y\.mp4'"):
        read(tmp_path, content)


# Parquet


def parquet(folder: Path, columns: dict[str, Any], **options: Any) -> Path:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.table(columns), folder / "a.parquet", **options)
    return folder / "a.parquet"


@pytest.mark.parametrize(
    ("cells", "texts"),
    [([b"a red circle", None], ["a red circle", ""]), (["x", "東京"], ["x", "東京"]), ([207, None], ["207", ""]),
     ([None, None], ["", ""]), ([b"caf\xc3\xa9", b""], ["café", ""])],
)  # fmt: skip
def test_texts_of_parquet(cells, texts, tmp_path):
    assert list(read_table(parquet(tmp_path, {"path": ["a", b"b".decode()], "text": cells})).text) == texts
    if isinstance(cells[0], bytes):
        paths = parquet(tmp_path, {"path": [b"caf\xe9.mp4", b"b"]})
        assert os.fsencode(read_table(paths).path[0]) == b"caf\xe9.mp4"


@pytest.mark.parametrize(
    ("name", "cells", "wanted"),
    [("text", [["a red circle"]], "texts"), ("text", [{"en": "a"}], "texts"), ("text", [float("nan")], "texts"),
     ("text", [True], "texts"), ("video", [{"path": "a.mp4", "bytes": None}], "texts"), ("path", [5], "texts"),
     ("num_frames", [True], "numbers"), ("height", [timedelta(seconds=5)], "numbers"), ("width", [[5]], "numbers")],
)  # fmt: skip
def test_columns_of_other_types_are_refused(name, cells, wanted, tmp_path):
    columns = {name: cells} if name in ("path", "video") else {"path": ["a.mp4"], name: cells}
    with pytest.raises(ConfigError, match=f"column '{name}': holds .*, not {wanted}; save it as {wanted}"):
        read_table(parquet(tmp_path, columns))


def test_bytes_that_are_no_text_are_refused_by_their_row(tmp_path):
    cells = [b"x"] * 3000 + [b"caf\xe9"]
    with pytest.raises(ConfigError, match="row 3000, column 'text': is not UTF-8 text"):
        read_table(parquet(tmp_path, {"path": ["a.mp4"] * 3001, "text": cells}))


def test_numbers_of_parquet(tmp_path):
    columns = {"path": ["a", "b"], "num_frames": [Decimal("24"), None], "height": ["64", "x"], "width": [96.0, None]}
    table = read_table(parquet(tmp_path, columns))
    np.testing.assert_array_equal(table.sizes(), [[24, np.nan], [64, np.nan], [96, np.nan]])


def same(text: str, count: int) -> Any:
    """One text in so many rows, as a dictionary of one."""
    pyarrow = pytest.importorskip("pyarrow")
    return pyarrow.DictionaryArray.from_arrays(np.zeros(count, np.int32), [text])


def alike(count: int, length: int) -> Any:
    """Texts that differ at their ends."""
    return ["x" * length + str(number) for number in range(count)]


DELTAS = {"use_dictionary": False, "column_encoding": {"path": "DELTA_BYTE_ARRAY"}}


@pytest.mark.parametrize(
    ("columns", "options"),
    [
        (lambda: {"path": same("x" * 2_000_000, 2000)}, {}),
        (lambda: {"path": same("a.mp4", 2000), "text": same("x" * 500_000, 2000)}, {}),
        (lambda: {"path": same("x" * 90_000, 3000)}, {}),
        (lambda: {"path": alike(900, 90_000)}, DELTAS),
        (lambda: {"path": alike(20, 2_000_000)}, {"use_dictionary": False}),
        (lambda: {"path": same("a", 3_000_000)}, {}),
    ],
)
def test_few_bytes_that_stand_for_many_are_refused(columns, options, tmp_path):
    path = parquet(tmp_path, columns(), compression="zstd", **options)
    assert path.stat().st_size < 200_000
    with pytest.raises(ConfigError, match=r"holds .* bytes, more than 100,000 char|200 times as large as the file"):
        read_table(path)


@pytest.mark.parametrize(
    ("name", "message"),
    [("text_list", "column 'text': holds list<element: string>, not texts"), ("nf_dur", "holds duration.ns., not numb"),
     ("longstr", "column 'path': holds 10,000,000 bytes, more than 100,000 characters; shorten the cell")],
)  # fmt: skip
def test_cases_of_parquet(name, message):
    pytest.importorskip("pyarrow")
    with pytest.raises(ConfigError, match=message):
        read_table(CASES / f"{name}.parquet")
    assert list(read_table(CASES / "text_bin.parquet").text) == ["a red circle"] * 3


# Files that are no tables


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
@pytest.mark.parametrize("kind", ["fifo", "device", "link"])
def test_only_regular_files_are_read(suffix, kind, tmp_path, capsys):
    path = tmp_path / f"a{suffix}"
    if suffix == ".parquet":
        pytest.importorskip("pyarrow")
    if kind == "fifo":
        os.mkfifo(path)
    else:
        path.symlink_to(
            "/dev/zero" if kind == "device" else "/dev/stdin" if os.path.exists("/dev/stdin") else "/dev/null"
        )
    with pytest.raises(ConfigError, match="is not a regular file; give a file"):
        read_table(path)


# Paths


@pytest.fixture
def videos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with files beside the table, and another one to work in."""
    (tmp_path / "here").mkdir()
    (tmp_path / "data" / "vid").mkdir(parents=True)
    for name in ("c1.mp4", "c 2.mp4"):
        (tmp_path / "data" / "vid" / name).write_text("x")
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("HOME", str(tmp_path / "data"))
    return tmp_path / "data"


@pytest.mark.parametrize(
    "path",
    [
        "vid/c1.mp4",
        "vid\\c1.mp4",
        "~/vid/c1.mp4",
        " vid/c1.mp4 ",
        "vid/c 2.mp4",
        "./vid/../vid/c1.mp4",
        "~\\vid\\c1.mp4",
    ],
)
@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_paths_lead_to_files(path, suffix, videos):
    content = f"path,text\n{path},x\n" if suffix == ".csv" else json.dumps({"path": path})
    table = read(videos, content, f"a{suffix}")
    assert table.path[0] == path and Path(table.file(0)).read_text() == "x"
    assert not len(table.missing().rows)


def test_the_working_directory_goes_first(videos):
    table = read(videos, "path\nvid/c1.mp4\n")
    Path("vid").mkdir()
    Path("vid/c1.mp4").write_text("here")
    assert table.file(0) == "vid/c1.mp4"
    (videos / "metadata.csv").write_text("file_name,text\nvid/c1.mp4,x\n")
    assert Path(read_table(videos).file(0)).read_text() == "x"


@pytest.mark.parametrize("name", ["winpath", "tilde", "spaces", "short_rows"])
def test_cases_of_missing_files(name):
    table = read_table(CASES / f"{name}.csv")
    assert len(table.missing().rows) == len(table) and len(table.missing().tried) >= 2


def test_missing_files_are_told_with_what_was_tried(videos):
    lines = ["path", "vid/c1.mp4", "vid\\gone.mp4", "", "vid/c 2.mp4", str(videos / "no" / "x.mp4"), "vid", "~/y.mp4"]
    table = read(videos, "\n".join(lines))
    rows, tried = table.missing()
    assert rows.tolist() == [1, 3, 4, 5]
    assert tried == ["vid\\gone.mp4", "vid/gone.mp4", f"{videos}/vid\\gone.mp4", f"{videos}/vid/gone.mp4"]
    assert table.file(1) == "vid\\gone.mp4"


# Folders


@pytest.mark.parametrize(
    ("name", "content"),
    [("metadata.csv", "file_name,text\nvid/c1.mp4,a cat\n"),
     ("metadata.jsonl", '{"file_name": "vid/c1.mp4", "text": "a cat"}'),
     ("metadata.csv", "file_name;caption\nvid/c1.mp4;a cat\n")],
)  # fmt: skip
def test_a_folder_as_the_hub_lays_it_out(name, content, videos):
    (videos / name).write_text(content)
    table = read_table(videos)
    assert list(table.text) == ["a cat"] and Path(table.file(0)).read_text() == "x"
    assert table.source == str(videos / name)


def test_folders_that_are_no_tables(videos):
    with pytest.raises(ConfigError, match=r"a folder without metadata.csv or metadata.jsonl; make one with `op"):
        read_table(videos)
    for name in ("metadata.csv", "metadata.jsonl"):
        (videos / name).write_text("")
    with pytest.raises(ConfigError, match=r"holds metadata\.csv and metadata\.jsonl; name one of them"):
        read_table(videos)


def test_buckets_of_a_folder(videos, capsys):
    (videos / "metadata.csv").write_text("file_name,num_frames,height,width\n" + "vid/c1.mp4,20,144,256\n" * 5)
    Path("train.py").write_text("model = dict(type='STDiT3-XL/2')\nbucket_config = {'144p': {17: (1.0, 4)}}\n")
    assert cli.main(["buckets", str(videos), "train.py"]) == 0
    assert "5 of 5 rows have a bucket" in capsys.readouterr().out
    assert sorted(os.listdir("samples/buckets")) == ["data.buckets.csv", "data.buckets.svg"]

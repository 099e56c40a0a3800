"""Conditions on rows: what they mean, and what they refuse."""

from __future__ import annotations

import pytest

from opensora.curation.tables.expression import condition
from opensora.curation.tables.stream import TableStream
from opensora.errors import ConfigError

COLUMNS = ("path", "text", "aes", "flow", "num_frames", "odd name")
ROWS = [
    ["a.mp4", "A cat", "5.5", "3", "17", "x"],
    ["b.MP4", "a dog runs", "4", "", "34", ""],
    ["c.png", "", 6.0, 10, 1, None],
    ["d.mp4", "no number", "n/a", "-1e3", "nan", "y"],
]
TABLE = TableStream("t.csv", COLUMNS, ROWS)


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("aes >= 5", "ac"), ("aes < 5", "b"), ("aes == 6", "c"), ("aes != 6", "ab"), ("not aes >= 5", "b"),
        ("5 < aes <= 6", "ac"), ("flow is None", "b"), ("flow is not None", "acd"),
        ("flow < 30 or flow is None", "abcd"),
        ("aes >= 5 and 2 < flow < 30", "ac"), ("aes > 5 or flow < 0", "acd"), ("flow < 5 or aes > 100", "ad"),
        ("num_frames / 17 == 1", "a"), ("num_frames % 17 == 0", "ab"), ("num_frames // 0 == 1", ""), ("-flow > 0", "d"),
        ("suffix(path) == '.mp4'", "abd"), ("suffix(path) in ('.png', '.jpg')", "c"),
        ("suffix(path) not in ['.mp4']", "c"),
        ("contains(text, 'CAT')", "a"), ("'dog' in text", "b"), ("startswith(text, 'a ')", "b"),
        ("endswith(path, 'mp4')", "ad"),
        ("words(text) > 2", "b"), ("len(text) == 5", "a"), ("lower(text) == 'a cat'", "a"),
        ("max(aes, flow) > 5", "ac"),
        ("abs(flow) == 1000", "d"), ("round(aes) == 6", "ac"), ("min(aes, 5) == 5", "ac"),
        ('column("odd name") == "x"', "a"),
        ("True", "abcd"), ("None", ""), ("1e999 > aes", ""), ("text == ''", ""), ("text < 'b'", "ab"),
        ("path > text", "ab"),
        ("caption is None", "c"), ("num_frames in (1, 34)", "bc"), ("9" * 400 + " > aes", ""),
    ],
)  # fmt: skip
def test_what_a_condition_keeps(text: str, kept: str) -> None:
    table = TableStream("t.csv", ("path", "caption", *COLUMNS[2:]), ROWS) if "caption" in text else TABLE
    if "caption" in text:
        text = text.replace("caption", "text")  # the other spelling of training tables
    keep = condition(text, table)
    assert "".join(str(row[0])[0] for row in ROWS if keep(row)) == kept


@pytest.mark.parametrize(
    "text",
    [
        "", "aes >=", "aes >> 2", "aes = 5", "__import__('os')", "().__class__", "aes.real", "aes[0]", "lambda: 1",
        "[x for x in text]",
        "f'{aes}'", "aes if flow else 1", "(y := 5) > 1", "open('x')", "len(*text)", "len(text, text)",
        "len(text=1)", "column(text)",
        "column('x', 'y')", "nope > 1", "aes ** 9", "aes @ 2", "~aes", "await aes", "b'x' == text", "1j > aes",
        "... is None", "aes; 1",
        "(" * 300 + "1" + ")" * 300, "not " * 200 + "aes",
        "+".join(["aes"] * 300), "aes > 1 " + "and aes > 1 " * 400, "\0", "flow is 3",
        "yield", "{'a': 1}", "contains('a')", "*aes",
    ],
)  # fmt: skip
def test_what_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"condition|has no column"):
        keep = condition(text, TABLE)
        any(map(keep, ROWS))

"""`opensora data report`: counts by rule, examples, and texts that stay texts."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from opensora.cli import main
from opensora.curation.analysis.report import EvenSample, write_report
from opensora.datasets.video import write_image, write_video

TAGS = {
    "html", "head", "meta", "title", "style", "body", "main", "h1", "h2", "h3", "p", "table", "tr", "th", "td", "div",
    "svg", "text", "rect", "figure", "img", "figcaption", "br",
}  # fmt: skip
EVIL = [
    "<script>alert(1)</script>", "\"><img src=x onerror=alert(1)>", "' onload='x", "</style><style>*{}</style>",
    "javascript:alert(1)", "&lt;b&gt;", "=HYPERLINK(\"http://x\")", "\x1b[31m\u202e\u2028", "\udcff lone", "]]>-->",
]  # fmt: skip


class Page(HTMLParser):
    """The tags and attributes of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: list[tuple[str, str | None]] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += attrs

    def handle_data(self, data: str) -> None:
        self.words.append(data)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write_video(np.full((6, 16, 24, 3), 200, np.uint8), Path("a.mp4"), 8)
    write_image(np.zeros((20, 30, 3), np.uint8), Path("b.png"))
    return tmp_path


def test_rules_are_counted_in_order(here: Path) -> None:
    cells = [{"path": ["a.mp4", "b.png", "gone.mp4"][n % 3], "aes": n % 10, "flow": n} for n in range(60)]
    Path("t.jsonl").write_text("\n".join(map(json.dumps, cells)))
    assert write_report(["t.jsonl"], "r.html", ["aes >= 5", "flow < 40"], examples=3) == (60, 20)
    page = Page(Path("r.html").read_text())
    text = " ".join(page.words)
    assert re.search(r"dropped by aes >= 5\s+30\s+50.0%", text) and re.search(r"by flow < 40\s+10\s+16.7%", text)
    assert re.search(r"kept\s+20\s+33.3%", text)
    pictures = [value for name, value in page.attributes if name == "src"]
    assert pictures and all(value.startswith("data:image/jpeg;base64,") for value in pictures)
    assert text.count("cannot be read") + len(pictures) == 9  # three of each group
    assert main(["data", "report", "t.jsonl", "--output", "r.html"]) == 1
    assert main(["data", "report", "t.jsonl", "--output", "r.html", "--force"]) == 0
    assert "Rules" not in Path("r.html").read_text()


def test_texts_of_a_table_stay_texts(here: Path) -> None:
    rows = [{"path": EVIL[n % 10], "text": EVIL[n // 2 % 10], f"<i>{EVIL[0]}": EVIL[n % 3]} for n in range(40)]
    Path("<b>t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    write_report(["<b>t.jsonl"], "r.html", ["contains(text, '<script>') or text == 'x'"])
    source = Path("r.html").read_text(encoding="utf-8")
    page = Page(source)
    assert page.tags <= TAGS and {name for name, _ in page.attributes} <= {
        "lang", "charset", "http-equiv", "content", "class", "width", "height", "role", "aria-label", "x", "y",
        "text-anchor", "src", "alt",
    }  # fmt: skip
    assert "\x1b" not in source and "\u202e" not in source and source.count("<style>") == 1
    policy = dict(page.attributes)["content"]
    assert "default-src 'none'" in policy and "script" not in policy and "unsafe" not in policy
    assert any(EVIL[0] in words for words in page.words)  # it is shown, as text


@pytest.mark.parametrize("count", [0, 1, 3, 50])
@pytest.mark.parametrize("total", [0, 1, 5, 1000])
def test_examples_are_spread_over_the_table(count: int, total: int) -> None:
    sample = EvenSample(count)
    for number in range(total):
        sample.add([number])
    found = [int(row[0]) for row in sample.rows]
    assert len(found) == min(count, total) and found == sorted(set(found))
    assert total <= count or count < 2 or found[-1] - found[0] >= total * 0.4


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--where", "nope > 1"], "no column 'nope'"), (["--where", "__import__('os')"], "is not part of conditions"),
        (["--examples", "-1"], "up to 50"), (["--where", "aes"] * 21, "up to 20 rules"),
        (["gone.csv"], "no such table"),
    ],
)  # fmt: skip
def test_refused_reports_leave_nothing(here: Path, capsys: pytest.CaptureFixture, argv: list[str], words: str) -> None:
    Path("t.csv").write_text("path,aes\na.mp4,1\n")
    assert main(["data", "report", "t.csv", *argv, "--output", "r.html"]) == 1
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1 and not Path("r.html").exists()

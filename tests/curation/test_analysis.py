"""`opensora data split` and `analyze`: rows of buckets, figures of columns."""

from __future__ import annotations

import csv
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from opensora.cli import main
from opensora.curation.analysis.figures import figures_of
from opensora.curation.analysis.series import BINS, SAMPLE, NumberSeries, TextSeries
from opensora.curation.tables.reading import open_table
from opensora.datasets.video import read_image

CONFIG = """
dataset = dict(type="VariableVideoTextDataset")
bucket_config = {"144p": {1: (1.0, 2), 17: (1.0, 2)}, "240p": {17: (0.5, 2)}}
model = dict(type="STDiT3-XL/2")
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("c.py").write_text(CONFIG)
    return tmp_path


def write(name: str, columns: str, rows: list[tuple]) -> None:
    with open(name, "w", newline="") as file:
        csv.writer(file).writerows([columns.split(), *rows])


def sizes(count: int) -> list[tuple]:
    """Clips, pictures and clips that are too small, in turn."""
    kinds = [(17, 144, 256), (1, 144, 256), (40, 240, 426), (17, 20, 30), ("", 144, 256)]
    return [(f"{n}.mp4", *kinds[n % len(kinds)]) for n in range(count)]


def test_a_split_has_the_first_rows_of_each_bucket(here: Path) -> None:
    write("a.csv", "path num_frames height width", sizes(30))
    write("b.csv", "path width height num_frames", [(f"9{p}", w, h, t) for p, t, h, w in sizes(10)])
    split = ["data", "split", "[ab].csv", "-c", "c.py", "--force"]
    assert main([*split, "-o", "few.csv", "-l", "3"]) == 0
    rows = list(csv.DictReader(Path("few.csv").read_text().splitlines()))
    groups = Counter((row["num_frames"], row["height"]) for row in rows)
    assert groups[("1", "144")] == 3 and ("17", "20") not in groups and ("", "144") not in groups
    # clips of 240p stay there or, with probability 0.5, become ones of 144p, and share its limit
    assert 3 < groups[("17", "144")] + groups[("40", "240")] <= 6
    numbers = [int(row["path"].partition(".")[0]) for row in rows]
    assert numbers == sorted(numbers)  # the order stays
    assert main([*split, "-o", "all.csv", "-l", "100"]) == 0
    assert len(Path("all.csv").read_text().splitlines()) == 1 + 24
    assert main([*split, "-o", "again.csv", "-l", "3"]) == 0
    assert Path("again.csv").read_bytes() == Path("few.csv").read_bytes()


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["-l", "0"], "at least 1"), (["-c", "plain.py"], "no bucket_config"), (["-o", "x.txt"], "is a .csv"),
        (["-c", "gone.py"], "gone.py"), (["small.csv"], "no row has a bucket"), (["lost.csv"], "no column 'height'"),
    ],
)  # fmt: skip
def test_refused_splits_leave_nothing(here: Path, capsys: pytest.CaptureFixture, argv: list[str], words: str) -> None:
    Path("plain.py").write_text('model = dict(type="STDiT3-XL/2")\n')
    write("small.csv", "path num_frames height width", [("a.mp4", 17, 8, 8)])
    write("lost.csv", "path num_frames width", [("a.mp4", 17, 8)])
    write("a.csv", "path num_frames height width", sizes(10))
    given = {"-c": "c.py", "-o": "out.csv"} | dict(zip(argv[::2], argv[1::2], strict=False))
    table = argv[0] if argv[0].endswith(".csv") else "a.csv"
    words_of = [word for flag, value in given.items() if flag.startswith("-") for word in (flag, value)]
    assert main(["data", "split", table, *words_of]) == 1
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1 and not Path("out.csv").exists()


def test_figures_agree_with_numpy(here: Path) -> None:
    random = np.random.default_rng(0)
    aes = random.normal(5, 1, 500).round(3)
    cells = [(f"{n}.mp4", "a b c" if n % 2 else "", a if n % 5 else "", 24 * (n % 9 + 1)) for n, a in enumerate(aes)]
    write(
        "t.csv",
        "path text aes num_frames fps camera",
        [(*row, 24, ["pan", "tilt", ""][n % 3]) for n, row in enumerate(cells)],
    )
    figures = figures_of(open_table("t.csv"))
    series = dict(figures.numbers())
    known = aes[np.arange(500) % 5 != 0]
    assert series["aes"].count == 400 and series["aes"].mean == pytest.approx(known.mean())
    assert (series["aes"].least, series["aes"].most) == (known.min(), known.max())
    assert series["aes"].quantiles(0.1, 0.5) == pytest.approx(np.quantile(known, [0.1, 0.5]))
    seconds = [n % 9 + 1 for n in range(500)]
    assert figures.seconds.total == sum(seconds) and figures.words.count == 250 and figures.words.mean == 3
    columns = {column.name: column for column in figures.columns}
    assert columns["aes"].missing == 100 and columns["camera"].missing == 166
    assert [bar.label for bar in dict(figures.texts())["camera"].bars()] == ["pan", "tilt"]
    assert sum(bar.share for bar in series["aes"].bars()) == pytest.approx(1) and len(series["aes"].bars()) == BINS


@pytest.mark.parametrize("count", [1, SAMPLE, SAMPLE + 1, 5 * SAMPLE])
def test_long_series_are_sampled_evenly(count: int) -> None:
    series = NumberSeries()
    for value in range(count):
        series.add(value)
    assert series.count == count and series.most == count - 1
    assert min(count, SAMPLE // 2) <= len(series._sample) <= SAMPLE
    assert series.quantiles(0.5)[0] == pytest.approx((count - 1) / 2, rel=1e-3)


def test_texts_that_are_all_different_have_no_bars() -> None:
    series = TextSeries()
    for number in range(20_000):
        series.add(f"text {number}")
    assert series.bars() == [] and len(series.found) < 20_000


def test_histograms_are_pictures(here: Path, capsys: pytest.CaptureFixture) -> None:
    rows = [(f"{n}.mp4", n / 7, "<b>x</b>\x1b[31m\n\u202e") for n in range(40)]
    write("t.csv", "path aes note/../\x07", rows)
    assert main(["data", "analyze", "t.csv", "--save-img", "pictures"]) == 0
    shown = capsys.readouterr().out
    assert "40 rows" in shown and "\x1b" not in shown and "\u202e" not in shown
    files = sorted(Path("pictures").iterdir())
    assert len(files) == 3 and all(read_image(file).std() > 5 for file in files)
    write("empty.csv", "path", [])
    assert main(["data", "analyze", "empty.csv"]) == 0 and "0 rows" in capsys.readouterr().out
    assert main(["data", "analyze", "empty.csv", "--save-img", "none"]) == 1 and not Path("none").exists()

"""What is wrong with a table is told before the first step: files that are not there, texts that are not written."""

from __future__ import annotations

import csv
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from opensora.config.settings import TrainSettings
from opensora.datasets.table import read_table
from opensora.errors import ConfigError, MediaError
from opensora.training.data.table_checks import check_texts, missing_files, same_on_all_ranks
from opensora.training.diffusion import train


def table(folder: Path, *rows: tuple, header: tuple = ("path", "text", "num_frames", "height", "width")) -> Path:
    path = folder / "table.csv"
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    return path


def rows_of(folder: Path, count: int, gone: int, text: str = "a clip") -> list[tuple]:
    """So many rows of files, the last ones not there."""
    paths = [folder / f"{number}.mp4" for number in range(count)]
    [path.touch() for path in paths[: count - gone]]
    return [(path, text, 20, 192, 192) for path in paths]


def train_settings(path: Path, **changes: Any) -> TrainSettings:
    """Encoders are named that are nowhere: nothing of them may be needed before the table is known to be good."""
    section = {"type": "VideoTextDataset", "data_path": str(path), "num_frames": 4, "image_size": (16, 16)}
    base = dict(
        dataset={**section, **changes.pop("dataset", {})}, model={"type": "STDiT3"}, scheduler={"type": "rflow"},
        vae={"type": "VideoAutoencoderPipeline", "from_pretrained": "/nowhere"}, batch_size=1, max_steps=1,
        text_encoder={"type": "t5", "from_pretrained": "/nowhere"}, outputs=str(path.parent / "runs"), device="cpu",
    )  # fmt: skip
    return TrainSettings(**{**base, **changes})


class TestFiles:
    @pytest.mark.parametrize(
        "paths",
        [
            ["videos\\a.mp4", "videos\\b.mp4"], ["~/no such folder/a.mp4"], ["my videos/a 1.mp4 "], ["", ""],
            ["folder.mp4"], ["pipe.mp4", "gone.png"], ["/nowhere/a.mp4"] * 40, ["x" * 5000, "line\nbreak.mp4"],
        ],
        ids=lambda paths: repr(paths[0])[:20],
    )  # fmt: skip
    @pytest.mark.parametrize("kind", ["VideoTextDataset", "VariableVideoTextDataset"])
    def test_a_run_without_files_is_refused(
        self, paths: list[str], kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        (tmp_path / "folder.mp4").mkdir()
        os.mkfifo(tmp_path / "pipe.mp4")
        path = table(tmp_path, *((one, "a clip", 20, 192, 192) for one in paths))
        one_size = {"num_frames": 4, "image_size": (16, 16)} if kind == "VideoTextDataset" else {}
        section = {"type": kind, "data_path": str(path), **one_size}
        buckets = None if one_size else {"144p": {17: (1.0, 1)}}
        asked = train_settings(path)
        asked = TrainSettings(**{**vars(asked), "dataset": section, "bucket_config": buckets})
        with pytest.raises(
            MediaError, match=rf"none of its {len(paths)} files exists: .*the working directory"
        ) as told:
            train(asked)
        assert not (tmp_path / "runs").exists() and "\n" not in str(told.value)

    @pytest.mark.parametrize(("count", "gone", "most"), [(60, 6, 3), (3, 2, 1), (100, 6, 5)])
    def test_too_many_are_refused(self, count: int, gone: int, most: int, tmp_path: Path) -> None:
        path = table(tmp_path, *rows_of(tmp_path, count, gone))
        first = tmp_path / f"{count - gone}.mp4"
        with pytest.raises(MediaError, match=rf"{gone} of {count} files do not exist: {first}.*limit of {most};"):
            train(train_settings(path))
        assert not (tmp_path / "runs").exists()

    @pytest.mark.parametrize(("count", "gone"), [(60, 3), (2, 1), (100, 5)])
    def test_a_few_are_said_and_left_out(
        self, count: int, gone: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        found = missing_files(read_table(table(tmp_path, *rows_of(tmp_path, count, gone))))
        assert [one.row for one in found] == [*range(count - gone, count)]
        assert f"{gone} of {count} files do not exist" in caplog.text and "their rows are left out" in caplog.text

    def test_nothing_is_said_of_a_whole_table(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        assert missing_files(read_table(table(tmp_path, *rows_of(tmp_path, 3, 0)))) == [] and not caplog.text

    def test_a_file_counts_that_any_rank_lacks(self, tmp_path: Path) -> None:
        made = read_table(table(tmp_path, *rows_of(tmp_path, 60, 1)))
        others = [np.array([4]), np.array([4, 7])]
        assert [one.row for one in missing_files(made, lambda own: [own, *others])] == [4, 7, 59]
        with pytest.raises(MediaError, match="5 of 60"):
            missing_files(made, lambda own: [own, np.arange(4)])


class TestTexts:
    @pytest.mark.parametrize("header", [("path",), ("path", "size"), ("path", "num_frames", "height", "width")])
    def test_a_table_without_them_is_refused(self, header: tuple, tmp_path: Path) -> None:
        (tmp_path / "a.mp4").touch()
        path = table(tmp_path, ("a.mp4", *([20] * (len(header) - 1))), header=header)
        with pytest.raises(ConfigError, match=r"has no column text.*add it"):
            train(train_settings(path))
        assert not (tmp_path / "runs").exists()

    @pytest.mark.parametrize(
        ("texts", "captions", "words"),
        [
            (["", "", ""], "mostly", "3 of 3 texts are empty: .*over the limit of 1"),
            (["  ", "\t", "x", "x"], "mostly", "2 of 4 texts are empty: .*over the limit of 1"),
            ([""] * 6 + ["x"] * 94, "mostly", "6 of 100 texts are empty: .*over the limit of 5"),
            (["x", ""], "required", "1 of 2 texts are empty: .*'required' allows none"),
            (["x"] * 99 + ["\u3000"], "required", "1 of 100 texts are empty: .*99.mp4"),
        ],
    )
    def test_too_many_empty_ones_are_refused(self, texts: list[str], captions: str, words: str, tmp_path: Path) -> None:
        rows = [(row[0], text, *row[2:]) for row, text in zip(rows_of(tmp_path, len(texts), 0), texts, strict=True)]
        with pytest.raises(ConfigError, match=words):
            train(train_settings(table(tmp_path, *rows), dataset={"captions": captions}))
        assert not (tmp_path / "runs").exists()

    @pytest.mark.parametrize(
        ("texts", "captions"), [([""] + ["x"] * 20, "mostly"), (["", " ", ""], "optional"), (["x", ""], "mostly")]
    )
    def test_a_few_are_counted(
        self, texts: list[str], captions: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        made = read_table(table(tmp_path, *((f"{number}.mp4", text) for number, text in enumerate(texts)),
                                header=("path", "text")))  # fmt: skip
        check_texts(made, captions)
        empty = sum(not text.strip() for text in texts)
        assert f"{empty} of {len(texts)} texts are empty" in caplog.text

    @pytest.mark.parametrize("value", ["always", True, 3])
    def test_other_values_are_refused(self, value: Any, tmp_path: Path) -> None:
        path = table(tmp_path, *rows_of(tmp_path, 1, 0))
        with pytest.raises(ConfigError, match=r"dataset\.captions .*mostly"):
            train(train_settings(path, dataset={"captions": value}))


def test_other_tables_on_other_ranks_are_refused() -> None:
    cells, other = np.zeros((2, 16), np.uint8), np.ones((2, 16), np.uint8)
    same_on_all_ranks(cells, "t.csv", lambda own: [own, own])
    for digests in (lambda own: [own, b"another"], lambda own: [b"another", own], lambda own: [own, own, b"x"]):
        with pytest.raises(ConfigError, match=r"t\.csv: rank \d reads another table than rank 0"):
            same_on_all_ranks(other, "t.csv", digests)

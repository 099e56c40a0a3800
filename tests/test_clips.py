"""Rows that are a part of their file: a span of times, a crop of the picture."""

from __future__ import annotations

import json
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from opensora.curation.cutting.cut import CutSettings, cut_clips
from opensora.curation.cutting.stage import Cut
from opensora.curation.execution.settings import ExecutorSettings
from opensora.datasets.bucket import Bucket, Buckets
from opensora.datasets.datasets import VariableVideoTextDataset, VideoTextDataset, frame_indices
from opensora.datasets.file_content import content_keys, file_stamps
from opensora.datasets.quarantine import Quarantine, UnreadableRow
from opensora.datasets.table import Table, read_table
from opensora.datasets.transforms import resize_crop
from opensora.datasets.video import Crop, Span, read_video, shown_times, write_image, write_video
from opensora.errors import ConfigError
from opensora.training.data.data_record import cells_of, record_of_table
from opensora.training.feature_extraction.extract import extract
from opensora.training.feature_extraction.shards import LatentShard, missing
from tests.curation.footage import scene
from tests.features import settings, use

FRAMES, HEIGHT, WIDTH = 40, 96, 160
HEAD = ("path", "text", "num_frames", "height", "width", "start_pts", "end_pts", "crop")


@pytest.fixture(scope="module")
def film(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_video(scene(3, FRAMES), tmp_path_factory.mktemp("film") / "film.mp4", 24)


@pytest.fixture(scope="module")
def times(film: Path) -> list[int]:
    return [time for time in shown_times(film) if time is not None]


def table(folder: Path, *rows: tuple, head: tuple = HEAD) -> Path:
    path = folder / "table.jsonl"
    path.write_text("".join(json.dumps(dict(zip(head, row, strict=False))) + "\n" for row in rows))
    return path


def test_samples_are_the_frames_of_the_clip(film: Path, times: list[int], tmp_path: Path) -> None:
    whole, _ = read_video(film)
    path = table(
        tmp_path,
        (str(film), "cropped", 20, HEIGHT, WIDTH, times[10], times[30], "8 20 64 100"),
        (str(film), "to the end", 10, HEIGHT, WIDTH, times[30]),
        (str(film), "whole", FRAMES, HEIGHT, WIDTH),
        (str(film), "a crop alone", FRAMES, HEIGHT, WIDTH, None, None, "0 0 96 32"),
    )  # fmt: skip
    expected = (whole[10:30, 8:72, 20:120], whole[30:], whole, whole[:, :, :32])
    dataset = VideoTextDataset(path, 4, 2, (32, 48), "resize_crop")
    buckets = VariableVideoTextDataset(path, frame_interval=2)
    for row, frames in enumerate(expected):
        for start in (0, len(frames) - 8):
            picked = frames[frame_indices(len(frames), 4, 2, start)]
            assert torch.equal(dataset.read(row, start)["video"], resize_crop(picked, (32, 48)))
            assert torch.equal(buckets.read(f"{row}-4-64-64", start)["video"], resize_crop(picked, (64, 64)))
    assert dataset.name(0) == f"{film} [{times[10]}, {times[30]}) crop 8 20 64 100" and dataset.name(2) == str(film)


def test_rows_of_whole_files_are_as_without_the_columns(film: Path, tmp_path: Path) -> None:
    plain = read_table(table(tmp_path, (str(film), "a", FRAMES, HEIGHT, WIDTH), head=HEAD[:5]))
    assert plain.parts is None
    empty = read_table(table(tmp_path, (str(film), "a", FRAMES, HEIGHT, WIDTH, None, "", " ")))
    assert empty.span(0) is None and empty.crop(0) is None and empty.name(0) == plain.name(0) == str(film)


def test_buckets_take_the_size_of_the_crop(tmp_path: Path) -> None:
    rows = read_table(
        table(tmp_path, ("a.mp4", "a", 17, 720, 1280), ("a.mp4", "b", 17, 720, 1280, 0, 9, "0 0 144 256"))
    )
    placed = Buckets({"720p": {17: (1.0, 1)}, "144p": {17: (1.0, 1)}}).assign(*rows.sizes(), seed=1)
    assert [placed[row].resolution for row in (0, 1)] == ["720p", "144p"]


WRONG = [
    ((5, 5, None), "not after start_pts 5"), ((7, 2, None), "end_pts 2 is not after start_pts 7"),
    ((None, 9, None), "without start_pts"), ((1.5, 9, None), "start_pts '1.5' is no integer"),
    (("x", 9, None), "start_pts 'x'"), ((0, "nan", None), "end_pts 'nan'"), ((0, [9], None), "end_pts '[9]'"),
    ((True, None, None), "start_pts 'a boolean'"), ((10**30, None, None), "is no integer"),
    (("1_0", None, None), "is no integer"), ((0, "1e3", None), "is no integer"),
    ((None, None, "1 2 3"), "top left height width"), ((None, None, "0 0 0 5"), "is empty"),
    ((None, None, "0,0,5,5"), "top left height width"), ((None, None, "-1 0 5 5"), "top left height width"),
    ((None, None, "0 9000 5 5"), "goes beyond 8192"), ((None, None, "1 2 3 9" + "9" * 400), "crop '1 2 3 9"),
]  # fmt: skip


@pytest.mark.parametrize(("cells", "words"), WRONG)
def test_wrong_cells_are_named(cells: tuple, words: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        read_table(table(tmp_path, ("a.mp4", "a", 1, 1, 1), ("a.mp4", "a", 1, 1, 1, *cells)))
    message = str(error.value)
    assert words in message and "line 2" in message and "\n" not in message and len(message) < 500


def test_one_column_of_two_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("path,start_pts\na.mp4,1\n")
    with pytest.raises(ConfigError, match=r"has a column start_pts and none end_pts"):
        read_table(tmp_path / "a.csv")


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_formats(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"a.{suffix}"
    if suffix == "csv":
        path.write_text("path,start_pts,end_pts,crop\na.mp4,0,10.0,\nb.mp4,,,1 2 3 4\nc.mp4,-5,,\n")
    else:
        pyarrow = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        columns = {"path": ["a.mp4", "b.mp4", "c.mp4"], "start_pts": [0, None, -5], "crop": [None, "1 2 3 4", ""]}
        ends = pyarrow.array([Decimal(10), None, None], pyarrow.decimal128(20, 2))
        parquet.write_table(pyarrow.table({**columns, "end_pts": ends}), path)
    read = read_table(path)
    assert [read.span(row) for row in range(3)] == [Span(0, 10), None, Span(-5, None)]
    assert [read.crop(row) for row in range(3)] == [None, Crop(1, 2, 3, 4), None]


@pytest.mark.parametrize(
    ("cells", "words"),
    [
        ((-5, 9), "goes beyond its frames"), ((0, 10**12), "goes beyond its frames"), ((10**9, None), "shows no frame"),
        ((10**9, 10**10), "shows no frame"), ((1, 2), "shows no frame"), ((0, 600), "frames in [0, 600), fewer than"),
        ((None, None, "0 0 97 10"), "the crop 0 0 97 10 reaches beyond"), ((None, None, "95 159 1 2"), "96x160 pixels"),
    ],
)  # fmt: skip
def test_parts_that_a_file_does_not_have_are_unreadable(cells: tuple, words: str, film: Path, tmp_path: Path) -> None:
    dataset = VideoTextDataset(table(tmp_path, (str(film), "a", 9, 9, 9, *cells)), 4, image_size=(32, 32))
    found = dataset[0]
    assert isinstance(found, UnreadableRow) and words in found.reason and "\n" not in found.reason


def test_images_have_crops_and_no_spans(tmp_path: Path) -> None:
    picture = scene(5, 1)[0]
    image = str(write_image(picture, tmp_path / "a.png"))
    dataset = VideoTextDataset(
        table(tmp_path, (image, "", 1, 1, 1, None, None, "8 8 40 60"), (image, "", 1, 1, 1, 0, 5)), 1, 1, (16, 16),
        "resize_crop",
    )  # fmt: skip
    assert torch.equal(dataset.read(0)["video"], resize_crop(picture[8:48, 8:68], (16, 16)))
    assert "is an image, which has no span" in dataset[1].reason


def test_only_the_surroundings_of_a_clip_are_read(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    noise = random.integers(0, 255, (300, 64, 64, 3), np.uint8)
    path = write_video(noise, tmp_path / "noise.mkv.mp4", 24)
    times = shown_times(path)
    dataset = VideoTextDataset(
        table(tmp_path, (str(path), "", 4, 64, 64, times[3], times[7])), 4, image_size=(64, 64), as_uint8=True
    )

    def characters_read() -> int:
        return int(Path("/proc/self/io").read_text().split()[1])

    before = characters_read()
    dataset.read(0, 0)
    assert characters_read() - before < path.stat().st_size / 2


def test_parts_decide_the_identity_of_the_data(film: Path, times: list[int], tmp_path: Path) -> None:
    def record(*cells: Any) -> Any:
        rows = read_table(table(tmp_path, (str(film), "a", 9, 9, 9, *cells)))
        return record_of_table(rows, cells_of(rows))

    whole, span, crop = record(), record(0, times[9]), record(0, times[9], "0 0 8 8")
    assert len({one.digest for one in (whole, span, crop, record(0, times[8]))}) == 4
    assert f"film.mp4 [0, {times[8]}) crop 0 0 8 8" in record(0, times[8], "0 0 8 8").changes_since(crop)


def shard_of(rows: Table, folder: Path) -> LatentShard:
    paths = [rows.file(0)]
    held: dict[str, Any] = {"planned": np.arange(1), "stamp": file_stamps(paths), "key": content_keys(paths)}
    if rows.parts is not None:
        held["part"] = rows.parts_of(np.arange(1))
    save_file({name: torch.from_numpy(value) for name, value in held.items()}, folder / "a.safetensors")
    return LatentShard("a.safetensors", 0, Bucket("144p", 1, "1.00"), (1, 8, 8), 1, np.arange(1))


@pytest.mark.parametrize(("before", "after"), [((), (0, 600)), ((0, 600), ()), ((0, 600), (0, 601))])
def test_features_of_another_part_are_stale(before: tuple, after: tuple, film: Path, tmp_path: Path) -> None:
    def of(cells: tuple) -> Table:
        head = HEAD if cells else HEAD[:5]
        return read_table(table(tmp_path, (str(film), "a", 9, 9, 9, *cells), head=head))

    shard = shard_of(of(before), tmp_path)
    assert missing(tmp_path, [shard], of(before), replace_stale=False) == []
    with pytest.raises(ConfigError, match=r"spans or crops of rows in a.safetensors have changed"):
        missing(tmp_path, [shard], of(after), replace_stale=False)
    assert missing(tmp_path, [shard], of(after), replace_stale=True) == [shard]


def test_features_of_clips_are_those_of_cut_files(
    film: Path, times: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [(str(film), "a", 9, 9, 9, times[2], times[9]), (str(film), "b", 9, 9, 9, times[20], "", "8 8 64 64")]
    clips = table(tmp_path, *rows)
    cut_clips(CutSettings(str(clips), Cut(str(tmp_path / "cut"), lossless=True), None, ExecutorSettings(workers=0)))
    use(monkeypatch)

    def latents(path: Path, folder: str) -> torch.Tensor:
        section = {"type": "VideoTextDataset", "num_frames": 4, "image_size": (32, 32), "data_path": str(path)}
        how: dict[str, Any] = {"dataset": section, "bucket_config": None, "batch_size": 2}
        [shard] = (extract(settings(path, tmp_path / folder, **how)) / "latents").rglob("*.safetensors")
        return load_file(shard)["latents"]

    assert torch.equal(latents(clips, "of_clips"), latents(tmp_path / "cut/clips.csv", "of_files"))
    table(tmp_path, (*rows[0][:5], times[3], times[9]), rows[1])
    with pytest.raises(ConfigError, match=r"spans or crops of rows in .* have changed"):
        latents(clips, "of_clips")


def test_unreadable_parts_of_one_file_are_listed_each(film: Path, tmp_path: Path) -> None:
    rows = [(str(film), "a", 9, 9, 9, start, start + 1) for start in (1, 2, 3)]
    read = read_table(table(tmp_path, *rows))
    unreadable = [UnreadableRow(row, str(film), "shows no frame") for row in (0, 1)]
    listed = tmp_path / "quarantine.jsonl"
    Quarantine(listed, 100, table=read).add(unreadable)
    again = Quarantine(listed, 100, table=read)
    again.add(unreadable)
    assert len(listed.read_text().splitlines()) == len(again) == 2
    rows[0] = (str(film), "a", 9, 9, 9, 0, 600)
    assert len(Quarantine(listed, 100, table=read_table(table(tmp_path, *rows)))) == 1

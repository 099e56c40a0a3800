"""Tables, crops and samples against the recorded data sets; what differs on purpose is named by its quirk."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from opensora.datasets import datasets
from opensora.datasets.columns import SPELLINGS
from opensora.datasets.datasets import (
    UnreadableRow,
    VariableVideoTextDataset,
    VideoTextDataset,
    collate,
    frame_indices,
    num_starts,
)
from opensora.datasets.table import read_table
from opensora.datasets.video import IMAGE_SUFFIXES, VIDEO_SUFFIXES, read_video
from opensora.errors import ConfigError, MediaError
from tests.parity.cases import ROOT

FACTS = json.loads((ROOT / "data" / "datasets.json").read_text())
TENSORS = load_file(ROOT / "data" / "datasets.safetensors")
MEDIA = ROOT / "data" / "datasets.media"
BEHAVIOURS = FACTS["behaviours"]
ELSEWHERE = {  # checked by tests of references and features, or without a counterpart here
    "is_url", "get_data_info", "feature_dataset", "id_column_after_loading", "existing_id_column_is_overwritten",
    "collated_batch_with_dummy_text_features",
}  # fmt: skip
HERE = {
    "csv_columns", "table_file_formats", "type_by_extension", "image_extensions", "video_extensions", "IMG_FPS",
    "bad_file_retry_fixed_dataset", "bad_file_variable_dataset", "collated_batch", "collated_video_batch_interval_3",
}  # fmt: skip


def write_table(path: Path, rows: list[dict[str, Any]], header: bool = True) -> Path:
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        if header:
            writer.writeheader()
        writer.writerows(rows)
    return path


def dataset_of(case: dict, table: Path) -> Any:
    options = {"frame_interval": case.get("frame_interval", 1)}
    if case["dataset"] == "VariableVideoTextDataset":
        return VariableVideoTextDataset(table, **options)
    options |= {"num_frames": case.get("num_frames", 1), "image_size": tuple(case.get("image_size", (16, 16)))}
    return VideoTextDataset(table, transform_name=case.get("transform", "center"), **options)


def is_refused_on_purpose(case: dict) -> bool:
    """D8: an image that is cut off; and one that the table takes for a video, which no batch could hold."""
    image = case["file"].lower().endswith(IMAGE_SUFFIXES)
    variable = case["dataset"] == "VariableVideoTextDataset"
    return case["file"].startswith("truncated") or (image and variable and case["index"].split("-")[1] != "1")


def facts_of(sample: dict[str, Any]) -> dict[str, Any]:
    """Everything but the video, as recorded: kind and value."""
    return {name: (type(v).__name__, v) for name, v in sample.items() if name != "video"}


def test_kinds_are_known() -> None:
    known = {"version", "temporal", "transforms", "items", "save_sample", "read_from_path", "behaviours"}
    assert set(FACTS) == known | {"collect_references", "v1.1.0", "v1.0.0"}
    assert set(BEHAVIOURS) == HERE | ELSEWHERE


@pytest.mark.parametrize(
    "case", FACTS["temporal"], ids=lambda c: "{total_frames}-{num_frames}-{frame_interval}".format(**c)
)
def test_temporal(case: dict) -> None:
    """D1: here the last frame of a longer video is used too, by one more start; all other crops are as recorded."""
    total, num_frames, interval = case["total_frames"], case["num_frames"], case["frame_interval"]
    starts = num_starts(total, num_frames, interval)
    if "error" in case:
        assert starts == 0
        return
    longer = total > num_frames * interval
    assert starts == case["number_of_possible_crops"] + longer
    assert case["first_frame_range"] == [0, starts - 1 - longer]
    for recorded in case["possible_frame_indices"]:
        assert frame_indices(total, num_frames, interval, recorded[0]) == recorded
    last = frame_indices(total, num_frames, interval, starts - 1)
    assert last[-1] == total - 1 or num_frames == 1


@pytest.mark.parametrize("case", FACTS["items"], ids=lambda c: f"{c['dataset'][:3]}-{c['file']}-{c['index']}")
def test_item(case: dict, tmp_path: Path) -> None:
    row = {"path": str(MEDIA / case["file"]), "text": "a caption"}
    data = dataset_of(case, write_table(tmp_path / "a.csv", [row]))
    if "error" in case or is_refused_on_purpose(case):
        with pytest.raises((MediaError, ValueError, IndexError)):
            data.read(case["index"])
        return
    expected = TENSORS[case["tensor"]]
    image = case["file"].lower().endswith(IMAGE_SUFFIXES)
    longer = 0 if image else len(read_video(MEDIA / case["file"])[0]) - expected.shape[1] * case["frame_interval"]
    samples = [data.read(case["index"], start) for start in range(max(longer, 1))]  # which was drawn is not recorded
    sample = min(samples, key=lambda sample: float((sample["video"] - expected).abs().max()))
    recorded = {n: (fact["kind"], fact["value"]) for n, fact in case["item"].items() if n != "video"}
    assert facts_of(sample) == recorded and list(sample) == list(case["item"])
    assert sample["video"].dtype == torch.float32 and sample["video"].is_contiguous()
    assert sample["video"].shape == expected.shape
    lossy = case["file"].startswith(("h264", "mpeg4"))
    most = 0.15 if lossy else 0.02 if case["file"].lower().endswith((".jpg", ".jpeg")) else 1e-5
    difference = (sample["video"] - expected).abs()
    assert difference.max() <= most and difference.mean() <= 0.05


@pytest.mark.parametrize(
    "case", BEHAVIOURS["csv_columns"], ids=lambda c: f"{c['dataset'][:3]}-{'-'.join(c['columns'])}"
)
def test_columns(case: dict, tmp_path: Path) -> None:
    """D7: an empty caption is an empty text. D9: other names of the columns count too."""
    empty = case.get("note") == "text cell empty"
    assert case.get("note") in (None, "text cell empty")
    cells = {"path": str(MEDIA / "rgb_37x53.png"), "text": "" if empty else "hi", "num_frames": 1, "aes": 5}
    [path], [text] = (
        [n for n in case["columns"] if n in SPELLINGS[column]][:1] or [column] for column in ("path", "text")
    )
    cells |= {path: cells["path"], text: cells["text"]}
    table = write_table(tmp_path / "a.csv", [{name: cells.get(name, 7) for name in case["columns"]}])
    if "error" in case["item"] and path not in case["columns"]:
        with pytest.raises(ConfigError, match="no column 'path'"):
            dataset_of(case, table)
        return
    sample = dataset_of(case, table).read("0-1-16-16" if case["dataset"].startswith("Variable") else 0)
    expected = {n: fact if n == "video" else (fact["kind"], fact["value"]) for n, fact in case["item"]["out"].items()}
    if empty or text in set(case["columns"]) - {"text"}:
        expected["text"] = ("str", cells[text])
    assert facts_of(sample) | {"video": "tensor"} == expected


def test_table_file_formats(tmp_path: Path) -> None:
    """Suffixes may be upper case here; Parquet needs a package that is optional."""
    for case in BEHAVIOURS["table_file_formats"]:
        table = write_table(tmp_path / f"table{case['extension']}", [{"path": "a.mp4"}])
        if case["extension"].lower() == ".csv":
            assert len(read_table(table)) == 1
        else:
            with pytest.raises(ConfigError, match=r"arquet"):
                read_table(table)


def test_kinds_of_files() -> None:
    assert set(IMAGE_SUFFIXES) == set(BEHAVIOURS["image_extensions"])
    assert set(VIDEO_SUFFIXES) == set(BEHAVIOURS["video_extensions"])
    assert BEHAVIOURS["IMG_FPS"] == datasets.IMAGE_FPS
    for case in BEHAVIOURS["type_by_extension"]:
        if "out" in case:
            assert datasets._is_image(case["path"]) == (case["out"] == "image"), case["path"]


def test_a_bad_file_is_never_replaced(tmp_path: Path) -> None:
    """D4: neither another row at random nor the end of training."""
    bad, good = ({"path": str(MEDIA / name), "text": name} for name in ("broken.mp4", "lossless_20f_24x40_24fps.mkv"))
    cases = [(case["rows"], case["asked_for"]) for case in BEHAVIOURS["bad_file_retry_fixed_dataset"]]
    assert cases
    for rows, asked in cases:
        table = write_table(tmp_path / "a.csv", [bad if row == "bad" else good for row in rows])
        sample = VideoTextDataset(table, num_frames=4, image_size=(16, 16))[asked]
        assert isinstance(sample, UnreadableRow) and sample.row == asked and sample.path == bad["path"]
    case = BEHAVIOURS["bad_file_variable_dataset"]
    table = write_table(tmp_path / "a.csv", [bad if row == "bad" else good for row in case["rows"]])
    assert isinstance(VariableVideoTextDataset(table)[case["index"]], UnreadableRow)


@pytest.mark.parametrize(
    ("name", "file", "size", "interval"),
    [
        ("collated_batch", "rgb_37x53.png", "1-16-24", 1),
        ("collated_video_batch_interval_3", "lossless_20f_24x40_24fps.mkv", "7-12-12", 3),
    ],
)
def test_collated(name: str, file: str, size: str, interval: int, tmp_path: Path) -> None:
    recorded = BEHAVIOURS[name]
    rows = [{"path": str(MEDIA / file), "text": text} for text in recorded["text"]["value"]]
    data = VariableVideoTextDataset(write_table(tmp_path / "a.csv", rows), frame_interval=interval)
    batch = collate([data[f"{row}-{size}"] for row in range(len(rows))])
    assert batch.pop("unreadable") == [] and list(batch) == list(recorded)
    for key, fact in recorded.items():
        if fact["kind"] == "list":
            assert batch[key] == fact["value"]
            continue
        assert list(batch[key].shape) == fact["shape"] and str(batch[key].dtype) == f"torch.{fact['dtype']}"
        for what in ("min", "max", "mean"):
            assert float(getattr(batch[key].double(), what)()) == pytest.approx(fact[what], abs=2e-5)


def test_version_1_1() -> None:
    """D2, D3: there `ar` is width / height and `fps` is not divided; the pictures are the same."""
    assert len(FACTS["v1.1.0"]["items"]) == len(FACTS["items"])
    for old, new in zip(FACTS["v1.1.0"]["items"], FACTS["items"], strict=True):
        if "item" in new and "error" not in old:
            assert old["video_identical_to_v1.2.0"]
            assert set(new["item"]) - set(old["keys"]) <= {"fps"}


@pytest.mark.parametrize("case", FACTS["v1.0.0"]["rows"], ids=lambda case: case["case"])
def test_version_1_0(case: dict, tmp_path: Path) -> None:
    """Tables without a header are read. Each row has its own kind here, and nothing is mirrored."""
    video, image = ({"path": str(MEDIA / name), "text": "a caption"} for name in ("lossless_20f_24x40_24fps.mkv",
                                                                                  "rgb_37x53.png"))  # fmt: skip
    tables = {
        "video rows without header": ([video, video], False),
        "image rows without header": ([image], False),
        "table with a header row": ([video], True),
        "images after a first video row": ([video, image], False),
    }
    if case["case"] == "relative paths with a root folder":  # the setting `root` is refused with the settings
        return
    rows, header = tables[case["case"]]
    data = VideoTextDataset(write_table(tmp_path / "a.csv", rows, header), num_frames=3, image_size=(16, 16))
    assert len(data) == len(rows) == case.get("len", len(rows))
    for row in range(len(rows)):
        sample = data[row]
        assert sample["text"] == "a caption" and sample["video"].shape == (3, 3, 16, 16)

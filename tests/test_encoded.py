"""Features read back: the samples and batches that training would have made of the videos themselves."""

from __future__ import annotations

import json
import pickle
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from opensora.datasets import feature_files as module
from opensora.datasets.bucket import Buckets
from opensora.datasets.datasets import VariableVideoTextDataset, to_model_range
from opensora.datasets.encoded import (
    EncodedBatchSampler,
    EncodedDataset,
    TextFeatures,
    collate_encoded,
    encoded_batches,
)
from opensora.datasets.samplers import BucketBatchSampler
from opensora.errors import ConfigError
from opensora.training.data.data_record import record_of_features
from opensora.training.data.encoded import refuse_stale
from opensora.training.feature_extraction.extract import extract
from tests.features import BUCKETS, TextEncoder, Vae, make_rows, settings, use, write_rows

SEED, OWN_BUCKETS = 7, {"144p": {9: (1.0, 1)}}


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[tuple]:
    return make_rows(tmp_path_factory.mktemp("clips"), 24)


@pytest.fixture(scope="module")
def table(rows: list[tuple], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("table") / "table.csv", rows)


@pytest.fixture(scope="module")
def folder(table: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        use(patch)
        return extract(settings(table, tmp_path_factory.mktemp("features"), crops=2, save_dtype="fp32"))


@pytest.fixture
def copied(folder: Path, tmp_path: Path) -> Path:
    return shutil.copytree(folder, tmp_path / "copy")


def of_table(table: Path, **how: Any) -> BucketBatchSampler:
    source = VariableVideoTextDataset(table).table
    return BucketBatchSampler(Buckets(BUCKETS), *source.sizes(), seed=SEED, **how)


@pytest.mark.parametrize("epoch", [0, 1])
@pytest.mark.parametrize("drop_last", [True, False])
def test_batches_are_those_of_the_videos(epoch: int, drop_last: bool, folder: Path, table: Path) -> None:
    dataset = EncodedDataset(folder)
    ours = EncodedBatchSampler(dataset, seed=SEED, drop_last=drop_last)
    theirs = of_table(table, drop_last=drop_last)
    for sampler in (ours, theirs):
        sampler.set_epoch(epoch)
    asked = [[tuple(map(int, index.split("-"))) for index in batch] for batch in theirs]
    made = [[(int(dataset.row[i]), *dataset.sizes[dataset.group[i]]) for i in batch] for batch in ours]
    assert made == asked and len(made) > 3
    assert all(dataset.crop[i] == epoch for batch in ours for i in batch)


def test_samples_are_those_of_the_videos(folder: Path, table: Path) -> None:
    dataset, videos = EncodedDataset(folder), VariableVideoTextDataset(table, seed=SEED, as_uint8=True)
    assert len(dataset) == len(dataset.group) == len(dataset.row) > 24
    for index in range(len(dataset)):
        sample = dataset[index]
        size = dataset.sizes[dataset.group[index]]
        video = videos.at(int(dataset.crop[index]))["-".join(map(str, (sample["id"], *size)))]
        expected = Vae().encode(to_model_range(video["video"])[None], sample=False)[0]
        torch.testing.assert_close(sample["latents"], expected, atol=1e-6, rtol=0)
        told = ("num_frames", "height", "width", "ar", "fps")
        assert [sample[name] for name in told] == [video[name] for name in told]
        text, _ = TextEncoder().encode([video["text"]])
        assert torch.equal(sample["text"], text[0, 0]) and sample["mask"].tolist() == [1] * len(video["text"])
        last = Vae().encode(to_model_range(video["video"])[None, :, -1:], sample=False)[0, :, 0]
        torch.testing.assert_close(sample["last"], last, atol=1e-6, rtol=0)


def test_loaded_batches(folder: Path) -> None:
    dataset = EncodedDataset(folder)
    sampler = EncodedBatchSampler(dataset, seed=SEED)
    for workers in (0, 2):
        loader = DataLoader(dataset, batch_sampler=sampler, collate_fn=collate_encoded, num_workers=workers)
        for indices, batch in zip(sampler, loader, strict=True):
            samples = [dataset[index] for index in indices]
            assert torch.equal(batch["latents"], torch.stack([sample["latents"] for sample in samples]))
            assert batch["text"].shape[:2] == batch["mask"].shape == (len(indices), max(batch["mask"].sum(1)))
            for text, mask, sample in zip(batch["text"], batch["mask"], samples, strict=True):
                assert torch.equal(text[mask.bool()], sample["text"]) and not text[~mask.bool()].any()
            assert batch["id"].tolist() == [sample["id"] for sample in samples]
            assert len(set(batch["height"].tolist())) == 1 and batch["ar"].dtype == torch.float32


@pytest.mark.parametrize("drop_last", [True, False])
def test_resumes_from_one_integer_on_other_ranks(drop_last: bool, folder: Path) -> None:
    dataset = EncodedDataset(folder)
    everything = list(EncodedBatchSampler(dataset, 1, seed=3, drop_last=drop_last))
    first = [EncodedBatchSampler(dataset, 1, seed=3, drop_last=drop_last, rank=r, world_size=2) for r in range(2)]
    served = [batch for sampler in first for batch in list(sampler)[:4]]
    state = first[0].state_dict(steps=4)
    assert state == first[1].state_dict(steps=4)
    for rank in range(3):
        sampler = EncodedBatchSampler(dataset, 1, rank=rank, world_size=3, drop_last=drop_last)
        sampler.load_state_dict(state)
        served += list(sampler)
    twice = len(served) - len({batch[0] for batch in served})
    unserved = [batch for batch in everything if batch not in served]
    assert (len(unserved) < 3 and not twice) if drop_last else (not unserved and twice < 3)


def test_order_is_a_function_of_seed_and_epoch(folder: Path) -> None:
    dataset = EncodedDataset(folder)
    orders = {(seed, epoch): list(encoded_batches(dataset, epoch, seed=seed)) for seed in (1, 2) for epoch in range(4)}
    assert len({str(order) for order in orders.values()}) == 8
    assert orders[1, 2] == list(encoded_batches(dataset, 2, seed=1))
    assert {dataset.crop[i] for batch in orders[1, 3] for i in batch} == {1}
    left = encoded_batches(dataset, 0, seed=1, without=[0, 5], drop_last=False)
    rows = {int(dataset.row[i]) for batch in left for i in batch}
    assert rows.isdisjoint({0, 5}) and len(rows) > 10


def test_batch_sizes(folder: Path, tmp_path: Path) -> None:
    dataset = EncodedDataset(folder)
    wished = {"144p": {1: (0.5, 1), 9: (1.0, 3), 17: (1.0, 1)}, "240p": {9: (1.0, 5)}}
    for batch in encoded_batches(dataset, 0, batch_size=wished):
        bucket = dataset.buckets[dataset.group[batch[0]]]
        assert len(batch) == wished[bucket.resolution][bucket.num_frames][1]
    assert {len(batch) for batch in encoded_batches(dataset, 0, batch_size=2)} == {2}
    with pytest.raises(ConfigError, match="bucket_config no batch size for them"):
        encoded_batches(dataset, 0, batch_size={"240p": {9: (1.0, 5)}})
    with pytest.raises(ConfigError, match="no bucket has the rows of one batch"):
        EncodedBatchSampler(dataset, 100).require_steps()


def test_only_what_is_asked_for_is_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_OPEN", 2)
    dataset = EncodedDataset(folder)
    samples = [dataset[index] for index in range(len(dataset))]
    assert len(dataset.shards._open) <= 2
    assert all(sample["latents"].untyped_storage().nbytes() == sample["latents"].nbytes for sample in samples)
    with ThreadPoolExecutor(4) as threads:
        again = threads.map(dataset.__getitem__, [*range(len(dataset))] * 3)
        assert all(torch.equal(one["latents"], two["latents"]) for one, two in zip(again, samples * 3, strict=True))
    copy = pickle.loads(pickle.dumps(dataset))
    assert torch.equal(copy[3]["latents"], dataset[3]["latents"])


def test_texts_alone(folder: Path, rows: list[tuple]) -> None:
    texts = TextFeatures(folder)
    assert len(texts) == 24
    features, mask = texts[5]
    assert len(features) == len(mask) == len(rows[5][1])
    captions = [row[1] for row in rows]
    texts.check(captions)
    with pytest.raises(ConfigError, match="the caption of row 3 is not the one that was encoded"):
        texts.check([*captions[:3], "another", *captions[4:]])
    with pytest.raises(ConfigError, match="no text of row 99"):
        texts[99]
    assert "text" not in EncodedDataset(folder, with_text=False)[0]


def test_incomplete_and_damaged_folders(copied: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is not a folder of encoded features"):
        EncodedDataset(tmp_path)
    plan = json.loads((copied / "plan.json").read_text())
    shard = copied / plan["latents"][2]["file"]
    content = shard.read_bytes()
    shard.write_bytes(content[: len(content) // 2])
    with pytest.raises(ConfigError, match=f"{shard.name}: is damaged"):
        EncodedDataset(copied)
    shard.unlink()
    with pytest.raises(ConfigError, match=r"1 of \d+ shards do not exist yet .*extract_feat.py again"):
        EncodedDataset(copied)


@pytest.mark.parametrize(("kind", "problem"), [("latents", "no video features"), ("text", "no text features")])
def test_parts_that_were_left_out(kind: str, problem: str, copied: Path) -> None:
    plan = json.loads((copied / "plan.json").read_text())
    (copied / "plan.json").write_text(json.dumps({**plan, kind: []}))
    with pytest.raises(ConfigError, match=problem):
        EncodedDataset(copied)


def test_features_of_other_weights_are_refused(folder: Path) -> None:
    dataset = EncodedDataset(folder)
    dataset.require(vae="vae", text_encoder="text_encoder")
    with pytest.raises(ConfigError, match="was encoded with vae vae, and the run has other; re-encode it"):
        dataset.require(vae="other")


def test_a_shard_of_broken_files_alone(tmp_path: Path, rows: list[tuple], monkeypatch: pytest.MonkeyPatch) -> None:
    gone = (tmp_path / "gone.mp4", "gone", 20, 720, 1280)
    table = write_rows(tmp_path / "table.csv", [*rows[:4], gone])
    use(monkeypatch)
    dataset = EncodedDataset(
        extract(settings(table, tmp_path / "f", bucket_config={"144p": {9: (1.0, 1)}}, bin_size=1))
    )
    assert sorted(dataset.row.tolist()) == [0, 1, 2, 3]
    assert np.unique(dataset.group).size >= 2 and all(dataset[i]["text"].ndim == 2 for i in range(4))


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path, list[tuple]]:
    """A table of videos of its own, their features, and its rows."""
    use(monkeypatch)
    made = make_rows(tmp_path / "own", 3)
    path = write_rows(tmp_path / "own.csv", made)
    return path, extract(settings(path, tmp_path / "features", bucket_config=OWN_BUCKETS)), made


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("caption", "the caption of row 1 has changed"),
        ("video", "1.mp4 has changed since it was encoded"),
        ("fewer rows", "is no longer in the table|the caption of row"),
        ("none", None), ("gone", None), ("no table", None), ("another file", None),
    ],
)  # fmt: skip
def test_stale_features_are_refused_where_training_begins(change: str, words: str | None, own: tuple) -> None:
    path, folder, rows = own
    before = record_of_features(EncodedDataset(folder))
    if change == "caption":
        write_rows(path, [rows[0], (rows[1][0], "new", *rows[1][2:]), *rows[2:]])
    elif change == "video":
        make_rows(rows[0][0].parent, 1, first=1, seed=1)
    elif change == "fewer rows":
        write_rows(path, rows[:2])
    elif change == "gone":
        rows[1][0].unlink()
    elif change == "no table":
        path.unlink()
    elif change == "another file":
        path.write_bytes(b"\xff\xff")
    if words is None:
        refuse_stale(EncodedDataset(folder))
    else:
        with pytest.raises(ConfigError, match=rf"stale.*({words}).*encode them again") as told:
            refuse_stale(EncodedDataset(folder))
        assert "\n" not in str(told.value)
    assert record_of_features(EncodedDataset(folder)).changes_since(before) == ""


def test_features_that_were_encoded_anew_are_named(own: tuple) -> None:
    path, folder, rows = own
    before = record_of_features(EncodedDataset(folder))
    make_rows(rows[0][0].parent, 1, first=1, seed=1)
    extract(settings(path, folder, bucket_config=OWN_BUCKETS, replace_stale=True))
    told = record_of_features(EncodedDataset(folder)).changes_since(before)
    assert told.startswith("1 shards changed: latents/crop0/") and "its cells and its file" in told


@pytest.mark.parametrize("value", [[], None, "x", 3])
@pytest.mark.parametrize("name", ["plan.json", "features.json"])
def test_descriptions_that_are_none(name: str, value: Any, copied: Path) -> None:
    (copied / name).write_text(json.dumps(value))
    with pytest.raises(ConfigError, match=name) as told:
        EncodedDataset(copied)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize(
    ("part", "value"),
    [
        ("num_rows", 10**12), ("num_rows", "3"), ("num_crops", 0), ("latents", None), ("latents", [[]]), ("text", {}),
        ("text", [{"file": "../../secret.safetensors"}]), ("text", [{"file": "/etc/passwd"}]), ("table", 3),
        ("more", 1),
    ],
)  # fmt: skip
def test_wrong_plans_are_refused_in_one_line(part: str, value: Any, copied: Path) -> None:
    plan = json.loads((copied / "plan.json").read_text())
    (copied / "plan.json").write_text(json.dumps({**plan, part: value}))
    with pytest.raises(ConfigError, match=r"plan\.json") as told:
        EncodedDataset(copied)
    assert "\n" not in str(told.value)

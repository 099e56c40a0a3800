"""Ranks learn and encode what one does: with a text encoder sharded over them, and where one of them has no sample."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from opensora.checkpoints import builder
from opensora.config.settings import TrainSettings
from opensora.datasets.quarantine import Quarantine, UnreadableRow
from opensora.datasets.video import write_image
from opensora.distributed.process_group import RankLayout, start
from opensora.errors import MediaError
from opensora.training.data import synchronize
from opensora.training.data.synchronize import StepSynchronizer
from opensora.training.diffusion import train
from tests.ranks import run
from tests.test_encoders import make_clip_folder
from tests.tiny import TINY_STDIT3, make_tiny_t5, make_tiny_vae

ROWS = 8  # of an epoch: 4 steps of one row on each rank


def as_ranks(
    monkeypatch: pytest.MonkeyPatch, numbers: list[tuple[float, ...]], broken: list[list[UnreadableRow]] = ()
) -> RankLayout:
    """One rank of several, of which the others say the same each time."""
    monkeypatch.setattr(
        synchronize, "all_reduce_sum", lambda own, _: [sum(column) for column in zip(own, *numbers, strict=True)]
    )
    monkeypatch.setattr(synchronize, "all_gather_objects", lambda own, _: [own, *broken])
    return RankLayout(0, len(numbers) + 1)


def batch(*names: str, broken: tuple = ()) -> dict[str, Any]:
    return {"names": list(names), "weight": float(bool(names)), "unreadable": list(broken)}


class TestStepSynchronizer:
    @pytest.mark.parametrize(
        ("own", "others", "weights", "samples"),
        [
            ([batch("a", "b")], [], [1], 2),
            ([batch()], [], [0], 0),
            ([batch("a"), batch()], [], [2, 0], 1),
            ([batch("a")], [(0, 0, 0, 0)], [2], 1),
            ([batch()], [(2, 1, 0, 0)], [0], 2),
            ([batch("a"), batch("b")], [(2, 1, 0, 0), (0, 0, 0, 0)], [2, 2], 4),
            ([batch()], [(0, 0, 0, 0)], [0], 0),
        ],
    )
    def test_batches_without_samples_take_no_weight_from_the_others(
        self, own: list, others: list, weights: list[float], samples: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        made = StepSynchronizer(as_ranks(monkeypatch, others))(own)
        assert [one["weight"] for one in made.batches] == weights and made.samples == samples and not made.stop

    def test_broken_files_of_all_ranks_are_counted_once(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        broken = [UnreadableRow(row, f"{row}.mp4", "is cut off") for row in range(6)]
        quarantine = Quarantine(tmp_path / "quarantine.jsonl", 100)
        group = as_ranks(monkeypatch, [(0, 0, 3, 0), (0, 0, 0, 0)], [broken[1:4], []])
        StepSynchronizer(group, quarantine)([batch("a", broken=broken[:2])])
        StepSynchronizer(group, quarantine)([batch("a", broken=broken[:2])])
        assert quarantine.rows == {0, 1, 2, 3}
        assert len((tmp_path / "quarantine.jsonl").read_text().splitlines()) == 4
        with pytest.raises(MediaError, match="6 of 100 files cannot be read, over the limit of 5"):
            StepSynchronizer(group, quarantine)([batch("a", broken=broken[4:])])


def make_settings(folder: Path, name: str, sharded: bool = False, **changes: Any) -> TrainSettings:
    encoder = {"type": "t5", "from_pretrained": str(folder / "t5"), "model_max_length": 32, "shardformer": sharded}
    section = {"type": "VideoTextDataset", "data_path": str(folder / "table.csv"), "num_frames": 1}
    base = dict(
        dataset={**section, "image_size": (16, 16)}, model={"type": "STDiT3", **TINY_STDIT3}, batch_size=1,
        vae={"type": "VideoAutoencoderPipeline", "from_pretrained": str(folder / "vae")}, text_encoder=encoder,
        scheduler={"type": "rflow"}, dtype="fp32", device="cpu", num_workers=0, max_steps=4, lr=1e-3, tensorboard=False,
        outputs=str(folder / name),
    )  # fmt: skip
    return TrainSettings(**{**base, **changes})


def make_folder(folder: Path) -> None:
    """A table of images, one of them broken, and tiny encoders."""
    rng, rows = np.random.default_rng(0), []
    for number in range(ROWS):
        path = folder / f"{number}.png"
        write_image(rng.integers(0, 255, (16, 16, 3), dtype=np.uint8), path)
        rows.append((path, f"image {number}"))
    (folder / "3.png").write_bytes(b"nothing")
    with (folder / "table.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("path", "text"), *rows])
    make_tiny_vae(folder / "vae"), make_tiny_t5(folder / "t5")


def on_rank(folder: Path) -> None:
    train(make_settings(folder, "two", sharded=True))


ENCODERS = {
    "t5": ("t5", 32, torch.float32),
    "wider t5": ("t5", 48, torch.float32),
    "t5 in bf16": ("t5", 64, torch.bfloat16),
    "clip": ("clip", 0, torch.float32),
}


def make_encoders(folder: Path) -> None:
    for name, (kind, hidden, _) in ENCODERS.items():
        make_tiny_t5(folder / name, hidden) if kind == "t5" else make_clip_folder(folder / name)


def encoded(folder: Path, sharded: bool) -> dict[str, list[torch.Tensor]]:
    """What each of `ENCODERS` makes of two texts on this rank."""
    cpu, found = torch.device("cpu"), {}
    layout = start(cpu) if sharded else RankLayout()
    for name, (kind, _, dtype) in ENCODERS.items():
        section = {"type": kind, "from_pretrained": str(folder / name), "model_max_length": 16, "shardformer": sharded}
        encoder, _ = builder.load_component(section, "text_encoder", cpu, dtype, layout=layout)
        with torch.no_grad():
            found[name] = list(encoder.encode(["a red circle", "a boat on a lake, at dawn"]))
    return found


@pytest.fixture(scope="module")
def both_ways(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, list[dict]]:
    """What whole encoders make of the texts, and what sharded ones make of them on each of two ranks."""
    folder = tmp_path_factory.mktemp("encoders")
    make_encoders(folder)
    return encoded(folder, False), run(2, encoded, folder, True)


@pytest.mark.parametrize("name", ENCODERS)
def test_a_sharded_encoder_encodes_what_a_whole_one_does(both_ways: tuple[dict, list[dict]], name: str) -> None:
    expected, ranks = both_ways
    for found in ranks:
        for one, other in zip(found[name], expected[name], strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=2e-2 if "bf16" in name else 1e-5)


def lines_of(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in next(folder.glob("0*/log.jsonl")).read_text().splitlines()]


def test_two_ranks_with_a_sharded_encoder_learn_what_one_learns(tmp_path: Path) -> None:
    """In one of the steps one rank has no sample, and then the batch of the other is all that counts."""
    make_folder(tmp_path)
    run(2, on_rank, tmp_path)
    train(make_settings(tmp_path, "one", accumulation_steps=2))
    one, two = (lines_of(tmp_path / name) for name in ("one", "two"))
    assert len(one) == len(two) == ROWS // 2
    for first, second in zip(one, two, strict=True):
        assert [first[name] for name in ("loss", "grad_norm")] == pytest.approx(
            [second[name] for name in ("loss", "grad_norm")], rel=1e-4
        )
    lists = [next((tmp_path / name).glob("0*/quarantine.jsonl")).read_text() for name in ("one", "two")]
    assert lists[0] == lists[1] and "3.png" in lists[0]

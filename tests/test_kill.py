"""Training from a table, killed with SIGKILL on one rank and on two, and continued on other numbers of ranks.

Every batch of every attempt, those that are taken again included, has the samples and the very loss of the
uninterrupted run. OPENSORA_FULL=1 kills 50 times in all, and on one rank too.
"""

from __future__ import annotations

import csv
import json
import os
from pathlib import Path

import numpy as np
import pytest

from opensora.datasets.video import write_image
from tests import killing
from tests.full import FULL, count
from tests.test_resume import assert_same, results, write_config
from tests.tiny import TINY_STDIT3, make_tiny_t5, make_tiny_vae

NUM_IMAGES, BATCH = 22, 2
EVERY = 2  # steps to a checkpoint
KILLS = count(1, 25)  # of each number of ranks
SCRIPT = "scripts/train.py"

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forked processes")


def table_config(folder: Path, **settings: object) -> Path:
    """A training on images, fast enough to be started again and again."""
    vae, t5 = make_tiny_vae(folder / "vae"), make_tiny_t5(folder / "t5")
    rng = np.random.default_rng(0)
    paths = [folder / f"{number}.png" for number in range(NUM_IMAGES)]
    for path in paths:
        write_image(rng.integers(0, 255, (16, 16, 3), dtype=np.uint8), path)
    with (folder / "table.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("path", "text"), *((path, f"image {path.stem}") for path in paths)])
    size = dict(num_frames=1, image_size=(16, 16))
    defaults = dict(
        dataset=dict(type="VideoTextDataset", data_path=str(folder / "table.csv"), **size),
        model=dict(type="STDiT3", **{**TINY_STDIT3, "depth": 1}),
        vae=dict(type="VideoAutoencoderPipeline", from_pretrained=str(vae)),
        text_encoder=dict(type="t5", from_pretrained=str(t5), model_max_length=32),
        scheduler=dict(type="rflow", sample_method="logit-normal"),
        lr_schedule="constant", batch_size=BATCH, ckpt_every=EVERY, log_every=1, num_workers=2,
    )  # fmt: skip
    return write_config(folder / "table.py", **{**defaults, **settings})


def seen(outputs: Path) -> dict[tuple[int, int], set[tuple[str, float]]]:
    """(step, batch of the step) -> its samples and loss, in each attempt."""
    found: dict[tuple[int, int], set[tuple[str, float]]] = {}
    for file in outputs.glob("seen.*.jsonl"):
        for text in file.read_text().splitlines():
            if text.endswith("}"):  # not cut off by a kill
                line = json.loads(text)
                what = (" ".join(Path(name).stem for name in line["names"]), line["loss"])
                found.setdefault((line["step"], line["batch"]), set()).add(what)
    return found


@pytest.mark.timeout(100 * KILLS + 300)
@pytest.mark.parametrize("ranks", [2, 1] if FULL else [2])  # test_resume kills one rank
def test_every_resume_repeats_the_uninterrupted_run(tmp_path: Path, ranks: int) -> None:
    steps = 4 * KILLS + (6 if FULL else 2)
    config = table_config(tmp_path, max_steps=steps)
    killing.run(SCRIPT, config, tmp_path / "whole", ranks=ranks)
    assert len(killing.run(SCRIPT, config, tmp_path / "killed", 0, KILLS, ranks)) == KILLS
    assert_same(results(tmp_path / "killed"), results(tmp_path / "whole"))
    expected, found = seen(tmp_path / "whole"), seen(tmp_path / "killed")
    assert len(expected) == steps * ranks and all(len(values) == 1 for values in expected.values())
    assert found == expected


def in_order(outputs: Path) -> list[tuple[str, float]]:
    """The samples and losses of all batches, one after another."""
    found = seen(outputs)
    assert all(len(values) == 1 for values in found.values())
    return [min(found[key]) for key in sorted(found)]


def test_other_numbers_of_ranks_go_on_with_the_rest_of_the_epoch(tmp_path: Path) -> None:
    """Fewer ranks, then more: every sample of the first epoch is served once, as it would have been on one rank."""
    first_epoch, runs = NUM_IMAGES // BATCH, ((2, 2), (1, 4), (3, 6)) if FULL else ((2, 2), (1, 10))
    for ranks, steps in runs:
        config = table_config(tmp_path, max_steps=steps)
        killing.run(SCRIPT, config, tmp_path / "changing", ranks=ranks)
    served = in_order(tmp_path / "changing")
    names = " ".join(samples for samples, _ in served[:first_epoch]).split()
    assert sorted(map(int, names)) == list(range(NUM_IMAGES)) and len(served) == 12
    config = table_config(tmp_path, max_steps=2, accumulation_steps=2)
    killing.run(SCRIPT, config, tmp_path / "one")
    for (samples, loss), (expected, wanted) in zip(served, in_order(tmp_path / "one"), strict=False):
        assert samples == expected and loss == pytest.approx(wanted, rel=1e-5)

"""Training masks against the recorded ones: which ratios are taken, and how often each mask is drawn."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping

import pytest
import torch

from opensora.config.settings import TrainSettings
from opensora.errors import ConfigError
from opensora.training.masks import TYPES, MaskRatios, draw_mask
from tests.full import count
from tests.parity.cases import ROOT, needed

FACTS = json.loads((ROOT / "data" / "mask_generator.json").read_text())
OLD = FACTS["v1.1.0"]
DRAWS = count(1000, 4000)  # of each type
SIGMAS = 4
OURS = {"half_head", "interpolate"}  # the latter is quirk G1: only "intepolate" is known there


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def text(mask: torch.Tensor) -> str:
    return "".join("1" if generated else "0" for generated in mask.tolist())


def assert_as_often(found: Counter, recorded: Mapping, draws: int) -> None:
    """Every outcome's share lies within 4 sigma of the recorded share, which is itself a count of `draws`."""
    total = sum(found.values())
    for outcome in {*found, *recorded}:
        a, b = found[outcome] / total, recorded.get(outcome, 0.0)
        pooled = (found[outcome] + b * draws) / (total + draws)
        sigma = math.sqrt(pooled * (1 - pooled) * (1 / total + 1 / draws))
        assert abs(a - b) <= SIGMAS * sigma, f"{outcome}: {a:.4f}, recorded {b:.4f}"


def test_types() -> None:
    assert set(TYPES) == {*FACTS["valid_types"], *OURS}


@pytest.mark.parametrize("case", FACTS["constructor"], ids=lambda case: json.dumps(case["ratios"]))
def test_constructor(case: dict) -> None:
    ratios, refused = case["ratios"], "error" in case
    if set(ratios) == {"interpolate"} and 0 <= ratios["interpolate"] <= 1:
        refused = False  # G1
    if sum(ratios.values()) > 1.1:
        refused = True  # G4: v1.2.0 takes a negative identity
    if refused:
        with pytest.raises(ConfigError, match="mask_ratios"):
            MaskRatios(ratios)
    else:
        expected = case.get("ratios_after", {**ratios, "identity": 1 - sum(ratios.values())})
        assert MaskRatios(ratios).ratios == pytest.approx(expected)


@pytest.mark.parametrize("ratio", [float("nan"), "0.1", None, True])
def test_a_ratio_that_is_no_number(ratio: object) -> None:
    with pytest.raises(ConfigError, match="mask_ratios: random must be a number from 0 to 1"):
        MaskRatios({"random": ratio})


ALL_TYPES = [*FACTS["per_type"], *OLD["per_type"]]


@pytest.mark.parametrize("case", ALL_TYPES, ids=lambda case: f"{case['type']}-{case['num_frames']}")
def test_each_type(case: dict) -> None:
    kind, frames, source = case["type"], case["num_frames"], generator()
    masks = [draw_mask(kind, frames, source) for _ in range(DRAWS)]
    assert all(mask.shape == (frames,) and mask.dtype == torch.bool and mask.any() for mask in masks)
    if "error" in case:  # G2: v1.2.0 fails for 2 and 3 frames, where a quarter is none; one frame is given here
        same = draw_mask(kind.replace("quarter", "image"), frames, generator())
        assert (~masks[0]).sum() == (~same).sum() > 0
    elif kind == "image_head_tail" and frames == 2:
        assert {text(mask) for mask in masks} == {"01"}  # G3: v1.2.0 leaves nothing to generate
    elif "masks" in case:
        assert_as_often(Counter(map(text, masks)), dict(case["masks"]), case["draws"])
    else:
        counts = Counter(int(mask.sum()) for mask in masks)
        assert_as_often(counts, dict(case["generated_frames_count_freq"]), case["draws"])


@pytest.mark.parametrize("case", FACTS["mixture"], ids=lambda case: f"{len(case['ratios'])} types")
def test_mixtures(case: dict) -> None:
    masks = MaskRatios(case["ratios"]).draw(4000, case["num_frames"], generator())
    assert_as_often(Counter(map(text, masks)), dict(case["masks"]), case["draws"])


def test_batch() -> None:
    batch, frames = FACTS["batch"]["mask_shape"]
    mask = MaskRatios({"image_head": 1.0}).draw(batch, frames, generator())
    assert list(mask.shape) == [batch, frames] and f"torch.{FACTS['batch']['mask_dtype']}" == str(mask.dtype)
    again = MaskRatios({"random": 0.9}).draw(batch, frames, generator(3))
    assert torch.equal(again, MaskRatios({"random": 0.9}).draw(batch, frames, generator(3)))


@pytest.mark.parametrize("frames", [1, 2, 3, 5, 10])
def test_half_head(frames: int) -> None:
    assert text(draw_mask("half_head", frames, generator())) == "0" * (frames // 2) + "1" * (frames - frames // 2)


@pytest.mark.parametrize("name", OLD["valid_types"])
def test_old_names(name: str) -> None:
    """Under v1.1.0's names too; that version refuses ratios below 1 in sum, here identity takes the rest (G4)."""
    settings = TrainSettings.from_config({"model": {"type": "STDiT3"}, "mask_ratios": {name: 1.0}}, "a.py")
    kind = "identity" if name == "mask_no" else name.removeprefix("mask_")
    recorded = [case for case in OLD["per_type"] if case["type"] == kind and "masks" in case and case["num_frames"] > 3]
    for case in [needed(recorded, f"masks of {kind}"), *recorded[1:]]:
        masks = MaskRatios(settings.mask_ratios or {}).draw(200, case["num_frames"], generator())
        assert {text(mask) for mask in masks} <= {mask for mask, _ in case["masks"]}

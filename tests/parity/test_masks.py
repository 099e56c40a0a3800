"""Mask strategies against the recorded ones: parsing, placing references, carrying frames to the next loop."""

from __future__ import annotations

import json
import math

import pytest
import torch
from safetensors.torch import load_file

from opensora.errors import ConfigError
from opensora.pipeline.mask_strategy import (
    ReferencePlacement,
    carry,
    clip_conditioning,
    nearest_multiple,
    parse_mask_strategy,
)
from opensora.pipeline.noise import condition_latents
from tests.parity.cases import ROOT

FACTS = json.loads((ROOT / "data" / "masks.json").read_text())
TENSORS = load_file(ROOT / "data" / "masks.safetensors")
OUTSIDE = {"reference": -1, "target": 1}


def readable(row: list) -> bool:
    """Whether every number of a recorded tuple makes sense: the reference takes any, we take rates from 0 to 1."""
    return row[4] >= 0 and row[5] != "nan" and 0 <= row[5] <= 1


@pytest.mark.parametrize("case", FACTS["parse"], ids=lambda case: str(case["in"]))
def test_parse(case: dict) -> None:
    if "error" in case or not all(map(readable, case["out"])):
        with pytest.raises(ConfigError, match="mask_strategy"):
            parse_mask_strategy(case["in"])
    else:
        assert parse_mask_strategy(case["in"]) == [ReferencePlacement(*row) for row in case["out"]]


def lies_outside(case: dict) -> bool:
    """Whether a start lies outside (quirk M2: wrapped round or ignored by the reference, refused here)."""
    frames = case["z_shape"][2]
    for references, strategy in zip(case["ref_shapes"], case["mask_strategy"], strict=False):
        for placement in parse_mask_strategy(strategy):
            if placement.loop == case["loop"] and not -frames <= placement.target_start < frames:
                return True
            count = references[placement.reference][1]
            if placement.loop == case["loop"] and not -count <= placement.reference_start < count:
                return True
    return False


def place(
    noise: torch.Tensor, references: list[torch.Tensor], strategy: str, case: dict
) -> tuple[torch.Tensor, torch.Tensor]:
    placements = [one for one in parse_mask_strategy(strategy) if one.loop == case["loop"]]
    counts = [reference.shape[1] for reference in references]
    return condition_latents(noise, references, clip_conditioning(placements, counts, noise.shape[1], case["align"]))


@pytest.mark.parametrize("case", FACTS["apply"], ids=lambda case: case["name"])
def test_place(case: dict) -> None:
    name, z = case["name"], TENSORS.get(f"{case['name']}.z_in")
    strategies = case["mask_strategy"]
    if "error" in case or lies_outside(case):
        z = torch.zeros(case["z_shape"]) if z is None else z
        with pytest.raises(ConfigError, match="mask_strategy"):
            for row, (strategy, shapes) in enumerate(zip(strategies, case["ref_shapes"], strict=True)):
                references = [torch.zeros(shape) for shape in shapes]
                place(z[row], references, strategy, case)
        return
    if case["mask"] is None:
        assert not strategies  # an empty batch
        return
    for row, strategy in enumerate(strategies):
        references = [TENSORS[f"{name}.ref.{row}.{k}"] for k in range(len(case["ref_shapes"][row]))]
        latents, edit = place(z[row], references, strategy, case)
        assert torch.equal(edit, TENSORS[f"{name}.mask"][row])
        assert torch.equal(latents, TENSORS[f"{name}.z_out"][row])


def test_nearest_multiple() -> None:
    rows = FACTS["nearest_multiple"]["rows"]
    assert rows
    for value, point, count, result in rows:
        assert nearest_multiple(value, point, count) == result, (value, point, count)


def test_carry() -> None:
    checked = 0
    for case in FACTS["append_generated"]:
        if "error" in case:
            continue  # quirk M5: a None among the references; ours are lists
        for before, given, out in zip(
            case["references_before"], case["mask_strategy"], case["mask_strategy_out"], strict=True
        ):
            added = carry(case["loop"], before, case["condition_frame_length"], case["condition_frame_edit"])
            assert [*parse_mask_strategy(given), added] == parse_mask_strategy(out)
            checked += 1
    assert checked
    assert math.isclose(carry(1, 0, 5, 0.25).edit, 0.25)

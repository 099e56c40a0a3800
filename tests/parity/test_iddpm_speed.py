"""IDDPM with SpeeD's training against the recorded tables and losses."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from opensora.schedulers.iddpm_speed import IDDPM_SPEED, RISE, STEEPNESS
from tests.parity.cases import Case, discover, part
from tests.parity.test_iddpm import LOSS, RECORDED
from tests.parity.test_rflow import StandIn

close = torch.testing.assert_close
FAR = 10.0  # from the middle of the sigmoid: what is to be added to it there hardly changes it


def check_tables(facts: dict, speed: IDDPM_SPEED, tensors: dict[str, torch.Tensor]) -> None:
    assert len(speed.process) == facts["num_timesteps"]
    assert speed.meaningful_steps == facts["meaningful_steps"]
    drawn = tensors["timestep"]
    assert torch.equal(speed.paired(drawn, 2 * len(drawn))[len(drawn) :], tensors["dual_timestep"])
    probabilities, recorded = speed.probabilities.float(), tensors["probabilities"]
    # Where the rise crosses its threshold, the last bit of a square root decides; there are 1 / N on average.
    close(probabilities, recorded, rtol=RECORDED["rtol"], atol=RECORDED["atol"] * 1000 / len(recorded))
    apart = (STEEPNESS * (speed._rise - RISE)).abs() > FAR
    assert apart.any()
    close(probabilities[apart], recorded[apart], rtol=3e-5, atol=0)
    close(speed.loss_weights.float(), tensors["loss_weights"], **RECORDED)
    if speed.tables == "float32":
        close(1 / speed.loss_weights - 1, tensors["snr"], **RECORDED)


def check_training_losses(facts: dict, speed: IDDPM_SPEED, tensors: dict[str, torch.Tensor]) -> None:
    model = StandIn(tensors)
    t = speed.paired(tensors["multinomial_draw"], len(tensors["x_start"]))
    assert torch.equal(t, tensors["t_used"])
    given = {"noise": tensors["noise"], "timestep": t, "mask": tensors.get("mask")}
    given["weights"] = tensors.get("loss_weights")
    terms = speed.training_terms(model, tensors["x_start"], {"y": tensors["y"]}, **given)
    assert set(terms) == set(part(tensors, "terms/"))
    for name, value in terms.items():
        close(value, tensors[f"terms/{name}"], **LOSS)
    ((x_t, model_t, x_mask),) = model.seen
    close(x_t, tensors["x_t"], **RECORDED)
    if "model_t" in tensors:
        assert torch.equal(model_t, tensors["model_t"].float())
    if "x_mask" in tensors:
        assert torch.equal(x_mask, tensors["x_mask"])


CHECKS = {"tables": check_tables, "training_losses": check_training_losses}


@pytest.mark.parametrize("tables", ["float32", "float64"])
@pytest.mark.parametrize("case", discover("schedulers/iddpm_speed"), ids=str)
def test_case(case: Case, tables: str) -> None:
    facts = case.facts
    assert facts["kind"] in CHECKS, f"{case}: no check for the kind {facts['kind']!r}"
    speed = dataclasses.replace(IDDPM_SPEED(**facts["constructor"]), tables=tables)
    CHECKS[facts["kind"]](facts, speed, case.tensors())

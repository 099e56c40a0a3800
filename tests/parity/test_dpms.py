"""DPM-Solver++ against the recorded schedule and samples."""

from __future__ import annotations

import re

import pytest
import torch

from opensora.schedulers.dpms import DPM_SOLVER, schedule_at, spaced_times, times_at
from tests.parity.cases import Case, discover
from tests.parity.test_rflow import TIMESTEP, StandIn

SPACINGS = {"time_uniform": "time_uniform", "logsnr": "logSNR", "quadratic": "time_quadratic"}
LATENT = {"rtol": 2e-5, "atol": 5e-5}
close = torch.testing.assert_close


def check_noise_schedule(facts: dict, tensors: dict[str, torch.Tensor]) -> None:
    path = schedule_at(tensors["t"].tolist())
    found = {
        "alpha": path.alpha,
        "std": path.sigma,
        "lambda": path.lam,
        "inverse": times_at(path.lam),
    }
    for name in tensors:
        if spacing := re.fullmatch(r"(time_uniform|logsnr|quadratic)_([0-9]+)", name):
            found[name] = spaced_times(int(spacing[2]), SPACINGS[spacing[1]])
    assert found.keys() | {"t", "log_alpha"} == tensors.keys()
    for name, values in found.items():
        close(torch.tensor(values), tensors[name], **LATENT)
    close(torch.tensor(path.alpha).log(), tensors["log_alpha"], **LATENT)


def _check_runs(facts: dict, tensors: dict[str, torch.Tensor], settings: list[dict]) -> None:
    z, y = tensors["z"], tensors["y"]
    for row, given in zip(facts["cases"], settings, strict=True):
        model, solver = StandIn(tensors), DPM_SOLVER(cfg_scale=row["cfg_scale"], **given)
        out = solver.sample(model, z, {"y": y}, {"y": tensors["y_null"].expand_as(y)})
        close(out, tensors[row["out"]], **LATENT)
        assert all(x_mask is None and bool((t == t[0]).all()) for _, t, x_mask in model.seen)
        timesteps = torch.stack([t[0] for _, t, _ in model.seen])
        close((timesteps + 1) / 1000, (tensors[row["model_t"]] + 1) / 1000, **LATENT)
        if given.get("skip_type") != "logSNR":  # whose times were recorded with the round-off of float32 logarithms
            close(timesteps, tensors[row["model_t"]], **TIMESTEP)
        if "model_batch" in row:
            assert len(model.seen) == row["model_evaluations"]
            assert list(model.seen[0][0].shape) == row["model_batch"]


def check_sample(facts: dict, tensors: dict[str, torch.Tensor]) -> None:
    _check_runs(facts, tensors, [{"num_sampling_steps": row["num_sampling_steps"]} for row in facts["cases"]])


def check_direct(facts: dict, tensors: dict[str, torch.Tensor]) -> None:
    assert facts["algorithm_type"] == "dpmsolver++"
    given = [dict(row["kwargs"]) for row in facts["cases"]]
    _check_runs(facts, tensors, [{"num_sampling_steps": row.pop("steps"), **row} for row in given])


CHECKS = {"noise_schedule": check_noise_schedule, "sample": check_sample, "direct": check_direct}


@pytest.mark.parametrize("case", discover("schedulers/dpm_solver"), ids=str)
def test_case(case: Case) -> None:
    facts = case.facts
    assert facts["kind"] in CHECKS, f"{case}: no check for the kind {facts['kind']!r}"
    CHECKS[facts["kind"]](facts, case.tensors())

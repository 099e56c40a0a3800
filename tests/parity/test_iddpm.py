"""IDDPM against the recorded tables, steps, samples and losses."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from opensora.errors import ConfigError
from opensora.schedulers.diffusion import linear_betas, space_timesteps
from opensora.schedulers.guidance import GuidedDenoiser
from opensora.schedulers.iddpm import IDDPM, ancestral_step, ddim_reverse_step, ddim_step
from tests.parity.cases import Case, discover, part
from tests.parity.test_rflow import StandIn

RECORDED = {"rtol": 1e-5, "atol": 2e-5}
X_START = {"rtol": 1e-5, "atol": 1e-4}  # values up to 200
REVERSE = {"rtol": 1e-4, "atol": 1e-3}  # cancellation near t = 0
OTHER_TABLES = {"rtol": 1e-3, "atol": 3e-3}  # float64 tables against what float32 tables gave
LOSS = {"rtol": 1e-4, "atol": 1e-4}
close = torch.testing.assert_close


def schedulers(facts: dict, constructor: dict) -> list[IDDPM]:
    """The scheduler with the tables of the recorded version first, then with the default ones where they differ."""
    default = IDDPM(**constructor)
    if facts["source"].endswith("v1.0.0"):
        return [default]
    return [dataclasses.replace(default, tables="float32"), default]


def check_tables(facts: dict, tensors: dict[str, torch.Tensor]) -> None:
    if "base/betas_float64" in tensors:
        close(linear_betas(facts["default_diffusion_steps"]), tensors["base/betas_float64"], rtol=1e-12, atol=0)
    for row in facts["cases"]:
        for iddpm in schedulers(facts, row["constructor"])[:1]:
            recorded = part(tensors, row["prefix"])
            assert torch.equal(iddpm.process.timestep_map, recorded["timestep_map"])
            for name in row["tables"]:
                close(getattr(iddpm.process, name), recorded[name], **RECORDED)


def check_space_timesteps(facts: dict, tensors: dict[str, torch.Tensor]) -> None:
    for row in facts["cases"]:
        if "error" in row:
            with pytest.raises(ConfigError):
                space_timesteps(row["num_timesteps"], row["section_counts"])
        else:
            assert space_timesteps(row["num_timesteps"], row["section_counts"]) == tensors[row["out"]].tolist()


def check_single_steps(facts: dict, tensors: dict[str, torch.Tensor]) -> None:
    recorded, default = (*schedulers(facts, facts["constructor"]), None)[:2]
    _check_steps(recorded, tensors, slice(None))
    if default is not None:
        late = tensors["t"] > 1
        _check_steps(default, tensors, late)
        _check_steps(default, tensors, ~late, **OTHER_TABLES)


def _check_steps(iddpm: IDDPM, tensors: dict[str, torch.Tensor], rows: slice | torch.Tensor, **looser: float) -> None:
    tensors = {name: value if name.startswith("model/") else value[rows] for name, value in tensors.items()}
    process, x, t = iddpm.process, tensors["x"], tensors["t"]
    model = StandIn(tensors)
    output = model(x, iddpm.process.timestep_map[t], tensors["y"])
    if "model_t" in tensors:
        assert torch.equal(process.timestep_map[t], tensors["model_t"])
        close(output, tensors["model_out"], **RECORDED)

    def check(out: torch.Tensor, name: str, tolerance: dict[str, float] = RECORDED) -> None:
        close(out.expand_as(tensors[name]), tensors[name], **(looser or tolerance))

    for name, clip in (("pmv/", False), ("pmv_clip/", True)):
        if name + "mean" in tensors:
            predicted = iddpm.predict(output, x, t, clip)
            check(predicted.mean, name + "mean")
            check(predicted.log_variance, name + "log_variance")
            check(predicted.log_variance.exp(), name + "variance")
            check(predicted.x_start, name + "pred_xstart", X_START)

    predicted = iddpm.predict(output, x, t)
    check(ancestral_step(predicted, t, tensors["p_sample/noise"]), "p_sample/sample")
    if "ddim_eta0/sample" not in tensors:
        return
    check(ddim_step(process, x, predicted.x_start, t), "ddim_eta0/sample")
    check(ddim_step(process, x, predicted.x_start, t, tensors["ddim_eta1/noise"], eta=1.0), "ddim_eta1/sample")
    check(ddim_reverse_step(process, x, predicted.x_start, t), "ddim_reverse/sample", REVERSE)

    table = process.__dict__.items()
    at_t = {name: value[t].float()[:, None, None, None, None] for name, value in table if name != "timestep_map"}
    x_t = process.q_sample(x, t, tensors["q/noise"])
    check(x_t, "q/sample")
    check(at_t["sqrt_alphas_cumprod"] * x, "q/mean")
    check(at_t["sqrt_one_minus_alphas_cumprod"].square(), "q/variance")
    check(at_t["log_one_minus_alphas_cumprod"], "q/log_variance")
    mean, log_variance = process.q_posterior(x, x_t, t)
    check(mean, "q/posterior_mean")
    check(log_variance, "q/posterior_log_variance")
    check(at_t["posterior_variance"], "q/posterior_variance")


def check_sample(facts: dict, tensors: dict[str, torch.Tensor]) -> None:
    z, y, edit = tensors["z"], tensors["y"], tensors.get("mask")
    for iddpm, tolerance in zip(schedulers(facts, facts["constructor"]), (RECORDED, OTHER_TABLES), strict=False):
        model, draws = StandIn(tensors), iter(tensors["noise"][:, : len(z)])
        null = {"y": tensors["y_null"].expand_as(y)}
        out = iddpm.sample(model, z, {"y": y}, null, edit=edit, source=lambda draws=draws: next(draws))
        close(out, tensors["output"], **tolerance)
        assert next(draws, None) is None, "fewer draws than recorded"
        close(torch.stack([x[: len(z)] for x, _, _ in model.seen]), tensors["traj/x_in"], **tolerance)
        assert torch.equal(torch.stack([t[: len(z)] for _, t, _ in model.seen]), tensors["traj/t"])
        for step, (_, _, x_mask) in enumerate(model.seen):
            assert (x_mask is None) == (edit is None)
            assert x_mask is None or torch.equal(x_mask[: len(z)], tensors["traj/x_mask"][step])


def check_p_sample_mask(facts: dict, tensors: dict[str, torch.Tensor]) -> None:
    for iddpm, early in zip(schedulers(facts, facts["constructor"]), (RECORDED, OTHER_TABLES), strict=False):
        starts = (tensors["mask"] * len(iddpm.process)).long()
        for number, index in enumerate(facts["t_indices"]):
            tolerance = early if index <= 1 else RECORDED
            model, recorded = StandIn(tensors), part(tensors, f"step{number}/")
            draws = iter((recorded["noise_renoise"], recorded["noise_step"]))

            def denoise(x, timestep, model=model, **frames):
                return model(x, timestep, tensors["y"], **frames)

            out, _ = iddpm.step(denoise, tensors["x"], index, lambda draws=draws: next(draws), starts)
            close(out, recorded["sample"], **tolerance)
            close(model.seen[0][0], recorded["model_x"], **tolerance)
            assert torch.equal(model.seen[0][2], recorded["x_mask"])


def check_cfg_split(facts: dict, tensors: dict[str, torch.Tensor]) -> None:
    half = len(tensors["x"]) // 2
    (x, _), (t, _) = tensors["x"].split(half), tensors["t"].split(half)
    cond, uncond = tensors["y"].split(half)
    for row in facts["cases"]:
        channels = row["cfg_channel"] or x.shape[1]
        denoise = GuidedDenoiser(StandIn(tensors), {"y": cond}, {"y": uncond}, row["cfg_scale"], channels)
        out = denoise(x, t.float(), **({"x_mask": tensors["x_mask_half"]} if row["uses_x_mask"] else {}))
        recorded = tensors[row["out"]]
        close(out, recorded[:half], **RECORDED)
        close(out[:, :channels], recorded[half:, :channels] if row["cfg_scale"] != 1 else out[:, :channels], **RECORDED)


def check_training_losses(facts: dict, tensors: dict[str, torch.Tensor]) -> None:
    late = tensors["t"] > 1
    for iddpm, rows in zip(schedulers(facts, facts["constructor"]), (slice(None), late), strict=False):
        model = StandIn(tensors)
        given = {"noise": tensors["noise"], "timestep": tensors["t"], "mask": tensors.get("mask")}
        given["weights"] = tensors.get("loss_weights")
        terms = iddpm.training_terms(model, tensors["x_start"], {"y": tensors["y"]}, **given)
        assert sorted(terms) == sorted(facts["terms"])
        for name, value in terms.items():
            close(value[rows], tensors[f"terms/{name}"][rows], **LOSS)
        ((x_t, model_t, _),) = model.seen
        close(x_t, tensors["x_t"], **RECORDED)
        assert torch.equal(model_t, tensors["model_t"].float())
        loss = iddpm.training_loss(model, tensors["x_start"], {"y": tensors["y"]}, **given)
        assert torch.equal(loss, terms["loss"])


CHECKS = {
    "tables": check_tables,
    "space_timesteps": check_space_timesteps,
    "single_steps": check_single_steps,
    "sample": check_sample,
    "p_sample_mask": check_p_sample_mask,
    "cfg_split": check_cfg_split,
    "training_losses": check_training_losses,
}


@pytest.mark.parametrize("case", discover("schedulers/iddpm"), ids=str)
def test_case(case: Case) -> None:
    facts = case.facts
    assert facts["kind"] in CHECKS, f"{case}: no check for the kind {facts['kind']!r}"
    CHECKS[facts["kind"]](facts, case.tensors())

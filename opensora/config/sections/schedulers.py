"""Sections of schedulers: how training draws noise, and how samples are made."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from opensora.config.schema import Name, Number, Positive, Share
from opensora.config.sections.common import Guidance, Section, Steps, Width, arg


class RFLOW(Section):
    """Rectified flow, of Open-Sora 1.2."""

    num_sampling_steps: Steps = arg(10, "steps of the sampler", 30)
    num_timesteps: Steps = arg(1000, "what the model is told at full noise")
    cfg_scale: Guidance = arg(4.0, "strength of classifier-free guidance; 1: none", 7.0)
    use_discrete_timesteps: bool = arg(False, "whole timesteps alone")
    use_timestep_transform: bool = arg(False, "more noise for larger and longer clips, as 1.2", True)
    sample_method: Literal["uniform", "logit-normal"] = arg("uniform", "how training draws times", "logit-normal")
    loc: Annotated[Number, Field(ge=-100, le=100)] = arg(0.0, "mean of the logit-normal's logit")
    scale: Annotated[Number, Field(gt=0, le=100)] = arg(1.0, "standard deviation of the logit-normal's logit")
    transform_scale: Annotated[Number, Field(gt=0, le=1e6)] = arg(1.0, "strength of the transform in training")


class IDDPM(Section):
    """Improved DDPM, of Open-Sora 1.0 and 1.1; trains and samples."""

    num_sampling_steps: Steps | None = arg(None, "steps of the sampler; without it, all", 100)
    timestep_respacing: Name | None = arg(None, "the same in IDDPM's words", "ddim50")
    noise_schedule: Literal["linear", "squaredcos_cap_v2"] = arg("linear", "noise over time")
    use_kl: bool = arg(False, "train on the whole variational bound")
    sigma_small: bool = arg(False, "variance of the posterior, without learn_sigma")
    predict_xstart: bool = arg(False, "the model predicts the data instead of the noise")
    learn_sigma: bool = arg(True, "the model also predicts the variance")
    rescale_learned_sigmas: bool = arg(False, "scale the variance's share of the loss")
    diffusion_steps: Steps = arg(1000, "timesteps in all")
    cfg_scale: Guidance = arg(4.0, "strength of classifier-free guidance; 1: none", 7.0)
    cfg_channel: Width | None = arg(None, "latent channels to guide; without it, all", 3)
    ddim_eta: Share | None = arg(None, "sample by DDIM with that share of noise", 0.0)
    tables: Literal["float64", "float32"] = arg("float64", "float32 repeats a rounding of 1.1 and 1.2")


class IDDPMSpeed(IDDPM):
    """IDDPM that trains more on the timesteps where the process changes."""


class DPMSolver(Section):
    """DPM-Solver++: few steps, samples only."""

    num_sampling_steps: Steps = arg(20, "evaluations of the model")
    cfg_scale: Guidance = arg(4.0, "strength of classifier-free guidance; 1: none", 4.5)
    order: Annotated[Positive, Field(le=3)] = arg(2, "order of the solver, 1 to 3")
    skip_type: Literal["time_uniform", "logSNR", "time_quadratic"] = arg("time_uniform", "how steps are spaced")
    method: Literal["multistep", "singlestep"] = arg("multistep", "learn from earlier steps, or within a step")

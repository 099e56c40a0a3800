"""Sections of schedulers: noise schedule in training, and sampler."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from opensora.config.schema import Name, Number, Positive, Share
from opensora.config.sections.common import Guidance, Section, Steps, Width, arg


class RFLOW(Section):
    """Rectified flow, Open-Sora 1.2."""

    num_sampling_steps: Steps = arg(10, "sampling steps", 30)
    num_timesteps: Steps = arg(1000, "timestep at full noise")
    cfg_scale: Guidance = arg(4.0, "guidance scale (classifier-free); 1: none", 7.0)
    use_discrete_timesteps: bool = arg(False, "integer timesteps only")
    use_timestep_transform: bool = arg(False, "shift timesteps to more noise for larger and longer clips, as 1.2", True)
    sample_method: Literal["uniform", "logit-normal"] = arg(
        "uniform", "distribution of timesteps in training", "logit-normal"
    )
    loc: Annotated[Number, Field(ge=-100, le=100)] = arg(0.0, "mean of the logit-normal distribution")
    scale: Annotated[Number, Field(gt=0, le=100)] = arg(1.0, "standard deviation of the logit-normal distribution")
    transform_scale: Annotated[Number, Field(gt=0, le=1e6)] = arg(1.0, "scale of the timestep transform in training")
    s_churn: Annotated[Number, Field(ge=0, le=1e6)] = arg(
        0.0, "stochastic sampling: noise that all steps together add again (EDM's S_churn); 0: none", 12.0
    )


class IDDPM(Section):
    """Improved DDPM, Open-Sora 1.0 and 1.1."""

    num_sampling_steps: Steps | None = arg(None, "sampling steps; None: all", 100)
    timestep_respacing: Name | None = arg(None, "sampling steps in IDDPM's notation", "ddim50")
    noise_schedule: Literal["linear", "squaredcos_cap_v2"] = arg("linear", "noise schedule")
    use_kl: bool = arg(False, "train on the variational lower bound")
    sigma_small: bool = arg(False, "fixed variance: the posterior's, if learn_sigma is False")
    predict_xstart: bool = arg(False, "the model predicts x_0 instead of the noise")
    learn_sigma: bool = arg(True, "the model predicts the variance as well")
    rescale_learned_sigmas: bool = arg(False, "rescale the variance term of the loss")
    diffusion_steps: Steps = arg(1000, "number of timesteps")
    cfg_scale: Guidance = arg(4.0, "guidance scale (classifier-free); 1: none", 7.0)
    cfg_channel: Width | None = arg(None, "number of latent channels to guide; None: all", 3)
    ddim_eta: Share | None = arg(None, "sample with DDIM and this eta", 0.0)
    tables: Literal["float64", "float32"] = arg(
        "float64", "precision of the schedule; float32 reproduces the rounding of 1.1 and 1.2"
    )


class IDDPMSpeed(IDDPM):
    """IDDPM with SpeeD: trains more on the timesteps where the process changes most."""


class DPMSolver(Section):
    """DPM-Solver++; sampling only."""

    num_sampling_steps: Steps = arg(20, "model evaluations")
    cfg_scale: Guidance = arg(4.0, "guidance scale (classifier-free); 1: none", 4.5)
    order: Annotated[Positive, Field(le=3)] = arg(2, "order of the solver, 1 to 3")
    skip_type: Literal["time_uniform", "logSNR", "time_quadratic"] = arg("time_uniform", "spacing of the steps")
    method: Literal["multistep", "singlestep"] = arg("multistep", "multistep, or singlestep")

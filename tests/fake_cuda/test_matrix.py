"""Every model under every memory plan, once, at a published size on a CUDA device that computes nothing.

Guided steps are sampled, with and without given frames; frames are encoded, latents decoded, a prompt encoded.
No tensor meets one of another device, and within a step the host waits for nothing, so that it stays ahead of the
device. By default one model of most classes runs under one of the plans with one block of each kind; OPENSORA_FULL=1
runs all of them, in full depth. `machine.py` says what cannot run.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from opensora import registry
from opensora.acceleration.memory_plan import BY_NAME, PLANS
from opensora.acceleration.model_parts import kept_in_float32
from opensora.acceleration.offload import offload_blocks
from opensora.acceleration.placement import to_device
from opensora.checkpoints import builder
from opensora.cli.merge import settings_of
from opensora.config.settings import InferenceSettings
from opensora.models.text_encoder.t5 import T5Config, T5EncoderModel
from opensora.pipeline.decode import encode
from opensora.pipeline.denoise import denoise
from opensora.pipeline.job import Job
from opensora.pipeline.job_spec import JobSpec
from opensora.pipeline.loaded_models import LoadedModels
from opensora.pipeline.noise import initial_noise, noise_generator
from opensora.utils.config_utils import inference_parser
from tests.fake_cuda.machine import FakeMachine
from tests.full import FULL

DEVICE, HOST = torch.device("cuda:0"), torch.device("cpu")
VIDEO = ("--resolution", "480p", "--aspect-ratio", "9:16", "--num-frames", "2s")
# Registered model -> the configuration that publishes it or a relative, and flags.
MODELS: dict[str, tuple[str, ...]] = {
    "STDiT-XL/2": ("configs/opensora/inference/16x512x512.py",),
    "STDiT-XL/2x2": ("configs/opensora/inference/16x512x512.py",),
    "STDiT2-XL/2": ("configs/opensora-v1-1/inference/sample.py", "--num-frames", "32"),
    "STDiT3-XL/2": ("configs/opensora-v1-2/inference/sample.py", *VIDEO),
    "STDiT3-3B/2": ("configs/opensora-v1-2/inference/sample.py", *VIDEO),
    "DiT-XL/2": ("configs/dit/inference/16x256x256.py",),
    "DiT-XL/2x2": ("configs/dit/inference/16x256x256.py",),
    "Latte-XL/2": ("configs/latte/inference/16x256x256-class.py",),
    "Latte-XL/2x2": ("configs/latte/inference/16x256x256.py",),
    "PixArt-XL/2": ("configs/pixart/inference/1x512x512.py",),
    "PixArt-1B/2": ("configs/pixart/inference/1x20481B.py",),
    "PixArtMS-XL/2": ("configs/pixart/inference/1x1024MS.py",),
    "PixArt-Sigma-XL/2": ("configs/pixart/inference/1x2048MS.py",),
}
AUTOENCODERS = {
    "OpenSoraVAE_V1_2": MODELS["STDiT3-XL/2"],
    "VideoAutoencoderKL": MODELS["STDiT2-XL/2"],
    "VideoAutoencoderKLTemporalDecoder": MODELS["STDiT2-XL/2"],
}
XXL = T5Config(32128, 4096, 64, 10240, 24 if FULL else 2, 64, 32, 128, 1e-6, "gated-gelu")
GIVEN = ("STDiT",)  # models that can be given frames
# Without OPENSORA_FULL=1 these stand aside: a model whose blocks are those of one that runs, and an autoencoder that is
# a part of another.
LIKE_OTHERS = ("STDiT-XL/2x2", "DiT-XL/2x2", "PixArt-1B/2", "VideoAutoencoderKL")


def with_plans(names: Iterable[str]) -> list[tuple[str, str]]:
    """Each name with every plan, or by default one name of each class with one of them, in turn."""
    plans = [plan.name for plan in PLANS]
    if not FULL:
        names = {registry.BUILDERS[name]: name for name in names}.values()
        names = [name for name in names if name not in LIKE_OTHERS]
    return [(one, plan) for n, one in enumerate(names) for plan in (plans if FULL else [plans[n % len(plans)]])]


@pytest.fixture
def machine(machine: FakeMachine, monkeypatch: pytest.MonkeyPatch) -> FakeMachine:
    """One on which weights need no files."""
    monkeypatch.setattr(builder, "load_model_weights", fill)
    return machine


def settings_for(config: str, *flags: str, **options: Any) -> InferenceSettings:
    """The settings of a configuration, with flags and fields of sections. Weights are named, and never read."""
    fields = {"model.from_pretrained": "some/weights", **options}
    words = [config, "--prompt", "0", "--device", str(DEVICE), "--dtype", "bf16", *flags]
    words += ["--cfg-options", *(f"{name}={value}" for name, value in fields.items())]
    return settings_of(InferenceSettings, inference_parser().parse_args(words))


def test_the_matrix_has_every_model() -> None:
    """Names without a size are those of the XL models."""
    assert {registry.MODELS[name] for name in MODELS} == set(registry.MODELS.values())
    assert set(registry.VARIANTS) <= set(MODELS)


@pytest.mark.parametrize(("name", "plan"), with_plans(MODELS))
def test_models(name: str, plan: str, machine: FakeMachine) -> None:
    depth = {} if FULL else {"model.depth": 2 if name.startswith("Latte") else 1}
    settings = settings_for(*MODELS[name], **{"model.type": name}, **depth)
    with machine.running(), torch.no_grad():
        steps = 2 if FULL or plan == "fast" else 1
        check_steps(machine, *load(settings, plan), given=name.startswith(GIVEN), steps=steps)


def test_more_elements_than_32_bits_count(machine: FakeMachine) -> None:
    """16 seconds of 720p: queries, keys and values of both guidance branches are 3e9 numbers."""
    config, *_ = MODELS["STDiT3-XL/2"]
    size = ("--resolution", "720p", "--aspect-ratio", "9:16", "--num-frames", "16s")
    settings = settings_for(config, *size, **{"model.depth": 1})
    with machine.running(), torch.no_grad():
        models, job = load(settings, "fast")
        _, frames, height, width = (1, *models.vae.get_latent_size(job.size))
        assert 2 * frames * (height // 2) * (width // 2) * 3 * 1152 > 2**31
        check_steps(machine, models, job, given=False, steps=1)


@pytest.mark.parametrize(("name", "plan"), with_plans(AUTOENCODERS))
def test_autoencoders(name: str, plan: str, machine: FakeMachine) -> None:
    settings = settings_for(*AUTOENCODERS[name], **{"vae.type": name, "model.depth": 1})
    with machine.running(), torch.no_grad():
        models, job = load(settings, plan)
        frames = 17 if models.vae.get_latent_size((17, 8, 8))[0] < 17 else 2  # a chunk, if there are any
        latents = encode(models, torch.empty(3, frames, *job.frame_size))
        assert latents.device == HOST
        with models.on_device("vae"):
            pieces = list(models.vae.decoded(latents[None].to(DEVICE, models.dtype), num_frames=frames))
        assert {piece.device for piece in pieces} == {DEVICE}
        assert torch.cat(pieces, dim=2).shape == (1, 3, frames, *job.frame_size)


@pytest.mark.parametrize("plan", BY_NAME)
def test_text_encoder(plan: str, machine: FakeMachine) -> None:
    with torch.device("meta"):
        model = T5EncoderModel(XXL).eval().requires_grad_(False)
    with machine.running(), torch.no_grad():
        empty = {
            n: torch.empty(t.shape, dtype=torch.bfloat16, device=DEVICE).cpu() for n, t in model.state_dict().items()
        }
        model.load_state_dict(empty, assign=True)
        offload_blocks(model, DEVICE) if BY_NAME[plan].offload else to_device(model, DEVICE)
        ids = torch.zeros(1, 37, dtype=torch.int64, device=DEVICE)
        [features] = model([(ids, torch.ones_like(ids))])
        assert features.device == DEVICE and features.shape == (1, 37, 4096)


def load(settings: InferenceSettings, plan: str) -> tuple[LoadedModels, Job]:
    """The models on the device, without text encoder, and a job for them."""
    models = LoadedModels(settings)
    models.use_plan(BY_NAME[plan])
    job = Job(JobSpec(settings, to_files=False), models)
    models.build(job.size)
    models.paths |= {"vae": Path("unread"), "model": Path("unread")}
    models.load(job.size)
    return models, job


def fill(model: nn.Module, section: Any, path: Any, device: torch.device, dtype: torch.dtype, linear: str) -> Any:
    """As `builder.load_model_weights`, with weights that have no values."""

    def empty(name: str, tensor: Tensor) -> Tensor:
        own = dtype if tensor.is_floating_point() and not kept_in_float32(name) else tensor.dtype
        return torch.empty(tensor.shape, dtype=own, device=device)

    model.load_state_dict({name: empty(name, one) for name, one in model.state_dict().items()}, assign=True)
    to_device(model.eval().requires_grad_(False), device)
    return SimpleNamespace(sha256="")


def text_for(models: LoadedModels, job: Job) -> Tensor:
    """What a text encoder would give for a prompt of 37 tokens."""
    config = models.model.config
    if job.settings.text_encoder["type"] == "classes":
        return torch.zeros(1, dtype=torch.int64, device=DEVICE)
    length = min(config["model_max_length"], 37 if job.settings.text_encoder["type"] == "t5" else 1)
    return torch.empty(1, 1, length, config["caption_channels"], dtype=models.dtype, device=DEVICE)


def check_steps(machine: FakeMachine, models: LoadedModels, job: Job, given: bool, steps: int) -> None:
    """Steps without given frames and with, for which the host never waits."""
    text, shape = text_for(models, job), (models.vae.out_channels, *models.vae.get_latent_size(job.size))
    noise = initial_noise(1, 0, 0, shape)[None].to(DEVICE)
    edits = [torch.ones(1, shape[1])] + ([torch.ones(1, shape[1]).index_fill(1, torch.tensor([0]), 0)] if given else [])
    for edit in edits:
        states = denoise(models, job, noise, text, {}, edit=edit, source=[noise_generator(1, 0)])
        with models.on_device("model"):  # weights that are offloaded travel before the first step and after the last
            machine.waits.clear()
            for state in islice(states, steps if FULL or edit.all() else 1):
                assert state.x.device == DEVICE and state.x.shape == noise.shape and state.x.dtype == torch.float32
            assert not machine.waits
        states.close()

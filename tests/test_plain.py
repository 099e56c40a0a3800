"""The models against the plain formulation that they are measured against: the same weights, the same numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks import plain
from benchmarks.common import cast
from opensora.acceleration.placement import to_device
from opensora.models.stdit.stdit3 import STDiT3
from opensora.models.vae.vae import VideoAutoencoderPipeline
from opensora.schedulers.rf import RFLOW, sampling_times
from tests.tiny import TINY_VAE

SIZES = [(3, 6, 8), (1, 5, 7), (9, 2, 2)]  # (T, H, W): more patches than frames, an image with padding, the reverse
LENGTHS = (5, 9)
LONGEST = 12


def randomize(module: nn.Module, seed: int = 0) -> None:
    """Weights as after training: none zero, norms near 1."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            spread = 0.3 if parameter.ndim < 2 or "table" in name else parameter[0].numel() ** -0.5
            noise = torch.randn(parameter.shape, generator=generator) * spread
            parameter.data = noise + 1 if name.endswith("norm.weight") or ".norm" in name else noise


def models(dtype: torch.dtype = torch.float32, **config: object) -> tuple[STDiT3, plain.PlainSTDiT3]:
    """The fast model as the package runs it, and the plain one, with one set of weights."""
    sizes = dict(hidden_size=48, depth=2, num_heads=4, in_channels=4, caption_channels=24, model_max_length=LONGEST)
    fast = STDiT3(**{**sizes, **config})
    randomize(fast)
    slow = plain.PlainSTDiT3(fast.config)
    slow.load_state_dict(fast.state_dict())
    return to_device(fast.to(dtype).eval().requires_grad_(False), torch.device("cpu")), slow.to(dtype).eval()


def inputs(size: tuple[int, int, int], given: bool) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    mask = (torch.arange(LONGEST) < torch.tensor(LENGTHS)[:, None]).long()
    x_mask = torch.ones(2, size[0], dtype=torch.bool)
    if given:
        x_mask[0, 0] = x_mask[1, -1] = False
    return dict(
        x=torch.randn(2, 4, *size, generator=generator), timestep=torch.tensor([871.0, 130.0]), mask=mask,
        y=torch.randn(2, 1, LONGEST, 24, generator=generator), x_mask=x_mask,
        fps=torch.tensor([24.0]), height=torch.tensor([size[1] * 8.0]), width=torch.tensor([size[2] * 8.0]),
    )  # fmt: skip


def prepared(model: STDiT3, told: dict[str, Tensor]) -> dict[str, Any]:
    """The same arguments, the conditioning among them prepared."""
    latents = {name: told[name] for name in ("x", "timestep", "x_mask")}
    conditioning = {name: value for name, value in told.items() if name not in latents}
    return {**latents, **model.prepare(told["x"].shape, **conditioning)}


def error(actual: Tensor, expected: Tensor) -> float:
    """The norm of the difference over that of what is expected."""
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize("given", [False, True], ids=["all generated", "frames given"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_forward_agrees(size, given):
    fast, slow = models()
    told = inputs(size, given)
    expected = slow(**told)
    assert error(fast(**told), expected) < 1e-5
    if not given:
        assert error(fast(**{**told, "x_mask": None}), expected) < 1e-5
    assert error(fast(**prepared(fast, told)), expected) < 1e-5


def test_one_text_without_prompt_serves_all_rows():
    """The mask is that of the texts, as in a batch of them with guidance."""
    fast, _ = models()
    told = inputs(SIZES[0], True)
    told["y"] = fast.null_caption(told["y"])
    assert len(told["y"]) == 1 < len(told["mask"])
    assert error(fast(**prepared(fast, told)), fast(**told)) < 1e-6


def test_the_masked_twins_matter():
    """Otherwise the agreement above would show nothing."""
    _, slow = models()
    assert error(slow(**inputs(SIZES[0], True)), slow(**inputs(SIZES[0], False))) > 0.01


def test_text_without_its_padding_agrees():
    fast, slow = models()
    told = inputs(SIZES[0], False)
    for row, length in enumerate(LENGTHS):
        one = {name: value[row : row + 1] if len(value) == 2 else value for name, value in told.items()}
        short = {**one, "y": one["y"][:, :, :length], "mask": None, "x_mask": None}
        assert error(fast(**short), slow(**one)) < 1e-5


@pytest.mark.parametrize("given", [False, True], ids=["all generated", "frames given"])
def test_bf16_is_as_near_to_float64_as_the_plain_formulation(given):
    told = inputs(SIZES[0], given)
    true = models(torch.float64)[1](**told)
    fast, slow = models(torch.bfloat16)
    bare = told if given else {**told, "x_mask": None}
    for learns in (False, True):  # a CPU has a way of its own where nothing does
        with torch.set_grad_enabled(learns):
            assert error(fast(**bare), true) < 1.1 * error(slow(**told), true)
            assert error(fast(**prepared(fast, bare)), true) < 1.1 * error(slow(**told), true)


def test_gradients_agree():
    fast, slow = models()
    told = inputs(SIZES[0], False)
    fast.requires_grad_(True), slow.requires_grad_(True)
    for model, arguments in ((fast, {**told, "x_mask": None}), (slow, told)):
        model(**arguments).square().mean().backward()
    expected = dict(slow.named_parameters())
    for name, parameter in fast.named_parameters():
        if expected[name].grad is not None:
            assert error(parameter.grad, expected[name].grad) < 2e-5, name


def test_whole_sampling_agrees():
    fast, slow = models(pred_sigma=False)
    told = inputs(SIZES[0], False)
    size = {name: told[name] for name in ("fps", "height", "width")}
    noise, y, mask = told["x"][:1], told["y"][:1], told["mask"][:1]
    short = y[:, :, : LENGTHS[0]]
    null = fast.null_caption(y)
    times = sampling_times(6).tolist()
    expected = plain.sample(slow, noise, y, mask, null, times, 4.0, torch.Generator(), **size)
    scheduler = RFLOW(num_sampling_steps=6, cfg_scale=4.0)
    cond, null = {"y": short, **size}, {"y": fast.null_caption(short)}
    for options in ({}, {"precompute": True}, {"precompute": True, "sequential_cfg": True}):
        assert error(scheduler.sample(fast, noise, cond, null, **options), expected) < 1e-5


def autoencoders(frames: int, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, nn.Module, Tensor]:
    """The autoencoder as the package runs it in a type, as it was built, and latents of a clip."""
    torch.manual_seed(0)
    slow = VideoAutoencoderPipeline(**TINY_VAE).eval().requires_grad_(False)
    z = torch.randn(1, 4, slow.get_latent_size((frames, None, None))[0], 3, 4)
    return to_device(cast(slow, dtype), torch.device("cpu")), slow, z


@pytest.mark.parametrize("frames", [17, 34, 5])
def test_decoding_agrees(frames):
    fast, slow, z = autoencoders(frames)
    expected = plain.decode(slow, z, frames)
    assert expected.shape == (1, 3, frames, 24, 32)
    assert error(fast.decode(z, frames), expected) < 1e-5
    assert error(torch.cat(list(fast.decoded(z, frames)), dim=2), expected) < 1e-5


@torch.no_grad()
def test_decoding_in_bf16_is_as_near_as_the_plain_formulation():
    fast, slow, z = autoencoders(17, torch.bfloat16)
    half = z.bfloat16()
    exact, plainly = plain.decode(slow, half.float(), 17), plain.decode(cast(slow, torch.bfloat16), half, 17)
    assert error(fast.decode(half, 17), exact) < 1.1 * error(plainly, exact)

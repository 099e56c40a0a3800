"""Convolutions with fewer products and single-pixel convolutions, against the plain ones."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from benchmarks import plain
from opensora.acceleration.kernels import linear, winograd
from opensora.acceleration.kernels.linear import OneDnnPointwise, has_onednn
from opensora.acceleration.kernels.winograd import (
    TWO_OF_THREE,
    UPSAMPLED,
    TransformedKernels,
    WinogradConv2d,
    WinogradTime,
    kernel_bytes,
    without_winograd,
)
from opensora.acceleration.memory_plan import PLANS
from opensora.acceleration.placement import to_device
from opensora.models.vae.vae import VideoAutoencoderPipeline
from opensora.models.vae.vae_temporal import CausalConv3d, TimeUpsample
from tests.test_plain import error
from tests.tiny import TINY_VAE

CPU = torch.device("cpu")
WIDE = 160  # channels of which fewer products pay on any processor
WIDE_VAE = TINY_VAE | {
    "vae_2d": TINY_VAE["vae_2d"] | {"block_out_channels": (WIDE,) * 4, "norm_num_groups": 32},
    "vae_temporal": TINY_VAE["vae_temporal"] | {"filters": 128, "num_groups": 32},
}
pytestmark = pytest.mark.skipif(not has_onednn(), reason="PyTorch is built without oneDNN")


@pytest.fixture(autouse=True)
def same_numbers_of_few_pixels(monkeypatch) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(winograd, "MIN_TILES", 64)


def convolution(*channels: int, kernel: int = 3, bias: bool = True, **how: Any) -> nn.Conv2d:
    how = {"padding": kernel // 2} | how
    return nn.Conv2d(*channels, kernel, bias=bias, **how).requires_grad_(False)


def placed(conv: nn.Conv2d) -> nn.Conv2d:
    return to_device(nn.Sequential(copy.deepcopy(conv)), CPU)[0]


SHAPES = [
    (1, 128, 128, 16, 20), (2, 128, 192, 17, 31), (5, 192, 128, 8, 9), (1, 128, 160, 5, 2100), (300, 128, 128, 1, 1),
]  # fmt: skip


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("count", "inside", "outside", "height", "width"), SHAPES)
def test_fewer_products_are_as_accurate(count, inside, outside, height, width, bias):
    """Sides that tiles do not fill, several images, bands of one row and of all, any layout."""
    conv = convolution(inside, outside, bias=bias)
    x = torch.randn(count, inside, height, width)
    shift = None if conv.bias is None else conv.bias.double()
    for rule, seen in ((TWO_OF_THREE, x), (UPSAMPLED, F.interpolate(x, scale_factor=2.0))):
        true = F.conv2d(seen.double(), conv.weight.double(), shift, padding=1)
        for given in (x, x.to(memory_format=torch.channels_last), x.transpose(2, 3).contiguous().transpose(2, 3)):
            made = TransformedKernels(conv, rule).convolve(given)
            assert made.shape == true.shape and made.is_contiguous(memory_format=torch.channels_last)
            assert error(made, true) < 1e-6


def test_kernels_are_made_again_when_the_weights_change():
    conv = convolution(128, 128)
    x, kernels = torch.randn(1, 128, 16, 16), TransformedKernels(conv, TWO_OF_THREE)
    before, first = kernels.convolve(x), kernels.taps[0]
    assert torch.equal(kernels.convolve(x), before) and kernels.taps[0] is first
    conv.weight.mul_(2)
    assert error(kernels.convolve(x), conv(x)) < 1e-6 and kernels.taps[0] is not first


def test_kernels_are_made_of_as_many_frames_as_there_are():
    conv = CausalConv3d(128, 128).requires_grad_(False)
    kernels, made = TransformedKernels(conv.conv, TWO_OF_THREE), []
    for frames in (1, 5, 2):
        x = torch.randn(1, 128, frames, 8, 8)
        out = kernels.convolve(x.transpose(1, 2).flatten(0, 1)).unflatten(0, (1, -1)).transpose(1, 2)
        assert error(out, conv(x)) < 1e-6
        made.append(len(kernels.taps))
    assert made == [1, 3, 3]


def test_wide_convolutions_take_part_by_themselves(monkeypatch):
    conv = convolution(WIDE, WIDE)
    fast, x = placed(conv), torch.randn(2, WIDE, 12, 12)
    called, convolve = [], TransformedKernels.convolve
    monkeypatch.setattr(TransformedKernels, "convolve", lambda self, x: called.append(1) or convolve(self, x))
    assert error(fast(x), conv(x)) < 1e-6 and called == [1]
    assert fast.state_dict().keys() == conv.state_dict().keys()


@pytest.mark.parametrize(
    "conv",
    [
        convolution(640, 127), convolution(64, 640), convolution(WIDE, WIDE, stride=2),
        convolution(WIDE, WIDE, padding=0), convolution(WIDE, WIDE, dilation=2, padding=2),
        convolution(512, 512, groups=2), convolution(WIDE, WIDE, kernel=5),
        convolution(WIDE, WIDE, padding_mode="circular"), convolution(WIDE, WIDE).requires_grad_(),
    ],
)  # fmt: skip
def test_others_stay_as_they_are(conv):
    assert type(placed(conv)) is nn.Conv2d


def test_what_does_not_suit_is_computed_directly(monkeypatch):
    monkeypatch.setattr(TransformedKernels, "convolve", None)
    fast, x = placed(convolution(WIDE, WIDE)), torch.randn(1, WIDE, 16, 16)
    fast(x[:, :, :15])  # too few tiles
    fast(x.clone().requires_grad_()).sum().backward()
    fast.double()(x.double())
    with torch.autocast("cpu", torch.bfloat16):
        fast.float()(x)
    with pytest.raises(TypeError):
        fast(x)


def test_single_pixels_are_a_product(monkeypatch):
    conv = convolution(128, 192, kernel=1)
    fast, x = placed(conv), torch.randn(2, 128, 5, 7)
    calls, product = [], linear.product
    monkeypatch.setattr(linear, "product", lambda *args: calls.append(1) or product(*args))
    assert type(fast) is OneDnnPointwise
    for given in (x, x.to(memory_format=torch.channels_last)):
        made = fast(given)
        assert error(made, conv(x)) < 1e-6 and made.is_contiguous(memory_format=torch.channels_last)
    assert calls == [1, 1]
    fast(x.clone().requires_grad_()).sum().backward()
    assert len(calls) == 2


def wide_vae() -> VideoAutoencoderPipeline:
    torch.manual_seed(0)
    return VideoAutoencoderPipeline(**WIDE_VAE).eval().requires_grad_(False)


def test_a_wide_autoencoder_agrees_with_the_plain_formulation():
    slow, fast = wide_vae(), to_device(wide_vae(), CPU)
    z = torch.randn(1, 4, fast.get_latent_size((5, None, None))[0], 9, 11)
    expected = plain.decode(slow, z, 5)
    assert error(fast.decode(z, 5), expected) < 1e-5
    x = torch.rand(1, 3, 5, 136, 144) * 2 - 1
    assert error(fast.encode(x, sample=False), slow.encode(x, sample=False)) < 1e-5


def test_memory_plans_keep_the_kernels_or_not():
    """What is counted is what is held; smaller plans hold fewer, the least one none, and all give the same clip."""
    z, made = torch.randn(1, 4, 3, 16, 16), []
    for plan in PLANS:
        vae = to_device(wide_vae(), CPU)
        plan.prepare_vae(vae)
        made.append(vae.decode(z, 9))
        wide = [module for module in vae.modules() if isinstance(module, WinogradConv2d)]
        in_time = [module for module in vae.modules() if isinstance(module, WinogradTime)]
        kept = [module.transformed for module in [*wide, *in_time]]
        held = [tensor for kernels in kept for tap in kernels.taps for row in tap for tensor in row]
        assert bool(wide) is (nn.Conv2d in plan.winograd) and bool(in_time) is (CausalConv3d in plan.winograd)
        expected = kernel_bytes(vae, "decoder", plan.winograd) if plan.winograd else 0
        assert sum(tensor.nbytes for tensor in held) == expected
    assert all(error(one, made[0]) < 1e-5 for one in made)


def test_kernels_can_be_forgotten():
    fast = placed(convolution(WIDE, WIDE))
    fast(torch.randn(1, WIDE, 16, 16))
    (fast,) = without_winograd(nn.Sequential(fast))
    assert type(fast) is nn.Conv2d and not any(isinstance(value, TransformedKernels) for value in vars(fast).values())
    assert kernel_bytes(nn.ModuleDict({"decoder": fast}), "encoder") == 0
    assert kernel_bytes(nn.ModuleDict({"decoder": fast}), "decoder") == 4 * 16 * WIDE**2


@pytest.mark.parametrize("mkl", [True, False])
def test_fewer_products_pay_sooner_where_the_direct_way_is_slow(mkl, monkeypatch):
    monkeypatch.setattr(winograd, "mkl_is_faster", lambda: mkl)
    fast = placed(convolution(128, 128))
    assert isinstance(fast, WinogradConv2d) is not mkl
    assert isinstance(placed(convolution(128, 256)), WinogradConv2d)
    assert isinstance(to_device(CausalConv3d(128, 128).requires_grad_(False), CPU), WinogradTime)


@pytest.mark.parametrize("mkl", [True, False])
@pytest.mark.parametrize(
    ("samples", "frames", "height", "width", "bias"),
    [(1, 1, 16, 16, True), (1, 2, 17, 9, False), (1, 5, 12, 11, True), (2, 3, 8, 9, True), (3, 1, 10, 10, False)],
)
def test_convolutions_over_frames_with_fewer_products(samples, frames, height, width, bias, mkl, monkeypatch):
    """Shorter and longer than the kernel, sides that tiles do not fill, several bands and clips, any layout."""
    monkeypatch.setattr(linear, "mkl_is_faster", lambda: mkl)
    monkeypatch.setattr(winograd, "MAX_TILES", 60)
    conv = CausalConv3d(128, 160, bias=bias).requires_grad_(False)
    fast = to_device(nn.Sequential(copy.deepcopy(conv)), CPU)[0]
    x = torch.randn(samples, 128, frames, height, width)
    true = conv.double()(x.double())
    called, convolve = [], TransformedKernels.convolve
    monkeypatch.setattr(TransformedKernels, "convolve", lambda self, *args: called.append(1) or convolve(self, *args))
    for given in (x, x.to(memory_format=torch.channels_last_3d)):
        assert error(fast(given), true) < 1e-6
    assert called == [1, 1] and fast.state_dict().keys() == conv.state_dict().keys()


def test_frames_that_are_doubled_and_those_that_do_not_suit(monkeypatch):
    conv = TimeUpsample(128).requires_grad_(False)
    fast, x = to_device(nn.Sequential(copy.deepcopy(conv)), CPU)[0], torch.randn(1, 128, 2, 12, 12)
    assert error(fast(x), conv(x)) < 1e-6
    monkeypatch.setattr(TransformedKernels, "convolve", None)
    assert error(fast(x[..., :5]), conv(x[..., :5])) < 1e-6  # too few tiles
    fast(x.clone().requires_grad_()).sum().backward()
    assert error(fast.double()(x.double()), conv.double()(x.double())) < 1e-12
    for other in (CausalConv3d(128, 128, 1), CausalConv3d(128, 128, time_stride=2), CausalConv3d(64, 128)):
        assert not isinstance(to_device(other.requires_grad_(False), CPU), WinogradTime)


def test_few_channels_are_not_worth_it():
    assert not winograd.suits(torch.randn(1, 64, 64, 64), torch.randn(128, 64, 3, 3), 2)

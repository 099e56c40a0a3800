"""The autoencoders of Stable Diffusion and Stable Video Diffusion against those of diffusers, with random weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from opensora.models.vae.autoencoder_kl import AutoencoderKL
from opensora.models.vae.blocks import ACTIVATIONS, ResidualBlock, SelfAttention
from opensora.models.vae.temporal_decoder import AutoencoderKLTemporalDecoder
from tests.full import some
from tests.test_plain import error

TINY_FRAMES: dict[str, Any] = dict(
    in_channels=3, out_channels=3, latent_channels=4, layers_per_block=1, block_out_channels=(32, 64),
    down_block_types=("DownEncoderBlock2D",) * 2,
)  # fmt: skip
TINY: dict[str, Any] = dict(
    **TINY_FRAMES, up_block_types=("UpDecoderBlock2D",) * 2, act_fn="silu", norm_num_groups=32,
    mid_block_add_attention=True,
)  # fmt: skip
PUBLISHED_FRAMES: dict[str, Any] = TINY_FRAMES | dict(
    layers_per_block=2, block_out_channels=(128, 256, 512, 512), down_block_types=("DownEncoderBlock2D",) * 4
)
PUBLISHED: dict[str, Any] = TINY | PUBLISHED_FRAMES | dict(up_block_types=("UpDecoderBlock2D",) * 4)


def pair(ours: type[nn.Module], config: dict[str, Any]) -> tuple[nn.Module, nn.Module]:
    """diffusers' model with random weights, and ours with the same ones."""
    import diffusers

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        reference = getattr(diffusers, ours.__name__)(**config).eval()
        for parameter in reference.parameters():
            if parameter.ndim == 1:  # norms and mixes, which start at 1 and 0, and biases
                parameter.data.add_(torch.randn_like(parameter), alpha=0.05 if parameter.numel() > 1 else 1.0)
    with torch.device("meta"):
        model = ours(**config)
    state = reference.state_dict()
    assert list(model.state_dict()) == list(state), "optimizers count parameters in this order"
    model.load_state_dict(state, assign=True)
    return reference, model


def images(count: int, channels: int, *size: int) -> Tensor:
    return torch.randn(count, channels, *size, generator=torch.Generator().manual_seed(1))


def compare(ours: type[nn.Module], config: dict[str, Any], x: Tensor, gradients: bool = True) -> None:
    """Encodes x [N, C, H, W] and decodes latents of the same size with both; N frames are one video."""
    reference, model = pair(ours, config)
    frames = {} if ours is AutoencoderKL else {"num_frames": len(x)}
    with torch.set_grad_enabled(gradients):
        expected = reference.encode(x).latent_dist.parameters
        z = expected.detach().chunk(2, dim=1)[0]
        decoded = reference.decode(z, **frames).sample
    with torch.no_grad():
        assert error(model.encode(x), expected) < 1e-5 and error(model.decode(z), decoded) < 1e-5
    if gradients:
        for pair_of in ((expected, decoded), (model.encode(x), model.decode(z))):
            sum(one.square().mean() for one in pair_of).backward()
        grads = [
            torch.cat([p.grad.flatten() for p in each.parameters() if p.grad is not None])
            for each in (reference, model)
        ]
        assert error(grads[1], grads[0]) < 1e-5


ATTENTIVE = dict(
    layers_per_block=2, block_out_channels=(32, 64, 64),
    down_block_types=("DownEncoderBlock2D", "AttnDownEncoderBlock2D", "AttnDownEncoderBlock2D"),
    up_block_types=("AttnUpDecoderBlock2D", "UpDecoderBlock2D", "AttnUpDecoderBlock2D"),
)  # fmt: skip


@pytest.mark.parametrize(
    "changes",
    [
        *({"act_fn": name} for name in ACTIVATIONS),
        {"mid_block_add_attention": False},
        ATTENTIVE,
        {"norm_num_groups": 8, "in_channels": 1, "out_channels": 2, "latent_channels": 16},
        {"block_out_channels": (32,), "down_block_types": ("DownEncoderBlock2D",),
         "up_block_types": ("UpDecoderBlock2D",)},
    ],
)  # fmt: skip
@some(4)
def test_every_layout_of_images(changes: dict[str, Any]) -> None:
    config = TINY | changes
    compare(AutoencoderKL, config, images(2, config["in_channels"], 18, 26))


@pytest.mark.parametrize("frames", [1, 4])
@pytest.mark.parametrize("layers", [1, 2, 3])
def test_every_layout_of_videos(layers: int, frames: int) -> None:
    """Also those whose middle block has an attention or a residual block that diffusers leaves out."""
    compare(AutoencoderKLTemporalDecoder, TINY_FRAMES | {"layers_per_block": layers}, images(frames, 3, 14, 18))


@pytest.mark.parametrize(
    ("ours", "config", "frames"), [(AutoencoderKL, PUBLISHED, 1), (AutoencoderKLTemporalDecoder, PUBLISHED_FRAMES, 2)]
)
def test_published_sizes(ours: type[nn.Module], config: dict[str, Any], frames: int) -> None:
    compare(ours, config, images(frames, 3, 16, 24), gradients=False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    reference, model = pair(AutoencoderKL, TINY)
    x = images(1, 3, 16, 16)
    with torch.no_grad():
        moments = reference.encode(x).latent_dist.parameters
        assert model.to(dtype).encode(x.to(dtype)).dtype == dtype
        assert error(model.encode(x.to(dtype)).float(), moments) < 0.05


@pytest.mark.parametrize("block", [ResidualBlock(32, 32, 8), ResidualBlock(32, 64, 8), SelfAttention(32, 8)])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_blocks_leave_their_input_as_it_is(block: nn.Module, layout: torch.memory_format) -> None:
    x = images(2, 32, 9, 7).to(memory_format=layout)
    given, expected = x.clone(memory_format=torch.preserve_format), block(x)
    with torch.no_grad():
        assert error(block(given), expected) < 1e-6 and torch.equal(given, x)

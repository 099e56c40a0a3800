"""Blocks of per-frame autoencoders (Rombach et al. 2022, arXiv:2112.10752): residual, attention, resampling."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Activation = Callable[..., Tensor]  # (x, inplace=...)


def _gelu(x: Tensor, inplace: bool = False) -> Tensor:
    return F.gelu(x)


ACTIVATIONS: dict[str, Activation] = {
    "silu": F.silu, "swish": F.silu, "mish": F.mish, "gelu": _gelu, "relu": F.relu,
}  # fmt: skip


class ResidualBlock(nn.Module):
    """x [N, C, ...] -> [N, O, ...]: x plus two convolutions, each after a group norm and an activation.

    Without gradients, activations and the sum are computed in place; x itself stays as it is.
    """

    eps = 1e-6  # of the group norms

    def __init__(self, in_channels: int, out_channels: int, groups: int, activation: Activation = F.silu) -> None:
        super().__init__()
        self.activation = activation
        self.norm1 = nn.GroupNorm(groups, in_channels, self.eps)
        self.conv1 = self.convolution(in_channels, out_channels)
        self.norm2 = nn.GroupNorm(groups, out_channels, self.eps)
        self.conv2 = self.convolution(out_channels, out_channels)
        self.conv_shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else None

    @staticmethod
    def convolution(in_channels: int, out_channels: int) -> nn.Module:
        return nn.Conv2d(in_channels, out_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        inplace = not torch.is_grad_enabled()
        hidden = self.activation(self.norm1(x), inplace=inplace)
        hidden = self.conv1(hidden)
        hidden = self.activation(self.norm2(hidden), inplace=inplace)
        hidden = self.conv2(hidden)
        skip = x if self.conv_shortcut is None else self.conv_shortcut(x)
        return hidden.add_(skip) if inplace else hidden + skip


class SelfAttention(nn.Module):
    """x [N, C, H, W] plus attention of one head between its pixels."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.group_norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        self.to_out = nn.Sequential(nn.Linear(channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        pixels = self.group_norm(x).flatten(2).transpose(1, 2)  # [N, H * W, C]
        q, k, v = (project(pixels).unsqueeze(1) for project in (self.to_q, self.to_k, self.to_v))
        out = F.scaled_dot_product_attention(q, k, v).squeeze(1)
        return self.to_out(out).transpose(1, 2).unflatten(2, x.shape[2:]) + x


class Downsample(nn.Module):
    """x [N, C, H, W] -> [N, C, H / 2, W / 2], rounded down: a convolution with padding on the right and below."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """x [N, C, H, W] -> [N, C, 2 H, 2 W]: a convolution of x with its pixels repeated."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class MidBlock(nn.Module):
    """A residual block, attention and another residual block, at the lowest resolution.

    Published decoders of videos have as many residual blocks as a level. What exceeds the two is not used; a single
    block leaves out the attention.
    """

    def __init__(self, resnets: Iterable[nn.Module], channels: int, groups: int, attends: bool = True) -> None:
        super().__init__()
        self.attentions = nn.ModuleList([_attention(channels, groups, attends)])
        self.resnets = nn.ModuleList(resnets)

    def forward(self, x: Tensor) -> Tensor:
        x = self.resnets[0](x)
        for resnet in self.resnets[1:2]:
            x = resnet(self.attentions[0](x))
        return x


class Level(nn.Module):
    """Residual blocks of one resolution, each with attention after it if the level `attends`, then the resampling."""

    def __init__(
        self, resnets: Sequence[nn.Module], channels: int, groups: int, attends: bool = False, down: bool = False,
        up: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        self.attentions = nn.ModuleList(_attention(channels, groups, attends) for _ in resnets)
        self.resnets = nn.ModuleList(resnets)
        self.downsamplers = nn.ModuleList([Downsample(channels)] if down else [])
        self.upsamplers = nn.ModuleList([Upsample(channels)] if up else [])

    def forward(self, x: Tensor) -> Tensor:
        for resnet, attention in zip(self.resnets, self.attentions, strict=True):
            x = attention(resnet(x))
        for resample in (*self.downsamplers, *self.upsamplers):
            x = resample(x)
        return x


def _attention(channels: int, groups: int, attends: bool) -> nn.Module:
    return SelfAttention(channels, groups) if attends else nn.Identity()

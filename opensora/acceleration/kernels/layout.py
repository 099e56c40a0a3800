"""Memory formats of weights: channels last for convolutions, transposed small linear layers.

Kernels then read weights as they are and copy nothing per call.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from opensora.acceleration.replace_modules import recast

SMALL = 2**20  # values of a weight whose copy costs as much as a product with a few hundred rows


def channels_last(model: nn.Module, frame_by_frame: bool = False) -> list[Tensor]:
    """Converts the weights of frozen convolutions to channels last; returns those that were copied.

    With `frame_by_frame`, 3-D kernels are stored frame after frame instead, each contiguous: a CPU sums that order
    more accurately.
    """
    copied: list[Tensor] = []
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Conv3d) and not module.weight.requires_grad:
            before = module.weight.data_ptr()
            module.weight.data = _converted(module.weight.data, frame_by_frame)
            if module.weight.data_ptr() != before:
                copied.append(module.weight)
    return copied


def pairwise_group_norm(module: nn.Module) -> nn.Module:
    """The `PairwiseGroupNorm` of a frozen group norm; other modules are returned."""
    frozen = type(module) is nn.GroupNorm and not module.weight.requires_grad
    return recast(module, PairwiseGroupNorm) if frozen else module


def outputs_last(model: nn.Module) -> list[Tensor]:
    """Transposes the memory of small weights [out, in] of frozen linear layers, `out` innermost; returns them."""
    copied: list[Tensor] = []
    for module in model.modules():
        if isinstance(module, nn.Linear) and not module.weight.requires_grad and module.weight.numel() <= SMALL:
            module.weight.data = module.weight.data.t().contiguous().t()
            copied.append(module.weight)
    return copied


def release_file(model: nn.Module, copied: Sequence[Tensor]) -> None:
    """Copies the remaining weights of a model, if most were `copied` already.

    A memory-mapped file stays in memory for as long as one tensor refers to it.
    """
    done = set(map(id, copied))
    left = [parameter for parameter in model.parameters() if id(parameter) not in done]
    if _bytes(left) >= _bytes(copied) or any(parameter.requires_grad for parameter in left):
        return
    for parameter in left:
        parameter.data = parameter.data.clone()
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.clone())  # a new tensor: `data` of a view keeps its base


def _bytes(tensors: Sequence[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def _converted(weight: Tensor, frame_by_frame: bool) -> Tensor:
    """[O, C, H, W] or [O, C, T, H, W] with C innermost; or with T outermost, for kernels read frame by frame."""
    if weight.ndim == 5 and frame_by_frame:
        return weight.permute(2, 0, 1, 3, 4).contiguous().permute(1, 2, 0, 3, 4)
    return weight.contiguous(memory_format=torch.channels_last if weight.ndim == 4 else torch.channels_last_3d)


class PairwiseGroupNorm(nn.GroupNorm):
    """Group norm of x [N, C, ...] with pairwise float32 sums on a CPU.

    For channels-last inputs PyTorch's CPU kernel adds pixel after pixel, and loses a digit for every factor of 100.
    """

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type != "cpu" or x.dtype != torch.float32 or x.is_contiguous():
            return super().forward(x)
        pixels, groups = tuple(range(2, x.ndim)), (self.num_groups, -1)
        mean, square = (one.mean(pixels).unflatten(1, groups).mean(-1, keepdim=True) for one in (x, x.square()))
        scale = self.weight.view(groups) * (square - mean.square() + self.eps).rsqrt()
        shift = self.bias.view(groups) - mean * scale
        shape = (*x.shape[:2], *(1 for _ in pixels))
        return torch.addcmul(shift.reshape(shape), x, scale.reshape(shape))

"""Where weights lie in memory: channels of convolutions, and outputs of small linear layers, next to one another.

So fast kernels read them, and need not move them in every call.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

SMALL = 2**20  # values of a weight that takes as long to move as to multiply by a few hundred rows


def channels_last(model: nn.Module, folded: bool = False) -> list[Tensor]:
    """Rearranges the kernels of convolutions whose weights are fixed; what they give then lies in the same way.

    `folded`: those in time are computed frame by frame of the kernel, so these lie apart, each in PyTorch's own order,
    which a CPU adds up more accurately. Returns the kernels that were copied for that.
    """
    arranged: list[Tensor] = []
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Conv3d) and not module.weight.requires_grad:
            before = module.weight.data_ptr()
            module.weight.data = _arranged(module.weight.data, folded)
            if module.weight.data_ptr() != before:
                arranged.append(module.weight)
        elif type(module) is nn.GroupNorm and not module.weight.requires_grad:
            module.__class__ = GroupNorm
    return arranged


def outputs_last(model: nn.Module) -> list[Tensor]:
    """Rearranges the small weights [out, in] of linear layers that are fixed, `out` innermost; returns them."""
    arranged: list[Tensor] = []
    for module in model.modules():
        if isinstance(module, nn.Linear) and not module.weight.requires_grad and module.weight.numel() <= SMALL:
            module.weight.data = module.weight.data.t().contiguous().t()
            arranged.append(module.weight)
    return arranged


def leave_file(model: nn.Module, copied: Sequence[Tensor]) -> None:
    """Copies what is left of a model, too, where most of its weights are copies already.

    All of a file that is mapped stays in memory for as long as one tensor lies there.
    """
    done = set(map(id, copied))
    left = [parameter for parameter in model.parameters() if id(parameter) not in done]
    if _bytes(left) >= _bytes(copied) or any(parameter.requires_grad for parameter in left):
        return
    for parameter in left:
        parameter.data = parameter.data.clone()
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.clone())  # another tensor, because a view holds what it was made of


def _bytes(tensors: Sequence[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def _arranged(weight: Tensor, folded: bool) -> Tensor:
    """The same numbers: [O, C, H, W] or [O, C, T, H, W] with C innermost, or, folded, with T outermost."""
    if weight.ndim == 5 and folded:
        return weight.permute(2, 0, 1, 3, 4).contiguous().permute(1, 2, 0, 3, 4)
    return weight.contiguous(memory_format=torch.channels_last if weight.ndim == 4 else torch.channels_last_3d)


class GroupNorm(nn.GroupNorm):
    """The norm of x [N, C, ...], its sums in float32 taken pairwise where a CPU's own are not.

    With channels innermost PyTorch adds up pixel after pixel there, and loses a digit with every hundredfold of them.
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

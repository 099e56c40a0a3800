"""Linear layers in 8 bits: an approximation to be asked for, with products of integers and scales in float32.

Weights [out, in] have a scale for each output (in advance), inputs one for each token (at every call), so that large
tokens do not coarsen small ones: x w = (x / s_x) (w / s_w) s_x s_w, the quotients rounded to -127..127 (LLM.int8,
Dettmers et al. 2022, without its outliers).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

FEWEST = 32  # rows of a product of integers: some kernels take no fewer than 17
LEAST = 128  # inputs and outputs below which a layer stays as it is; modulation and embeddings are told by their names
KEPT = ("embedder", "t_block", "final_layer", "adaLN")


def quantize(model: nn.Module, kept: tuple[str, ...] = KEPT) -> nn.Module:
    """The model with the linear layers of its blocks in 8 bits; those whose name has a part in `kept` stay."""
    for name, module in list(model.named_modules()):
        for child, layer in list(module.named_children()):
            whole = f"{name}.{child}"
            if isinstance(layer, nn.Linear) and min(layer.weight.shape) >= LEAST and not any(k in whole for k in kept):
                setattr(module, child, Int8Linear(layer))
    return model


class Int8Linear(nn.Module):
    """x [..., in] -> [..., out] by the weights of `linear`, rounded to 8 bits; for inference."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        weight = linear.weight.detach().float()
        scale = weight.abs().amax(dim=1).clamp(min=1e-12) / 127
        self.register_buffer("weight", (weight / scale[:, None]).round().to(torch.int8))
        self.register_buffer("scale", scale)
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, -2).float()
        scale = rows.abs().amax(dim=1, keepdim=True).clamp(min=1e-12) / 127
        small = (rows / scale).round_().to(torch.int8)
        small = F.pad(small, (0, 0, 0, max(0, FEWEST - len(rows))))
        out = torch._int_mm(small, self.weight.t())[: len(rows)] * self.scale
        out = out.mul_(scale) if self.bias is None else torch.addcmul(self.bias.float(), out, scale)
        return out.to(x.dtype).unflatten(0, x.shape[:-1])

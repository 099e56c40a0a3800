"""What attention is computed by on a CPU: the same sums in fewer passes, where fused kernels do not pay.

In float32 and, as far as queries and keys go, bfloat16; for training also in what autocast makes of float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from opensora.acceleration.kernels.gradients import Attention, Heads
from opensora.acceleration.kernels.linear import INFERRED, in_training, needs_gradients, product_type, suits
from opensora.models.layers import attention as plain
from opensora.models.layers.attention import Kernels

FEW = 8  # tokens, up to which products value by value are faster than those of matrices
SOME = 16  # tokens that leave the blocks of a fused kernel empty
IN_CACHE = 2**20  # values of queries that stay there between two products
MOST_SCORES = 2**28  # values that may be kept for the backward pass
MOST_FOLDED = 2**18  # values that a text may take in each block


def use_host_attention(model: nn.Module) -> None:
    """Makes the attention of a model compute by the functions below."""
    for module in model.modules():
        if isinstance(module, plain.SelfAttention | plain.CrossAttention):
            module.kernels = Kernels(attention, rotate)
            module.__class__ = OWN.get(type(module), type(module))


def attention(q: Tensor, k: Tensor, v: Tensor, keep: Tensor | None = None) -> Tensor:
    """As everywhere, but by products where gradients are asked for and where tokens are few: [N, L, H * D]."""
    if keep is None and in_training(q, k, v):
        if q[..., 0].numel() * k.shape[1] <= MOST_SCORES:
            return _by_matrices(q, k, v)
    elif keep is None and suits(q, k) and not needs_gradients(q, k, v):
        tokens = max(q.shape[1], k.shape[1])
        if tokens <= SOME and q.numel() <= IN_CACHE:
            return _by_values(q, k, v) if tokens <= FEW else _by_matrices(q, k, v)
    return plain.attention(q, k, v, keep)


def rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """x [N, L, ..., D] turned by its position: pairs are complex numbers, and so are rotations [L, D / 2, 2]."""
    if not suits(x, rotation):
        return plain.rotate(x, rotation)
    pairs, turns = (torch.view_as_complex(one) for one in (x.unflatten(-1, (-1, 2)), plain.along_tokens(rotation, x)))
    return torch.view_as_real(pairs * turns).flatten(-2)


def _by_matrices(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    heads = (x.to(product_type(q)).transpose(1, 2).flatten(0, 1).contiguous() for x in (q, k, v))  # [N * H, L, D]
    return Attention.apply(*heads).unflatten(0, (len(q), -1)).transpose(1, 2).flatten(2)


def _by_values(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = (q[:, :, None] * k[:, None]).sum(dim=-1) * q.shape[-1] ** -0.5  # [N, L, M, H]
    return (scores.softmax(dim=2)[..., None] * v[:, None]).sum(dim=2).flatten(2)


class HostSelfAttention(plain.SelfAttention):
    """Self-attention that normalises and turns queries and keys together."""

    def heads(self, x: Tensor, rotation: Tensor | None) -> tuple[Tensor, ...]:
        norm, learns = self.q_norm, needs_gradients(x, *self.parameters())
        if self.qk_norm_legacy or not isinstance(norm, plain.RMSNorm):
            return super().heads(x, rotation)
        fixed = rotation is None or not rotation.requires_grad
        if learns and fixed and in_training(x, *self.parameters()) and norm.weight.dtype == torch.float32:
            return self._learned(self.qkv(x), rotation)
        if learns or not suits(x, norm.weight, INFERRED):
            return super().heads(x, rotation)
        both, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).split((2, 1), dim=-3)  # [N, L, ..., 2, H, D]
        made = both.new_empty(2, *v.squeeze(-3).shape).movedim(0, -3)  # all queries, then all keys
        weight = torch.stack((norm.weight, self.k_norm.weight)).float()[:, None]
        _normalise(both, weight, norm.eps, rotation, made)
        return *made.unbind(-3), v.squeeze(-3)

    def _learned(self, qkv: Tensor, rotation: Tensor | None) -> tuple[Tensor, ...]:
        """The same of qkv [N, L, ..., 3 * C], with gradients: [N, L, heads of all sequences, D]."""
        parts = qkv.reshape(*qkv.shape[:2], -1, 3, self.num_heads, self.q_norm.weight.numel())  # [N, L, S, 3, H, D]
        turns = None if rotation is None else torch.view_as_complex(rotation)
        weights = self.q_norm.weight, self.k_norm.weight
        made = Heads.apply(parts.permute(3, 0, 2, 4, 1, 5), *weights, turns, self.q_norm.eps)
        return tuple(part.flatten(1, 2).transpose(1, 2) for part in made)


def _normalise(x: Tensor, weight: Tensor, eps: float, rotation: Tensor | None, out: Tensor) -> None:
    """Fills `out` with queries and keys x [N, L, ..., 2, H, D] over their root mean square, weighted and turned.

    weight [2, 1, D] float32. What is between is float32, and of other types stays in the cache.
    """
    turns = None if rotation is None else torch.view_as_complex(plain.along_tokens(rotation, x))
    for n, tokens in _parts(x, x.numel() if x.dtype == torch.float32 else IN_CACHE):
        place = out[n, tokens]
        part = x[n, tokens].float()
        size = torch.linalg.vector_norm(part, dim=-1, keepdim=True)
        scale = size.square_().div_(part.shape[-1]).add_(eps).rsqrt_()
        normed = torch.mul(part, scale, out=place if x.dtype == part.dtype else part).mul_(weight)
        if turns is not None:
            torch.view_as_complex(normed.unflatten(-1, (-1, 2))).mul_(turns[tokens])
        if normed is not place:
            place.copy_(normed)


def _parts(x: Tensor, most: int) -> Iterator[tuple[slice, slice]]:
    """Parts of the sequences and of their tokens, x [N, L, ...], of so many values at most, if no token has more."""
    single = x[0, 0].numel()
    tokens = min(x.shape[1], max(1, most // single))
    sequences = max(1, most // (tokens * single))
    for n in range(0, len(x), sequences):
        for first in range(0, x.shape[1], tokens):
            yield slice(n, n + sequences), slice(first, first + tokens)


class Folded(NamedTuple):
    """A text of M tokens as two matrices a sample, which take the place of layers and attention."""

    to_scores: Tensor  # [B, C, H * M]: the layer of the queries, then the keys
    shift: Tensor  # [B, 1, H * M]: what its bias adds
    to_tokens: Tensor  # [B, H * M, C]: the values, then the last layer


class HostCrossAttention(plain.CrossAttention):
    """Attention to text; to a short one, prepared for many steps, by matrices smaller than its own layers."""

    def prepare(self, y: Tensor, keep: Tensor | None) -> Any:
        keys, values = pair = self.read(y)  # [B, M, H, D] each
        batch, length, heads, dim = keys.shape
        width = heads * dim
        small = 2 * length <= dim and 2 * batch * width * length * heads <= MOST_FOLDED
        if keep is not None or not small or not self._foldable(y):
            return pair
        keys = keys * dim**-0.5
        by_head = self.q_linear.weight.unflatten(0, (heads, dim))  # [H, D, C]
        return Folded(
            torch.einsum("hdc,bmhd->bchm", by_head, keys).flatten(2),
            torch.einsum("hd,bmhd->bhm", self.q_linear.bias.unflatten(0, (heads, dim)), keys).flatten(1)[:, None],
            torch.einsum("bmhd,chd->bhmc", values, self.proj.weight.unflatten(1, (heads, dim))).flatten(1, 2),
        )

    def _foldable(self, y: Tensor) -> bool:
        layers = self.q_linear, self.proj
        exact = all(isinstance(layer, nn.Linear) and suits(y, layer.weight) for layer in layers)
        return exact and not needs_gradients(y, *self.parameters())

    def forward(self, x: Tensor, y: Any, keep: Tensor | None = None) -> Tensor:
        if not isinstance(y, Folded):
            return super().forward(x, y, keep)
        shift, to_scores, to_tokens = (one.expand(len(x), -1, -1) for one in (y.shift, y.to_scores, y.to_tokens))
        scores = torch.baddbmm(shift, x, to_scores).unflatten(-1, (self.num_heads, -1))  # [B, N, H, M]
        return torch.baddbmm(self.proj.bias, scores.softmax(dim=-1).flatten(2), to_tokens)


OWN = {plain.SelfAttention: HostSelfAttention, plain.CrossAttention: HostCrossAttention}

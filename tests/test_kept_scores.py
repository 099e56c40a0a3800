"""Attention that keeps its scores, which trains faster on a CPU, gives what the fused kernel gives."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from opensora.models.layers import attention as layers

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2e-2}


def drawn(*shape: int, dtype: torch.dtype, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("length", "others", "masked"), [(5, 5, False), (16, 16, False), (80, 32, True), (1, 7, True)])
def test_values_and_gradients_equal(length: int, others: int, masked: bool, dtype: torch.dtype) -> None:
    made = [drawn(3, n, 4, 8, dtype=dtype, seed=seed) for seed, n in enumerate((length, others, others))]
    mask = (torch.arange(others) < torch.tensor([[1], [others // 2], [others]])) if masked else None
    results = []
    for compute in (layers.kept_scores, F.scaled_dot_product_attention):
        q, k, v = (x.clone().transpose(1, 2).requires_grad_() for x in made)
        out = compute(q, k, v, attn_mask=None if mask is None else mask[:, None, None])
        out.sin().sum().backward()
        results.append([out.detach(), q.grad, k.grad, v.grad])
    for kept, fused in zip(*results, strict=True):
        torch.testing.assert_close(kept, fused, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@pytest.mark.parametrize(
    ("length", "grad", "kept"), [(64, True, True), (65, True, False), (64, False, False), (8, False, False)]
)
def test_only_training_on_few_tokens_keeps_them(
    length: int, grad: bool, kept: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Long sequences would take too much memory, and inference gains nothing."""
    used = []
    monkeypatch.setattr(layers, "kept_scores", lambda q, k, v, attn_mask: used.append(1) or v)
    q = torch.randn(1, length, 2, 4)
    with torch.set_grad_enabled(grad):
        layers.attention(q, q, q)
    assert bool(used) == kept

"""Attention as a CPU computes it, against the formulation of all devices."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from opensora.acceleration.kernels import attention as host
from opensora.acceleration.kernels.attention import CpuCrossAttention, FoldedText, cpu_attention_module
from opensora.acceleration.placement import to_device
from opensora.acceleration.quantization import quantize
from opensora.models.layers import attention as plain
from opensora.models.layers.attention import CrossAttention, SelfAttention, rotation_table
from opensora.schedulers.rf import RFLOW
from tests.test_plain import error, inputs, models

LENGTHS = [(5, 5), (8, 3), (16, 16), (3, 16), (17, 17), (80, 9)]


def parts(length: int, keys: int, grad: bool = False) -> list[torch.Tensor]:
    """q, k, v of two samples, not all of them next to one another in memory."""
    q = torch.randn(2, length, 3 * 4 * 8).chunk(3, dim=-1)[1].unflatten(-1, (4, 8))
    k, v = torch.randn(2, keys, 2, 4, 8).unbind(2)
    return [x.detach().requires_grad_(grad) for x in (q, k, v)]


@pytest.mark.parametrize(("length", "keys"), LENGTHS)
def test_attention_of_few_and_of_many_tokens(length, keys):
    given = parts(length, keys)
    assert error(host.attention(*given), plain.attention(*given)) < 1e-6


@pytest.mark.parametrize("together", [1, 1000, 3000, 2**20])
@pytest.mark.parametrize("shape", [(24, 33, 64), (3, 7, 5, 64)], ids=["space", "time"])
def test_queries_and_keys_of_bf16(shape, together, monkeypatch):
    """Rounded once, not after each operation."""
    x, slow = torch.randn(shape).bfloat16(), SelfAttention(64, 4, qk_norm=True).bfloat16()
    for norm in (slow.q_norm, slow.k_norm):
        nn.init.normal_(norm.weight)
    rotation = rotation_table(torch.rand(8), shape[1]) if len(shape) > 3 else None
    exact, fast = copy.deepcopy(slow).float(), cpu_attention_module(copy.deepcopy(slow))
    made = slow.qkv(x)
    for layer in (exact, slow, fast):
        layer.qkv = nn.Identity()
    with torch.no_grad():
        expected, published = exact.heads(made.float(), rotation), slow.heads(made, rotation)
        monkeypatch.setattr(plain.RMSNorm, "forward", lambda *_: pytest.fail("a CPU normalises them together"))
        monkeypatch.setattr(host, "IN_CACHE", together)
        ours = fast.heads(made, rotation)
    for one, theirs, each in zip(ours, published, expected, strict=True):
        assert one.dtype == torch.bfloat16
        assert error(one, each) <= min(error(theirs, each), 0.0018)


@pytest.mark.parametrize("what", ["legacy", "float64"])
@torch.no_grad()
def test_queries_and_keys_that_are_left_to_pytorch(what, monkeypatch):
    dtype = torch.float64 if what == "float64" else torch.float32
    slow = SelfAttention(64, 4, qk_norm=True, qk_norm_legacy=what == "legacy").to(dtype)
    x, way = torch.randn(2, 7, 3, 64, dtype=dtype), [rotation_table(torch.rand(8), 7)]
    fast = cpu_attention_module(copy.deepcopy(slow))
    monkeypatch.setattr(host, "_normalise", lambda *_: pytest.fail("this is not for them"))
    assert error(fast(x, *way), slow(x, *way)) < 1e-6


def test_attention_in_training_is_the_plain_one():
    """Trained modules are not replaced, and frozen ones that get gradients compute as the plain ones."""
    slow, x = SelfAttention(64, 4, qk_norm=True), torch.randn(2, 7, 64, requires_grad=True)
    assert to_device(nn.Sequential(slow), torch.device("cpu"))[0] is slow
    fast, found = cpu_attention_module(slow), []
    assert fast is not slow and fast.qkv is slow.qkv
    for attend in (slow, fast):
        out = attend(x)
        found.append([out.detach(), *torch.autograd.grad(out.sin().sum(), [x, *slow.parameters()])])
    assert all(torch.equal(ours, expected) for expected, ours in zip(*found, strict=True))


@pytest.mark.parametrize("what", ["mask", "float64", "large", "gradients"])
def test_attention_that_is_left_to_pytorch(what, monkeypatch):
    given, keep, called = parts(5, 5, grad=what == "gradients"), None, []
    if what == "mask":
        keep = torch.tensor([[True] * 5, [True, True, False, False, False]])
    elif what == "float64":
        given = [x.double() for x in given]
    elif what == "large":
        monkeypatch.setattr(host, "IN_CACHE", 7)
    expected, attend = plain.attention(*given, keep), plain.attention
    monkeypatch.setattr(plain, "attention", lambda *args: called.append(1) or attend(*args))
    assert torch.equal(host.attention(*given, keep), expected) and called


@pytest.mark.parametrize("shape", [(2, 5, 4, 8), (2, 5, 3, 4, 8)])
def test_rotation_as_a_product_of_complex_numbers(shape):
    x, table, found = torch.randn(shape, requires_grad=True), rotation_table(torch.rand(4), 5), []
    for rotate in (plain.rotate, host.rotate):
        out = rotate(x, table)
        found.append([out.detach(), *torch.autograd.grad(out.square().sum() + out.sum(), x)])
    assert all(error(ours, expected) < 1e-6 for expected, ours in zip(*found, strict=True))
    half = x.detach().bfloat16()
    assert torch.equal(host.rotate(half, table), plain.rotate(half, table))


def crossing(dim: int = 64, heads: int = 2) -> tuple[CrossAttention, CrossAttention]:
    """Attention to text, and the same one as a CPU has it."""
    slow, fast = (CrossAttention(dim, heads).requires_grad_(False) for _ in range(2))
    fast.load_state_dict(slow.state_dict())
    return slow, cpu_attention_module(fast)


def test_a_short_text_takes_the_place_of_layers():
    slow, fast = crossing()
    x, y = torch.randn(2, 30, 64), torch.randn(2, 10, 64)
    read = fast.prepare(y, None)
    assert isinstance(fast, CpuCrossAttention) and isinstance(read, FoldedText)
    assert sum(part.numel() for part in read) < 2**18
    expected = slow(x, y)
    for text in (y, slow.prepare(y, None), read):
        assert error(fast(x, text), expected) < 1e-6
    assert error(fast(x, fast.prepare(y[:1], None)), slow(x, y[:1].expand(2, -1, -1))) < 1e-6  # one for all samples


@pytest.mark.parametrize("what", ["long", "masked", "in training", "float64", "8 bits", "large"])
def test_texts_that_do_not(what, monkeypatch):
    slow, fast = crossing(256)
    keep = torch.ones(2, 10, dtype=torch.bool) if what == "masked" else None
    x, y = torch.randn(2, 30, 256), torch.randn(2, 100 if what == "long" else 10, 256)
    expected = slow(x, y, keep)
    if what == "in training":
        fast.requires_grad_(True)
    elif what == "float64":
        fast, x, y = fast.double(), x.double(), y.double()
    elif what == "8 bits":
        quantize(nn.Sequential(fast))
    elif what == "large":
        monkeypatch.setattr(host, "MAX_FOLDED", 7)
    read = fast.prepare(y, keep)
    assert not isinstance(read, FoldedText)
    assert error(fast(x, read, keep).detach(), expected) < (0.05 if what == "8 bits" else 1e-6)


def test_models_use_it(monkeypatch):
    attend, x = SelfAttention(16, 2, qk_norm=True), torch.randn(2, 5, 3, 16)
    rotation = rotation_table(torch.rand(4), 5)
    nn.init.normal_(attend.k_norm.weight)
    ways = [(x, rotation), (x[:, :, 0], None)]
    expected = [attend(*way).detach() for way in ways]
    attend = cpu_attention_module(attend)
    for name in ("attention", "rotate"):
        monkeypatch.setattr(plain, name, lambda *_: pytest.fail("few tokens of a CPU"))
    monkeypatch.setattr(plain.RMSNorm, "forward", lambda *_: pytest.fail("queries and keys are normalised together"))
    with torch.no_grad():
        for way, each in zip(ways, expected, strict=True):
            assert error(attend(*way), each) < 1e-6


def test_what_is_made_in_inference_mode_leaves_a_model_as_it_was():
    fast, _ = models(pred_sigma=False)
    told = inputs((3, 6, 8), False)
    cond = {name: told[name] for name in ("y", "fps", "height", "width")}
    with torch.inference_mode():
        made = RFLOW(num_sampling_steps=2, cfg_scale=1.0).sample(fast, told["x"], cond, precompute=True)
    assert torch.isfinite(made).all()
    fast.requires_grad_(True)
    fast(**told).square().mean().backward()
    assert all(p.grad is not None for p in fast.temporal_blocks.parameters())

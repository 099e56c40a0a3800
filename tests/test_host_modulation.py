"""Modulation as a CPU computes it in training, against the formulation of all devices."""

from __future__ import annotations

import pytest
import torch

from opensora.acceleration.kernels import modulation as host
from opensora.models.layers import blocks as plain
from tests.test_plain import error, inputs, models


def given(frames: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """Tokens of two clips, not next to one another in memory, and rows for their clips or their frames."""
    x = torch.randn(2, 5, 64, 7, dtype=dtype).transpose(2, 3)
    rows = torch.randn(2, 2, frames, 1, 64, dtype=dtype)
    return [one.detach().requires_grad_() for one in (x, *rows)]


def learned(modulate, parts: list[torch.Tensor]) -> list[torch.Tensor]:
    out = modulate(*parts)
    return [out.detach(), *torch.autograd.grad(out.sin().sum(), parts)]


@pytest.mark.parametrize("together", [64, 200, 64 * 3, 2**18])
@pytest.mark.parametrize("frames", [1, 5])
def test_modulation_and_its_gradients(frames, together, monkeypatch):
    parts = given(frames)
    expected = learned(plain.modulated, [x.detach().double().requires_grad_() for x in parts])
    monkeypatch.setattr(host, "IN_CACHE", together)
    monkeypatch.setattr(plain, "modulated", lambda *_: pytest.fail("in training a CPU has its own"))
    assert all(error(ours, each) < 1e-6 for ours, each in zip(learned(host.modulated, parts), expected, strict=True))


def test_gradients_that_are_one_number():
    parts = given(1)
    found = [torch.autograd.grad(one(*parts).sum(), parts[1:]) for one in (plain.modulated, host.modulated)]
    assert all(error(ours, expected) < 1e-6 for expected, ours in zip(*found, strict=True))


@pytest.mark.parametrize("what", ["float64", "rows of bf16", "no gradients"])
def test_modulation_that_is_left_to_pytorch(what, monkeypatch):
    parts = given(1, torch.float64 if what == "float64" else torch.float32)
    if what == "rows of bf16":
        parts[1:] = [row.detach().bfloat16().requires_grad_() for row in parts[1:]]
    expected = plain.modulated(*parts)
    monkeypatch.setattr(host._Modulated, "apply", lambda *_: pytest.fail("this takes float32 and gradients"))
    with torch.set_grad_enabled(what != "no gradients"):
        assert torch.equal(host.modulated(*parts), expected)


@pytest.mark.parametrize("frames_given", [False, True])
@pytest.mark.parametrize("half", [False, True])
def test_models_use_it(half, frames_given, monkeypatch):
    told, found = inputs((3, 6, 8), frames_given), []
    for model in reversed(models(pred_sigma=False)):  # the plain one first
        model.train().requires_grad_(True)
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            out = model(**told)
        out.float().square().mean().backward()
        found.append({name: one.grad for name, one in model.named_parameters() if one.grad is not None})
        monkeypatch.setattr(plain.Block, "modulate", lambda *_: pytest.fail("in training a CPU has its own"))
    assert len(found[1]) > 40
    for name, of_weight in found[1].items():
        assert error(of_weight, found[0][name]) < (0.1 if half else 1e-5), name

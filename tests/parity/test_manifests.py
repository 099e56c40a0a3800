"""Full-size models, built without memory, have the tensors of the published checkpoints: name, shape, dtype, kind."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from torch import nn

from opensora.registry import build
from opensora.weights import count_parameters, family
from tests.parity.cases import ROOT, Case, discover

# Families that come in later work, by the start of their registry name.
LATER_FAMILIES = ("DiT-", "Latte-", "PixArt-", "PixArtMS-", "STDiT-", "STDiT2-")

INDEX: dict[str, dict[str, Any]] = json.loads((ROOT / "manifests" / "index.json").read_text())
MANIFESTS = [case for case in discover("manifests") if case.path.name != "index.json"]


def is_later(manifest: Case) -> bool:
    """True for a family of later work, and for layouts of other authors' classes, which have no registry name."""
    return INDEX[manifest.path.stem].get("registry_name", LATER_FAMILIES[0]).startswith(LATER_FAMILIES)


def model_of(manifest: Case) -> nn.Module:
    """The model that a manifest describes, on the default device."""
    if is_later(manifest):
        pytest.skip("later work")
    entry = INDEX[manifest.path.stem]
    return build(dict(type=entry["registry_name"], **entry["kwargs"]))


def test_there_are_manifests() -> None:
    assert MANIFESTS


@pytest.mark.parametrize("manifest", MANIFESTS, ids=str)
def test_state_dict(manifest: Case) -> None:
    with torch.device("meta"):
        model = model_of(manifest)
    entry = INDEX[manifest.path.stem]
    parameters = dict(model.named_parameters(remove_duplicate=False))
    found = {
        name: {
            "shape": list(tensor.shape),
            "dtype": str(tensor.dtype).removeprefix("torch."),
            "kind": "param" if name in parameters else "buffer",
        }
        for name, tensor in model.state_dict().items()
    }
    wanted = manifest.facts
    assert sorted(found) == sorted(wanted)
    assert found == wanted
    assert len(found) == entry["num_tensors"]
    assert sum(math.prod(found[name]["shape"]) for name in parameters) == entry["num_param_elements"]
    assert sorted(name for name, tensor in parameters.items() if not tensor.requires_grad) == entry["frozen_params"]
    assert not set(entry["non_persistent_buffers_not_in_checkpoint"]) & set(found)


CURRENT = [case for case in MANIFESTS if not is_later(case)]
WITH_VALUES = [case for case in MANIFESTS if "buffer_values" in INDEX[case.path.stem]]


@pytest.mark.parametrize("manifest", WITH_VALUES, ids=str)
def test_buffer_values(manifest: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    for initialiser in ("kaiming_uniform_", "uniform_"):  # memory that nothing writes to is not spent
        monkeypatch.setattr(nn.init, initialiser, lambda tensor, *_, **__: tensor)
    buffers = dict(model_of(manifest).named_buffers())
    for name, values in INDEX[manifest.path.stem]["buffer_values"].items():
        torch.testing.assert_close(buffers[name].flatten(), torch.tensor(values))


@pytest.mark.parametrize("manifest", CURRENT, ids=str)
def test_files_are_summed_up_as_recorded(manifest: Case) -> None:
    tensors = {name: torch.empty(entry["shape"], device="meta") for name, entry in manifest.facts.items()}
    assert count_parameters(tensors) == INDEX[manifest.path.stem]["num_param_elements"]
    assert family(tensors) != "unknown"

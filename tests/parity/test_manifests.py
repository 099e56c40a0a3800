"""Full-size models, built without memory, have the tensors of the published checkpoints: name, shape, dtype, kind."""

from __future__ import annotations

import json
import math
import re
from typing import Any

import pytest
import torch
from torch import nn

from opensora.checkpoints.fit import fit
from opensora.checkpoints.inspection import family
from opensora.checkpoints.summary import count_parameters
from opensora.registry import build
from tests.parity.cases import ROOT, Case, discover

# What `inspect` calls a registered type, without the size after its name.
TITLES = {
    "DiT": "DiT or Latte", "Latte": "DiT or Latte", "PixArt": "PixArt (", "PixArtMS": "PixArt with sizes",
    "PixArt-Sigma": "PixArt (", "STDiT": "STDiT (", "STDiT2": "STDiT2 (", "STDiT3": "STDiT3 (",
    "OpenSoraVAE_V1_2": "video autoencoder", "VAE_Temporal_SD": "temporal autoencoder",
    "VideoAutoencoderKL": "per-frame autoencoder",
}  # fmt: skip

HEAD = 72  # channels of an attention head in every published image model
INDEX: dict[str, dict[str, Any]] = json.loads((ROOT / "manifests" / "index.json").read_text())
ALL = [case for case in discover("manifests") if case.path.name != "index.json"]
MANIFESTS = [case for case in ALL if "registry_name" in INDEX[case.path.stem]]
ORIGINALS = [case for case in ALL if case not in MANIFESTS]


def model_of(stem: str) -> nn.Module:
    """The model that a manifest describes, on the default device."""
    entry = INDEX[stem]
    return build(dict(type=entry["registry_name"], **entry["kwargs"]))


def registered(manifest: Case) -> dict[str, Any]:
    """The section of the registered model that takes the files of a manifest, as its facts tell."""
    entry = INDEX[manifest.path.stem]
    if "registry_name" in entry:
        return {"type": entry["registry_name"], **entry["kwargs"]}
    given, own = entry["kwargs"], manifest.facts
    frames = given.get("num_frames", 1)
    size = {"input_size": (frames, given["input_size"], given["input_size"])}
    widths = own["x_embedder.proj.weight"]["shape"]
    size |= {"hidden_size": widths[0], "depth": 1 + max(int(n.split(".")[1]) for n in own if n.startswith("blocks."))}
    size |= {"num_heads": widths[0] // HEAD, "patch_size": (1, *widths[2:])}
    if "num_classes" in given:
        kind = next(kind for kind in ("Latte", "DiT") if kind in entry["source"])
        return {"type": kind, **size, "condition": f"label_{given['num_classes']}"}
    kind = "PixArtMS" if any(name.startswith("csize_embedder.") for name in own) else "PixArt"
    length, channels = own["y_embedder.y_embedding"]["shape"]
    return {"type": kind, **size, "caption_channels": channels, "model_max_length": length}


def tensors_of(manifest: Case) -> dict[str, torch.Tensor]:
    """A file with the names, shapes and types of a manifest, without memory."""
    types = {name: getattr(torch, entry["dtype"]) for name, entry in manifest.facts.items()}
    return {n: torch.empty(entry["shape"], dtype=types[n], device="meta") for n, entry in manifest.facts.items()}


def test_there_are_manifests() -> None:
    assert MANIFESTS
    assert all("original" in INDEX[case.path.stem]["source"] for case in ORIGINALS)


@pytest.mark.parametrize("manifest", MANIFESTS, ids=str)
def test_state_dict(manifest: Case) -> None:
    with torch.device("meta"):
        model = model_of(manifest.path.stem)
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


WITH_VALUES = [case for case in MANIFESTS if "buffer_values" in INDEX[case.path.stem]]


@pytest.mark.parametrize("manifest", WITH_VALUES, ids=str)
def test_buffer_values(manifest: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    for initialiser in ("kaiming_uniform_", "uniform_"):  # memory that nothing writes to is not spent
        monkeypatch.setattr(nn.init, initialiser, lambda tensor, *_, **__: tensor)
    buffers = dict(model_of(manifest.path.stem).named_buffers())
    for name, values in INDEX[manifest.path.stem]["buffer_values"].items():
        torch.testing.assert_close(buffers[name].flatten(), torch.tensor(values))


@pytest.mark.parametrize("manifest", MANIFESTS, ids=str)
def test_files_are_summed_up_as_recorded(manifest: Case) -> None:
    assert count_parameters(tensors_of(manifest)) == INDEX[manifest.path.stem]["num_param_elements"]


@pytest.mark.parametrize("manifest", ALL, ids=str)
def test_inspect_knows_the_family(manifest: Case) -> None:
    kind = re.sub(r"-(XL|3B|1B|[SBL])/.*", "", registered(manifest)["type"])
    title = (
        "Latte" if "temp_embed" in manifest.facts else TITLES[kind]
    )  # of its own authors, whom a position gives away
    assert family(tensors_of(manifest)).startswith(title)


@pytest.mark.parametrize("manifest", ORIGINALS, ids=str)
def test_files_of_other_authors_fill_the_registered_model(manifest: Case) -> None:
    with torch.device("meta"):
        model = build(registered(manifest))
    file, own = tensors_of(manifest), model.state_dict()
    tensors, changes = fit(model, file, manifest.path)
    assert {name: tensor.shape for name, tensor in tensors.items()} == {name: own[name].shape for name in own}
    assert set(changes["dropped"]) == {"pos_embed", "temp_embed"} & file.keys()
    assert changes["resized"] == ("x_embedder.proj.weight",)
    assert not any(changes[what] for what in ("renamed", "initial", "ignored"))
    assert all(not tensors[name].is_meta for name in model.positions())


@pytest.mark.parametrize("manifest", MANIFESTS, ids=str)
def test_files_of_our_layout_need_no_change(manifest: Case) -> None:
    with torch.device("meta"):
        model = model_of(manifest.path.stem)
    tensors, changes = fit(model, tensors_of(manifest), manifest.path)
    assert tensors.keys() == model.state_dict().keys()
    assert set(changes.pop("dropped")) == set(getattr(model, "positions", dict)())
    assert not any(changes.values())

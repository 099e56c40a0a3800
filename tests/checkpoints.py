"""Tiny checkpoints of every part of the 1.2 system, alone and as a hub cache, and what runs programs on them."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.tiny import make_tiny_stdit3, make_tiny_t5, make_tiny_vae

SCRIPT = Path(__file__).parents[1] / "scripts" / "inference.py"
SAMPLE = "configs/opensora-v1-2/inference/sample.py"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
REPOSITORIES = {
    "model": "hpcai-tech/OpenSora-STDiT-v3",
    "vae": "hpcai-tech/OpenSora-VAE-v1.2",
    "text_encoder": "DeepFloyd/t5-v1_1-xxl",
}
# What the published config.json files state beyond the shape of the model.
PUBLISHED: dict[str, dict[str, Any]] = {
    "model": dict(
        architectures=["STDiT3"], transformers_version="4.41.2", torch_dtype="float32", drop_path=0.0,
        enable_flash_attn=False, enable_layernorm_kernel=False, enable_sequence_parallelism=False,
        freeze_y_embedder=True, only_train_temporal=False,
    ),
    "vae": dict(
        architectures=["VideoAutoencoderPipeline"], transformers_version="4.36.2", torch_dtype="float32",
        cal_loss=False, freeze_vae_2d=False,
        vae_2d=dict(from_pretrained="org/other", subfolder="vae", local_files_only=False, micro_batch_size=4),
        vae_temporal=dict(from_pretrained=None),
    ),
}  # fmt: skip


def make_hub_cache(folder: Path) -> Path:
    """The three repositories that configs/opensora-v1-2/inference/sample.py names, as the hub client caches them."""
    makers = {"model": make_tiny_stdit3, "vae": make_tiny_vae, "text_encoder": make_tiny_t5}
    for part, make in makers.items():
        config = make(snapshot(folder, part)) / "config.json"
        config.write_text(json.dumps(_merged(json.loads(config.read_text()), PUBLISHED.get(part, {}))))
        refs = folder / f"models--{REPOSITORIES[part].replace('/', '--')}" / "refs"
        refs.mkdir()
        (refs / "main").write_text(COMMIT)
    return folder


def snapshot(cache: Path, part: str) -> Path:
    """Where a part ("model", "vae", "text_encoder") lies in a cache made by `make_hub_cache`."""
    return cache / f"models--{REPOSITORIES[part].replace('/', '--')}" / "snapshots" / COMMIT


def _merged(config: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    nested = {key: _merged(config[key], value) for key, value in more.items() if isinstance(value, dict)}
    return {**config, **more, **nested}


def use_cache(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes `folder` the hub cache of this process, and the hub itself unreachable."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(folder))
    monkeypatch.setattr("opensora.checkpoints.hub._unreachable", lambda repo: "cannot be reached (test)")


def run_script(*argv: object) -> int:
    """The exit code of scripts/inference.py with these arguments, run within this process."""
    before, sys.argv = sys.argv, [str(SCRIPT), *map(str, argv)]
    try:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    except SystemExit as end:
        return end.code
    finally:
        sys.argv = before
    raise AssertionError("scripts/inference.py did not exit")


def tree(folder: Path) -> dict[str, bytes | None]:
    """Every file below a folder with its bytes, every folder with None."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }

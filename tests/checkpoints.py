"""Tiny checkpoints of every part of the 1.2 system, alone and as a hub cache, and what runs programs on them."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import torch
from torch import nn

from opensora.models.stdit.stdit3 import STDiT3
from opensora.models.vae.vae import OpenSoraVAE_V1_2
from opensora.weights import save_pretrained
from tests.tiny import make_tiny_t5

SCRIPT = Path(__file__).parents[1] / "scripts" / "inference.py"
SAMPLE = "configs/opensora-v1-2/inference/sample.py"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
REPOSITORIES = {
    "model": "hpcai-tech/OpenSora-STDiT-v3",
    "vae": "hpcai-tech/OpenSora-VAE-v1.2",
    "text_encoder": "DeepFloyd/t5-v1_1-xxl",
}


def make_tiny_stdit3(folder: Path, seed: int = 0, **changes: object) -> Path:
    """An STDiT3 of depth 1 with random weights and the keys of the published config.json."""
    keywords = dict(hidden_size=32, depth=1, num_heads=2, caption_channels=32, model_max_length=300, **changes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = STDiT3(**keywords)
        _randomise(model)
    config = dict(architectures=["STDiT3"], model_type="STDiT3", transformers_version="4.41.2", torch_dtype="float32")
    config |= dict(enable_flash_attn=False, freeze_y_embedder=False, only_train_temporal=False)
    save_pretrained(model.state_dict(), folder, {**model.config, **config})
    return folder


def make_tiny_vae(folder: Path, seed: int = 0) -> Path:
    """A 1.2 autoencoder (8 x 8 pixels, 4 frames) with random weights, nested as in the published config.json."""
    spatial = dict(type="VideoAutoencoderKL", from_pretrained="org/other", subfolder="vae", local_files_only=False)
    spatial |= dict(block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4)
    temporal = dict(type="VAE_Temporal_SD", from_pretrained=None, filters=8, num_res_blocks=1, num_groups=4)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = OpenSoraVAE_V1_2(vae_2d=spatial, vae_temporal=temporal)
    config = dict(model_type="VideoAutoencoderPipeline", architectures=["VideoAutoencoderPipeline"], cal_loss=False)
    config |= dict(freeze_vae_2d=False, micro_frame_size=17, shift=model.config["shift"], scale=model.config["scale"])
    save_pretrained(model.state_dict(), folder, {**config, "vae_2d": spatial, "vae_temporal": temporal})
    return folder


def make_hub_cache(folder: Path) -> Path:
    """The three repositories that configs/opensora-v1-2/inference/sample.py names, as the hub client caches them."""
    makers = {"model": make_tiny_stdit3, "vae": make_tiny_vae, "text_encoder": make_tiny_t5}
    for part, make in makers.items():
        make(snapshot(folder, part))
        refs = folder / f"models--{REPOSITORIES[part].replace('/', '--')}" / "refs"
        refs.mkdir()
        (refs / "main").write_text(COMMIT)
    return folder


def snapshot(cache: Path, part: str) -> Path:
    """Where a part ("model", "vae", "text_encoder") lies in a cache made by `make_hub_cache`."""
    return cache / f"models--{REPOSITORIES[part].replace('/', '--')}" / "snapshots" / COMMIT


def _randomise(model: nn.Module) -> None:
    """Gives zero-initialised tensors values, so that text and every block have an effect."""
    for parameter in model.parameters():
        if parameter.requires_grad and not parameter.any():
            nn.init.normal_(parameter, std=0.05)


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

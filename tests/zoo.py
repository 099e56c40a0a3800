"""Tiny stand-ins for every published checkpoint in its format, and the flags that make a configuration use them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from opensora import registry
from opensora.checkpoints.save import save_file, save_pretrained
from opensora.models.vae.vae import VideoAutoencoderKL
from tests.checkpoints import COMMIT
from tests.test_encoders import SHAPES
from tests.tiny import make_tiny_stdit3, make_tiny_t5, make_tiny_vae
from tests.tiny_clip import make_clip_folder, seeded

SMALL: dict[str, Any] = dict(hidden_size=48, depth=2, num_heads=2)
TEXT: dict[str, Any] = dict(caption_channels=32, model_max_length=120)
PUBLISHED_SIZE = (1, 8, 8)  # latents of the stand-ins' own training; requests have others


def make_vae(folder: Path) -> Path:
    """A per-frame autoencoder as stabilityai/sd-vae-ft-ema lays it out: in the names of diffusers."""
    shape = SHAPES[VideoAutoencoderKL]
    state = seeded(0, lambda: VideoAutoencoderKL(**shape)).state_dict()
    folder.mkdir(parents=True, exist_ok=True)
    save_file(
        {name.removeprefix("module."): tensor for name, tensor in state.items()},
        folder / "diffusion_pytorch_model.safetensors",
    )
    config = {"_class_name": "AutoencoderKL", **shape, "sample_size": 1024, "scaling_factor": 0.13025}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def random_model(kind: str, **settings: Any) -> nn.Module:
    """A small model of a registered type with random weights, none of them zero."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = registry.build({"type": kind, **SMALL, **settings})
        for parameter in model.parameters():
            if not parameter.any():
                nn.init.normal_(parameter, std=0.02)
    return model


def original(model: nn.Module, *dropped: str) -> dict[str, Tensor]:
    """The state dict as the image models' authors save it: a 2-D patch kernel, and their own position buffers."""
    state = {name: tensor for name, tensor in model.state_dict().items() if name not in dropped}
    state["x_embedder.proj.weight"] = state["x_embedder.proj.weight"].squeeze(2)
    return state


def dit(file: Path, condition: str) -> Path:
    """DiT-XL-2-256x256.pt: flat, with `pos_embed`."""
    model = random_model("DiT", input_size=PUBLISHED_SIZE, condition=condition, caption_channels=16)
    state = original(model, "pos_embed_spatial", "pos_embed_temporal")
    torch.save({**state, "pos_embed": model.pos_embed_spatial}, file)
    return file


def latte(file: Path, condition: str) -> Path:
    """ucf101.pt: under `ema`, with `pos_embed` and `temp_embed`."""
    model = random_model("Latte", input_size=(16, 8, 8), condition=condition, caption_channels=16)
    positions = {"pos_embed": model.pos_embed_spatial, "temp_embed": model.pos_embed_temporal}
    state = original(model, "pos_embed_spatial", "pos_embed_temporal")
    torch.save({"ema": {**state, **positions}, "opt": {}}, file)
    return file


def pixart(file: Path, kind: str = "PixArt", text_length: int = 120, **settings: Any) -> Path:
    """PixArt-XL-2-512x512.pth and its relatives: under `state_dict`, with `pos_embed`."""
    text = {**TEXT, "model_max_length": text_length}
    model = random_model(kind, input_size=PUBLISHED_SIZE, **text, **settings)
    torch.save({"state_dict": original(model, "pos_embed_temporal"), "epoch": 1}, file)
    return file


def stdit(file: Path) -> Path:
    """OpenSora-v1-HQ-16x256x256.pth: flat, both position buffers."""
    torch.save(random_model("STDiT", input_size=(16, 8, 8), **TEXT).state_dict(), file)
    return file


def stdit2(folder: Path) -> Path:
    """OpenSora-STDiT-v2-stage3: config.json and safetensors."""
    text = {**TEXT, "model_max_length": 200}
    model = random_model("STDiT2", input_sq_size=512, qk_norm=True, qk_norm_legacy=True, **text)
    save_pretrained(model.state_dict(), folder, {"model_type": "STDiT2", **model.config})
    return folder


def stdit3(folder: Path) -> Path:
    """OpenSora-STDiT-v3: config.json and safetensors."""
    return make_tiny_stdit3(folder, **SMALL)


def stdit_training(folder: Path) -> Path:
    """A checkpoint folder of 1.0's training: `model/` in shards with an index, and ema.pt; no config.json."""
    state = random_model("STDiT", input_size=(16, 8, 8), **TEXT).state_dict()
    (folder / "model").mkdir(parents=True)
    torch.save(state, folder / "ema.pt")
    names, index = sorted(state), {}
    for number, shard in enumerate((names[::2], names[1::2]), 1):
        file = f"pytorch_model-{number:05d}.bin"
        torch.save({name: state[name] for name in shard}, folder / "model" / file)
        index |= dict.fromkeys(shard, file)
    text = json.dumps({"metadata": {"total_size": 0}, "weight_map": index})
    (folder / "model" / "pytorch_model.bin.index.json").write_text(text)
    return folder


Make = Callable[[Path], Path]
# What its documents call a model -> its configuration, its weights, and the size flags that they need.
MODELS: dict[str, tuple[str, Make]] = {
    "DiT text": ("configs/dit/inference/16x256x256.py", lambda p: dit(p / "dit.pt", "text")),
    "DiT class": ("configs/dit/inference/1x256x256-class.py", lambda p: dit(p / "DiT-XL-2-256x256.pt", "label_1000")),
    "Latte text": ("configs/latte/inference/16x256x256.py", lambda p: latte(p / "latte.pt", "text")),
    "Latte class": ("configs/latte/inference/16x256x256-class.py", lambda p: latte(p / "ucf101.pt", "label_101")),
    "PixArt": ("configs/pixart/inference/1x512x512.py", lambda p: pixart(p / "PixArt-XL-2-512x512.pth")),
    "PixArtMS": ("configs/pixart/inference/1x1024MS.py", lambda p: pixart(p / "PixArt-XL-2-1024-MS.pth", "PixArtMS")),
    "PixArt-Sigma": (
        "configs/pixart/inference/1x2048MS.py",
        lambda p: pixart(p / "PixArt-Sigma-XL-2-2K-MS.pth", text_length=300),
    ),
    "STDiT": ("configs/opensora/inference/16x256x256.py", lambda p: stdit(p / "OpenSora-v1-HQ-16x256x256.pth")),
    "STDiT2": ("configs/opensora-v1-1/inference/sample.py", lambda p: stdit2(p / "OpenSora-STDiT-v2-stage3")),
    "STDiT3": ("configs/opensora-v1-2/inference/sample.py", lambda p: stdit3(p / "OpenSora-STDiT-v3")),
}


def make_parts(folder: Path) -> dict[str, Path]:
    """An autoencoder of each kind and a text encoder of each kind, by the name of their registered type."""
    parts = {name: folder / name for name in ("VideoAutoencoderKL", "OpenSoraVAE_V1_2", "t5", "clip")}
    make_vae(parts["VideoAutoencoderKL"])
    make_tiny_vae(parts["OpenSoraVAE_V1_2"])
    make_tiny_t5(parts["t5"])
    make_clip_folder(parts["clip"])
    return parts


def flags(weights: Path, parts: dict[str, Path], vae: str, text_encoder: str) -> list[str]:
    """What points a configuration of full size at tiny weights."""
    options = [f"model.{name}={value}" for name, value in SMALL.items()]
    options += [f"vae.from_pretrained={parts[vae]}", "vae.subfolder=None"]
    if text_encoder in parts:
        options.append(f"text_encoder.from_pretrained={parts[text_encoder]}")
    return ["--ckpt-path", str(weights), "--cfg-options", *options]


# Repository -> what makes the part of it that is read, and where in it that part lies.
HUB: dict[str, tuple[Make, str]] = {
    "hpcai-tech/OpenSora-STDiT-v3": (stdit3, ""),
    "hpcai-tech/OpenSora-STDiT-v2-stage3": (stdit2, ""),
    "hpcai-tech/OpenSora-VAE-v1.2": (make_tiny_vae, ""),
    "stabilityai/sd-vae-ft-ema": (make_vae, ""),
    "PixArt-alpha/pixart_sigma_sdxlvae_T5_diffusers": (make_vae, "vae"),
    "DeepFloyd/t5-v1_1-xxl": (make_tiny_t5, ""),
    "openai/clip-vit-base-patch32": (make_clip_folder, ""),
}


def fill_hub_cache(folder: Path) -> Path:
    """A hub cache with a stand-in for every repository that a configuration of inference names."""
    for name, (make, subfolder) in HUB.items():
        repository = folder / f"models--{name.replace('/', '--')}"
        made = repository / "snapshots" / COMMIT / subfolder
        made.mkdir(parents=True)
        make(made)
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text(COMMIT)
    return folder

"""A tiny random CLIP in its published layout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

POSITIONS = 20
# What the published file states of the text encoder, token ids of an earlier vocabulary among it.
STATED = dict(
    _name_or_path="", add_cross_attention=False, architectures=None, attention_dropout=0.0, bad_words_ids=None,
    bos_token_id=0, eos_token_id=2, pad_token_id=1, dropout=0.0, hidden_act="quick_gelu", initializer_factor=1.0,
    initializer_range=0.02, layer_norm_eps=1e-05, model_type="clip_text_model", num_beams=1, output_attentions=False,
    return_dict=True, temperature=1.0, top_k=50, torch_dtype=None, torchscript=False, use_bfloat16=False,
    transformers_version="4.16.0.dev0", hidden_size=16, intermediate_size=32, num_hidden_layers=2,
    num_attention_heads=2, max_position_embeddings=POSITIONS, projection_dim=12,
)  # fmt: skip
VISION = dict(
    hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4
)


def seeded(seed: int, make: Any) -> Any:
    """What `make` returns under a seed, the global generator left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make()


def make_clip_folder(folder: Path, **text_settings: Any) -> tuple[Path, nn.Module]:
    """A full CLIP checkpoint with its tokenizer, laid out as openai/clip-vit-base-patch32, and transformers' model."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import CLIPConfig, CLIPModel

    folder.mkdir(exist_ok=True)
    letters = sorted(ByteLevel.alphabet())
    merges = ("r e", "re d</w>", "c a", "ca r</w>")
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), *(pair.replace(" ", "") for pair in merges)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({token: number for number, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("\n".join(("#version: 0.2", *merges, "")))
    config = {
        "model_type": "clip", "architectures": ["CLIPModel"], "projection_dim": 12, "logit_scale_init_value": 2.6592,
        "text_config_dict": None, "text_config": {**STATED, "vocab_size": len(tokens), **text_settings},
        "vision_config_dict": None, "vision_config": VISION,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    model = seeded(0, lambda: CLIPModel(CLIPConfig.from_dict(config))).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():  # transformers starts with vectors too small to tell apart
        parameter.add_(seeded(len(name), lambda p=parameter: torch.randn_like(p)), alpha=0.3)
    state = {**model.state_dict(), "text_model.embeddings.position_ids": torch.arange(POSITIONS)[None]}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return folder, model

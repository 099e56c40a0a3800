"""Tiny checkpoints in the published layouts, made on the spot: small enough for any test, no file to keep."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

TINY_SENTENCES = (
    "a red circle moving left on a black background",
    "a beautiful sunset over the city, 4k",
    "the quick brown fox jumps over the lazy dog, and then it sleeps; why not?",
    "waves of the sea roll slowly towards the beach at dawn.",
    "0123456789 abcdefghijklmnopqrstuvwxyz !\"#$%&'()*+-/:<=>@[]^_`{|}~",
)

TINY_STDIT3: dict[str, Any] = dict(
    hidden_size=32, depth=2, num_heads=2, in_channels=4, caption_channels=32, model_max_length=300, qk_norm=True
)
TINY_VAE: dict[str, Any] = dict(
    micro_frame_size=17,
    micro_batch_size=4,
    vae_2d=dict(
        type="VideoAutoencoderKL",
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
    ),
    vae_temporal=dict(
        type="VAE_Temporal",
        filters=8,
        num_res_blocks=1,
        channel_multipliers=(1, 1, 1),
        temporal_downsample=(True, True),
        num_groups=4,
    ),
    shift=(-0.10, 0.34, 0.27, 0.98),
    scale=(3.85, 2.32, 2.33, 3.06),
)


def make_tiny_t5(folder: Path, hidden: int = 32, seed: int = 0) -> Path:
    """A T5 encoder of 2 layers with random weights and its tokenizer, as DeepFloyd/t5-v1_1-xxl lays them out."""
    from safetensors.torch import save_file

    from opensora.models.text_encoder.t5 import T5Config, T5EncoderModel

    folder.mkdir(parents=True, exist_ok=True)
    config = T5Config(
        vocab_size=_make_tokenizer(folder),
        d_model=hidden,
        d_kv=hidden // 2,
        d_ff=2 * hidden,
        num_layers=2,
        num_heads=2,
        relative_attention_num_buckets=32,
        relative_attention_max_distance=128,
        layer_norm_epsilon=1e-6,
        feed_forward_proj="gated-gelu",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = T5EncoderModel(config)
        for parameter in model.parameters():
            if parameter.ndim > 1:  # the rest scales norms
                nn.init.normal_(parameter, std=hidden**-0.5)
    state = {name: tensor for name, tensor in model.state_dict().items() if name != "encoder.embed_tokens.weight"}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    stated = {"architectures": ["T5EncoderModel"], "model_type": "t5", **config._asdict()}
    (folder / "config.json").write_text(json.dumps(stated))
    return folder


def make_tiny_stdit3(folder: Path, seed: int = 0, **settings: Any) -> Path:
    """An STDiT3 of 2 + 2 blocks that fits `make_tiny_t5` and `make_tiny_vae`, as OpenSora-STDiT-v3 is laid out."""
    from opensora.models.stdit.stdit3 import STDiT3

    return _save_random(STDiT3, {**TINY_STDIT3, **settings}, folder, "STDiT3", seed)


def make_tiny_vae(folder: Path, seed: int = 0, **settings: Any) -> Path:
    """A video autoencoder with 17 frames in 5 latents of 4 channels, as OpenSora-VAE-v1.2 is laid out."""
    from opensora.models.vae.vae import VideoAutoencoderPipeline

    name = "VideoAutoencoderPipeline"
    return _save_random(VideoAutoencoderPipeline, {**TINY_VAE, **settings}, folder, name, seed)


def _save_random(builder: type[nn.Module], settings: dict[str, Any], folder: Path, model_type: str, seed: int) -> Path:
    """Saves a model with random weights; those that start at zero become small, so that every part has an effect."""
    from opensora.checkpoints.save import save_pretrained

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = builder(**settings)
        for parameter in model.parameters():
            if not parameter.any():
                nn.init.normal_(parameter, std=0.02)
    save_pretrained(model.state_dict(), folder, {"model_type": model_type, **model.config})
    return folder


def _make_tokenizer(folder: Path) -> int:
    """spiece.model and tokenizer_config.json of a unigram tokenizer with T5's special ids; its number of pieces."""
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TINY_SENTENCES * 4),
        model_writer=model,
        model_type="unigram",
        vocab_size=160,
        hard_vocab_limit=False,
        character_coverage=1.0,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    (folder / "spiece.model").write_bytes(model.getvalue())
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "T5Tokenizer", "extra_ids": 0}))
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue()).get_piece_size()

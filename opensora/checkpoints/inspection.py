"""Inspects a checkpoint: contents, model family, and anything that would keep it from loading."""

from __future__ import annotations

import os
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from opensora.checkpoints.finite import not_finite
from opensora.checkpoints.formatting import join_first
from opensora.checkpoints.hub import locate, read_config_json
from opensora.checkpoints.lora import describe_adapter, is_adapter
from opensora.checkpoints.prefixes import adapter_names, common_prefix
from opensora.checkpoints.read import read_state_dict
from opensora.checkpoints.summary import Summary, summarize
from opensora.errors import WeightsError

# Family -> texts that must each occur in some tensor name; the first matching family counts.
FAMILIES = {
    "STDiT3 (Open-Sora 1.2)": ("spatial_blocks.", "temporal_blocks.", "fps_embedder."),
    "STDiT2 (Open-Sora 1.1)": (".attn_temp.", "t_block_temp.", "fl_embedder."),
    "STDiT (Open-Sora 1.0)": (".attn_temp.", "t_block.", "y_embedder."),
    "PixArt with sizes (PixArt-alpha 1024-MS)": ("csize_embedder.", "ar_embedder.", "t_block.", ".cross_attn."),
    "PixArt-Sigma with key and value compression": ("t_block.", ".cross_attn.", ".attn.sr."),
    "PixArt (alpha or Sigma)": ("t_block.", ".cross_attn.", "y_embedder."),
    "Latte": ("temp_embed", ".adaLN_modulation.", "y_embedder."),
    "DiT or Latte (the same names)": (".adaLN_modulation.", "y_embedder."),
    "video autoencoder (Open-Sora 1.2: per-frame and temporal)": ("spatial_vae.module.", "temporal_vae."),
    "temporal autoencoder (VAE_Temporal_SD)": ("encoder.block_res_blocks.", "decoder.block_res_blocks."),
    "video autoencoder (AutoencoderKLTemporalDecoder)": ("encoder.down_blocks.", "decoder.time_conv_out."),
    "per-frame autoencoder (AutoencoderKL)": ("encoder.down_blocks.", "decoder.up_blocks.", "quant_conv."),
    "T5 text encoder (llama.cpp's names)": ("enc.blk.0.attn_q.weight",),
    "T5 text encoder": ("encoder.block.0.layer.0.SelfAttention.",),
    "CLIP text encoder": ("embeddings.token_embedding.", "encoder.layers.0.self_attn.", "final_layer_norm."),
}


@dataclass(frozen=True)
class CheckpointInfo:
    """What a checkpoint is; `str` gives the lines that `opensora inspect` prints."""

    summary: Summary
    model_type: str | None  # stated by config.json
    family: str  # inferred from tensor names, or "unknown"
    prefix: str  # common prefix of all names, or ""
    not_finite: tuple[str, ...]  # tensors with NaN or infinity
    adapter: str = ""  # lines about a LoRA file

    def __str__(self) -> str:
        lines = [str(self.summary)]
        if self.model_type:
            lines.append(f"config.json: {self.model_type}")
        lines.append(f"family: {self.family}")
        if self.adapter:
            lines.append(self.adapter)
        if self.prefix:
            lines.append(f"all names begin with: {join_first([self.prefix])}")
        if self.not_finite:
            lines.append(f"not finite: {join_first(self.not_finite)}")
        return "\n".join(lines)


def inspect(source: str | os.PathLike[str], offline: bool = False) -> CheckpointInfo:
    """Reads a checkpoint (file, folder, hub id or published file name) and describes it. Raises WeightsError."""
    path = locate(source, offline=offline)
    tensors, config = read_state_dict(path), read_config_json(path)
    stated = [str(config[key]) for key in ("type", "model_type", "_class_name") if config.get(key)]
    return CheckpointInfo(
        summary=summarize(path, tensors),
        model_type=stated[0] if stated else None,
        family=family(tensors),
        prefix=common_prefix(tensors),
        not_finite=tuple(not_finite(tensors)),
        adapter=_adapter(path) if is_adapter(path, tensors) else "",
    )


def _adapter(path: Path) -> str:
    """Lines about an adapter, or why it cannot be used."""
    try:
        return describe_adapter(path)
    except WeightsError as error:
        return f"not usable: {error}"


def family(names: Collection[str]) -> str:
    """The model family with these tensor names, or "unknown"."""
    if adapter_names(names):
        return "adapter (LoRA or similar), not a model"
    fits = (title for title, parts in FAMILIES.items() if all(any(part in name for name in names) for part in parts))
    return next(fits, "unknown")

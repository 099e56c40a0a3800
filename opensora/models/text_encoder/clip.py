"""CLIP (Radford et al. 2021, arXiv:2103.00020) as a text encoder: prompts in, one pooled feature out."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from opensora.models.text_encoder.tokens import Tokenizer

# What a checkpoint holds beside the text encoder: patterns of names to leave out when loading.
CLIP_DROPPED = ("vision_model.*", "visual_projection.*", "text_projection.*", "logit_scale", "*embeddings.position_ids")
# Patterns of names in files that hold the text encoder alone, and what takes their place when loading.
CLIP_RENAMED = tuple((f"{part}.*", f"text_model.{part}.*") for part in ("embeddings", "encoder", "final_layer_norm"))


class CLIPText(nn.Module):
    """CLIP's text encoder of a transformers configuration, under the names of a full checkpoint: `text_model.*`."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        from transformers import CLIPTextModel

        model = CLIPTextModel(config)
        self.text_model = getattr(model, "text_model", model)  # transformers 4 and 5 differ

    def forward(self, ids: Tensor) -> Tensor:
        """Features [B, C] at the end token of ids [B, L]; tokens after it have no effect."""
        return self.text_model(input_ids=ids).pooler_output


class CLIPEncoder:
    """A CLIP text encoder and its tokenizer; `output_dim` is the size of a prompt's feature."""

    def __init__(self, model: CLIPText, tokenizer: Tokenizer, model_max_length: int = 77) -> None:
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        config = model.text_model.config
        self.model_max_length = min(model_max_length, config.max_position_embeddings)
        self.output_dim: int = config.hidden_size

    @torch.no_grad()
    def encode(self, texts: list[str]) -> tuple[Tensor, None]:
        """Pooled features [B, 1, 1, C] float32 of B prompts, and no mask.

        A prompt of more than `model_max_length` tokens, 77 at most, is cut there, with a warning.
        """
        rows = [torch.tensor(self.tokenizer.ids(text, self.model_max_length)) for text in texts]
        ids = pad_sequence(rows, batch_first=True, padding_value=self.tokenizer.pad_id)
        return self.model(ids.to(next(self.model.parameters()).device)).float()[:, None, None], None


def make_clip(
    config: dict[str, Any], tokenizer: Tokenizer, model_max_length: int = 77, dtype: torch.dtype = torch.float32
) -> CLIPEncoder:
    """A CLIPEncoder of a config.json, of a full CLIP or its text part, whose `model` lies on the meta device."""
    from transformers import CLIPConfig, CLIPTextConfig

    full = "text_config" in config
    text_config = CLIPConfig.from_dict(config).text_config if full else CLIPTextConfig.from_dict(config)
    with torch.device("meta"):
        model = CLIPText(text_config).to(dtype)
    positions = torch.arange(text_config.max_position_embeddings)[None]  # no checkpoint fills this buffer
    model.text_model.embeddings.position_ids = positions
    return CLIPEncoder(model, tokenizer, model_max_length)

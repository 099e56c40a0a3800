"""How well images look and fit captions: CLIP (Radford et al. 2021, arXiv:2103.00020) and a head for aesthetics."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class CLIPImageText(nn.Module):
    """CLIP of a transformers configuration, under the names of the published checkpoints."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        from transformers import CLIPModel

        model = CLIPModel(config)
        self.text_model, self.vision_model = model.text_model, model.vision_model
        self.text_projection, self.visual_projection = model.text_projection, model.visual_projection
        self.logit_scale = model.logit_scale

    def embed_images(self, pixels: Tensor) -> Tensor:
        """Unit vectors [B, C] of normalized pixels [B, 3, S, S]."""
        return F.normalize(self.visual_projection(self.vision_model(pixel_values=pixels).pooler_output), dim=-1)

    def embed_text(self, ids: Tensor) -> Tensor:
        """Unit vectors [B, C] of token ids [B, L]."""
        return F.normalize(self.text_projection(self.text_model(input_ids=ids).pooler_output), dim=-1)

    def match(self, images: Tensor, texts: Tensor) -> Tensor:
        """The logits [B] of B pairs of embeddings: their cosine, scaled; about 20 to 35 where they fit."""
        return self.logit_scale.exp() * (images * texts).sum(-1)


class AestheticHead(nn.Module):
    """Aesthetic score, about 1 to 10, of CLIP ViT-L/14 embeddings.

    The multilayer perceptron of https://github.com/christophschuhmann/improved-aesthetic-predictor: linear layers
    without activations; dropout, which only training needs, keeps its place among them.
    """

    def __init__(self, width: int = 768) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(width, 1024), nn.Dropout(0.2), nn.Linear(1024, 128), nn.Dropout(0.2), nn.Linear(128, 64),
            nn.Dropout(0.1), nn.Linear(64, 16), nn.Linear(16, 1),
        )  # fmt: skip

    def forward(self, images: Tensor) -> Tensor:
        """Scores [B] of unit vectors [B, C]."""
        return self.layers(images).squeeze(-1)


def make_clip_image_text(config: dict[str, Any]) -> CLIPImageText:
    """The model of a config.json of CLIP; its parameters lie on the meta device."""
    from transformers import CLIPConfig

    parsed = CLIPConfig.from_dict(config)
    with torch.device("meta"):
        model = CLIPImageText(parsed).eval().requires_grad_(False)
    for embeddings in (model.text_model.embeddings, model.vision_model.embeddings):
        count = embeddings.position_embedding.num_embeddings
        embeddings.position_ids = torch.arange(count)[None]  # no checkpoint fills this buffer
    return model

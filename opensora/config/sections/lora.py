"""The setting `lora` of training: which layers an adapter adapts, and how."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from opensora.config.schema import Name, Number, Positive, Schema

Rank = Annotated[Positive, Field(le=65_536)]
Alpha = Annotated[Number, Field(gt=0, le=1e6)]


class LoRA(Schema):
    """A new adapter; the fields are those of `opensora.models.lora.LoRAConfig`."""

    rank: Rank = Field(16, description="rank of A and B", examples=[16])
    alpha: Alpha | None = Field(None, description="B A is scaled by alpha / rank; None: the rank", examples=[16])
    targets: Annotated[list[Name], Field(min_length=1, max_length=1_000)] | None = Field(
        None, description="names or ends of names of linear layers, with wildcards", examples=[["attn.qkv", "mlp.*"]]
    )
    rank_pattern: dict[Name, Rank] = Field(
        {},
        max_length=1_000,
        description="ranks of single layers; the first match counts",
        examples=[{"fc1": 8}],
    )
    alpha_pattern: dict[Name, Alpha] = Field(
        {}, max_length=1_000, description="alphas of single layers", examples=[{"fc1": 8}]
    )

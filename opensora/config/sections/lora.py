"""The setting `lora` of training: which layers an adapter adapts, and how."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from opensora.config.schema import Name, Number, Positive, Schema

Rank = Annotated[Positive, Field(le=65_536)]
Alpha = Annotated[Number, Field(gt=0, le=1e6)]


class LoRA(Schema):
    """A new adapter; the fields are those of `opensora.models.lora.LoRAConfig`."""

    rank: Rank = 16
    alpha: Alpha | None = None
    targets: Annotated[list[Name], Field(min_length=1, max_length=1_000)] | None = None
    rank_pattern: dict[Name, Rank] = Field(default_factory=dict, max_length=1_000)
    alpha_pattern: dict[Name, Alpha] = Field(default_factory=dict, max_length=1_000)

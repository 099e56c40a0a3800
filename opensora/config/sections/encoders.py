"""Sections of text encoders."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from opensora.config.schema import Positive
from opensora.config.sections.common import Loaded, Section, Tokens, arg


class T5(Loaded):
    """T5: one embedding per token."""

    model_max_length: Tokens = arg(300, "maximum prompt length in tokens; longer prompts are truncated")


class CLIP(Loaded):
    """CLIP: one pooled embedding per prompt."""

    model_max_length: Tokens = arg(77, "maximum prompt length in tokens, at most 77")


class Classes(Section):
    """Class labels: prompts are class numbers; no weights."""

    num_classes: Annotated[Positive, Field(le=1_000_000)] = arg(1000, "number of classes")

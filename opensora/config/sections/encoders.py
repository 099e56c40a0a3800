"""Sections of text encoders."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from opensora.config.schema import Positive
from opensora.config.sections.common import Loaded, Section, Tokens, arg


class T5(Loaded):
    """T5: features of every token."""

    model_max_length: Tokens = arg(300, "tokens at which a prompt is cut")


class CLIP(Loaded):
    """CLIP: one feature of the prompt."""

    model_max_length: Tokens = arg(77, "tokens at which a prompt is cut, 77 at most")


class Classes(Section):
    """Prompts that are numbers of classes; no weights."""

    num_classes: Annotated[Positive, Field(le=1_000_000)] = arg(1000, "how many classes there are")

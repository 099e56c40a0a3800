"""Class numbers instead of a text encoder, for class-conditional models."""

from __future__ import annotations

import re

import torch

from opensora.errors import ConfigError


class ClassIds:
    """Prompts that are numbers of classes, 0 to `num_classes` - 1; there are no weights."""

    def __init__(self, num_classes: int = 1000) -> None:
        self.num_classes = num_classes

    def encode(self, texts: list[str]) -> tuple[torch.Tensor, None]:
        """Classes [B] int64 of B prompts such as "207", and no mask. Raises ConfigError for any other prompt."""
        return torch.tensor([self._number(text) for text in texts], dtype=torch.int64), None

    def _number(self, text: str) -> int:
        match = re.fullmatch(r"\s*0*([0-9]{1,9})\s*", text)
        if match is None or int(match[1]) >= self.num_classes:
            start = text if len(text) <= 60 else text[:57] + "..."
            raise ConfigError(f"prompt {start!r} is not a class; give a number from 0 to {self.num_classes - 1}")
        return int(match[1])

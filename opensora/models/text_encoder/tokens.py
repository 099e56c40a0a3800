"""Prompts to token ids, the same way for every text encoder."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Tokenizer:
    """A tokenizer: `encode` gives the token ids of a text, with its end token."""

    encode: Callable[[str], list[int]]
    vocab_size: int
    pad_id: int

    def ids(self, text: str, max_length: int) -> list[int]:
        """Token ids of a prompt with its end token; a prompt of more than `max_length` is cut there, with a warning."""
        ids = self.encode(text)
        if len(ids) <= max_length:
            return ids
        start = text if len(text) <= 60 else text[:57] + "..."
        log.warning("prompt %r has %d tokens; only the first %d are used", start, len(ids), max_length)
        return ids[: max_length - 1] + ids[-1:]

"""Prompts to token ids, the same way for every text encoder."""

from __future__ import annotations

import logging
from typing import Any

log = logging.getLogger(__name__)


def tokenize(tokenizer: Any, text: str, most: int) -> list[int]:
    """Token ids of one prompt with its end token; a prompt of more than `most` is cut there, with a warning."""
    ids = tokenizer(text, truncation=False, verbose=False)["input_ids"]
    if len(ids) <= most:
        return ids
    start = text if len(text) <= 60 else text[:57] + "..."
    log.warning("prompt %r has %d tokens; only the first %d are used", start, len(ids), most)
    return ids[: most - 1] + ids[-1:]

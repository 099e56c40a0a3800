"""Which words of a caption reach the text encoder."""

from __future__ import annotations

import logging
from bisect import bisect_right
from typing import NamedTuple

import torch

from opensora.checkpoints import builder
from opensora.config.settings import TrainSettings
from opensora.errors import WeightsError
from opensora.models.text_encoder.cleaning import preprocess
from opensora.models.text_encoder.tokens import Tokenizer

log = logging.getLogger("opensora")


class ShownCaption(NamedTuple):
    """A cleaned caption: the words that the encoder sees whole, the rest; its number of tokens, if known, and of those
    that are dropped."""

    kept: str
    dropped: str
    tokens: int | None = None
    dropped_tokens: int = 0


class CaptionReader:
    """Cleans captions as training does, and cuts them at the encoder's number of tokens.

    Without the encoder's files on this machine, captions are not cut; nothing is downloaded.
    """

    def __init__(self, settings: TrainSettings) -> None:
        self.tokenizer: Tokenizer | None = None
        self.max_length = 0
        section = settings.section("text_encoder")
        try:
            if path := builder.find_weights(section, "text_encoder", offline=True):
                with torch.device("meta"):
                    encoder = builder.build_text_encoder(section, path, torch.float32)
                self.tokenizer, self.max_length = encoder.tokenizer, encoder.model_max_length
        except WeightsError as error:
            log.warning("captions are shown uncut, since the tokenizer is not here: %s", error)

    def __call__(self, text: str) -> ShownCaption:
        clean = preprocess(text)
        if self.tokenizer is None:
            return ShownCaption(clean, "")
        count = len(self.tokenizer.encode(clean))
        if count <= self.max_length:
            return ShownCaption(clean, "", count)
        words, encode = clean.split(), self.tokenizer.encode
        whole = bisect_right(range(len(words) + 1), self.max_length, key=lambda n: len(encode(" ".join(words[:n])))) - 1
        kept = max(whole, 0)
        return ShownCaption(" ".join(words[:kept]), " ".join(words[kept:]), count, count - self.max_length)

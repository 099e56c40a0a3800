"""T5 as a text encoder: prompts in, one feature per token out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from opensora.errors import WeightsError
from opensora.models.text_encoder.tokens import tokenize

# What a full T5 checkpoint holds beside the encoder: patterns of names to leave out when loading.
T5_DROPPED = ("decoder.*", "lm_head.weight")


class T5Encoder:
    """A T5 encoder and its tokenizer; `output_dim` is the size of a token's feature."""

    def __init__(self, model: nn.Module, tokenizer: Any, model_max_length: int = 300) -> None:
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.model_max_length = model_max_length
        self.output_dim: int = model.config.d_model

    @torch.no_grad()
    def encode(self, texts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """Features [B, 1, L, C] float32 and mask [B, L] int64 (1 a real token, 0 padding) of B cleaned prompts.

        L is the length of the longest prompt in the list: padding takes part in nothing, so a prompt's features do
        not depend on its neighbours. Features of padding are zero. A prompt of more than `model_max_length` tokens is
        cut there, with a warning.
        """
        rows = [torch.tensor(tokenize(self.tokenizer, text, self.model_max_length)) for text in texts]
        device = next(self.model.parameters()).device
        ids = pad_sequence(rows, batch_first=True, padding_value=self.tokenizer.pad_token_id).to(device)
        mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True).to(device)
        features = self.model(input_ids=ids, attention_mask=mask).last_hidden_state.float()  # [B, L, C]
        return (features * mask[..., None])[:, None], mask


def make_t5(
    config: dict[str, Any], tokenizer_folder: Path, model_max_length: int = 300, dtype: torch.dtype = torch.float32
) -> T5Encoder:
    """A T5Encoder of a config.json whose `model` lies on the meta device: no memory is taken until weights are loaded.

    `shared.weight` and `encoder.embed_tokens.weight` are one tensor; a checkpoint may hold either or both. Raises
    WeightsError when the folder holds no tokenizer.
    """
    from transformers import T5Config, T5EncoderModel

    with torch.device("meta"):
        model = T5EncoderModel(T5Config.from_dict(config)).to(dtype)
    if dtype == torch.float16:  # these projections overflow in float16; transformers keeps them in float32 as well
        for name, module in model.named_modules():
            if name.endswith(".wo"):
                module.float()
    model.tie_weights()
    return T5Encoder(model, load_t5_tokenizer(tokenizer_folder), model_max_length)


def load_t5_tokenizer(folder: Path) -> Any:
    """The tokenizer of a checkpoint folder, from its tokenizer.json or spiece.model; nothing is downloaded.

    Raises WeightsError when the folder has neither.
    """
    from transformers import T5TokenizerFast

    if not any((Path(folder) / name).is_file() for name in ("tokenizer.json", "spiece.model")):
        raise WeightsError(f"{folder}: no T5 tokenizer; the folder needs spiece.model or tokenizer.json")
    return T5TokenizerFast.from_pretrained(str(folder), local_files_only=True)

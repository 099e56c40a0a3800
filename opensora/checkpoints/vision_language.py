"""Vision-language models of local folders, through transformers. No code of a folder runs, no pickle is read."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from opensora.acceleration.device import pick_device
from opensora.checkpoints.hub import one_line
from opensora.checkpoints.read import read_state_dict
from opensora.checkpoints.remembered_hash import FileIdentity
from opensora.errors import WeightsError

LOCAL = {"local_files_only": True, "trust_remote_code": False}


class VisionLanguageModel(NamedTuple):
    """A model on a device, and what makes its inputs."""

    model: Any
    processor: Any
    device: torch.device

    def answer(self, frames: Sequence[np.ndarray], prompt: str, max_tokens: int) -> tuple[str, bool]:
        """The most likely answer to frames uint8 [H, W, 3] and a prompt, and whether it ended by itself."""
        content = [*({"type": "image"} for _ in frames), {"type": "text", "text": prompt}]
        chat = [{"role": "user", "content": content}]
        text = self.processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        inputs = self.processor(images=list(frames), text=text, return_tensors="pt").to(self.device)
        with torch.inference_mode():
            tokens = self.model.generate(**inputs, max_new_tokens=max_tokens, do_sample=False)[0]
        new = tokens[inputs["input_ids"].shape[1] :]
        ends = self.model.generation_config.eos_token_id
        ended = len(new) < max_tokens or int(new[-1]) in (ends if isinstance(ends, list) else [ends])
        return self.processor.decode(new, skip_special_tokens=True), ended


@lru_cache(maxsize=1)
def load_vision_language(folder: str, device: str | None) -> VisionLanguageModel:
    """The model of a folder in transformers' layout, with safetensors; kept in memory.

    Raises WeightsError for folders that transformers cannot use without running their code, ConfigError for devices
    that are not there.
    """
    where = pick_device(device)
    try:
        from transformers import AutoModelForImageTextToText, AutoProcessor

        processor = AutoProcessor.from_pretrained(folder, **LOCAL)
        model = AutoModelForImageTextToText.from_pretrained(folder, use_safetensors=True, dtype="auto", **LOCAL)
    except Exception as error:  # transformers raises anything
        problem = "transformers cannot use it as a vision-language model"
        raise WeightsError(f"{folder}: {problem} ({one_line(error)}); it needs safetensors and no code") from error
    return VisionLanguageModel(model.eval().requires_grad_(False).to(where), processor, where)


@lru_cache
def vision_language_hash(folder: str) -> str:
    """The SHA-256 of the content of a folder's weights. Raises WeightsError."""
    if not any(Path(folder).glob("*.safetensors")):
        raise WeightsError(f"{folder}: has no .safetensors; name the folder of a vision-language model")
    identity = FileIdentity(Path(folder))
    return identity.content_hash(read_state_dict(folder))

"""Captions by a local vision-language model: a tiny random LLaVA in transformers' layout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from opensora.curation.clip import Clip
from opensora.curation.stages.captions import Captions
from opensora.datasets.video import write_image
from opensora.errors import MediaError, OpenSoraError
from tests.full import FULL
from tests.tiny_clip import seeded

pytestmark = pytest.mark.skipif(not FULL, reason="transformers' models take seconds to import; OPENSORA_FULL=1")

WORDS = ("<pad>", "</s>", "<image>", "USER:", "ASSISTANT:", "a", "cat", "dog", "sits", "runs", "on", "grass")
TEMPLATE = (
    "{% for m in messages %}USER: {% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}<image> {% else %}{{ c['text'] }} {% endif %}{% endfor %}{% endfor %}ASSISTANT:"
)


def make_llava(folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import (
        CLIPImageProcessor,
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
        PreTrainedTokenizerFast,
    )

    core = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="a"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="</s>", additional_special_tokens=["<image>"]
    )
    images = CLIPImageProcessor(size={"shortest_edge": 8}, crop_size=8)
    LlavaProcessor(
        images, tokenizer, patch_size=4, vision_feature_select_strategy="default", num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    ).save_pretrained(folder)  # fmt: skip
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**small, image_size=8, patch_size=4, projection_dim=8),
        text_config=LlamaConfig(**small, vocab_size=len(WORDS), num_key_value_heads=2, pad_token_id=0, eos_token_id=1),
        image_token_index=2, vision_feature_layer=-1,
    )  # fmt: skip
    model = seeded(0, lambda: LlavaForConditionalGeneration(config))
    model.generation_config.eos_token_id = 1
    model.generation_config.suppress_tokens = list(range(WORDS.index("a")))
    model.save_pretrained(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llava")
    make_llava(path)
    return path


def test_a_local_model_captions(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from opensora.checkpoints.vision_language import load_vision_language

    write_image(np.full((20, 30, 3), 90, np.uint8), tmp_path / "a.png")
    clip = Clip(str(tmp_path / "a.png"))
    stage = Captions(model=str(folder), max_tokens=6, device="cpu")
    stage.check()
    stage.setup()
    with pytest.raises(MediaError, match="is cut off at its limit of tokens"):
        stage.process(clip)  # random weights never end
    found = load_vision_language(str(folder), "cpu")
    monkeypatch.setattr(found.model.generation_config, "eos_token_id", list(range(len(WORDS))))
    [word] = stage.process(clip)["text"].split()
    assert word in WORDS
    assert stage.provenance["settings"]["model"] == folder.name and set(stage.weights()) == {"model"}
    assert stage.place == "accelerator"


@pytest.mark.parametrize("spoil", ["code", "pickle", "nothing"])
def test_no_code_of_a_folder_runs(folder: Path, tmp_path: Path, spoil: str) -> None:
    """Neither a class that the configuration names, nor a pickle."""
    mark = tmp_path / "ran"
    config = json.loads((folder / "config.json").read_text())
    if spoil == "code":
        config |= {"auto_map": {"AutoConfig": "own.Own", "AutoModelForImageTextToText": "own.Own"}, "model_type": "own"}
        (tmp_path / "own.py").write_text(f"open({str(mark)!r}, 'w')")
        (tmp_path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    elif spoil == "pickle":
        torch.save({"a": Runs(str(mark))}, tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text(json.dumps(config))
    stage = Captions(model=str(tmp_path), device="cpu")
    with pytest.raises(OpenSoraError, match=str(tmp_path)) as error:
        stage.check()
        stage.setup()
    assert not mark.exists() and "\n" not in str(error.value)


class Runs:
    """Writes a file when it is unpickled."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (open, (self.path, "w"))

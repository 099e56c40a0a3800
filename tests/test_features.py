"""Encoding a data set once: shards, resuming, refusing what does not belong together."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from opensora.errors import ConfigError, WeightsError
from opensora.training.feature_extraction import clips
from opensora.training.feature_extraction.clips import encode_once

IDENTITY = {"clips": {"frames": 17, "image_size": (32, 32)}, "vae": "abc", "text_encoder": "def"}


class Encoder:
    """Clip n becomes tensors full of n; remembers what it was asked for."""

    def __init__(self, stop_at: int | None = None) -> None:
        self.asked: list[int] = []
        self.stop_at = stop_at

    def __call__(self, indices: range) -> dict[str, Tensor]:
        if self.stop_at in indices:
            raise KeyboardInterrupt
        self.asked += indices
        number = torch.tensor(indices, dtype=torch.float16)
        return {
            "latents": number[:, None, None, None, None].expand(-1, 2, 1, 2, 2).contiguous(),
            "last": number[:, None, None, None].expand(-1, 2, 2, 2).contiguous(),
            "text": number[:, None, None].expand(-1, 3, 4).contiguous(),
            "mask": torch.ones(len(indices), 3, dtype=torch.int64),
        }


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clips, "SHARD", 4)


def test_clips_in_order_and_encoded_once(tmp_path: Path) -> None:
    encoder = Encoder()
    made = encode_once(tmp_path, 10, IDENTITY, encoder)
    assert encoder.asked == list(range(10))
    assert made.latents[:, 0, 0, 0, 0].tolist() == made.text[:, 0, 0].tolist() == list(range(10))
    assert made.latents.shape == (10, 2, 1, 2, 2) and made.mask.shape == (10, 3)
    again = Encoder()
    read = encode_once(tmp_path, 10, IDENTITY, again)
    assert again.asked == []
    assert all(torch.equal(a, b) for a, b in zip(made, read, strict=True))


def test_encoding_resumes_at_the_missing_shard(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        encode_once(tmp_path, 10, IDENTITY, Encoder(stop_at=6))
    encoder = Encoder()
    made = encode_once(tmp_path, 10, IDENTITY, encoder)
    assert encoder.asked == list(range(4, 10))
    assert made.text[:, 0, 0].tolist() == list(range(10))


def test_more_clips_keep_the_whole_shards(tmp_path: Path) -> None:
    encode_once(tmp_path, 6, IDENTITY, Encoder())
    encoder = Encoder()
    made = encode_once(tmp_path, 9, IDENTITY, encoder)
    assert encoder.asked == list(range(4, 9))  # clips 4 and 5 were a short shard
    assert made.text[:, 0, 0].tolist() == list(range(9))


def test_other_weights_are_refused(tmp_path: Path) -> None:
    encode_once(tmp_path, 4, IDENTITY, Encoder())
    with pytest.raises(ConfigError, match=r"was encoded with another text_encoder, vae; remove it or name another"):
        encode_once(tmp_path, 4, {**IDENTITY, "vae": "xyz", "text_encoder": "xyz"}, Encoder())
    with pytest.raises(ConfigError, match="another clips"):
        encode_once(tmp_path, 4, {**IDENTITY, "clips": {"frames": 16, "image_size": (32, 32)}}, Encoder())


def test_damaged_shard_is_named(tmp_path: Path) -> None:
    encode_once(tmp_path, 4, IDENTITY, Encoder())
    shard = next(tmp_path.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:50])
    with pytest.raises(WeightsError, match=shard.name):
        encode_once(tmp_path, 4, IDENTITY, Encoder())

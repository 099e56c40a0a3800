"""The temporal autoencoder with more residual blocks in its decoder than in its encoder."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from opensora.checkpoints import builder
from opensora.config.sections import checked
from opensora.errors import ConfigError
from opensora.models.vae.vae_temporal import VAE_Temporal
from tests.tiny import TINY_VAE, make_tiny_vae

TINY: dict[str, Any] = {name: value for name, value in TINY_VAE["vae_temporal"].items() if name != "type"}


def blocks(model: VAE_Temporal, part: str) -> set[int]:
    """The residual blocks of each level of a part."""
    names = (name for name in model.state_dict() if re.match(rf"{part}\.(block_)?res_blocks\..*conv1", name))
    counts: dict[str, int] = {}
    for level in {name.rsplit(".", 4)[0] for name in names}:
        counts[level] = len({name for name in model.state_dict() if re.match(rf"{re.escape(level)}\.\d+\.conv1", name)})
    return set(counts.values())


@pytest.mark.parametrize(("encoder", "decoder", "expected"), [(1, None, 1), (1, 3, 3), (2, 1, 1), (3, 3, 3)])
def test_encoder_and_decoder_have_blocks_of_their_own(encoder: int, decoder: int | None, expected: int) -> None:
    model = VAE_Temporal(**{**TINY, "num_res_blocks": encoder, "decoder_num_res_blocks": decoder})
    assert blocks(model, "encoder") == {encoder} and blocks(model, "decoder") == {expected}
    x = torch.randn(1, 4, 17, 2, 3)
    assert model.decode(model.encode(x).mean, 17).shape == x.shape


def test_the_default_is_the_published_layout() -> None:
    plain, given = VAE_Temporal(**TINY), VAE_Temporal(**TINY, decoder_num_res_blocks=TINY["num_res_blocks"])
    assert list(plain.state_dict()) == list(given.state_dict())


def test_it_is_saved_and_read_again(tmp_path: Path) -> None:
    section = {**TINY_VAE["vae_temporal"], "decoder_num_res_blocks": 2}
    path = make_tiny_vae(tmp_path / "vae", vae_temporal=section)
    load = dict(type="VideoAutoencoderPipeline", from_pretrained=str(path))
    model, _ = builder.load_component(load, "vae", torch.device("cpu"), torch.float32)
    assert blocks(model.temporal_vae, "decoder") == {2} and blocks(model.temporal_vae, "encoder") == {1}


@pytest.mark.parametrize("count", [0, -1, 1.5, "many"])
def test_wrong_counts_are_refused(count: Any) -> None:
    section = dict(type="VAE_Temporal", decoder_num_res_blocks=count)
    with pytest.raises(ConfigError, match="decoder_num_res_blocks"):
        checked(section, "vae")

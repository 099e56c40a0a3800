"""Settings that training cannot follow yet are refused instead of ignored."""

from __future__ import annotations

import pytest

from opensora.config import find_config, read_config
from opensora.config.settings import NOT_YET_IN_TRAINING, NOT_YET_IN_VAE_TRAINING, TrainSettings, check_trainable
from opensora.errors import ConfigError

CONFIGS = sorted(find_config("embedded/train/stdit3").parent.glob("*.py"))
ASKED = {
    "accumulation_steps": 2,
    "mask_ratios": {"random": 0.5},
    "sp_size": 2,
    "grad_checkpoint": True,
    "bucket_config": {"144p": {1: (1.0, 4)}},
    "discriminator": {"type": "N_Layer_discriminator_3D"},
    "use_image_identity_loss": True,
    "load_video_features": True,
    "load_text_features": True,
    "lora": {"rank": 4},
    "linear": "int8",
}


def test_every_setting_is_tried():
    assert ASKED.keys() == set(NOT_YET_IN_VAE_TRAINING) > set(NOT_YET_IN_TRAINING)


def test_the_default_asks_for_nothing():
    assert all(getattr(TrainSettings, name) in (None, False, 1, "exact") for name in NOT_YET_IN_VAE_TRAINING)
    check_trainable(TrainSettings(model={"type": "STDiT3"}))


@pytest.mark.parametrize(("name", "value"), ASKED.items())
def test_refused(name, value):
    settings = TrainSettings.from_config({"model": {"type": "STDiT3"}, name: value}, "x.py")
    with pytest.raises(ConfigError, match=rf"^{name} is not supported by training yet; remove it$"):
        check_trainable(settings, NOT_YET_IN_VAE_TRAINING)
    if name not in NOT_YET_IN_TRAINING:
        check_trainable(settings)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_the_embedded_model_can_be_trained(path):
    check_trainable(TrainSettings.from_config(read_config(path), path.name))


def test_a_plugin_for_sequences_has_some_to_divide():
    model = {"type": "STDiT3"}
    with pytest.raises(ConfigError, match=r"plugin 'zero2-seq' divides .* sp_size is 1; set sp_size to 2 or more, or"):
        check_trainable(TrainSettings(model=model, plugin="zero2-seq"))
    check_trainable(TrainSettings(model=model, plugin="zero2-seq", sp_size=2))
    check_trainable(TrainSettings(model=model, plugin="zero2", sp_size=2))


@pytest.mark.parametrize("name", ["360x512x512", "64x512x512-sp"])
def test_published_plugins_divide_sequences(name):
    """The first names zero2-seq, the second inherits zero2; both mean two ranks a clip."""
    settings = TrainSettings.from_config(read_config(find_config(f"opensora/train/{name}")), name)
    check_trainable(settings)
    assert settings.sp_size == 2

"""Each model with each of its samplers makes an image and a video, from its own configuration and published format."""

from __future__ import annotations

from pathlib import Path

import pytest

from opensora.cli.verbs.generation import request_settings
from opensora.config import find_config, read_config
from opensora.pipeline.pipeline import VideoPipeline
from tests.full import FULL, some
from tests.zoo import MODELS, flags, make_parts

SAMPLERS = ("iddpm", "iddpm-speed", "dpm-solver", "rflow")
LENGTHS = (1, 17)  # an image, a video
PROMPTS = {"t5": "a red car", "clip": "a red car", "classes": "7"}


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return make_parts(tmp_path_factory.mktemp("parts"))


@pytest.mark.parametrize("model", MODELS)
@some(6)
def test_generates(model: str, parts: dict[str, Path], tmp_path: Path) -> None:
    """Loaded once; without FULL at one length a sampler, so that every model and every sampler has both."""
    config, make = MODELS[model]
    settings = read_config(find_config(config))
    text = settings["text_encoder"]["type"]
    weights = flags(make(tmp_path), parts, settings["vae"]["type"], text)
    prompt = PROMPTS[text]
    pipeline = VideoPipeline(request_settings(["--model", config, "--image-size", "48", "32", prompt, *weights]))
    row = list(MODELS).index(model)
    for column, sampler in enumerate(SAMPLERS):
        scheduler = {"type": sampler, "num_sampling_steps": 3, "cfg_scale": 4.0}
        for num_frames in LENGTHS if FULL else LENGTHS[(row + column) % 2 :][:1]:
            frames = pipeline(prompt, num_frames=num_frames, scheduler=scheduler).frames
            assert frames.shape == (num_frames, 48, 32, 3), sampler
            assert frames.std() > 1, sampler

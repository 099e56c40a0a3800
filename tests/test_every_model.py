"""Each model with each of its samplers makes an image and a video, from its own configuration and published format."""

from __future__ import annotations

from pathlib import Path

import pytest

from opensora.config import find_config, read_config
from opensora.datasets.video import read_image, read_video
from tests.checkpoints import run_script
from tests.full import FULL
from tests.zoo import MODELS, flags, make_parts

SAMPLERS = {
    "iddpm": "{'type': 'iddpm', 'num_sampling_steps': 3, 'cfg_scale': 4.0}",
    "iddpm-speed": "{'type': 'iddpm-speed', 'num_sampling_steps': 3, 'cfg_scale': 4.0}",
    "dpm-solver": "{'type': 'dpm-solver', 'num_sampling_steps': 3, 'cfg_scale': 4.0}",
    "rflow": "{'type': 'rflow', 'num_sampling_steps': 3, 'cfg_scale': 4.0}",
}
LENGTHS = (1, 17)  # an image, a video
# Each model with each sampler; without FULL at one length, so that every model and every sampler has both.
CASES = [
    (model, sampler, length)
    for row, model in enumerate(MODELS)
    for column, sampler in enumerate(SAMPLERS)
    for length in (LENGTHS if FULL else LENGTHS[(row + column) % 2 :][:1])
]
PROMPTS = {"t5": "a red car", "clip": "a red car", "classes": "7"}


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return make_parts(tmp_path_factory.mktemp("parts"))


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("weights")
    return {name: make(folder) for name, (_, make) in MODELS.items()}


@pytest.mark.parametrize(("model", "sampler", "num_frames"), CASES)
def test_generates(model: str, sampler: str, num_frames: int, parts: dict, weights: dict, tmp_path: Path) -> None:
    config, _ = MODELS[model]
    settings = read_config(find_config(config))
    text = settings["text_encoder"]["type"]
    argv = [config, "--image-size", "48", "32", "--num-frames", num_frames, "--save-dir", tmp_path / "out"]
    argv += ["--prompt", PROMPTS[text], *flags(weights[model], parts, settings["vae"]["type"], text)]
    argv += [f"scheduler={SAMPLERS[sampler]}"]
    assert run_script(*argv) == 0
    if num_frames == 1:
        frames = read_image(tmp_path / "out/sample_0000.png")[None]
    else:
        frames, _ = read_video(tmp_path / "out/sample_0000.mp4")
    assert frames.shape == (num_frames, 48, 32, 3)
    assert frames.std() > 1

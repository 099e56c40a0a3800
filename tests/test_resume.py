"""The training programs, killed with SIGKILL at random moments, end where the uninterrupted run ends, bit for bit.

OPENSORA_FULL=1 kills more often.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from opensora.training.checkpoint.folders import checkpoints
from tests import killing
from tests.full import count
from tests.tiny import TINY_STDIT3, TINY_VAE, make_tiny_t5, make_tiny_vae

SCHEDULE = dict(
    dtype="fp32", seed=3, batch_size=2, max_steps=13, ckpt_every=3, log_every=2, lr=1e-2, lr_schedule="cosine",
    warmup_steps=2, grad_clip=1.0, ema_decay=0.9,
)  # fmt: skip
TIMINGS = {"step_s", "clips_per_s", "tokens_per_s", "data_wait", "mfu"}
SEEDS, KILLS = range(1, count(2, 5)), count(2, 5)  # KILLS: of each seed

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forked processes")


def write_config(path: Path, **settings: Any) -> Path:
    path.write_text("".join(f"{name} = {value!r}\n" for name, value in {**SCHEDULE, **settings}.items()))
    return path


def diffusion_config(folder: Path) -> Path:
    vae, t5 = make_tiny_vae(folder / "vae"), make_tiny_t5(folder / "t5")
    return write_config(
        folder / "stdit3.py",
        dataset=dict(
            type="ShapeClips", num_frames=17, image_size=(32, 32), num_clips=8, features=str(folder / "features")
        ),
        model=dict(type="STDiT3", **TINY_STDIT3),
        vae=dict(type="VideoAutoencoderPipeline", from_pretrained=str(vae)),
        text_encoder=dict(type="t5", from_pretrained=str(t5), model_max_length=32),
        scheduler=dict(type="rflow", sample_method="logit-normal"),
    )


def autoencoder_config(folder: Path) -> Path:
    return write_config(
        folder / "vae.py",
        dataset=dict(type="ShapeClips", num_frames=5, image_size=(16, 16), num_clips=9),
        model=dict(type="VideoAutoencoderPipeline", freeze_vae_2d=True, **TINY_VAE),
        perceptual_loss_weight=0.0,
        use_z_rec_loss=True,
        use_real_rec_loss=True,
        mixed_strategy="mixed_video_image",
        mixed_image_ratio=0.3,
    )


def results(outputs: Path) -> dict[str, Any]:
    """Everything a run leaves: its log without the timings, its last checkpoint and the final model."""
    experiment = [folder for folder in sorted(outputs.glob("*-*")) if checkpoints(folder)][-1]
    log = [json.loads(line) for line in (experiment / "log.jsonl").read_text().splitlines()]
    last = checkpoints(experiment)[-1]
    assert not list(experiment.glob(".*")), "an unfinished checkpoint was left behind"
    optimizer = torch.load(last / "optimizer" / "optimizer.pt", weights_only=True)["optimizer"]
    moments = {f"{i}.{name}": value for i, part in optimizer["state"].items() for name, value in part.items()}
    return {
        "log": [{name: value for name, value in line.items() if name not in TIMINGS} for line in log],
        "position": json.loads((last / "running_states.json").read_text()),
        "groups": optimizer["param_groups"],
        "checkpoints": [path.name for path in checkpoints(experiment)],
        "model": load_file(last / "model" / "model.safetensors"),
        "ema": torch.load(last / "ema.pt", weights_only=True),
        "moments": moments,
        "final": load_file(outputs / "ema" / "model.safetensors"),
    }


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    for part, value in expected.items():
        if not isinstance(value, dict) or part == "position":
            assert found[part] == value, part
            continue
        assert found[part].keys() == value.keys()
        different = [name for name, tensor in value.items() if not torch.equal(found[part][name], tensor)]
        assert not different, f"{part}: {different[:5]}"


@pytest.mark.parametrize(
    ("script", "make_config", "seeds"),
    [("scripts/train.py", diffusion_config, SEEDS), ("scripts/train_vae.py", autoencoder_config, SEEDS[:1])],
)
def test_killed_runs_end_like_the_uninterrupted_one(tmp_path: Path, script: str, make_config: Any, seeds: Any) -> None:
    config = make_config(tmp_path)
    killing.run(script, config, tmp_path / "whole")
    expected = results(tmp_path / "whole")
    assert [line["step"] for line in expected["log"]] == [2, 4, 6, 8, 10, 12]
    assert expected["position"]["global_step"] == 13
    kills = []
    for seed in seeds:
        outputs = tmp_path / f"killed-{seed}"
        kills += killing.run(script, config, outputs, seed, KILLS)
        assert_same(results(outputs), expected)
    assert len(kills) >= 2 * len(seeds) and "save" in kills, kills

"""Fine-tuning begins with what the embedded model knows: on clips of its own kind its loss is small from the start."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from opensora import registry
from opensora.config import find_config, read_config
from opensora.config.settings import TrainSettings
from opensora.datasets import make_table
from opensora.datasets.synthetic.render import make_clip
from opensora.datasets.video import write_video
from opensora.distributed.process_group import RankLayout
from opensora.training.data.diffusion_data import make_data
from opensora.training.diffusion import build_model
from opensora.training.step import step_generator

CLIPS = 6


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> TrainSettings:
    """Those of the shipped configuration, on a table of rendered clips."""
    folder = tmp_path_factory.mktemp("finetune")
    (folder / "videos").mkdir()
    for number in range(CLIPS):
        clip = make_clip(77, number, 17, 64, 64)
        write_video(clip.video, folder / f"videos/{number}.mp4", 24)
        (folder / f"videos/{number}.txt").write_text(clip.text)
    make_table(folder / "videos", folder / "videos.csv")
    values = read_config(find_config("embedded/train/finetune"))
    values["dataset"]["data_path"] = str(folder / "videos.csv")
    return TrainSettings.from_config({**values, "batch_size": CLIPS, "validate_every": 0, "device": "cpu"}, "finetune")


def test_a_table_begins_with_a_small_loss(settings: TrainSettings) -> None:
    device = torch.empty(0).device
    data = make_data(settings, device, RankLayout())
    model, scheduler = build_model(settings, data, device)[0].eval(), registry.build(settings.scheduler)
    batch = data.encode(data.source.reader(0, 0)())
    frames, height, width = batch.size
    size = {"num_frames": frames, "height": height, "width": width}
    with torch.no_grad():
        how = {**size, "generator": step_generator(0, 1)}
        losses = scheduler.training_loss(model, batch.latents, batch.cond, **how)
    assert batch.latents.std() == pytest.approx(1, abs=0.3), "latents as the model was trained on"
    assert losses.mean() < 0.5
    assert len(losses) == CLIPS and Path(batch.names[0]).is_file()

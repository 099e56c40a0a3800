"""Training on clips of several sizes, with given frames."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from opensora.config.settings import TrainSettings
from opensora.datasets.synthetic.dataset import MixedClips, rendered_clips
from opensora.errors import ConfigError
from opensora.training.autoencoder import _mixed, train_vae
from opensora.training.diffusion import train
from opensora.training.losses.autoencoder import PIXEL_FRAMES, consecutive_frames
from opensora.training.losses.diffusion import end_in_image
from tests.full import some
from tests.tiny import TINY_STDIT3, TINY_VAE, make_tiny_t5, make_tiny_vae

SIZES = [(17, 16, 24, 0.5), (34, 16, 24, 0.3), (1, 24, 16, 0.2)]


def clips(sizes: Any = SIZES, **settings: Any) -> MixedClips:
    return rendered_clips(dict(type="ShapeClips", sizes=sizes, **settings), 10, 7)


class TestMixedClips:
    def test_batches_take_about_equally_long(self) -> None:
        assert [one.batch_size for one in clips().sets] == [10, 5, 50]
        assert [str(one) for one in clips().sets] == ["17x16x24", "34x16x24", "1x24x16"]

    def test_size_is_a_function_of_the_step_in_the_shares_asked_for(self) -> None:
        data = clips([(17, 8, 8, 5), (34, 8, 8, 3), (1, 8, 8, 2)])
        picked = Counter(data.pick(step) for step in range(2000))
        assert [data.pick(step) for step in range(50)] == [data.pick(step) for step in range(50)]
        assert [picked[number] / 2000 for number in range(3)] == pytest.approx([0.5, 0.3, 0.2], abs=0.04)

    def test_one_step_has_one_size(self) -> None:
        data = clips()
        for step in range(8):
            one = data.sets[data.pick(step)]
            assert data.videos(step).shape == (one.batch_size, 3, one.num_frames, *one.image_size)

    def test_sizes_show_scenes_of_their_own(self) -> None:
        first, second, _ = clips().sets
        assert [first.clip(n).text for n in range(9)] != [second.clip(n).text for n in range(9)]

    def test_videos_repeat_after_the_period(self) -> None:
        data = clips(num_clips=50)
        assert data.period == 5 + 10 + 1
        assert torch.equal(data.videos(3), data.videos(19))
        assert clips().period is None

    def test_a_single_size_is_as_before(self) -> None:
        data = rendered_clips(dict(type="ShapeClips", num_frames=5, image_size=(16, 24), num_clips=9), 2, 3)
        assert data.period == 4 and data.sets[0].batch_size == 2 and data.sets[0].seed == 3
        assert np.array_equal(data.windows(1), data.sets[0].windows(1))

    def test_a_size_may_have_a_number_of_clips_of_its_own(self) -> None:
        sizes = [(5, 16, 24, 1), (1, 16, 24, 1, 30)]
        data = rendered_clips(dict(type="ShapeClips", sizes=sizes, num_clips=8), 2, 3)
        assert [one.num_clips for one in data.sets] == [8, 30]

    @pytest.mark.parametrize(
        "size",
        [
            (17, 16, 24), (17, 16, 24, 0), (17, 16, -8, 1), (17, 16, 24, "1"), 17, (17.0, 16, 24, 1),
            (17, 16, 24, 1, 0), (17, 16, 24, 1, 0.5), (17, 16, 24, 1, 5, 5),
        ],
    )  # fmt: skip
    def test_wrong_sizes_are_refused(self, size: Any) -> None:
        with pytest.raises(ConfigError, match=r"dataset.sizes lists \(num_frames, height, width, share\)"):
            clips([SIZES[0], size])

    def test_sizes_do_not_go_with_a_single_size(self) -> None:
        with pytest.raises(ConfigError, match="dataset has sizes and also num_frames; remove one"):
            clips(num_frames=17)


def test_a_lone_last_frame_is_given_as_an_image() -> None:
    latents, last = torch.zeros(4, 2, 3, 1, 1), torch.ones(4, 2, 1, 1)
    mask = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 0, 0], [0, 1, 0]], dtype=torch.bool)
    ends = end_in_image(latents, last, mask)
    assert ends[:, 0, 2].flatten().tolist() == [0, 1, 0, 1] and not ends[:, :, :2].any()
    assert torch.equal(end_in_image(latents[:, :, :1], last, mask[:, :1]), latents[:, :, :1])


@pytest.fixture
def parts(tmp_path: Path) -> dict[str, Any]:
    vae, t5 = make_tiny_vae(tmp_path / "vae"), make_tiny_t5(tmp_path / "t5")
    return dict(
        dataset=dict(type="ShapeClips", sizes=SIZES, num_clips=10, features=str(tmp_path / "features")),
        model=dict(type="STDiT3", **TINY_STDIT3),
        vae=dict(type="VideoAutoencoderPipeline", from_pretrained=str(vae)),
        text_encoder=dict(type="t5", from_pretrained=str(t5), model_max_length=32),
        scheduler=dict(type="rflow"),
        mask_ratios={"image_head": 0.4, "image_tail": 0.2, "half_head": 0.2},
        dtype="fp32", device="cpu", batch_size=2, lr=1e-2, log_every=1, max_steps=4,
    )  # fmt: skip


def test_the_model_lists_its_sizes_and_resumes_exactly(tmp_path: Path, parts: dict[str, Any]) -> None:
    whole = train(TrainSettings(outputs=str(tmp_path / "whole"), **parts)).path
    config = json.loads((whole / "config.json").read_text())
    assert config["trained_sizes"] == [list(size[:3]) for size in SIZES]
    folders = {path.name for path in (tmp_path / "features").iterdir()}
    assert folders == {"17x16x24", "34x16x24", "1x24x16"}
    outputs = str(tmp_path / "parts")
    first = train(TrainSettings(outputs=outputs, **{**parts, "max_steps": 2})).path
    second = train(TrainSettings(outputs=outputs, load=str(first.parent / "000-STDiT3"), **parts)).path
    found, expected = load_file(second / "model.safetensors"), load_file(whole / "model.safetensors")
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_given_frames_change_what_is_learnt(tmp_path: Path, parts: dict[str, Any]) -> None:
    masked = train(TrainSettings(outputs=str(tmp_path / "masked"), **parts)).path
    free = train(TrainSettings(outputs=str(tmp_path / "free"), **{**parts, "mask_ratios": None})).path
    a, b = load_file(masked / "model.safetensors"), load_file(free / "model.safetensors")
    assert any(not torch.equal(a[name], tensor) for name, tensor in b.items())


def test_wrong_ratios_are_refused_before_any_work(tmp_path: Path, parts: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="mask_ratios: unknown type 'image_hed'; did you mean 'image_head'"):
        train(TrainSettings(outputs=str(tmp_path / "runs"), **{**parts, "mask_ratios": {"image_hed": 0.4}}))
    assert not (tmp_path / "features").exists() and not (tmp_path / "runs").exists()


@pytest.mark.parametrize("strategy", [None, "mixed_video_random"])
def test_the_autoencoder_trains_on_several_sizes(tmp_path: Path, strategy: str | None) -> None:
    dataset = dict(type="ShapeClips", sizes=[(5, 16, 24, 1), (5, 24, 16, 1)], num_clips=8)
    model = dict(type="VideoAutoencoderPipeline", freeze_vae_2d=True, **TINY_VAE)
    settings: dict[str, Any] = dict(model=model, dataset=dataset, dtype="fp32", device="cpu", batch_size=2, max_steps=4)
    settings |= dict(mixed_strategy=strategy, perceptual_loss_weight=0.0, use_z_rec_loss=True)
    made = train_vae(TrainSettings(outputs=str(tmp_path), **settings)).path
    assert (made / "model.safetensors").is_file()


@pytest.mark.parametrize("strategy", [None, "mixed_video_random"])
@some(1)
def test_decoders_alone_are_trained(tmp_path: Path, strategy: str | None) -> None:
    """Clips of several chunks and single frames; latents stay what they were."""
    start = make_tiny_vae(tmp_path / "start", shift=(0.1, 0.0, -0.1, 0.2), scale=(1.0, 2.0, 1.5, 0.5))
    dataset = dict(type="ShapeClips", sizes=[(34, 16, 24, 1), (1, 24, 16, 1)], num_clips=4)
    model = dict(type="VideoAutoencoderPipeline", from_pretrained=str(start), **TINY_VAE)
    settings = dict(model=model, dataset=dataset, dtype="fp32", device="cpu", batch_size=1, max_steps=4, lr=1e-2)
    settings |= dict(mixed_strategy=strategy, perceptual_loss_weight=0.0, freeze_encoders=True)
    made = train_vae(TrainSettings(outputs=str(tmp_path), **settings)).path
    before, after = (load_file(folder / "model.safetensors") for folder in (start, made))
    changed = {name for name, tensor in before.items() if not torch.equal(after[name], tensor)}
    assert changed and all(".decoder." in name or ".post_quant_conv." in name for name in changed)
    assert {name.split(".")[0] for name in changed} == {"spatial_vae", "temporal_vae"}


def test_decoders_alone_need_trained_encoders(tmp_path: Path) -> None:
    model = dict(type="VideoAutoencoderPipeline", **TINY_VAE)
    dataset = dict(type="ShapeClips", num_frames=5, image_size=(16, 16), num_clips=4)
    settings: dict[str, Any] = dict(model=model, dataset=dataset, perceptual_loss_weight=0.0, freeze_encoders=True)
    settings |= dict(max_steps=1)
    with pytest.raises(ConfigError, match="name their weights with --ckpt-path"):
        train_vae(TrainSettings(outputs=str(tmp_path), **settings))


@pytest.mark.parametrize(("frames", "chunk"), [(1, 17), (3, 17), (17, 17), (34, 17), (34, None)])
def test_frames_in_a_row(frames: int, chunk: int | None) -> None:
    generator = torch.Generator().manual_seed(0)
    starts = [consecutive_frames(frames, chunk, generator).start for _ in range(400)]
    assert set(starts) == set(range(max(frames - PIXEL_FRAMES, 0) + 1))
    around = starts.count(15) / len(starts)
    assert around > 0.4 if (frames, chunk) == (34, 17) else around < 0.2


@pytest.mark.parametrize(
    ("strategy", "ratio", "lengths"),
    [("mixed_video_random", 0.0, set(range(1, 6))), ("mixed_video_image", 0.5, {1, 5}), (None, 0.5, {5})],
)
def test_clips_are_cut_as_the_strategy_says(strategy, ratio, lengths):
    data = rendered_clips(dict(type="ShapeClips", num_frames=5, image_size=(8, 8)), 1, 0)
    settings = TrainSettings(model={"type": "STDiT3"}, mixed_strategy=strategy, mixed_image_ratio=ratio)
    videos = _mixed(settings, data, torch.device("cpu"))
    found = [videos(step).shape[2] for step in range(60)]
    assert set(found) == lengths and found == [videos(step).shape[2] for step in range(60)]

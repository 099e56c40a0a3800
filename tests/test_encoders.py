"""Autoencoders and text encoders of the earlier models against diffusers' and transformers' own, from tiny folders."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from opensora.checkpoints import builder
from opensora.checkpoints.fit import load_weights
from opensora.checkpoints.save import save_pretrained
from opensora.checkpoints.tokenizer import load_clip_tokenizer
from opensora.errors import ConfigError, WeightsError
from opensora.models.text_encoder.classes import ClassIds
from opensora.models.text_encoder.clip import CLIPEncoder, make_clip
from opensora.models.vae.vae import FrameAutoencoder, VideoAutoencoderKL, VideoAutoencoderPipeline
from opensora.models.vae.vae_svd import VideoAutoencoderKLTemporalDecoder
from tests.tiny_clip import POSITIONS, make_clip_folder, seeded

SCALE = 0.18215
SHAPES: dict[type[FrameAutoencoder], dict[str, Any]] = {
    VideoAutoencoderKL: dict(
        block_out_channels=[8, 8, 16, 16], layers_per_block=1, norm_num_groups=4, latent_channels=4,
        down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4,
    ),
    VideoAutoencoderKLTemporalDecoder: dict(
        block_out_channels=[32, 32, 32, 32], layers_per_block=1, latent_channels=4,
        down_block_types=["DownEncoderBlock2D"] * 4,
    ),
}  # fmt: skip
KINDS = pytest.mark.parametrize("cls", SHAPES)
OLD_NAMES = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(3))


def published(cls: type[FrameAutoencoder], folder: Path) -> nn.Module:
    """diffusers' own autoencoder with random weights, saved into `folder` by diffusers, as hubs hold it."""
    import diffusers

    kind = getattr(diffusers, cls.network.__name__)
    model = seeded(0, lambda: kind(**SHAPES[cls], sample_size=1024, scaling_factor=0.13025, force_upcast=True)).eval()
    model.save_pretrained(folder)
    return model.requires_grad_(False)


def load_frames(cls: type[FrameAutoencoder], folder: Path, **options: Any) -> FrameAutoencoder:
    config = cls.keywords(json.loads((folder / "config.json").read_text()))
    with torch.device("meta"):
        model = cls(**{**config, **options})
    load_weights(model, folder)
    return model.eval().requires_grad_(False)


def frames_of(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(0, 1)


@KINDS
def test_an_autoencoder_equals_diffusers_own(cls: type[FrameAutoencoder], tmp_path: Path) -> None:
    reference, model = published(cls, tmp_path), load_frames(cls, tmp_path)
    assert model.config["block_out_channels"] == (*SHAPES[cls]["block_out_channels"],)
    assert not {"scaling_factor", "sample_size", "force_upcast", "micro_batch_size"} & set(model.config)
    assert model.out_channels == 4
    assert model.get_latent_size([3, 16, 24]) == [3, 2, 3] and model.get_latent_size([None] * 3) == [None] * 3

    x, z = noise(2, 3, 3, 16, 24), noise(2, 4, 3, 2, 3)
    posterior = reference.encode(frames_of(x)).latent_dist
    torch.testing.assert_close(frames_of(model.encode(x, sample=False)), posterior.mean * SCALE)
    drawn = posterior.sample(torch.Generator().manual_seed(5)) * SCALE
    torch.testing.assert_close(frames_of(model.encode(x, generator=torch.Generator().manual_seed(5))), drawn)

    time = {} if cls is VideoAutoencoderKL else {"num_frames": 3}
    video = model.decode(z, num_frames=3)
    assert video.shape == x.shape
    torch.testing.assert_close(frames_of(video), reference.decode(frames_of(z) / SCALE, **time).sample)


@KINDS
@pytest.mark.parametrize("layout", ["old attention names", "ours"])
def test_other_layouts_of_names_hold_the_same_model(cls: type[FrameAutoencoder], layout: str, tmp_path: Path) -> None:
    published(cls, tmp_path)
    expected = load_frames(cls, tmp_path)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    renamed = {}
    for name, tensor in load_file(file).items():
        for new, old in OLD_NAMES.items() if layout != "ours" else ():
            name = name.replace(f".attentions.0.{new}.", f".attentions.0.{old}.")
        renamed[f"module.{name}" if layout == "ours" else name] = tensor
    assert any("query" in name for name in renamed) == (layout != "ours")
    save_file(renamed, file)
    found = load_frames(cls, tmp_path).state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.state_dict().items())


@KINDS
def test_a_saved_autoencoder_comes_back(cls: type[FrameAutoencoder], tmp_path: Path) -> None:
    model = seeded(1, lambda: cls(**SHAPES[cls])).eval().requires_grad_(False)
    save_pretrained(model.state_dict(), tmp_path, {"model_type": cls.__name__, **model.config})
    again = load_frames(cls, tmp_path)
    assert again.config == model.config
    z = noise(1, 4, 2, 2, 2)
    assert torch.equal(again.decode(z), model.decode(z))


@KINDS
def test_a_video_does_not_depend_on_its_neighbours(cls: type[FrameAutoencoder], tmp_path: Path) -> None:
    published(cls, tmp_path)
    x, z = noise(2, 3, 5, 16, 16), noise(2, 4, 5, 2, 2)
    for size in (None, 2, 64):
        model = load_frames(cls, tmp_path, micro_batch_size=size)
        latents, videos = model.encode(x, sample=False), model.decode(z)
        for i in range(2):
            torch.testing.assert_close(latents[i : i + 1], model.encode(x[i : i + 1], sample=False))
            torch.testing.assert_close(videos[i : i + 1], model.decode(z[i : i + 1]))


@KINDS
def test_micro_batches_bound_the_frames_at_once(cls: type[FrameAutoencoder], tmp_path: Path) -> None:
    published(cls, tmp_path)
    model = load_frames(cls, tmp_path, micro_batch_size=2)
    seen: dict[str, list[int]] = {"encoder": [], "decoder": []}
    for part, sizes in seen.items():
        getattr(model.module, part).register_forward_pre_hook(lambda _, args, sizes=sizes: sizes.append(len(args[0])))
    latents = model.encode(noise(1, 3, 5, 16, 16), sample=False)
    video = model.decode(latents)
    assert seen == {"encoder": [2, 2, 1], "decoder": [2, 2, 1]}
    whole = load_frames(cls, tmp_path)
    torch.testing.assert_close(whole.encode(noise(1, 3, 5, 16, 16), sample=False), latents)
    sees_time = cls is VideoAutoencoderKLTemporalDecoder
    assert torch.allclose(whole.decode(latents), video, atol=1e-5) != sees_time
    expected = torch.cat([whole.decode(part) for part in latents.split(2, dim=2)], dim=2)
    torch.testing.assert_close(video, expected)


@KINDS
def test_the_config_of_another_class_is_refused(cls: type[FrameAutoencoder]) -> None:
    with pytest.raises(
        ConfigError, match=f"{cls.__name__} takes weights of {cls.network.__name__}, these are of AutoencoderTiny"
    ):
        cls.keywords({"_class_name": "AutoencoderTiny"})
    assert (
        cls.keywords({"_class_name": cls.network.__name__, "_diffusers_version": "0.4.2", "latents_mean": None}) == {}
    )


def test_an_autoencoder_that_does_not_fit_names_its_tensors(tmp_path: Path) -> None:
    published(VideoAutoencoderKL, tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**SHAPES[VideoAutoencoderKL], "layers_per_block": 2}))
    with pytest.raises(WeightsError, match=r"not fit VideoAutoencoderKL: missing module\.encoder\.down_blocks\.0"):
        load_frames(VideoAutoencoderKL, tmp_path)


def test_a_pipeline_ignores_where_its_parts_were_loaded_from() -> None:
    where = dict(from_pretrained="a/b", subfolder="vae", cache_dir=None, local_files_only=True, force_huggingface=True)
    with torch.device("meta"):
        model = VideoAutoencoderPipeline(vae_2d={**SHAPES[VideoAutoencoderKL], **where}, micro_batch_size=4)
    assert model.spatial_vae.micro_batch_size == 4 and not set(where) & set(model.config["vae_2d"])


PROMPTS = ("a red car", "a red bird over the sea at dawn", "", "Café, 2 dogs!")


def load_clip(folder: Path, **options: Any) -> CLIPEncoder:
    encoder = make_clip(json.loads((folder / "config.json").read_text()), load_clip_tokenizer(folder), **options)
    load_weights(encoder.model, folder)
    return encoder


def their_tokenizer(folder: Path) -> Any:
    from transformers import CLIPTokenizerFast

    return CLIPTokenizerFast.from_pretrained(str(folder), local_files_only=True)


def pooled(reference: nn.Module, folder: Path, texts: list[str]) -> Tensor:
    """transformers' pooled feature [B, C] of texts padded and cut to all positions."""
    tokens = their_tokenizer(folder)(
        texts, truncation=True, max_length=POSITIONS, padding="max_length", return_tensors="pt"
    )
    return reference.text_model(input_ids=tokens["input_ids"]).pooler_output


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, nn.Module]:
    return make_clip_folder(tmp_path_factory.mktemp("clip"))


@pytest.mark.parametrize("ids", ["earlier", "own"])
def test_clip_equals_transformers(ids: str, tmp_path: Path) -> None:
    end = 2 * 256 + 4 + 1
    own = dict(bos_token_id=end - 1, eos_token_id=end, pad_token_id=end)
    folder, reference = make_clip_folder(tmp_path, **(own if ids == "own" else {}))
    encoder = load_clip(folder)
    texts = [text for text in PROMPTS if len(encoder.tokenizer.encode(text)) <= POSITIONS]
    assert len(texts) == 3 and encoder.output_dim == 16 and encoder.model_max_length == POSITIONS
    features, mask = encoder.encode(texts)
    assert mask is None and features.shape == (3, 1, 1, 16) and features.dtype == torch.float32
    torch.testing.assert_close(features[:, 0, 0], pooled(reference, folder, texts))
    assert (features[0] - features[2]).abs().max() > 0.01


def test_clip_padding_takes_part_in_nothing(clip: tuple[Path, nn.Module]) -> None:
    encoder = load_clip(clip[0])
    together = encoder.encode([PROMPTS[0], PROMPTS[3]])[0]
    for i, text in enumerate((PROMPTS[0], PROMPTS[3])):
        torch.testing.assert_close(together[i : i + 1], encoder.encode([text])[0], atol=1e-5, rtol=1e-5)


def test_a_long_prompt_of_clip_is_cut_with_a_warning(
    clip: tuple[Path, nn.Module], caplog: pytest.LogCaptureFixture
) -> None:
    folder, reference = clip
    with caplog.at_level(logging.WARNING):
        features = load_clip(folder, model_max_length=77).encode([PROMPTS[1]])[0]
    assert PROMPTS[1] in caplog.text and f"first {POSITIONS}" in caplog.text
    torch.testing.assert_close(features[:, 0, 0], pooled(reference, folder, [PROMPTS[1]]))
    assert not torch.allclose(load_clip(folder, model_max_length=5).encode([PROMPTS[1]])[0], features, atol=1e-3)


@pytest.mark.parametrize("layout", ["text_model.", ""])
def test_a_file_of_the_text_encoder_alone(clip: tuple[Path, nn.Module], layout: str, tmp_path: Path) -> None:
    folder, reference = clip
    state = {f"{layout}{name}": tensor for name, tensor in reference.text_model.state_dict().items()}
    state[f"{layout}embeddings.position_ids"] = torch.arange(POSITIONS)[None]
    save_file(state, tmp_path / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())["text_config"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    their_tokenizer(folder).save_pretrained(tmp_path)
    (tmp_path / "vocab.json").unlink(missing_ok=True)
    assert torch.equal(load_clip(tmp_path).encode(["a red car"])[0], load_clip(folder).encode(["a red car"])[0])


def test_clip_in_half_precision(clip: tuple[Path, nn.Module]) -> None:
    encoder = load_clip(clip[0], dtype=torch.bfloat16)
    assert {p.dtype for p in encoder.model.parameters()} == {torch.bfloat16}
    features = encoder.encode(["a red car"])[0]
    assert features.dtype == torch.float32
    torch.testing.assert_close(features, load_clip(clip[0]).encode(["a red car"])[0], atol=0.2, rtol=0.1)


OTHER_KINDS = (b"version https://git-lfs.github.com/spec/v1\n", b"<html></html>", b"")


@pytest.mark.parametrize(
    ("name", "content"),
    [(n, c) for n in ("vocab.json", "merges.txt", "config.json", "tokenizer_config.json") for c in OTHER_KINDS]
    + [(n, c) for n in ("vocab.json", "config.json") for c in (b"[" * 99, b'{"a": 1')],
)
def test_damaged_files_of_clip_are_named(
    clip: tuple[Path, nn.Module], tmp_path: Path, name: str, content: bytes
) -> None:
    shutil.copytree(clip[0], tmp_path, dirs_exist_ok=True)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(WeightsError, match=rf"{name}: ") as caught:
        builder.build_text_encoder({"type": "clip"}, tmp_path, torch.float32)
    assert "\n" not in str(caught.value)


def test_clip_errors_name_what_is_missing(clip: tuple[Path, nn.Module], tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"tokenizer\.json, or vocab\.json and merges\.txt"):
        load_clip_tokenizer(tmp_path)
    (tmp_path / "vocab.json").write_text("{}")
    with pytest.raises(WeightsError, match="no CLIP tokenizer"):
        load_clip_tokenizer(tmp_path)
    state = load_file(clip[0] / "model.safetensors")
    del state["text_model.final_layer_norm.bias"]
    save_file(state, tmp_path / "model.safetensors")
    encoder = make_clip(json.loads((clip[0] / "config.json").read_text()), load_clip_tokenizer(clip[0]))
    with pytest.raises(WeightsError, match=r"missing text_model\.final_layer_norm\.bias"):
        load_weights(encoder.model, tmp_path)


def test_class_numbers() -> None:
    ids, mask = ClassIds().encode(["207", " 0 ", "999", "007"])
    assert ids.tolist() == [207, 0, 999, 7] and ids.dtype == torch.int64 and mask is None


@pytest.mark.parametrize("text", ["101", "-1", "", "2.0", "1e1", "1_0", "٣", "goldfish", "207 208", "9" * 5000])
def test_what_is_no_class_is_named(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        ClassIds(num_classes=101).encode(["5", text])
    assert "0 to 100" in str(caught.value) and text[:57] in str(caught.value) and len(str(caught.value)) < 150

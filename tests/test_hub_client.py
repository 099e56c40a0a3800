"""Weights from the hub, which is a stand-in here: what is asked of it, when nothing is, and what its answers mean."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from opensora.checkpoints import builder, convert, inspect
from opensora.checkpoints.hub import EMBEDDED, locate
from opensora.checkpoints.published_files import PUBLISHED, published
from opensora.checkpoints.read import read_state_dict
from opensora.checkpoints.save import save_file
from opensora.cli import main
from opensora.config import read_config
from opensora.config.settings import TrainSettings
from opensora.errors import WeightsError
from tests.hub_server import COMMIT, StandIn, hub_server
from tests.tiny import TINY_VAE, make_tiny_stdit3

ROOT = Path(__file__).parents[1]
REPO = "org/name"
CPU, FP32 = torch.device("cpu"), torch.float32


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    with hub_server(tmp_path / "cache", monkeypatch) as server:
        save_file({"a": torch.ones(3)}, tmp_path / "a.safetensors")
        content = (tmp_path / "a.safetensors").read_bytes()
        server.repositories[REPO] = {
            "config.json": b"{}",
            "model.safetensors": content,
            "vae/model.safetensors": content,
        }
        yield server


def partial(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file() and path.name.endswith(".incomplete")]


def test_weights_are_fetched_once(hub: StandIn, tmp_path: Path) -> None:
    first = locate(REPO)
    assert read_state_dict(first)["a"].sum() == 3 and first.is_relative_to(tmp_path / "cache")
    assert any("model.safetensors" in one for one in hub.asked)
    hub.asked.clear()
    assert locate(REPO) == first and not hub.asked


@pytest.mark.parametrize("how", ["offline", "local_files_only", "HF_HUB_OFFLINE"])
@pytest.mark.parametrize("source", [REPO, "PixArt-XL-2-512x512.pth"])
def test_nobody_is_asked_when_that_is_forbidden(
    hub: StandIn, how: str, source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", how == "HF_HUB_OFFLINE")
    with pytest.raises(WeightsError, match=r"not in the hub cache \((offline|local_files_only)\); .*fill"):
        locate(source, offline=how == "offline", local_files_only=how == "local_files_only")
    assert not hub.asked


@pytest.mark.parametrize("what", ["model", "vae", "text_encoder"])
@pytest.mark.parametrize("key", ["local_files_only", "cache_dir"])
def test_sections_say_where_and_whether(hub: StandIn, tmp_path: Path, what: str, key: str) -> None:
    types = {"model": "STDiT3", "vae": "VideoAutoencoderKL", "text_encoder": "t5"}
    section = {"type": types[what], "from_pretrained": REPO, key: True if key == "local_files_only" else "~/here"}
    if key == "local_files_only":
        for act in (
            lambda: builder.find_weights(section, what),
            lambda: builder.load_component(section, what, CPU, FP32),
        ):
            with pytest.raises(WeightsError, match=rf"^{what}: 'org/name' .*\(local_files_only\)"):
                act()
        assert not hub.asked
        return
    section[key] = str(tmp_path / "here")
    found = builder.find_weights(section, what)
    assert found.is_relative_to(tmp_path / "here") and not (tmp_path / "cache").exists()
    hub.asked.clear()
    assert builder.find_weights({**section, "local_files_only": True}, what) == found and not hub.asked


def test_parts_of_an_autoencoder_say_where_and_whether(hub: StandIn, tmp_path: Path) -> None:
    from opensora.training.autoencoder import _build

    where = {"from_pretrained": REPO, "subfolder": "vae", "local_files_only": True}
    for name in ("vae_2d", "vae_temporal"):
        with pytest.raises(WeightsError, match=rf"^{name}: 'org/name' .*\(local_files_only\)"):
            _build({"type": "VideoAutoencoderPipeline", name: where}, offline=False)
    with pytest.raises(WeightsError, match=r"^model: 'org/name' .*\(offline\)"):
        _build({"type": "VideoAutoencoderPipeline", "from_pretrained": REPO}, offline=True)
    assert not hub.asked


def test_parts_of_an_autoencoder_start_from_the_weights_they_name(tmp_path: Path) -> None:
    from opensora.training.autoencoder import _build

    trained = _build({"type": "VideoAutoencoderPipeline", **TINY_VAE}, offline=True)
    for name, part in (("vae_2d", trained.spatial_vae), ("vae_temporal", trained.temporal_vae)):
        save_file(part.state_dict(), tmp_path / f"{name}.pt")
        section = {**TINY_VAE, name: {**TINY_VAE[name], "from_pretrained": str(tmp_path / f"{name}.pt")}}
        found = _build({"type": "VideoAutoencoderPipeline", **section}, offline=True)
        own = found.spatial_vae if name == "vae_2d" else found.temporal_vae
        assert all(torch.equal(value, own.state_dict()[key]) for key, value in part.state_dict().items())
        other = {"vae_2d": "temporal_vae", "vae_temporal": "spatial_vae"}[name]
        before, now = (getattr(one, other).state_dict() for one in (trained, found))
        assert any(not torch.equal(value, now[key]) for key, value in before.items())


def test_training_says_whether(hub: StandIn) -> None:
    from opensora.training.data.diffusion_data import DiffusionData
    from opensora.training.diffusion import build_model

    for model, offline in (({"local_files_only": True}, False), ({}, True)):
        section = {"type": "STDiT3", "from_pretrained": REPO, **model}
        settings = TrainSettings(model=section, scheduler={"type": "rflow"}, offline=offline)
        with pytest.raises(WeightsError, match=r"^model: 'org/name' .*not in the hub cache"):
            build_model(settings, DiffusionData(None, None, [], {}, {}, None), CPU)
    assert not hub.asked


@pytest.mark.parametrize(
    "verb", [["inspect", REPO], ["convert", REPO, "out.pt", "--to", "pt"], ["inspect", "ucf101.pt"]]
)
def test_programs_say_whether(
    hub: StandIn, verb: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([*verb, "--offline"]) == 1
    assert capsys.readouterr().err.count("\n") == 1 and not hub.asked
    if verb[1] == REPO:
        assert main(verb) == 0 and hub.asked


@pytest.mark.parametrize(
    ("status", "told"),
    [
        (401, "is private, gated or does not exist (log in with `hf auth login`)"),
        (403, "agree to its terms at https://huggingface.co/org/name, then log in with `hf auth login`"),
        (404, "there is no such repository or file; check the name"),
        (429, "too many requests"),
        (500, "answers 500 for it"),
        (503, "answers 503 for it"),
    ],
)
def test_answers_of_the_hub_are_told(hub: StandIn, status: int, told: str, tmp_path: Path) -> None:
    hub.refused[REPO] = status
    with pytest.raises(WeightsError) as caught:
        locate(REPO, what="VAE weights")
    message = str(caught.value)
    assert message.startswith("VAE weights: 'org/name' is not a local path") and told in message and "\n" not in message
    assert not partial(tmp_path)


@pytest.mark.parametrize("name", ["model.safetensors", "PixArt-XL-2-512x512.pth", "ucf101.pt"])
def test_a_download_that_breaks_off_leaves_nothing(hub: StandIn, tmp_path: Path, name: str) -> None:
    source = next((bare for bare, known in PUBLISHED.items() if known.file == name), REPO)
    if source != REPO:
        hub.repositories[PUBLISHED[source].repository] = {name: bytes(5000)}
    hub.cut.add(name)
    with pytest.raises(WeightsError, match=r"download of .* failed \(") as caught:
        locate(source)
    assert "\n" not in str(caught.value) and not partial(tmp_path)
    hub.cut.clear()
    assert locate(source).exists()


def test_a_published_name_is_a_local_file_if_there_is_one(
    hub: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in PUBLISHED:
        Path(name).touch()
        assert locate(name) == Path(name)
    assert not hub.asked


@pytest.mark.parametrize("name", [name for name, known in PUBLISHED.items() if known.repository])
def test_a_published_name_is_fetched_as_one_file(hub: StandIn, name: str) -> None:
    known = PUBLISHED[name]
    hub.repositories[known.repository] = {known.file: b"weights", "other.pth": b"not these"}
    path = locate(name)
    assert path.read_bytes() == b"weights" and path.name == known.file
    assert not any("other.pth" in one for one in hub.asked)
    hub.asked.clear()
    assert locate(name, offline=True) == path and not hub.asked


@pytest.mark.parametrize(
    ("spelt", "name"),
    [
        ("PixArt-XL-2-1024MS.pth", "PixArt-XL-2-1024-MS.pth"),
        ("PixArt-Sigma-XL-2-2k-MS.pth", "PixArt-Sigma-XL-2-2K-MS.pth"),
        ("pixart_sigma_xl_2_512ms.pth", "PixArt-Sigma-XL-2-512-MS.pth"),
        ("OpenSora-V1-HQ-16x512x512.pth", "OpenSora-v1-HQ-16x512x512.pth"),
    ],
)
def test_other_spellings_of_published_names(spelt: str, name: str) -> None:
    assert published(spelt) == PUBLISHED[name]


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("DiT-XL-2-256x256.pt", "is published at https://dl.fbaipublicfiles.com/DiT/models/DiT-XL-2-256x256.pt"),
        ("DiT-XL-2-512x512.pt", "download it, and give its path"),
        ("PixArt-1B-2.pth", "its authors have not published it; name other weights (--ckpt-path)"),
        ("PixArt-XL-2-512x521.pth", "did you mean 'PixArt-XL-2-512x512.pth'?"),
        ("weights/PixArt-XL-2-512x512.pth", "give the bare name 'PixArt-XL-2-512x512.pth'"),
        ("no-such-file", "name one that is here, or a hub id (org/name)"),
        ("x" * 5000, "no such file or folder"),
        ("a\0b", "no such file or folder"),
    ],
)
def test_what_cannot_be_fetched_says_the_ways_out(hub: StandIn, name: str, told: str) -> None:
    with pytest.raises(WeightsError) as caught:
        locate(name)
    assert told in str(caught.value) and not hub.asked


def test_a_published_name_offline_says_where_to_get_it(hub: StandIn) -> None:
    with pytest.raises(WeightsError) as caught:
        locate("OpenSora-v1-HQ-16x256x256.pth", what="model", offline=True)
    address = "https://huggingface.co/hpcai-tech/Open-Sora/blob/main/OpenSora-v1-HQ-16x256x256.pth"
    assert f"download it from {address} and name it with --ckpt-path" in str(caught.value) and not hub.asked


def test_a_link_to_nothing_is_told(tmp_path: Path) -> None:
    (tmp_path / "x.pt").symlink_to(tmp_path / "gone")
    with pytest.raises(WeightsError, match="is a link to something that is missing"):
        locate(tmp_path / "x.pt")


def named(section: object) -> Iterator[str]:
    """Every `from_pretrained` in a configuration, also of parts of parts."""
    if isinstance(section, dict):
        for key, value in section.items():
            if key == "from_pretrained" and value:
                yield value
            yield from named(value)


CONFIGS = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "configs").rglob("*.py"))
OWN = ("outputs/", "opensora/embedded/", "pretrained_models/")  # what training here writes or ships


@pytest.mark.parametrize("config", CONFIGS)
def test_shipped_configurations_name_weights_that_can_be_had(hub: StandIn, config: str) -> None:
    """Or, offline, that are told where they can be had."""
    for name in named(read_config(ROOT / config)):
        if name.startswith((EMBEDDED, *OWN)) or name == "PRETRAINED_MODEL":
            continue
        with pytest.raises(WeightsError) as caught:
            locate(name, offline=True)
        known = published(name)
        wanted = "not in the hub cache (offline)" if known is None or known.repository else "published"
        assert wanted in str(caught.value), name
    assert not hub.asked


def test_the_cache_that_a_section_names_is_used_for_converting(hub: StandIn, tmp_path: Path) -> None:
    model = make_tiny_stdit3(tmp_path / "model")
    hub.repositories[REPO] = {path.name: path.read_bytes() for path in model.iterdir()}
    assert inspect(REPO).model_type == "STDiT3"
    convert(REPO, str(tmp_path / "b"), "hf")
    assert json.loads((tmp_path / "b" / "config.json").read_text())["model_type"] == "STDiT3"
    assert COMMIT in str(locate(REPO))

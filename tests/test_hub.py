"""Finding checkpoints: local paths, the local hub cache, and a hub that cannot be reached."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from opensora.checkpoints.hub import checkpoint_files, locate, read_config_json
from opensora.errors import WeightsError

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty hub cache of which nothing outside is asked."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("opensora.checkpoints.hub._unreachable", lambda repo: "cannot be reached (test)")
    return tmp_path / "cache"


def fill(cache: Path, repo: str, *files: str) -> Path:
    """Lays out a repository as the hub client does; weight files are valid, others hold an empty object."""
    root = cache / f"models--{repo.replace('/', '--')}"
    (root / "refs").mkdir(parents=True)
    (root / "refs" / "main").write_text(COMMIT)
    for name in files:
        file = root / "snapshots" / COMMIT / name
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file({"a": torch.zeros(1)}, file) if file.suffix == ".safetensors" else file.write_text("{}")
    return root / "snapshots" / COMMIT


def test_local_paths_are_taken_as_they_are(tmp_path: Path) -> None:
    file = tmp_path / "model.pt"
    file.touch()
    assert locate(file) == file
    assert locate(str(tmp_path)) == tmp_path
    (tmp_path / "vae").mkdir()
    assert locate(tmp_path, subfolder="vae") == tmp_path / "vae"
    assert locate(tmp_path, subfolder="elsewhere") == tmp_path


def test_home_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "weights.pt").touch()
    assert locate("~/weights.pt") == tmp_path / "weights.pt"


@pytest.mark.parametrize(
    "source", ["./org", "/nowhere/org", "~/no-such-folder", "org/name.pt", "name.safetensors", "a/b/c", "name"]
)
def test_what_looks_local_is_never_asked_of_the_hub(source: str) -> None:
    with pytest.raises(WeightsError, match=r"^STDiT3 weights: no such file or folder"):
        locate(source, what="STDiT3 weights")


def test_empty_source_is_refused() -> None:
    with pytest.raises(WeightsError, match="no path and no hub id"):
        locate("")


def test_cached_repository_needs_no_network(cache: Path) -> None:
    snapshot = fill(cache, "org/name", "config.json", "model.safetensors")
    assert locate("org/name") == snapshot
    assert locate("org/name", offline=True) == snapshot


def test_cached_subfolder(cache: Path) -> None:
    snapshot = fill(cache, "org/name", "vae/model.safetensors")
    assert locate("org/name", subfolder="vae") == snapshot / "vae"


def test_cache_with_pickled_weights_only(cache: Path) -> None:
    snapshot = fill(cache, "org/name", "config.json", "pytorch_model.bin")
    assert locate("org/name") == snapshot


@pytest.mark.parametrize("files", [[], ["config.json"], ["config.json", "text_encoder/model.safetensors"]])
def test_incomplete_cache_is_no_find(cache: Path, files: list[str]) -> None:
    fill(cache, "org/name", *files)
    with pytest.raises(WeightsError, match="not in the hub cache"):
        locate("org/name")


def test_offline_says_the_ways_out(cache: Path) -> None:
    with pytest.raises(WeightsError) as caught:
        locate("org/name", what="VAE weights", offline=True)
    message = str(caught.value)
    assert message.startswith("VAE weights: 'org/name'")
    assert all(way in message for way in ("local path", "cache", "--model embedded"))
    assert "\n" not in message


@pytest.mark.parametrize("hangs", [False, True])
def test_unreachable_hub_fails_within_seconds(tmp_path: Path, hangs: bool) -> None:
    import socket

    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        if hangs:
            server.listen()
        code = (
            "import opensora.checkpoints.hub as hub, opensora.errors as errors\n"
            "import time\n"
            "hub._TIMEOUT, start = 1.0, time.monotonic()\n"
            "try:\n    hub.locate('org/name', what='STDiT3 weights')\n"
            "except errors.WeightsError as error:\n    print(error)\n"
            "assert time.monotonic() - start < 30\n"
        )
        address = f"http://127.0.0.1:{server.getsockname()[1]}"
        root = Path(__file__).parent.parent
        places = {"HF_HOME": str(tmp_path), "HF_ENDPOINT": address, "PYTHONPATH": str(root), "HF_HUB_OFFLINE": "0"}
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "TRANSFORMERS_"))}
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, env={**kept, **places}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 1, done.stderr
    assert "the hub cannot be reached" in done.stdout
    assert all(way in done.stdout for way in ("local path", "cache", "--model embedded"))


def test_download_follows_a_missing_cache(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def download(repo: str, *, allow_patterns: list[str], local_files_only: bool, **_: object) -> str:
        asked.append((local_files_only, allow_patterns[-1]))
        if local_files_only:
            raise FileNotFoundError
        return str(fill(cache, repo, "pytorch_model.bin") if "*.bin" in allow_patterns else cache)

    cache.mkdir()
    monkeypatch.setattr("opensora.checkpoints.hub._unreachable", lambda repo: None)
    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert locate("org/name").name == COMMIT
    assert [local for local, _ in asked] == [True, True, False, False]
    assert asked[2][1] == "*.safetensors"


def test_failed_download_is_one_line(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def download(repo: str, *, local_files_only: bool, **_: object) -> str:
        raise FileNotFoundError if local_files_only else RuntimeError("connection\nlost")

    monkeypatch.setattr("opensora.checkpoints.hub._unreachable", lambda repo: None)
    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    with pytest.raises(WeightsError, match=r"download of 'org/name' failed \(RuntimeError: connection lost\)"):
        locate("org/name")


@pytest.mark.parametrize(
    ("files", "chosen"),
    [
        (["model.safetensors", "pytorch_model.bin"], "model.safetensors"),
        (["diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.fp16.safetensors"], None),
        (["pytorch_model.bin", "training_args.bin"], "pytorch_model.bin"),
        (["model/pytorch_model.bin", "ema.pt"], "model/pytorch_model.bin"),
        (["ema.pt"], "ema.pt"),
        (["PixArt-XL-2-512x512.pth", ".hidden.pth"], "PixArt-XL-2-512x512.pth"),
    ],
)
def test_the_weights_of_a_folder(tmp_path: Path, files: list[str], chosen: str | None) -> None:
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert list(checkpoint_files(tmp_path)) == [tmp_path / (chosen or files[0])]


def test_ambiguous_and_empty_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="no weights in this folder"):
        checkpoint_files(tmp_path)
    (tmp_path / "a.pt").touch()
    (tmp_path / "b.pt").touch()
    with pytest.raises(WeightsError, match=r"several checkpoints in this folder \(a.pt, b.pt\)"):
        checkpoint_files(tmp_path)


def write_index(folder: Path, weight_map: object) -> Path:
    index = folder / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    return index


@pytest.mark.parametrize("name", ["../x.bin", "/etc/x.bin", "a/b.bin", "..", "", "a\\b.bin", 3])
def test_shards_elsewhere_are_refused(tmp_path: Path, name: object) -> None:
    write_index(tmp_path, {"a": name})
    with pytest.raises(WeightsError, match="not a file beside the index"):
        checkpoint_files(tmp_path)


def test_missing_shard_is_named(tmp_path: Path) -> None:
    (tmp_path / "one.bin").touch()
    write_index(tmp_path, {"a": "one.bin", "b": "two.bin"})
    with pytest.raises(WeightsError, match=r"index\.json: names shard 'two.bin', which is missing"):
        checkpoint_files(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": {}}', '{"weight_map": []}'])
def test_broken_index_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(WeightsError, match=r"model\.safetensors\.index\.json"):
        checkpoint_files(tmp_path)


def test_config_json(tmp_path: Path) -> None:
    assert read_config_json(tmp_path) == {}
    (tmp_path / "config.json").write_text('{"model_type": "STDiT3"}')
    assert read_config_json(tmp_path) == {"model_type": "STDiT3"}
    assert read_config_json(tmp_path / "model.safetensors") == {"model_type": "STDiT3"}
    assert read_config_json(tmp_path / "ema.pt") == {}
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(WeightsError, match=r"config\.json: holds a JSON list"):
        read_config_json(tmp_path)

"""`opensora doctor`: what it reports, what it counts as broken, and that it shows no secret."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from opensora import __version__
from opensora.cli import environment, main

SECRET = "hf_secretsecretsecret"


@pytest.fixture(autouse=True)
def one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in environment.RANK_VARIABLES:
        monkeypatch.delenv(name, raising=False)


def report(capsys: pytest.CaptureFixture, status: int = 0) -> dict[str, Any]:
    assert main(["doctor", "--json"]) == status
    found = json.loads(capsys.readouterr().out)
    assert found["ok"] == (status == 0)
    return found


def test_the_report_fits_one_screen(capsys: pytest.CaptureFixture) -> None:
    assert main(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) < 30 and max(map(len, lines)) < 130
    assert lines[-1] == "ok: opensora can run here"
    titles = [line.split()[0] for line in lines if line and not line.startswith(" ")]
    assert titles[:-1] == [
        "system", "packages", "optional", "devices", "codecs", "model", "caches", "variables", "ranks",
    ]  # fmt: skip


def test_versions_devices_and_codecs(capsys: pytest.CaptureFixture) -> None:
    import torch

    found = report(capsys)
    assert found["system"]["opensora"]["value"] == __version__
    assert found["packages"]["torch"]["value"] == torch.__version__
    assert f"{torch.get_num_threads()} threads" in found["devices"]["host"]["value"]
    assert "libx264" in found["codecs"]["encoders"]["value"] and "h264" in found["codecs"]["decoders"]["value"]
    assert found["ranks"]["torchrun"]["value"] == "one process"


def test_a_missing_extra_names_its_remedy(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "_requirements", lambda: iter([("no-such-package", ">=1", "parquet")]))
    entry = report(capsys)["optional"]["no-such-package"]
    assert entry == {"value": "missing", "problem": "pip install 'opensora[parquet]'", "broken": False}


@pytest.mark.parametrize(
    ("name", "bounds"), [("no-such-package", ">=1"), ("torch", ">=99"), ("torch", ">=2.6,<2.7"), ("numpy", ">=1.26,<2")]
)
def test_a_missing_or_wrong_requirement_is_broken(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, name: str, bounds: str
) -> None:
    monkeypatch.setattr(environment, "_requirements", lambda: iter([(name, bounds, "")]))
    entry = report(capsys, status=1)["packages"][name]
    assert entry["broken"] and entry["problem"] == f"pip install '{name}{bounds}'"


def test_requirements_are_those_of_the_package() -> None:
    found = list(environment._requirements())
    assert ("torch", ">=2.6", "") in found and ("pyarrow", ">=15", "parquet") in found


def test_a_section_that_fails_is_reported(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails() -> Any:
        raise ImportError(f"{Path.home()}/lib/libcuda.so: undefined symbol")

    monkeypatch.setattr(environment, "_devices", fails)
    entry = report(capsys, status=1)["devices"]["ImportError"]
    assert entry["broken"] and entry["value"].endswith("/lib/libcuda.so: undefined symbol")
    assert str(Path.home()) not in entry["value"] or Path.home() == Path("/")


def test_missing_weights_are_broken(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(environment, "__file__", str(tmp_path / "opensora" / "cli" / "environment.py"))
    found = report(capsys, status=1)
    assert {name for name, entry in found["model"].items() if entry.get("broken")} == {"stdit3", "vae", "text_encoder"}


def test_ranks_without_an_address_are_broken(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    entry = report(capsys, status=1)["ranks"]["torchrun"]
    assert entry["value"] == "WORLD_SIZE" and "start the ranks with torchrun" in entry["problem"]


def test_the_rank_under_torchrun(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in zip(environment.RANK_VARIABLES, ("2", "1", "1", "localhost", "29500"), strict=True):
        monkeypatch.setenv(name, value)
    assert report(capsys)["ranks"]["torchrun"]["value"] == "rank 1 of 2, local rank 1"


@pytest.mark.parametrize("form", [[], ["--json"]], ids=["text", "json"])
def test_no_secret_is_shown(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, form: list[str]
) -> None:
    home = tmp_path / "people" / "alice"
    (home / ".cache").mkdir(parents=True)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("USER", "alice")
    monkeypatch.setenv("HF_HOME", str(home / "models"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "scratch" / "alice"))
    for name in environment.SECRET_VARIABLES:
        monkeypatch.setenv(name, SECRET)
    for name in ("OPENAI_BASE_URL", "HF_ENDPOINT"):
        monkeypatch.setenv(name, f"https://alice:{SECRET}@host")
    assert main(["doctor", *form]) == 0
    printed = capsys.readouterr().out
    assert SECRET not in printed and "alice" not in printed
    assert "HF_TOKEN" in printed and "set, not shown" in printed
    assert "~/models" in printed and "/scratch/USER" in printed


def test_the_size_of_a_cache(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x").write_bytes(bytes(1500))
    (tmp_path / "y").write_bytes(bytes(1500))
    os.symlink("y", tmp_path / "link")
    assert environment._folder_size(tmp_path) == "3 kB"
    assert environment._folder_size(tmp_path / "missing") == "0 B"

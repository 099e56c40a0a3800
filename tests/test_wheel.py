"""The wheel is the product: built, installed outside of the repository, and run from there.

The environment is new, but finds the dependencies of this one; the package itself can only come from the wheel.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path
from typing import NamedTuple

import pytest

from opensora.cli.verbs import VERBS
from opensora.datasets.synthetic.render import make_clip
from opensora.datasets.video import read_video, write_video
from tests.full import FULL

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.timeout(900)  # on a machine with other work
PROMPT = "a red circle moving right on a black background"
SMALL = ("--image-size", "16", "24", "--num-frames", "5", "--verbose", "0")
FEW = "bucket_config={'144p': {17: (1.0, 1)}}"
ONE_STEP = ("batch_size=1", "num_workers=0", "max_steps=1", "ckpt_every=0", "validate_every=0", "sample_every=0")
TINY_VAE = (
    "dataset.image_size=(16, 16)", "model.vae_2d.block_out_channels=(8, 8, 8, 8)", "model.vae_2d.norm_num_groups=4",
    "model.vae_temporal.filters=8", "model.vae_temporal.num_groups=4",
)  # fmt: skip

# What the package must find outside of the repository: its weights, its configurations, its verbs.
COMMANDS: tuple[tuple[str, ...], ...] = (
    ("generate", PROMPT, *SMALL, "--steps", "2", "-o", "clip.mp4"),
    ("table", "videos", "videos.csv"),
    ("train", "embedded/train/finetune", "--data-path", "videos.csv", "--cfg-options", *ONE_STEP),
    ("export", "outputs/finetune/000-STDiT3", "exported", "--dtype", "fp16"),
    ("generate", PROMPT, *SMALL, "--steps", "1", "--ckpt-path", "exported"),
    ("doctor", "--json"),
)  # fmt: skip
# The other verbs, for the full run; tests/test_documents.py runs every verb in the repository.
MORE: tuple[tuple[str, ...], ...] = (
    ("plan", PROMPT, *SMALL),
    ("generate", PROMPT, *SMALL, "--steps", "2", "--steps-until", "1", "-o", "half.mp4"),
    ("continue", "half.draft.safetensors"),
    ("replay", "clip.mp4"),
    ("inspect", "clip.mp4"),
    ("benchmark", PROMPT, *SMALL, "--steps", "1", "--warmup-count", "0", "--eval-count", "1"),
    ("models",),
    ("buckets", "videos.csv", "embedded/train/finetune_buckets", "--cfg-options", FEW),
    (
        "extract", "embedded/train/finetune_buckets", "--data-path", "videos.csv", "--end-index", "1",
        "--cfg-options", "num_workers=0", FEW,
    ),
    ("train-vae", "embedded/train/vae_2d", "--outputs", "vae", "--cfg-options", *ONE_STEP, *TINY_VAE),
    ("convert", "exported", "exported.pt", "--to", "pt"),
    (
        "search-bs", "embedded/train/finetune_buckets", "--base-step-time", "60",
        "--cfg-options", "untimed_steps=0", "active_steps=1", "bucket_config={'144p': {1: (1, 1)}}",
    ),
)  # fmt: skip
SNIPPET = """
import opensora
pipe = opensora.load("embedded", device="cpu")
video = pipe("a red circle moving right on a black background", num_frames=17, num_inference_steps=2, seed=3)
assert video.frames.dtype == "uint8" and video.frames.shape == (17, 64, 64, 3)
video.save("out.mp4")
"""
RUN_ALL = f"""{SNIPPET}
import json, sys, time
from opensora.cli import main
print("FROM", opensora.__file__, file=sys.stderr)
for command in json.loads(sys.argv[1]):
    started = time.process_time()
    status = main(command)
    print(time.process_time() - started, "s:", *command, file=sys.stderr)
    assert status == 0, (status, command)
"""
HELP = """
import contextlib, io, json, runpy, sys
for verb in json.loads(sys.argv[1]):
    sys.argv = ["opensora", verb, "--help"]
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        try:
            runpy.run_module("opensora", run_name="__main__")
        except SystemExit as end:
            assert end.code == 0, verb
    assert printed.getvalue().startswith(f"usage: opensora {verb}"), verb
"""


class Installed(NamedTuple):
    """A virtual environment with the wheel, and a folder outside of the repository to work in."""

    wheel: Path
    python: Path
    folder: Path

    def run(self, *words: str | Path) -> subprocess.CompletedProcess[str]:
        """A program of the environment: `opensora`, or `python` with its arguments."""
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "OPENSORA"))}
        environment |= {
            "PATH": f"{self.python.parent}{os.pathsep}{os.environ['PATH']}", "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1", "GLOO_SOCKET_IFNAME": "lo", "XDG_CACHE_HOME": str(self.folder / "cache"),
        }  # fmt: skip
        program = self.python.parent / str(words[0])
        command = [str(program), *map(str, words[1:])]
        done = subprocess.run(command, cwd=self.folder, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{words}: {done.stdout[-1000:]}{done.stderr[-4000:]}"
        return done


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Installed:
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    build = [*pip, "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder), str(ROOT)]
    done = subprocess.run(build, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    [wheel] = folder.glob("opensora-*.whl")
    venv.create(folder / "venv", with_pip=False)
    python = folder / "venv" / "bin" / "python"
    site = folder / "venv" / "lib" / f"python{sys.version_info[0]}.{sys.version_info[1]}" / "site-packages"
    torch = importlib.util.find_spec("torch")
    assert torch is not None and torch.origin is not None
    dependencies = {sysconfig.get_paths()["purelib"], str(Path(torch.origin).parents[1])}
    (site / "dependencies.pth").write_text("\n".join(dependencies))  # an editable install there is not followed
    install = [*pip, "--python", str(python), "install", "--quiet", "--no-deps", "--no-index", str(wheel)]
    done = subprocess.run(install, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    (folder / "work").mkdir()
    return Installed(wheel, python, folder / "work")


@pytest.fixture(scope="module")
def worked(installed: Installed) -> Installed:
    """The environment after the commands have run on two rendered clips, and a program that uses the interface."""
    (installed.folder / "videos").mkdir()
    for number in range(2):
        clip = make_clip(77, number, 17, 144, 256)
        write_video(clip.video, installed.folder / f"videos/{number}.mp4", 24)
        (installed.folder / f"videos/{number}.txt").write_text(clip.text)
    done = installed.run("python", "-c", RUN_ALL, json.dumps(COMMANDS + (MORE if FULL else ())))
    package = installed.python.parents[1]
    assert f"FROM {package}" in done.stderr, "the package must come from the wheel"
    print(done.stderr[-4000:])
    return installed


def test_the_wheel_holds_code_weights_configurations_and_types(installed: Installed) -> None:
    names = zipfile.ZipFile(installed.wheel).namelist()
    assert {"opensora/py.typed", "opensora/configs/opensora-v1-2/inference/sample.py"} <= set(names)
    for folder, inside in (("opensora", "opensora"), ("configs", "opensora/configs")):
        files = [file.relative_to(ROOT / folder) for file in (ROOT / folder).rglob("*") if file.is_file()]
        wanted = {f"{inside}/{file.as_posix()}" for file in files if "__pycache__" not in file.parts}
        assert not wanted - set(names)
    assert not [name for name in names if name.split("/")[0] in ("tests", "scripts", "benchmarks")]


def test_every_verb_is_run() -> None:
    elsewhere = {"data", "serve"}  # tests/curation and tests/serving run these
    assert {command[0] for command in COMMANDS + MORE} | elsewhere == set(VERBS)


def test_every_verb_has_a_help_as_a_module(installed: Installed) -> None:
    installed.run("python", "-c", HELP, json.dumps(list(VERBS)))


def test_commands_do_their_job(worked: Installed) -> None:
    assert read_video(worked.folder / "clip.mp4")[0].shape == (5, 16, 24, 3)
    assert (worked.folder / "exported" / "model.safetensors").is_file()
    assert read_video(worked.folder / "samples/sample_0000.mp4")[0].shape == (5, 16, 24, 3)
    assert read_video(worked.folder / "out.mp4")[0].shape == (17, 64, 64, 3)


@pytest.mark.skipif(not FULL, reason="tests/test_documents.py runs every verb in the repository: set OPENSORA_FULL=1")
def test_the_other_verbs_do_their_job(worked: Installed) -> None:
    frames, again = (read_video(worked.folder / name)[0] for name in ("clip.mp4", "half.mp4"))
    assert (frames == again).all()
    assert (worked.folder / "exported.pt").is_file()
    assert json.loads((worked.folder / "benchmark" / "report.json").read_text())["eval_count"] == 1
    assert list((worked.folder / "features").rglob("*.safetensors"))
    assert list((worked.folder / "outputs").rglob("search_bs*.py"))


def test_the_command_is_the_same_program(installed: Installed) -> None:
    assert "embedded/inference/sample.py" in installed.run("opensora", "models").stdout


@pytest.mark.skipif(not FULL, reason="tests/test_parallel.py starts torchrun: set OPENSORA_FULL=1")
def test_two_ranks_train(worked: Installed) -> None:
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "opensora")
    train = ("train", "embedded/train/finetune", "--data-path", "videos.csv", "--outputs", "two")
    done = worked.run("python", *torchrun, *train, "--device", "cpu", "--cfg-options", *ONE_STEP)
    assert done.stdout == "two/ema\n", "one rank prints the result"
    assert (worked.folder / "two/000-STDiT3/ema/model.safetensors").is_file()

"""Whatever is wrong with a request: one clear line on stderr, a non-zero exit code, and nothing half-written."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import socket
import sys
import time
from pathlib import Path

import pytest
import torch

from opensora.checkpoints.hub import _unreachable
from opensora.checkpoints.read import read_state_dict
from opensora.checkpoints.save import save_file
from opensora.cli import main
from opensora.pipeline import denoise, output_files, pipeline
from tests.checkpoints import SAMPLE, run_script, snapshot, tree, use_cache
from tests.ranks import fork_server
from tests.tiny import make_tiny_stdit3, make_tiny_t5

SMALL = ("--num-sampling-steps", "2", "--image-size", "16", "24", "--num-frames", "17", "--verbose", "0")
OUTPUT = "new/folder"


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hub_cache: Path) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in ("BASE_URL", "MODEL", "API_KEY"):
        monkeypatch.delenv(f"OPENAI_{name}", raising=False)
    return tmp_path


@pytest.fixture
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes every way to read or download weights explode."""

    def explode(*args: object, **kwargs: object) -> None:
        raise AssertionError("weights were touched")

    for name in ("builder.locate", "builder.load_weights", "builder.read_config_json", "builder.t5.make_t5"):
        monkeypatch.setattr(f"opensora.checkpoints.{name}", explode)


def refused(capsys: pytest.CaptureFixture, *argv: object, script: bool = True) -> str:
    """The one line on stderr of a program that exits with 1 and leaves the folder as it was."""
    before = tree(Path())
    options = () if "--save-dir" in argv else ("--save-dir", OUTPUT)
    code = run_script(SAMPLE, *argv, *options) if script else main([*map(str, argv), *options])
    out, error = capsys.readouterr()
    assert code == 1 and out == ""
    assert error.startswith("error: ") and error.count("\n") == 1
    assert tree(Path()) == before
    return error


NAMES = [
    (("--resolution", "721p"), "resolution '721p' is not known; did you mean '720p'? choose one of 144p, "),
    (("--resolution", "huge"), "resolution 'huge' is not known; choose one of 144p, "),
    (("--aspect-ratio", "wide"), "aspect ratio 'wide' is not known"),
    (("--aspect-ratio", "9:0"), "aspect ratio '9:0' is not known"),
    (("--num-frames", "2x0"), "number of frames '2x0' is not known; did you mean '2x'?"),
    (("--num-frames", "3s"), "number of frames '3s' is not known; did you mean "),
    (("--dtype", "fp8"), "dtype 'fp8' is not known; did you mean 'fp32'? choose one of bf16"),
    (("--device", "tpu9"), "device 'tpu9' is not known; did you mean"),
    (("--cfg-options", "num_frame=3"), "sample.py: unknown setting 'num_frame'; did you mean 'num_frames'?"),
    (("--cfg-options", "model.dept=3"), "sample.py: unknown setting 'model.dept'; did you mean 'depth'?"),
    (("--cfg-options", "vae.micro_batch=3"), "unknown setting 'vae.micro_batch'; did you mean 'micro_batch_size'?"),
    (("--cfg-options", "text_encoder.max_length=3"), "unknown setting 'text_encoder.max_length'; did you mean 'model_"),
    (("--cfg-options", "scheduler.cfg=3"), "unknown setting 'scheduler.cfg'; did you mean 'cfg_scale'?"),
    (("--cfg-options", "model.type=STDiT3-XL"), "model type 'STDiT3-XL' is not known; did you mean 'STDiT3-XL/2'?"),
    (
        ("--cfg-options", "vae.type=OpenSoraVAE"),
        "vae type 'OpenSoraVAE' is not known; did you mean 'OpenSoraVAE_V1_2'?",
    ),
    (("--cfg-options", "text_encoder.type=t6"), "text_encoder type 't6' is not known; did you mean 't5'?"),
    (("--cfg-options", "scheduler.type=rfow"), "scheduler type 'rfow' is not known; did you mean 'rflow'?"),
    (("--cfg-options", "scheduler.sample_method=x"), "sample_method 'x' is not known"),
    (("--cfg-options", "multi_resolution=STDiT"), "multi_resolution 'STDiT' is not known; choose 'STDiT2'"),
    (("--cfg-options", "vae=None"), "the configuration has no vae"),
    (("--cfg-options", "vae.from_pretrained=None"), "vae has no weights: set from_pretrained"),
]
NUMBERS = [
    (("--image-size", "4", "64"), "image_size 4x64 is too small: the autoencoder needs 8 pixels a side"),
    (("--image-size", "0", "64"), "image_size must be (height, width) in pixels, 1 to 8192 each; it is "),
    (("--image-size", "-64", "64"), "image_size must be (height, width) in pixels, 1 to 8192 each; it is "),
    (("--num-frames", "0"), "num_frames must be at least 1; it is 0"),
    (("--num-frames", "-1"), "num_frames must be at least 1; it is -1"),
    (("--num-frames", "1.5"), "number of frames '1.5' is not known"),
    (("--num-frames", ""), "number of frames '' is not known"),
    (("--num-sampling-steps", "0"), "num_sampling_steps must be at least 1; it is 0"),
    (("--cfg-scale", "nan"), "scheduler.cfg_scale must be a finite number; it is nan"),
    (("--batch-size", "0"), "batch_size must be at least 1; it is 0"),
    (("--num-sample", "0"), "num_sample must be at least 1; it is 0"),
    (("--fps", "0"), "fps must be at least 1; it is 0"),
    (("--save-fps", "-8"), "save_fps must be at least 1; it is -8"),
    (("--start-index", "-1"), "start_index must be at least 0; it is -1"),
    (("--start-index", "5"), "no prompt given"),
]
PROMPTS = [
    ((), "no prompt given: give one, or --prompt-path"),
    (("--prompt", ""), "a prompt is empty"),
    (("--prompt", "a cat", " \t"), "a prompt is empty"),
    (("--prompt", "猫"), "prompt '猫' is empty once cleaned"),
    (("--prompt", "a \udcff cat"), "'a \\udcff cat' is not UTF-8 text"),
    (("--prompt", "a cat {y"), "what follows { is not JSON"),
    (("--prompt", 'x{"reference_path": "gone.png", "mask_strategy": "0"}'), "gone.png"),
    (("--prompt", 'x{"mask_strategy": "a"}'), "mask_strategy 'a': 'a' is not loop,reference,"),
    (("--prompt", "x", "--mask-strategy", "0,0,0,0,1,2"), "five integers up to 1,000,000 and a rate from 0 to 1"),
    (("--prompt", "x", "y", "--mask-strategy", "0"), "mask_strategy has 1 entries for 2 prompts"),
    (("--prompt", "|0|sun|x|rain"), "loop numbers and texts must alternate"),
    (("--prompt-path", "gone.txt"), "prompt file gone.txt: cannot be read"),
    (("--prompt-path", "."), "prompt file .: is not a regular file"),
]
NOT_YET = [
    (("--loop", "2", "--cfg-options", "scheduler={'type': 'dpm-solver'}"), "'dpm-solver' cannot keep given frames"),
    (("--loop", "2", "--cfg-options", "model={'type': 'DiT', 'from_pretrained': 'x'}"), "'DiT' cannot keep given"),
    (("--reference-path", "gone.png"), "gone.png"),
    (("--llm-refine", "True"), "llm_refine calls a language model; set OPENAI_BASE_URL"),
    (("--watermark", "True", "--image-size", "16", "24"), "'AI generated' cannot be read on frames of 16x24;"),
    (("--cfg-options", "watermark=猫"), "watermark '猫' cannot be drawn; write a text in Latin letters"),
    (("--cfg-options", "watermark=' '"), "watermark ' ' cannot be drawn"),
    (("--prompt-generator", "x"), "prompt_generator is not supported yet"),
]


@pytest.mark.parametrize(("argv", "problem"), NAMES + NUMBERS + NOT_YET)
def test_wrong_settings(capsys, no_weights, argv, problem):
    assert problem in refused(capsys, "--prompt", "a cat", *argv)


@pytest.mark.parametrize(("argv", "problem"), PROMPTS)
def test_wrong_prompts(capsys, no_weights, argv, problem):
    assert problem in refused(capsys, *argv)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("import os\nos.system('touch hacked')\n", "config.py:1: an import is not allowed in a configuration"),
        ("x = __import__('os').system('touch hacked')\n", "config.py:1: a call other than dict"),
        ("num_frames = (lambda: open('hacked', 'w'))()\n", "config.py:1: a call other than dict"),
        ("num_frames = [x for x in (1,)]\n", "config.py:1: a comprehension is not allowed"),
        ("num_frames = 17\nmodle = dict(type='STDiT3')\n", "unknown setting 'modle'; did you mean 'model'?"),
        ("num_frames = \n", "config.py:1: not valid Python"),
        ("num_frames = 17\n", "config.py: setting 'model' is missing"),
    ],
)
def test_wrong_configurations(here, capsys, no_weights, text, problem):
    (here / "config.py").write_text(text)
    assert problem in refused(capsys, "generate", "a cat", "--model", "config.py", script=False)


@pytest.mark.parametrize(
    ("model", "problem"),
    [
        ("embeded", "configuration 'embeded' does not exist; did you mean 'embedded'?"),
        ("opensora-v1-2/inference/samples", "did you mean 'opensora-v1-2/inference/sample'?"),
        ("gone.py", "configuration 'gone.py' does not exist"),
    ],
)
def test_unknown_model(capsys, no_weights, model, problem):
    assert problem in refused(capsys, "generate", "a cat", "--model", model, script=False)


def test_missing_weights_are_noticed_before_any_is_read(capsys, monkeypatch):
    monkeypatch.setattr("opensora.checkpoints.builder.load_weights", None)
    for flag in ("--ckpt-path", "--vae-path", "--text-encoder-path"):
        assert "no such file or folder 'gone/x.pt'" in refused(capsys, "--prompt", "x", flag, "gone/x.pt")
        assert "not in the hub cache, and the hub cannot be reached" in refused(capsys, "--prompt", "x", flag, "a/gone")


def change_model(hub_cache: Path, folder: Path, **tensors: torch.Tensor | None) -> Path:
    """A copy of the model with some tensors (dots written as __) replaced, or removed where None."""
    shutil.copytree(snapshot(hub_cache, "model"), folder)
    changed = read_state_dict(folder) | {name.replace("__", "."): tensor for name, tensor in tensors.items()}
    save_file({name: tensor for name, tensor in changed.items() if tensor is not None}, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize(
    ("tensors", "problem"),
    [
        (
            {"final_layer__linear__bias": torch.zeros(7)},
            "final_layer.linear.bias: expected float32 [32], found float32 [7]",
        ),
        ({"final_layer__linear__bias": None}, "missing final_layer.linear.bias float32 [32]"),
        ({"final_layer__extra": torch.zeros(2, 3)}, "unexpected final_layer.extra float32 [2, 3]"),
    ],
)
def test_one_wrong_tensor_is_named(here, capsys, hub_cache, tensors, problem):
    folder = change_model(hub_cache, here / "weights", **tensors)
    error = refused(capsys, *SMALL, "--prompt", "x", "--ckpt-path", folder)
    assert f"{folder} does not fit STDiT3: {problem}\n" in error


@pytest.mark.parametrize(
    ("flag", "part"), [("--ckpt-path", "model"), ("--vae-path", "vae"), ("--text-encoder-path", "text_encoder")]
)
def test_truncated_checkpoints(here, capsys, hub_cache, flag, part):
    whole = snapshot(hub_cache, part)
    shutil.copytree(whole, here / "cut")
    data = (whole / "model.safetensors").read_bytes()
    (here / "cut/model.safetensors").write_bytes(data[: len(data) // 2])
    error = refused(capsys, *SMALL, "--prompt", "x", flag, "cut")
    assert "cut/model.safetensors: truncated, damaged or not a safetensors file" in error

    (here / "cut/model.safetensors").unlink()
    save_file(read_state_dict(whole), here / "cut/model.pt")
    data = (here / "cut/model.pt").read_bytes()
    (here / "cut/model.pt").write_bytes(data[: len(data) // 2])
    error = refused(capsys, *SMALL, "--prompt", "x", flag, "cut")
    assert "cut/model.pt: truncated, damaged or not a PyTorch checkpoint" in error


@pytest.mark.parametrize(
    ("flag", "part"),
    [
        ("--ckpt-path", "vae"),
        ("--ckpt-path", "text_encoder"),
        ("--vae-path", "model"),
        ("--vae-path", "text_encoder"),
        ("--text-encoder-path", "model"),
    ],
)
def test_checkpoint_of_another_model(capsys, hub_cache, flag, part):
    error = refused(capsys, *SMALL, "--prompt", "x", flag, snapshot(hub_cache, part))
    assert str(snapshot(hub_cache, part)) in error
    assert " does not fit " in error or "no T5 tokenizer" in error


def test_parts_that_do_not_fit_each_other(here, capsys):
    for name, settings, problem in (
        ("wide", {"in_channels": 8}, "the model takes 8 latent channels, but the autoencoder makes 4"),
        ("text", {"caption_channels": 16}, "the model takes 16 text channels, but the text encoder makes 32"),
        ("short", {"model_max_length": 3}, "the model takes 3; shorten it, or cut it with --cfg-options"),
    ):
        folder = make_tiny_stdit3(here / name, **settings)
        assert problem in refused(capsys, *SMALL, "--prompt", "a cat on a mat", "--ckpt-path", folder)


@pytest.mark.parametrize("file", ["config.json", "spiece.model"])
def test_damaged_text_encoder_files(here, capsys, hub_cache, file):
    shutil.copytree(snapshot(hub_cache, "text_encoder"), here / "t5")
    (here / "t5" / file).write_bytes(b"\x0a\x05nonsense")
    assert "t5" in refused(capsys, *SMALL, "--prompt", "x", "--text-encoder-path", "t5")


def test_text_encoder_of_another_size(here, capsys):
    folder = make_tiny_t5(here / "t5", hidden=16)
    error = refused(capsys, *SMALL, "--prompt", "x", "--text-encoder-path", folder)
    assert "the model takes 32 text channels, but the text encoder makes 16" in error


def test_unwritable_folder(here, capsys, no_weights):
    (here / "file").write_text("")
    for folder in ("file", "file/below", "/proc/self/nothing"):
        error = refused(capsys, *SMALL, "--prompt", "x", "--save-dir", folder)
        assert f"{folder}: outputs cannot be saved there" in error and "choose another --save-dir" in error


@pytest.mark.parametrize(("frames", "limit"), [("17", 8_000), ("1", 5_000)])
def test_full_disk(here, capsys, frames, limit):
    """No file may grow beyond a limit, which stops the writing where a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        error = refused(capsys, *SMALL, "--image-size", "96", "96", "--num-frames", frames, "--prompt", "x")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert f"{OUTPUT}/sample_0000.{'png' if frames == '1' else 'mp4'}: cannot be written (File too large)" in error


def test_what_was_made_before_stays(here, capsys, monkeypatch):
    """A failure at the second result leaves the first one whole, and no third."""
    write = output_files.encode_output

    def fill(frames, media, *rest):
        if media.name.endswith("0001.mp4"):
            raise pipeline.ConfigError("stopped")
        return write(frames, media, *rest)

    monkeypatch.setattr(output_files, "encode_output", fill)
    assert run_script(SAMPLE, *SMALL, "--prompt", "a", "b", "c", "--save-dir", "out") == 1
    assert sorted(path.name for path in (here / "out").iterdir()) == ["sample_0000.json", "sample_0000.mp4"]


def test_weights_that_make_nan(here, capsys, hub_cache):
    folder = change_model(hub_cache, here / "weights", final_layer__linear__bias=torch.full((32,), float("nan")))
    error = refused(capsys, *SMALL, "--prompt", "x", "--ckpt-path", folder)
    assert "non-finite values (NaN, infinity) in final_layer.linear.bias" in error


def test_more_than_fits_into_memory(capsys, monkeypatch):
    def allocate(*args: object) -> torch.Tensor:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 123 bytes")

    monkeypatch.setattr(denoise, "initial_noise", allocate)
    error = refused(capsys, *SMALL, "--prompt", "x")
    assert "memory does not suffice for 17 frames of 16x24; use a smaller size or fewer frames" in error


def sample_for_long(cache: Path, folder: Path, told: Path) -> None:
    """The program of a process that is to be interrupted."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # it may be ignored where the tests run
    os.chdir(folder)
    os.dup2(os.open(told, os.O_WRONLY | os.O_CREAT), 2)
    with pytest.MonkeyPatch.context() as patch:
        use_cache(cache, patch)
        argv = (SAMPLE, *SMALL, "--num-sampling-steps", "10000", "--verbose", "1", "--prompt", "x")
        sys.exit(run_script(*argv, "--save-dir", OUTPUT))


def test_interrupted_while_sampling(here, hub_cache, tmp_path_factory):
    told = tmp_path_factory.mktemp("told") / "stderr"
    process = fork_server().Process(target=sample_for_long, args=(hub_cache, here, told))
    process.start()
    try:
        while process.is_alive() and not (told.exists() and b"sampling" in told.read_bytes()):
            time.sleep(0.05)
        time.sleep(0.2)
        os.kill(process.pid, signal.SIGINT)
        process.join(250)
        assert process.exitcode == 130
    finally:
        process.kill()
    assert told.read_text().count("interrupted; nothing half-written was left\n") == 1
    assert "Traceback" not in told.read_text() and tree(here) == {}


def test_interrupted_while_writing(here, capsys, monkeypatch):
    def encode(frames: object, path: Path, *rest: object) -> None:
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr("opensora.pipeline.output_files.encode_video", encode)
    assert run_script(SAMPLE, *SMALL, "--prompt", "x", "--save-dir", OUTPUT) == 130
    assert tree(here) == {}


def test_hub_that_cannot_be_reached(here, capsys, monkeypatch):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # bound but not listening: connections are refused
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{closed.getsockname()[1]}")
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", f"{here}-cache")
        monkeypatch.setattr("opensora.checkpoints.hub._unreachable", _unreachable)
        error = refused(capsys, "generate", "a cat", "--model", SAMPLE, script=False)
    assert "the hub cannot be reached" in error
    assert all(way in error for way in ("give a local path", "fill the hub cache", "--model embedded"))


def test_offline_says_so(here, capsys, monkeypatch):
    use_cache(here / "cache", monkeypatch)
    assert "not in the hub cache (offline)" in refused(capsys, "--prompt", "x", "--offline")

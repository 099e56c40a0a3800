"""What a command imports: nothing that it does not need. Each case is a process of its own, which lists its modules."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROMPT = "a red circle moving right on a black background"
SMALL = ("--num-frames", "1", "--num-sampling-steps", "1", "--verbose", "0")
# Seconds each: the compiler, sharding, other libraries' models, downloads.
SECONDS = {
    "torch._dynamo", "torch._inductor", "torch.distributed.fsdp", "torch.distributed.tensor", "torch.onnx", "sympy",
    "transformers", "diffusers", "huggingface_hub", "tensorboard", "pyarrow",
}  # fmt: skip
TORCH = {"torch", "numpy", "av", "PIL.Image", "safetensors", "http.client"}
CODE = """
import sys
from opensora.cli import main
try:
    status = main(sys.argv[2:])
except SystemExit as end:
    status = end.code
print("IMPORTED", *sorted(set(sys.argv[1].split()) & set(sys.modules)))
sys.exit(status)
"""


def imported(tmp_path: Path, unwanted: set[str], *argv: str, status: int = 0) -> set[str]:
    """Those of `unwanted` that a command has imported when it ends with `status`."""
    words = [sys.executable, "-c", CODE, " ".join(unwanted), *argv]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == status, done.stderr[-2000:]
    return set(done.stdout.splitlines()[-1].split()[1:])


def test_a_request_imports_no_compiler_and_no_other_library_of_models(tmp_path: Path) -> None:
    assert not imported(tmp_path, SECONDS, "generate", PROMPT, *SMALL, "--device", "cpu")


def test_a_plan_imports_no_media_library_either(tmp_path: Path) -> None:
    assert not imported(tmp_path, SECONDS | {"av", "PIL.Image"}, "plan", PROMPT, *SMALL, "--device", "cpu")


# Mistakes that are refused once the prompts are cleaned, which the light commands of test_cli.py do not reach.
@pytest.mark.parametrize(
    "argv",
    [
        (PROMPT, "--device", "cudda"),
        (PROMPT, "--image", "gone.png"),
        (PROMPT, "--output", "there.png", *SMALL),
    ],
    ids=["device", "image", "output"],
)
def test_refusals_come_before_torch(tmp_path: Path, argv: tuple[str, ...]) -> None:
    (tmp_path / "there.png").write_text("of somebody else")
    assert not imported(tmp_path, SECONDS | TORCH, "generate", *argv, status=1)

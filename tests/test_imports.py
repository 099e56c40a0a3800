"""What a command imports: nothing that it does not need. Each case is a process of its own, which lists its modules."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
PROMPT = "a red circle moving right on a black background"
SMALL = ("--num-frames", "1", "--num-sampling-steps", "1", "--verbose", "0")
# Seconds each: the compiler, sharding, other libraries' models, downloads.
SECONDS = {
    "torch._dynamo", "torch._inductor", "torch.distributed.fsdp", "torch.distributed.tensor", "torch.onnx", "sympy",
    "transformers", "diffusers", "huggingface_hub", "tensorboard", "pyarrow",
}  # fmt: skip
MEDIA = {"av", "PIL.Image"}
TORCH = {"torch", "numpy", *MEDIA, "safetensors", "http.client"}
CODE = """
import json, sys
from opensora.cli import main
for argv in json.loads(sys.argv[2]):
    try:
        status = main(argv)
    except SystemExit as end:
        status = end.code
    print("IMPORTED", status, *sorted(set(sys.argv[1].split()) & set(sys.modules)))
"""


def imported(tmp_path: Path, unwanted: set[str], *commands: Sequence[str]) -> list[tuple[int, set[str]]]:
    """The status of each command, and those of `unwanted` that are imported when it ends: one process runs them all."""
    words = [sys.executable, "-c", CODE, " ".join(unwanted), json.dumps(commands)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [line.split()[1:] for line in done.stdout.splitlines() if line.startswith("IMPORTED ")]
    return [(int(status), set(names)) for status, *names in lines]


def test_requests_import_no_compiler_and_no_other_library_of_models(tmp_path: Path) -> None:
    """And a plan no media library either."""
    request = (PROMPT, *SMALL, "--device", "cpu")
    plan, image = imported(tmp_path, SECONDS | MEDIA, ("plan", *request), ("generate", *request))
    assert plan == (0, set()) and image == (0, {"PIL.Image"})


def test_refusals_come_before_torch(tmp_path: Path) -> None:
    """Mistakes that are refused once the prompts are cleaned, which the light commands of test_cli.py do not reach."""
    (tmp_path / "there.png").write_text("of somebody else")
    wrong = [("--device", "cudda"), ("--image", "gone.png"), ("--output", "there.png", *SMALL)]
    commands = [("generate", PROMPT, *argv) for argv in wrong]
    assert imported(tmp_path, SECONDS | TORCH, *commands) == [(1, set())] * len(wrong)

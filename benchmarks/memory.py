"""Peak memory of each memory plan: of one guided step, measured, and of whole requests, as `opensora plan` counts it.

python -m benchmarks.memory [--frames 51] [--size 480 848] [--width 288] [--threads N] [--output results]
python -m benchmarks.memory --config opensora-v1-2/inference/sample --frames 102 --size 720 1280 [--output results]

The step is that of an STDiT3 of one pair of blocks with random weights, in a process of its own for each plan: what is
held in between does not depend on how many blocks there are. On an accelerator the peak is what was allocated there, on
a host what the process occupied beyond its weights. With `--config` nothing is made: what an accelerator would hold in
bf16 is counted stage by stage, for which neither weights nor the device are needed.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks import common
from benchmarks.gpu import FPS, SCALE, random_model
from opensora.acceleration.device import is_cpu, peak_memory, pick_device, reset_peak_memory
from opensora.acceleration.memory_plan import BY_NAME, PLANS
from opensora.acceleration.placement import to_device
from opensora.cli.verbs.generation import request_settings
from opensora.models.sizes import size_conditioning
from opensora.models.stdit.stdit3 import STDiT3
from opensora.pipeline.plan import make_plan
from opensora.pipeline.stage_costs import ResourceEstimate
from opensora.profiling import memory_meter
from opensora.profiling.cost_model import CostModel
from opensora.schedulers.rf import RFLOW

HEAD, TEXT, TOKENS = 72, 64, 80  # channels of a head and of the text, and its length
CHILD = "import sys; from benchmarks.memory import child; child(*sys.argv[1:])"


@torch.no_grad()
def child(name: str, file: str, width: str, *size: str) -> None:
    """Takes a step under a plan, keeps its result in `file`, and prints its peak in bytes and the one expected."""
    frames, height, columns = map(int, size)
    plan, device = BY_NAME[name], pick_device()
    dtype = torch.float32 if is_cpu(device) else torch.bfloat16
    sizes = dict(hidden_size=int(width), depth=1, num_heads=int(width) // HEAD, caption_channels=TEXT)
    torch.manual_seed(0)
    model = to_device(random_model(STDiT3, device, dtype, **sizes).eval().requires_grad_(False), device)
    latent = (frames // 17 * 5, height // 8, columns // 8)
    noise, text = torch.randn(1, 4, *latent, device=device), torch.randn(1, 1, TOKENS, TEXT, device=device, dtype=dtype)
    told = size_conditioning("STDiT2", 1, (height, columns), frames, FPS, device=device)
    batch = 1 if plan.sequential_cfg else 2
    counted = CostModel(dtype, device).step(model, latent, told, TOKENS, batch, plan=plan).peak
    plan.prepare_model(model)
    before = memory_meter.resident_memory() if is_cpu(device) else torch.accelerator.memory_allocated(device)
    reset_peak_memory(device)
    scheduler = RFLOW(num_sampling_steps=1, cfg_scale=SCALE)
    cond, null, options = {"y": text, **told}, {"y": model.null_caption(text)}, {"precompute": True}
    made = scheduler.sample(model, noise, cond, null, sequential_cfg=plan.sequential_cfg, **options)
    torch.save(made.cpu(), file)
    print(json.dumps({"peak": (peak_memory(device) or 0) - before, "counted": counted}))


def measured(width: int, size: list[int]) -> dict[str, Any]:
    """Plan -> bytes at the peak, bytes as counted, and the error against the fast plan."""
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        files = {plan.name: Path(folder, f"{plan.name}.pt") for plan in PLANS}
        for name, file in files.items():
            command = [sys.executable, "-c", CHILD, name, *map(str, (file, width, *size))]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise SystemExit(done.stderr)
            found[name] = json.loads(done.stdout.splitlines()[-1])
            made, fast = (torch.load(files[one], weights_only=True) for one in (name, "fast"))
            found[name]["relative_error"] = common.relative_error(made, fast)
    return found


def counted(config: str, size: list[int]) -> dict[str, Any]:
    """Plan -> bytes of an accelerator at the peak of a request, and stage by stage, weights and work apart."""
    words = ["x", "--model", config, "--num-frames", str(size[0]), "--image-size", *map(str, size[1:])]
    settings = request_settings([*words, "--memory", "fast"])
    made = make_plan(settings)
    accelerator = CostModel(torch.bfloat16, torch.device("meta"))
    built = made.models.build(made.job.size)
    estimate = ResourceEstimate(made.models, built, made.job, made.requests, again=False, costs=accelerator)
    return {
        plan.name: {
            "counted": estimate.peak(plan),
            "stages": {one.name: {"weights": one.weights, "work": one.cost.peak} for one in estimate.stages(plan)},
        }
        for plan in PLANS
    }


def main() -> None:
    given = common.arguments(__doc__, config="", frames=51, size=[480, 848], width=288)
    size = [given.frames, *given.size]
    plans = counted(given.config, size) if given.config else measured(given.width, size)
    summary = {name: {key: one[key] for key in one if key != "stages"} for name, one in plans.items()}
    report = {"config": given.config or f"STDiT3, width {given.width}", "size": size, "plans": plans}
    bars = {key: {name: one[key] / 1e9 for name, one in plans.items() if key in one} for key in ("peak", "counted")}
    name = "-".join(["memory", *(["request"] if given.config else []), *map(str, size)])
    common.save(name, report | {"summary": summary}, {k: v for k, v in bars.items() if v}, given.output, "GB")


if __name__ == "__main__":
    main()

"""STDiT3-XL/2 with random weights on an accelerator: a clip end to end, or training steps. See gpu.sh.

python -m benchmarks.gpu end-to-end --size 480p-2s [--steps 30] [--memory low] [--eager] [--graphs] [--dry]
python -m benchmarks.gpu train --size 240p-2s [--batch 2] [--eager] [--dry]

The text is random features of 80 tokens: its encoder is another model's time. Peak memory is what the process allocated
at most; with `--memory low` nothing is compiled, because blocks are cut into parts. A share of the peak is of the
published dense bf16 rate of the device, and of its own best matrix product. `--graphs` replays recorded steps.
`--dry` runs tiny models and sizes on a CPU, to see that it works; nothing is compiled or recorded there.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import common, decode
from opensora.acceleration.compile import compile_blocks
from opensora.acceleration.cuda_graphs import CapturedModel, check_graphs
from opensora.acceleration.device import device_name, peak_memory, pick_device, reset_peak_memory, synchronize
from opensora.acceleration.memory_plan import BY_NAME
from opensora.acceleration.offload import Offloader
from opensora.acceleration.placement import to_device
from opensora.acceleration.replace_modules import copy_structure
from opensora.datasets.video import to_uint8
from opensora.models.sizes import size_conditioning
from opensora.models.stdit.stdit3 import STDiT3
from opensora.models.vae.vae import OpenSoraVAE_V1_2
from opensora.schedulers.rf import RFLOW

SIZES = {  # frames, height, width
    "144p-2s": (51, 144, 256), "240p-2s": (51, 240, 426), "480p-2s": (51, 480, 854), "720p-4s": (102, 720, 1280),
}  # fmt: skip
DRY_SIZE = (17, 32, 48)
TINY = dict(hidden_size=64, depth=2, num_heads=4, caption_channels=32)
TOKENS, SCALE, FPS = 80, 7.0, 24
PEAKS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "4090": 165e12, "L4": 121e12}  # dense bf16


def random_model(kind: Any, device: torch.device, dtype: torch.dtype, **config: Any) -> nn.Module:
    """A model with small random weights, made on the device."""
    with torch.device("meta"):
        model = kind(**config)
    rope = model.rope.freqs.shape if hasattr(model, "rope") else None
    model = model.to_empty(device=device)
    for name, tensor in model.state_dict(keep_vars=True).items():
        if tensor.is_floating_point():
            spread = 0.02 if tensor.ndim > 1 else 0.0
            nn.init.normal_(tensor.data, 1.0 if "norm" in name and name.endswith("weight") else 0.0, spread)
    model = model.to(dtype)
    if rope is not None:
        exponents = torch.arange(rope[0], device=device, dtype=torch.float32) / rope[0]
        model.rope.freqs.data = 10000.0**-exponents
    return model


def product_rate(device: torch.device, dtype: torch.dtype, side: int) -> float:
    """Operations a second of a large matrix product."""
    x = torch.randn(side, side, device=device, dtype=dtype)
    return max(2 * side**3 / timed(lambda: x @ x, device)[1] for _ in range(5))


def timed(work: common.Work, device: torch.device) -> tuple[Any, float]:
    """What `work` gives, and the seconds until the device has done it."""
    synchronize(device)
    began = time.perf_counter()
    made = work()
    synchronize(device)
    return made, time.perf_counter() - began


def shares(flops: float, seconds: float, device: torch.device, dtype: torch.dtype, dry: bool) -> dict[str, Any]:
    """How much of the device's rates so many operations in so many seconds are."""
    rate, own = flops / seconds, product_rate(device, dtype, 256 if dry else 8192)
    name = device_name(device)
    published = next((peak for key, peak in PEAKS.items() if key in name), None)
    return {
        "device": name, "flops": flops, "flops_per_second": rate, "of_best_product": rate / own,
        "of_published_peak": published and rate / published,
    }  # fmt: skip


def told(size: tuple[int, int, int], batch: int, device: torch.device) -> dict[str, torch.Tensor]:
    """What the model is told of the size."""
    return size_conditioning("STDiT2", batch, size[1:], size[0], FPS, device=device)


@torch.no_grad()
def end_to_end(given: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Seconds and peak memory of one clip from noise to uint8, after a short one that compiles and warms up."""
    size = DRY_SIZE if given.dry else SIZES[given.size]
    model = random_model(STDiT3, device, dtype, **(TINY if given.dry else {})).eval().requires_grad_(False)
    vae = random_model(OpenSoraVAE_V1_2, device, dtype, **(decode.TINY if given.dry else {}))
    vae.scale, vae.shift = torch.ones((), device=device), torch.zeros((), device=device)
    to_device(model, device), to_device(vae.eval().requires_grad_(False), device)
    plan = BY_NAME[given.memory]
    plan.prepare_model(model)
    if not (given.eager or plan.chunked):
        compile_blocks(model)
    latent = vae.get_latent_size(size)
    noise = torch.randn(1, 4, *latent, device=device)
    text = torch.randn(1, 1, TOKENS, model.config["caption_channels"], device=device, dtype=dtype)
    cond, null = {"y": text, **told(size, 1, device)}, {"y": model.null_caption(text)}
    shape = dict(zip(("num_frames", "height", "width"), size, strict=True))
    offloader = Offloader(plan.offload, device)
    offloader.offload("model", model)
    offloader.offload("vae", vae)
    if given.graphs:
        check_graphs(device)
    denoiser = CapturedModel(model) if given.graphs else model

    def denoise(denoiser: Any, steps: int) -> torch.Tensor:
        scheduler = RFLOW(num_sampling_steps=steps, cfg_scale=SCALE, use_timestep_transform=True)
        with offloader.onloaded("model"):
            return scheduler.sample(
                denoiser, noise, cond, null, **shape, sequential_cfg=plan.sequential_cfg, precompute=True
            )

    def decoded(z: torch.Tensor) -> None:
        with offloader.onloaded("vae"):
            for piece in vae.decoded(z.to(dtype), size[0]):
                to_uint8(piece[0].nan_to_num())

    decoded(denoise(denoiser, 3 if given.graphs else 1))  # which records at the second step
    reset_peak_memory(device)
    z, denoising = timed(lambda: denoise(denoiser, given.steps), device)
    _, decoding = timed(lambda: decoded(z), device)
    seconds = {"denoise": denoising, "decode": decoding, "all": denoising + decoding}
    report = {"size": size, "steps": given.steps, "memory_plan": plan.name, "graphs": given.graphs, "seconds": seconds}
    report["peak_memory_gb"] = (peak_memory(device) or 0) / 1e9
    flops = count(lambda copy: denoise(copy, 1), model) * given.steps
    return report | shares(flops, seconds["denoise"], device, dtype, given.dry)


def count(work: Callable[[nn.Module], Any], model: STDiT3) -> int:
    """Floating-point operations of `work` on a copy of the model that is not compiled."""
    with FlopCounterMode(display=False) as counter:
        work(copy_structure(model))
    return counter.get_total_flops()


def train(given: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Seconds of a training step in mixed precision: forward, backward and a fused AdamW. Three steps count."""
    size = DRY_SIZE if given.dry else SIZES[given.size]
    model = random_model(STDiT3, device, torch.float32, **(TINY if given.dry else {})).train()
    to_device(model, device)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True)
    latent = (size[0] // 17 * 5, size[1] // 8, size[2] // 8)
    x = torch.randn(given.batch, 4, *latent, device=device)
    text = torch.randn(given.batch, 1, TOKENS, model.config["caption_channels"], device=device)
    cond, scheduler = {"y": text, **told(size, given.batch, device)}, RFLOW()

    def forward(model: nn.Module) -> torch.Tensor:
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            return scheduler.training_loss(model, x, cond).mean()

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        forward(model).backward()
        optimizer.step()

    with torch.no_grad():
        flops = 3 * count(forward, model)
    if not given.eager:
        compile_blocks(model)
    step(), step()
    reset_peak_memory(device)
    seconds = timed(lambda: [step() for _ in range(3)], device)[1] / 3
    report = {"size": size, "batch": given.batch, "seconds": {"step": seconds}}
    report["peak_memory_gb"] = (peak_memory(device) or 0) / 1e9
    return report | shares(flops, seconds, device, dtype, given.dry)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("end-to-end", "train"))
    parser.add_argument("--size", choices=SIZES, default="480p-2s")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--memory", choices=BY_NAME, default="fast", help="memory plan of end-to-end")
    parser.add_argument("--eager", action="store_true", help="without torch.compile")
    parser.add_argument("--graphs", action="store_true", help="record a step once and replay it")
    parser.add_argument("--dry", action="store_true", help="tiny models and sizes on a CPU, eager")
    parser.add_argument("--output", type=Path, default=Path("results"))
    given = parser.parse_args()
    device = torch.device("cpu") if given.dry else pick_device()
    if given.dry:
        given.eager, given.graphs, given.steps = True, False, min(given.steps, 2)
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    work = end_to_end if given.what == "end-to-end" else train
    report = work(given, device, dtype)
    how = {given.memory: given.memory != "fast", "eager": given.eager and not given.dry, "graphs": given.graphs}
    name = "-".join(["gpu", given.what, given.size, *(word for word, added in how.items() if added)])
    common.save(name, report, {name: report["seconds"]}, given.output)


if __name__ == "__main__":
    main()

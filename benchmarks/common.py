"""What the benchmarks share: two sides timed in turn, products timed alone, a report in JSON and a plot."""

from __future__ import annotations

import argparse
import copy
import json
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from opensora.acceleration.model_parts import kept_in_float32

Work = Callable[[], Any]
Report = dict[str, Any]


def arguments(about: str | None, repeats: int = 5, **flags: Any) -> argparse.Namespace:
    """The command line of a benchmark: --repeats, --threads, --output, and `flags` with their defaults."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=repeats, help="turns of every side")
    parser.add_argument("--threads", type=int, help="threads of PyTorch (as PyTorch likes)")
    parser.add_argument("--output", type=Path, default=Path("results"), help="folder for the JSON and the plot")
    for name, default in flags.items():
        several = isinstance(default, list)
        kind = type(default[0] if several else default)
        parser.add_argument(f"--{name}", type=kind, default=default, nargs="+" if several else None)
    given = parser.parse_args()
    if given.threads:
        torch.set_num_threads(given.threads)
    return given


def cast(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy of the model in a type, but for what stays in float32, as the package holds it."""
    model = copy.deepcopy(model)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_floating_point() and not kept_in_float32(name):
            tensor.data = tensor.data.to(dtype)
    return model


def race(sides: Mapping[str, Work], repeats: int, wait: Work | None = None) -> Report:
    """Seconds of each side, run in turn after one turn that does not count.

    `seconds` are medians on the clock, `cpu_seconds` of the process's processors, which other programs disturb less.
    """
    clock: dict[str, list[float]] = {name: [] for name in sides}
    processor: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(repeats + 1):
        for name, work in sides.items():
            began, spent = time.perf_counter(), time.process_time()
            work()
            if wait is not None:
                wait()
            if turn:
                clock[name].append(time.perf_counter() - began)
                processor[name].append(time.process_time() - spent)
    return {
        name: {
            "seconds": statistics.median(clock[name]), "cpu_seconds": statistics.median(processor[name]),
            "all_seconds": clock[name], "all_cpu_seconds": processor[name],
        }
        for name in sides
    }  # fmt: skip


def ratios(times: Report, base: str = "plain") -> Report:
    """How many times faster than `base` each other side is, by the clock and by processor time."""
    return {
        name: {unit: times[base][unit] / one[unit] for unit in ("seconds", "cpu_seconds")}
        for name, one in times.items()
        if name != base
    }


def peak_flops(repeats: int = 7, side: int = 2048, dtype: torch.dtype = torch.float32) -> float:
    """Operations a second of the best matrix product of a type that this machine shows, by processor time x threads.

    What one thread does in a second of its time, times the threads: others may take time, not speed.
    """
    weight, x = torch.randn(2, side, side).to(dtype)
    best = 0.0
    for _ in range(repeats):
        spent = time.process_time()
        F.linear(x, weight)
        best = max(best, 2 * side**3 / (time.process_time() - spent))
    return best


def linear_flops(model: nn.Module, work: Work) -> int:
    """Operations in the linear layers of a model while `work` runs."""
    count = 0

    def add(module: nn.Linear, args: tuple[Any, ...], _: Any) -> None:
        nonlocal count
        count += 2 * args[0].numel() * module.out_features

    handles = [m.register_forward_hook(add) for m in model.modules() if isinstance(m, nn.Linear)]
    work()
    for handle in handles:
        handle.remove()
    return count


def convolution_flops(model: nn.Module, work: Work) -> int:
    """Operations in everything that PyTorch counts, convolutions above all, while `work` runs."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


def bound(flops: float, peak: float, times: Report, factor: float = 1.0, **sides: Work) -> Report:
    """What products at the machine's best pace would take, and their share of each side's processor time.

    `profiled` is the share of `sides` that products take as they are, in one more run of each; `rest_free` is how many
    times as fast as `plain` the fast side would be if all else cost it nothing. `with_attention` are both with fused
    attention among the products, which it does inside.
    """
    seconds = factor * flops / peak
    report = {
        "flops": factor * flops, "peak_flops": peak, "seconds_at_peak": seconds,
        "share": {name: seconds / one["cpu_seconds"] for name, one in times.items()},
        "most_reachable": times["plain"]["cpu_seconds"] / seconds,
    }  # fmt: skip
    found = {name: profiled(work) for name, work in sides.items()}
    report["profiled"] = {name: products for name, (products, _) in found.items()}
    report["with_attention"] = {name: sum(both) for name, both in found.items()}
    if "fast" in sides:
        faster = times["plain"]["cpu_seconds"] / times["fast"]["cpu_seconds"]
        report["rest_free"] = faster / report["profiled"]["fast"]
        report["with_attention"]["rest_free"] = faster / report["with_attention"]["fast"]
    return report


PRODUCTS = {
    "aten::addmm",
    "aten::addmm_",
    "aten::baddbmm",
    "aten::bmm",
    "aten::mm",
    "aten::mkldnn_linear_backward_weights",
}
ATTENTION = {"aten::_scaled_dot_product_flash_attention_for_cpu"}
CONVOLUTIONS = {"aten::mkldnn_convolution", "aten::slow_conv3d_forward", "aten::_slow_conv2d_forward"}


def profiled(work: Work) -> tuple[float, float]:
    """The share of its time that `work` spends in products of matrices and in convolutions, and in fused attention."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        work()
    spent = {row.key: row.self_cpu_time_total for row in profile.key_averages()}
    products, fused = (sum(spent.get(name, 0.0) for name in names) for names in (PRODUCTS | CONVOLUTIONS, ATTENTION))
    return products / sum(spent.values()), fused / sum(spent.values())


def summary(report: Report) -> Report:
    """What a line can hold of a report."""
    shares = {name: report["products"][name] for name in ("share", "profiled", "rest_free", "with_attention")}
    return {**report["faster"], "error": report["relative_error"], **shares}


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """The norm of the difference over that of what is expected."""
    return float((actual.detach().double() - expected.detach().double()).norm() / expected.detach().double().norm())


def machine() -> Report:
    """Where the numbers come from."""
    processor = platform.processor() or platform.machine()
    if (cpuinfo := Path("/proc/cpuinfo")).exists():
        names = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        processor = names[0] if names else processor
    return {"processor": processor, "threads": torch.get_num_threads(), "torch": torch.__version__}


def save(name: str, report: Report, bars: Mapping[str, Mapping[str, float]], folder: Path, unit: str = "s") -> None:
    """Writes `folder`/`name`.json and .png, and prints the first as a line; `bars` are groups of labelled values."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps({**report, "machine": machine()}, indent=2) + "\n")
    plot(bars, folder / f"{name}.png", f"{name} ({unit})")
    print(json.dumps(report.get("summary", report)), flush=True)


COLOURS = ("#9aa5b1", "#2563eb", "#16a34a", "#d97706")


def plot(bars: Mapping[str, Mapping[str, float]], path: Path, title: str) -> None:
    """Horizontal bars, each group with its own scale."""
    from PIL import Image, ImageDraw

    rows = sum(len(group) + 2 for group in bars.values())
    image = Image.new("RGB", (760, 40 + 22 * rows), "white")
    draw, y = ImageDraw.Draw(image), 12
    draw.text((12, y), title, fill="black")
    for label, group in bars.items():
        y += 30
        draw.text((12, y), label, fill="black")
        longest = max(group.values())
        for number, (name, value) in enumerate(group.items()):
            y += 20
            draw.text((24, y), name, fill="#444444")
            width = int(440 * value / longest)
            draw.rectangle((190, y, 190 + width, y + 13), fill=COLOURS[number % len(COLOURS)])
            draw.text((198 + width, y), f"{value:.3g}", fill="black")
    image.save(path)


def sizes_of(names: Sequence[str], table: Mapping[str, Any]) -> dict[str, Any]:
    """The rows of a table that are asked for. Exits with what there is when a name is not known."""
    if unknown := [name for name in names if name not in table]:
        raise SystemExit(f"{unknown[0]} is not known; choose among {', '.join(table)}")
    return {name: table[name] for name in names}

"""The batch-size search with few trials against bisection, both on real training steps of this machine.

python benchmarks/search.py [--rounds 3] [--samples 40] [--output FILE]

A small STDiT3 is searched for batch sizes at three resolutions and lengths; the time aimed at is that of a step on
--samples images. One thread, and seconds of its processor, so that other programs disturb little. Bisection does not
agree with itself to the last sample either: the table gives what each search found in each round.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from opensora.config.settings import SearchSettings
from opensora.training.batch_size_search import probe
from opensora.training.batch_size_search.search import Method, Outcome, SearchPlan, Span, bisect, make_plan, search
from opensora.training.batch_size_search.search_model import ModelSearch

MODEL = dict(type="STDiT3", hidden_size=96, depth=2, num_heads=4, caption_channels=16, model_max_length=8)
BUCKETS = {
    "144p": {1: (48, 47), 17: (12, 11), 34: (8, 7)},
    "240p": {1: (24, 23), 17: (6, 5)},
    "360p": {1: (12, 11)},
}
METHODS: dict[str, Callable[[], Method]] = {"bisection": lambda: bisect, "model": ModelSearch}


class Counted:
    """Trials, with their number."""

    def __init__(self, trial: probe.TrainingProbe) -> None:
        self.trial, self.count = trial, 0

    def __call__(self, span: Span, batch_size: int) -> Outcome:
        self.count += 1
        return self.trial(span, batch_size)


def compare(trial: probe.TrainingProbe, plan: SearchPlan, rounds: int) -> dict[str, Any]:
    """The trials of each method, and the batch sizes that each found in each round."""
    trials, sizes = dict.fromkeys(METHODS, 0), defaultdict(lambda: {name: [] for name in METHODS})
    for _ in range(rounds):
        for name, make in METHODS.items():
            counted = Counted(trial)
            for found in search(plan, counted, make()):
                sizes[str(found.span)][name].append(found.batch_size)
            trials[name] += counted.count
    return {"trials": trials, "share": trials["model"] / trials["bisection"], "batch_sizes": dict(sizes)}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--samples", type=int, default=40)
    parser.add_argument("--output", type=Path, default=Path("outputs/benchmarks/search.json"))
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    probe.time = SimpleNamespace(perf_counter=time.process_time)
    settings = SearchSettings(
        model=MODEL, scheduler=dict(type="rflow", use_timestep_transform=True), dtype="fp32", device="cpu",
        untimed_steps=1, active_steps=3, lr=1e-4, bucket_config=BUCKETS, base_step_time=1.0,
        mask_ratios={"random": 0.3},
    )  # fmt: skip
    trial = probe.TrainingProbe(settings)
    images = Span("144p", 1, 1, 95)
    aim = statistics.median(trial(images, args.samples).seconds for _ in range(5))
    report = compare(trial, make_plan(BUCKETS, None, aim, None), args.rounds)
    for name, found in report["batch_sizes"].items():
        print(f"{name:18}" + "  ".join(f"{method} {sizes}" for method, sizes in found.items()))
    print(f"steps of {aim:.2f} s; trials {report['trials']}, the model takes {report['share']:.2f} of bisection's")
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps({"aim_seconds": aim, **report}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

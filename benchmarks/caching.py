"""What each cache saves on the embedded model, and what it costs in quality.

python benchmarks/caching.py [--num-prompts 50] [--calibration-prompts 8] [--seed 4000] [--save-dir DIR]

Every prompt is made without a cache and with each method, from the same noise. For each method: evaluations of a half
of guidance that the model makes, out of those without a cache; PSNR of the frames and relative error of the latents
against the uncached run; what share of the clips shows all that its prompt asks for
(`opensora/datasets/synthetic/measure.py`).
`auto` is calibrated on the prompts that `opensora generate --cache auto` uses, none of which is among those measured.
Writes caching.json and caching.png.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import platform
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from opensora import __version__
from opensora.acceleration.step_cache import cached_sampling, calibration
from opensora.acceleration.step_cache.cached_sampling import Cache
from opensora.cli.program import run_program
from opensora.config import find_config, read_config
from opensora.config.settings import InferenceSettings
from opensora.datasets import video
from opensora.datasets.synthetic.measure import measure
from opensora.datasets.synthetic.render import Clip, make_clip
from opensora.files import atomic_write
from opensora.pipeline.denoise import denoise
from opensora.pipeline.job import Job
from opensora.pipeline.job_spec import JobSpec
from opensora.pipeline.loaded_models import LoadedModels
from opensora.pipeline.noise import initial_noise, noise_generator
from opensora.pipeline.output_folder import check_folder
from opensora.pipeline.step_cache import psnr
from opensora.pipeline.text_encoding import encode_texts

MAX_ERRORS = (0.01, 0.02, 0.05, 0.1)
FEWEST_TIMES, LEAST_PSNR, MOST_LOST = 2.0, 30.0, 1.0  # bars: evaluations saved, dB on average, points of quality
ASKED = ("shape", "colour", "motion", "background")


class Method(NamedTuple):
    """A way to sample: its name, its cache, its number of steps, and the error that it promised."""

    name: str
    cache: Cache
    steps: int
    max_error: float | None = None


class Bench:
    """The embedded model, loaded once."""

    def __init__(self, texts: Sequence[str], seed: int, steps: int) -> None:
        file = find_config("embedded")
        config = {**read_config(file), "prompt": list(texts), "seed": seed}
        config["scheduler"] = {**config["scheduler"], "num_sampling_steps": steps}
        self.settings = InferenceSettings.from_config(config, file.name)
        models = self.models = LoadedModels(self.settings)
        job = self.job = Job(JobSpec(self.settings, to_files=False), models)
        models.locate()
        self.texts = encode_texts(models, job, list(texts))
        models.load(job.size)
        self.shape = (models.vae.out_channels, *models.vae.get_latent_size(job.size))
        self.steps, self.seed = steps, seed

    @torch.no_grad()
    def latents(self, text: str, number: int, method: Method, counter: list[int] | None = None) -> Tensor:
        """Clean latents of a text from noise number `number`."""
        scheduler = {**self.settings.scheduler, "num_sampling_steps": method.steps}
        job = Job(JobSpec(dataclasses.replace(self.settings, scheduler=scheduler), to_files=False), self.models)
        noise, source = initial_noise(self.seed, number, 0, self.shape)[None], [noise_generator(self.seed, number, 0)]
        return self.denoise(job, noise, text, method.cache, counter=[] if counter is None else counter, source=source)

    def denoise(self, job: Job, noise: Tensor, text: str, cache: Cache, **options: Any) -> Tensor:
        """The latents of the last step."""
        noise = noise.to(self.models.device)
        *_, last = denoise(self.models, job, noise, self.texts[text], self.texts, cache, **options)
        return last.x

    @torch.no_grad()
    def frames(self, latents: Tensor) -> np.ndarray:
        return video.to_uint8(self.models.vae.decode(latents, num_frames=self.job.size.num_frames)[0].float())


def find_methods(bench: Bench, prompts: Sequence[str]) -> tuple[Method, list[Method]]:
    """The uncached run, and all others."""
    exact, scheduler = Method("none", Cache(), bench.steps), bench.job.scheduler
    effects = cached_sampling.effects(scheduler, bench.shape[0], bench.job.size._asdict())

    made: dict[Any, Tensor] = {}  # calibrations for several errors try the same tables

    def run(number: int, cache: Cache, observe: Any) -> Tensor:
        key = (number, cache.table)
        if observe is not None or key not in made:
            noise = initial_noise(bench.seed, -1 - number, 0, bench.shape)[None]
            made[key] = bench.denoise(bench.job, noise, prompts[number], cache, observe=observe)
        return made[key]

    run = torch.no_grad()(run)
    recorded = min(calibration.RECORDED, len(prompts) - 1)
    recordings = [calibration.record(run, effects, scheduler.cfg_scale, number) for number in range(recorded)]
    ratios = calibration.mean_profile(recordings).ratios
    found = [
        Method("tea, published, 0.1", Cache("tea"), bench.steps),
        Method("tea, published, 0.2", Cache("tea", threshold=0.2), bench.steps),
        Method("mag, published, 0.06", Cache("mag"), bench.steps),
        Method("mag, published, 0.12", Cache("mag", threshold=0.12), bench.steps),
        Method("mag, own ratios, 0.12", Cache("mag", threshold=0.12, ratios=ratios), bench.steps),
        Method("guidance in 0.1..0.8", Cache(interval=(0.1, 0.8)), bench.steps),
        Method("half the steps", Cache(), bench.steps // 2),
        Method("a third of the steps", Cache(), bench.steps // 3),
    ]
    for most in MAX_ERRORS:
        calibrated = calibration.calibrate(run, effects, scheduler.cfg_scale, len(prompts), most)
        if calibrated.table is not None:
            found.append(Method(f"auto, max_error {most:g}", Cache("table", calibrated.table), bench.steps, most))
    return exact, found


def measure_all(bench: Bench, clips: Sequence[Clip], exact: Method, methods: Sequence[Method]) -> list[dict[str, Any]]:
    """A row for each method, the uncached run first."""
    results: dict[str, list[dict[str, float]]] = {one.name: [] for one in (exact, *methods)}
    for number, clip in enumerate(clips):
        right: dict[str, Any] = {}
        for method in (exact, *methods):
            counter: list[int] = []
            begin = time.perf_counter()
            latents = bench.latents(clip.text, number, method, counter)
            seconds, frames = time.perf_counter() - begin, bench.frames(latents)
            if method is exact:
                right = {"latents": latents, "frames": frames}
            seen = measure(frames)._asdict()
            results[method.name].append({
                "halves": sum(counter), "seconds": seconds, "psnr": psnr(frames, right["frames"]),
                "error": calibration.relative_error(latents, right["latents"]),
                "right": all(seen[name] == getattr(clip.scene, name) for name in ASKED),
            })  # fmt: skip
    return [_row(method, results[method.name], results[exact.name]) for method in (exact, *methods)]


def _row(method: Method, found: Sequence[dict[str, Any]], exact: Sequence[dict[str, Any]]) -> dict[str, Any]:
    def mean(key: str, of: Sequence[dict[str, Any]] = found) -> float:
        return float(np.mean([one[key] for one in of]))

    row = {
        "method": method.name, "halves": mean("halves"), "times_fewer": mean("halves", exact) / mean("halves"),
        "times_faster": mean("seconds", exact) / mean("seconds"), "error_mean": mean("error"),
        "error_most": max(one["error"] for one in found), "percent_right": 100 * mean("right"),
    }  # fmt: skip
    if row["error_most"] > 0:
        row |= {"psnr_mean": mean("psnr"), "psnr_least": min(one["psnr"] for one in found)}
    if method.max_error is not None:
        row["percent_within_max_error"] = 100 * float(np.mean([one["error"] <= method.max_error for one in found]))
    if method.cache.table is not None:
        row["table"] = method.cache.table.branches
    return row


def passing(rows: Sequence[dict[str, Any]]) -> list[str]:
    """The methods that meet all bars."""
    least = rows[0]["percent_right"] - MOST_LOST
    return [
        row["method"]
        for row in rows[1:]
        if row["times_fewer"] >= FEWEST_TIMES and row["psnr_mean"] >= LEAST_PSNR and row["percent_right"] >= least
    ]


def table_of(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown."""
    lines = [
        "| method | times fewer evaluations | PSNR, mean (least) | error, mean (most) | within max_error | right |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        db = f"{row['psnr_mean']:.1f} ({row['psnr_least']:.1f}) dB" if "psnr_mean" in row else ""
        within = f"{row['percent_within_max_error']:.0f} %" if "percent_within_max_error" in row else ""
        error = f"{row['error_mean']:.4f} ({row['error_most']:.4f})"
        times, right = f"{row['times_fewer']:.2f}", f"{row['percent_right']:.0f} %"
        lines.append(f"| {row['method']} | {times} | {db} | {error} | {within} | {right} |")
    return "\n".join(lines)


def draw(rows: Sequence[dict[str, Any]], path: Path) -> Path:
    """A picture: times fewer evaluations to the right, PSNR upwards."""
    from PIL import Image, ImageDraw

    width, height, left, bottom = 900, 560, 60, 500
    image = Image.new("RGB", (width, height), "white")
    pen = ImageDraw.Draw(image)
    shown = [row for row in rows if "psnr_mean" in row]
    most_times = max([row["times_fewer"] for row in shown], default=1) + 0.5
    most_db = max([min(row["psnr_mean"], 80.0) for row in shown], default=1) + 5

    def place(times: float, db: float) -> tuple[float, float]:
        x = left + (times - 1) / (most_times - 1) * (width - left - 240)
        return x, bottom - min(db, most_db) / most_db * (bottom - 20)

    for db in range(0, int(most_db), 10):
        _, y = place(1, db)
        pen.line([(left, y), (width - 20, y)], fill="crimson" if db == LEAST_PSNR else "gainsboro")
        pen.text((8, y - 6), f"{db} dB", fill="black")
    for times in range(1, int(most_times) + 1):
        x, _ = place(times, 0)
        pen.line([(x, 20), (x, bottom)], fill="crimson" if times == FEWEST_TIMES else "gainsboro")
        pen.text((x - 4, bottom + 8), f"{times}x", fill="black")
    pen.text((left, bottom + 30), "evaluations of the model: so many times fewer than without a cache", fill="black")
    for row in shown:
        x, y = place(row["times_fewer"], row["psnr_mean"])
        colour = "seagreen" if row["method"].startswith("auto") else "steelblue"
        pen.ellipse([(x - 4, y - 4), (x + 4, y + 4)], fill=colour)
        pen.text((x + 8, y - 6), row["method"], fill="black")
    return video.write_image(np.asarray(image), path)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark; 1 if no method meets the bars and `--bars` is given."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-prompts", type=int, default=50)
    parser.add_argument("--calibration-prompts", type=int, default=len(calibration.PROMPTS))
    parser.add_argument("--seed", type=int, default=4000, help="of the prompts and of the noise")
    parser.add_argument("--steps", type=int, default=30, help="of the sampler")
    parser.add_argument("--save-dir", default="./benchmark", help="receives caching.json and caching.png")
    parser.add_argument("--bars", action="store_true", help="exit with 1 if no method meets the bars")
    args = parser.parse_args(argv)
    folder, prompts = check_folder(args.save_dir), calibration.PROMPTS[: args.calibration_prompts]
    clips = [make_clip(args.seed, n, 1, 64, 64, held_out=n % 2 == 1) for n in range(args.num_prompts)]
    bench = Bench([*dict.fromkeys([*(clip.text for clip in clips), *prompts])], args.seed, args.steps)
    exact, methods = find_methods(bench, prompts)
    rows = measure_all(bench, clips, exact, methods)
    met = passing(rows)
    report = {
        "opensora": __version__, "torch": torch.__version__, "platform": platform.platform(), "seed": args.seed,
        "steps": args.steps, "weights": bench.models.summaries["model"].sha256, "num_prompts": args.num_prompts,
        "calibration_prompts": len(prompts), "meets_the_bars": met, "methods": rows,
    }  # fmt: skip
    with atomic_write(folder / "caching.json", make_folders=True) as [temporary]:
        temporary.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(table_of(rows))
    print(f"meets the bars: {', '.join(met) or 'none'}")
    print(draw(rows, folder / "caching.png"))
    return 1 if args.bars and not met else 0


if __name__ == "__main__":
    sys.exit(run_program(main))

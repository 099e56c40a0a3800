"""Benchmarks a request: time, FLOPs and peak memory of each stage."""

from __future__ import annotations

import json
import logging
import platform
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from opensora import __version__
from opensora.acceleration.device import device_name, peak_memory, reset_peak_memory, synchronize
from opensora.acceleration.precision import DTYPES
from opensora.config.settings import InferenceSettings
from opensora.errors import ConfigError, MediaError
from opensora.files import atomic_write
from opensora.models.text_encoder.classes import ClassIds
from opensora.pipeline import step_cache
from opensora.pipeline.calibrated_cache import calibrated_cache
from opensora.pipeline.generation import check_requests, choose_memory_plan, generate_batch, refine
from opensora.pipeline.job import Job
from opensora.pipeline.job_spec import JobSpec
from opensora.pipeline.loaded_models import LoadedModels
from opensora.pipeline.output_folder import check_folder
from opensora.pipeline.text_encoding import count_tokens, encode_texts
from opensora.profiling import cost_model
from opensora.profiling.operation_counter import Cost
from opensora.profiling.peak_flops import peak_flops

logger = logging.getLogger("opensora")

STAGES = ("text", "denoise", "decode")
Report = dict[str, Any]


def run_benchmark(
    settings: InferenceSettings, warmup_count: int, eval_count: int, spec: JobSpec | None = None
) -> Report:
    """Generates the first prompt `warmup_count` times untimed and `eval_count` times timed.

    For each stage: seconds of all timed runs, their median, and, where they can be counted, floating-point operations
    and the share of the device's peak; peak bytes of memory; versions, device, sizes. Raises what a generation raises.
    """
    for name, value, least in (("warmup_count", warmup_count, 0), ("eval_count", eval_count, 1)):
        if value < least:
            raise ConfigError(f"{name} must be at least {least}; it is {value}")
    begin = time.perf_counter()
    benchmark = _Benchmark(settings, spec)
    loading = time.perf_counter() - begin
    for _ in range(warmup_count):
        benchmark.run()
    reset_peak_memory(benchmark.models.device)
    runs = [benchmark.run() for _ in range(eval_count)]
    stages = {stage: _summary([run[stage] for run in runs]) for stage in (*STAGES, "total")}
    for stage, flops in benchmark.flops().items():
        if flops is not None:
            stages[stage] |= {"flops": flops, "share_of_peak": flops / stages[stage]["median"] / benchmark.peak}
    return {
        **benchmark.described(), "loading_seconds": loading, "warmup_count": warmup_count, "eval_count": eval_count,
        "seconds": stages, "peak_memory_bytes": peak_memory(benchmark.models.device),
    }  # fmt: skip


class _Benchmark:
    """One request, and loaded models to run it repeatedly."""

    def __init__(self, settings: InferenceSettings, spec: JobSpec | None) -> None:
        models = self.models = LoadedModels(settings)
        job = self.job = Job(spec or JobSpec(settings), models)
        if models.layout.world_size > 1:
            raise ConfigError("a benchmark runs on one device; start it without torchrun")
        models.locate()
        built = models.build(job.size)
        [self.request] = requests = check_requests(models, job, refine(models, job, job.requests[:1]), built)
        choose_memory_plan(models, job, requests, built)
        self.texts = encode_texts(models, job, [*job.texts(self.request), *step_cache.calibration_prompts(settings)])
        self.latent_size = tuple(built.vae.get_latent_size(job.size))
        self.step = self._count_step(built.model)  # before it is compiled
        models.load(job.size)
        self.parameters = sum(parameter.numel() for parameter in models.model.parameters())
        job.cache = calibrated_cache(models, job, (models.vae.out_channels, *self.latent_size), self.texts)
        self.peak = peak_flops(models.device, next(name for name, one in DTYPES.items() if one == models.dtype))

    def run(self) -> dict[str, float]:
        """Seconds of each stage, and of all."""
        models, job = self.models, self.job
        job.seconds.clear()
        begin = time.perf_counter()
        for text in job.texts_of([self.request]):
            models.text_encoder.encode([text])
        synchronize(models.device)
        encoded = time.perf_counter()
        for _ in generate_batch(models, job, [self.request], self.texts):
            pass
        end, taken = time.perf_counter(), job.seconds
        return {
            "text": encoded - begin, "denoise": taken["sampling"], "decode": taken["decoding"], "total": end - begin,
        }  # fmt: skip

    def _count_step(self, model: Any) -> Cost:
        """The cost of one evaluation of the model, with all guidance branches."""
        models, job = self.models, self.job
        self.tokens = max(count_tokens(models.text_encoder, text) for text in job.texts(self.request))
        costs, rows = cost_model.CostModel(models.dtype, models.device), job.scheduler.num_branches
        return costs.step(model, self.latent_size, job.conditioning, self.tokens, rows)

    def flops(self) -> dict[str, float | None]:
        """Stage -> floating-point operations; None where they are not known."""
        models, job, loops = self.models, self.job, self.job.settings.loop
        flops: dict[str, float | None] = {"denoise": None, "text": None}
        if job.cache.is_exact and job.scheduler.num_sampling_steps:
            flops["denoise"] = _operations(self.step.times(job.scheduler.num_sampling_steps * loops))
        decoding = cost_model.CostModel(models.dtype, models.device).decoding(models.vae, job.size)
        flops["decode"] = _operations(decoding.times(loops))
        if not isinstance(models.text_encoder, ClassIds):
            encoder = models.text_encoder.model
            config = getattr(encoder, "config", None) or encoder.text_model.config
            cost = cost_model.text_cost(
                config, sum(parameter.numel() for parameter in encoder.parameters()), self.tokens
            )
            flops["text"] = _operations(cost.times(len(job.texts_of([self.request]))))
        return flops

    def described(self) -> Report:
        """What was run, and where."""
        models, job, settings = self.models, self.job, self.job.settings
        table = job.cache.table
        return {
            "opensora": __version__, "torch": torch.__version__, "python": platform.python_version(),
            "platform": platform.platform(), "device": str(models.device), "device_name": device_name(models.device),
            "dtype": str(models.dtype).removeprefix("torch."), "peak_flops": self.peak,
            "model": settings.model["type"], "weights": {n: one.sha256 for n, one in models.summaries.items()},
            "parameters": self.parameters, "scheduler": settings.scheduler,
            "compile": settings.compile, "graphs": settings.graphs,
            "num_frames": job.size.num_frames, "height": job.frame_size[0], "width": job.frame_size[1],
            "loops": settings.loop, "prompt": self.request.prompt, "sample_name": settings.sample_name,
            "cache": "none" if job.cache.is_exact else job.cache.method,
            "halves_computed": None if table is None else table.cost,
        }  # fmt: skip


def _operations(cost: Cost) -> float:
    return cost.products + cost.convolutions


def _summary(seconds: Sequence[float]) -> dict[str, Any]:
    return {"all": list(seconds), "median": statistics.median(seconds), "least": min(seconds)}


def check_report_path(path: str | Path) -> None:
    """Raises MediaError if no report can be written there, before the benchmark runs."""
    if Path(path).is_dir():
        raise MediaError(f"{path}: is a folder; name a file such as {Path(path) / 'report.json'}")
    check_folder(Path(path).parent)


def write_report(report: Report, path: str | Path) -> Path:
    """Writes a report as JSON, whole or not at all. Raises MediaError."""
    path = Path(path)
    with atomic_write(path, make_folders=True) as [temporary]:
        temporary.write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return path


def table_of(report: Report) -> str:
    """The report in a few lines."""
    lines = [f"{report['model']} on {report['device']} ({report['device_name']}), {report['dtype']}: "
             f"{report['num_frames']} frames of {report['height']}x{report['width']}"]  # fmt: skip
    for stage, timing in report["seconds"].items():
        line = f"{stage:8}{timing['median']:10.3f} s"
        if "flops" in timing:
            line += f"{timing['flops'] / 1e9:14.1f} GFLOP{100 * timing['share_of_peak']:8.1f} % of the peak"
        lines.append(line)
    if report["peak_memory_bytes"]:
        lines.append(f"peak memory {report['peak_memory_bytes'] / 2**20:.0f} MiB")
    return "\n".join(lines)

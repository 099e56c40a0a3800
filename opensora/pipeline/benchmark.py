"""How long each stage of a request takes, what it computes and how much memory it needs: the report of a benchmark."""

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
from opensora.acceleration.device import DTYPES, name_of, peak_memory, reset_peak_memory, synchronize
from opensora.config.settings import InferenceSettings
from opensora.errors import ConfigError, MediaError
from opensora.files import replacing
from opensora.models.text_encoder.classes import ClassIds
from opensora.pipeline import step_cache
from opensora.pipeline.pipeline import VideoPipeline, count_tokens
from opensora.pipeline.recipe import check_folder
from opensora.profiling import cost_model
from opensora.profiling.peak_flops import peak_flops

logger = logging.getLogger("opensora")

STAGES = ("text", "denoise", "decode")
Report = dict[str, Any]


def run_benchmark(settings: InferenceSettings, warmup_count: int, eval_count: int) -> Report:
    """The report of the first prompt, made `warmup_count` times untimed and `eval_count` times timed.

    For each stage: seconds of all timed runs, their median, and, where they can be counted, floating-point operations
    and the share of the device's peak; peak bytes of memory; versions, device, sizes. Raises what a generation raises.
    """
    for name, value, least in (("warmup_count", warmup_count, 0), ("eval_count", eval_count, 1)):
        if value < least:
            raise ConfigError(f"{name} must be at least {least}; it is {value}")
    begin = time.perf_counter()
    bench = _Bench(settings)
    loading = time.perf_counter() - begin
    for _ in range(warmup_count):
        bench.run()
    reset_peak_memory(bench.pipeline.device)
    runs = [bench.run() for _ in range(eval_count)]
    stages = {stage: _summary([run[stage] for run in runs]) for stage in (*STAGES, "total")}
    for stage, flops in bench.flops().items():
        if flops is not None:
            stages[stage] |= {"flops": flops, "share_of_peak": flops / stages[stage]["median"] / bench.peak}
    return {
        **bench.described(), "loading_seconds": loading, "warmup_count": warmup_count, "eval_count": eval_count,
        "seconds": stages, "peak_memory_bytes": peak_memory(bench.pipeline.device),
    }  # fmt: skip


class _Bench:
    """A request whose parts are loaded and stay so."""

    def __init__(self, settings: InferenceSettings) -> None:
        pipeline = self.pipeline = VideoPipeline(settings)
        if not pipeline.requests:
            raise ConfigError("there is no prompt: give one with --prompt")
        if pipeline.layout.world_size > 1:
            raise ConfigError("a benchmark runs on one device; start it without torchrun")
        pipeline.requests = pipeline.requests[:1]
        parts = pipeline.build()
        [self.request] = requests = pipeline.check(pipeline.refine(pipeline.requests), parts)
        pipeline.choose_memory(requests, parts)
        self.encoder, told = parts["text_encoder"], pipeline.texts(self.request)
        texts = pipeline.encode_texts(self.encoder, [*told, *step_cache.prompts(settings)])
        self.latent = tuple(parts["vae"].get_latent_size(pipeline.size))
        self.step = self._count_step(parts["model"], told)  # as it was built: not compiled, and without numbers
        self.vae, self.model = (pipeline.fill(name, parts[name]) for name in ("vae", "model"))
        self.parameters = sum(parameter.numel() for parameter in self.model.parameters())
        self.texts = {text: texts[text] for text in told}
        self.model = pipeline.accelerated(self.model)
        pipeline.cache = step_cache.tuned(pipeline, self.model, (self.vae.out_channels, *self.latent), texts)
        self.peak = peak_flops(pipeline.device, next(name for name, one in DTYPES.items() if one == pipeline.dtype))

    def run(self) -> dict[str, float]:
        """Seconds of each stage, and of all."""
        pipeline = self.pipeline
        pipeline.seconds.clear()
        begin = time.perf_counter()
        for text in self.texts:
            self.encoder.encode([text])
        synchronize(pipeline.device)
        encoded = time.perf_counter()
        pipeline.make(self.model, self.vae, self.texts, self.request)
        end, taken = time.perf_counter(), pipeline.seconds
        return {
            "text": encoded - begin, "denoise": taken["sampling"], "decode": taken["decoding"], "total": end - begin,
        }  # fmt: skip

    def _count_step(self, model: Any, texts: Sequence[str]) -> cost_model.Cost:
        """The cost of one evaluation of the model, with both branches of guidance."""
        pipeline, batch = self.pipeline, self.pipeline.scheduler.num_branches
        self.tokens = max(count_tokens(self.encoder, text) for text in texts)
        where = (pipeline.dtype, pipeline.device)
        work = cost_model.step(model, self.latent, pipeline.conditioning, self.tokens, *where, batch)
        return cost_model.count(work, pipeline.device)

    def flops(self) -> dict[str, float | None]:
        """Stage -> floating-point operations; None where they are not known."""
        pipeline, loops = self.pipeline, self.pipeline.settings.loop
        scheduler, where = pipeline.scheduler, (pipeline.dtype, pipeline.device)
        found: dict[str, float | None] = {"denoise": None, "text": None}
        if pipeline.cache.is_exact and scheduler.num_sampling_steps:
            found["denoise"] = _operations(self.step.times(scheduler.num_sampling_steps * loops))
        found["decode"] = _operations(cost_model.decoding(self.vae, pipeline.size, *where).times(loops))
        if not isinstance(self.encoder, ClassIds):
            reader = self.encoder.model
            config = getattr(reader, "config", None) or reader.text_model.config
            read = cost_model.reading_text(config, sum(one.numel() for one in reader.parameters()), self.tokens)
            found["text"] = _operations(read.times(len(self.texts)))
        return found

    def described(self) -> Report:
        """What was run, and where."""
        pipeline, settings = self.pipeline, self.pipeline.settings
        table = pipeline.cache.table
        return {
            "opensora": __version__, "torch": torch.__version__, "python": platform.python_version(),
            "platform": platform.platform(), "device": str(pipeline.device), "device_name": name_of(pipeline.device),
            "dtype": str(pipeline.dtype).removeprefix("torch."), "peak_flops": self.peak,
            "model": settings.model["type"], "weights": {n: one.sha256 for n, one in pipeline.summaries.items()},
            "parameters": self.parameters, "scheduler": dict(settings.scheduler),
            "compile": settings.compile, "graphs": settings.graphs,
            "num_frames": pipeline.size.num_frames, "height": pipeline.made[0], "width": pipeline.made[1],
            "loops": settings.loop, "prompt": self.request.prompt, "sample_name": settings.sample_name,
            "cache": "none" if pipeline.cache.is_exact else pipeline.cache.method,
            "halves_computed": None if table is None else table.cost,
        }  # fmt: skip


def _operations(cost: cost_model.Cost) -> float:
    return cost.products + cost.convolutions


def _summary(seconds: Sequence[float]) -> dict[str, Any]:
    return {"all": list(seconds), "median": statistics.median(seconds), "least": min(seconds)}


def check_report_path(path: str | Path) -> None:
    """Raises MediaError if no report can be written there, before anybody waits for one."""
    if Path(path).is_dir():
        raise MediaError(f"{path}: is a folder; name a file such as {Path(path) / 'report.json'}")
    check_folder(Path(path).parent)


def write_report(report: Report, path: str | Path) -> Path:
    """Writes a report as JSON, whole or not at all. Raises MediaError."""
    path = Path(path)
    with replacing(path, make_folders=True) as [temporary]:
        temporary.write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return path


def table_of(report: Report) -> str:
    """The report in a few lines."""
    lines = [f"{report['model']} on {report['device']} ({report['device_name']}), {report['dtype']}: "
             f"{report['num_frames']} frames of {report['height']}x{report['width']}"]  # fmt: skip
    for stage, found in report["seconds"].items():
        line = f"{stage:8}{found['median']:10.3f} s"
        if "flops" in found:
            line += f"{found['flops'] / 1e9:14.1f} GFLOP{100 * found['share_of_peak']:8.1f} % of the peak"
        lines.append(line)
    if report["peak_memory_bytes"]:
        lines.append(f"peak memory {report['peak_memory_bytes'] / 2**20:.0f} MiB")
    return "\n".join(lines)

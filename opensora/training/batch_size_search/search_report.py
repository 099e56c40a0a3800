"""Runs the batch-size search, prints the result, and writes it as a configuration and a table."""

from __future__ import annotations

import dataclasses
import math
import pprint
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from opensora.config.settings import SearchSettings
from opensora.datasets.bucket import Buckets
from opensora.distributed.ranks import world_size
from opensora.errors import ConfigError
from opensora.files import atomic_write
from opensora.training.batch_size_search import search
from opensora.training.batch_size_search.probe import TrainingProbe
from opensora.training.batch_size_search.search import BucketResult, SearchPlan
from opensora.training.batch_size_search.search_model import ModelSearch

# Settings of the search alone, and those written separately.
NOT_WRITTEN = {
    "base", "base_step_time", "method", "untimed_steps", "active_steps", "output", "bucket_config", "resolution",
    "device", "offline",
}  # fmt: skip
HEADS = ("resolution", "frames", "batch size", "seconds a step", "samples a second", "what limits it")
LIMITS = {
    "memory": "memory",
    "time": "the time of a step",
    "data": "rows of the table",
    "range": "the range; a larger one may give more",
    "fixed": "set by the configuration, not tried",
}


def search_batch_sizes(settings: SearchSettings) -> list[Path]:
    """Searches on this machine, prints the result, and returns the configuration and the table it wrote.

    Raises ConfigError when there is nothing to search, or nothing was found.
    """
    if world_size() > 1 or settings.sp_size > 1:
        raise ConfigError("the search runs in one process; start it with --nproc_per_node 1 and sp_size=1")
    plan = search.make_plan(settings.bucket_config, settings.base, settings.base_step_time, settings.resolution)
    if not plan.order:
        raise ConfigError("every range of bucket_config is 0, which leaves nothing to search; write (guess, range)")
    probe = TrainingProbe(settings)
    methods: dict[str, search.Method] = {"model": ModelSearch(), "bisect": search.bisect, "grid": search.grid}
    found = search.search(plan, probe, methods[settings.method])
    print(result_text(plan, found))
    buckets = bucket_config(plan, found)
    if not buckets:
        raise ConfigError(f"no bucket has a batch size; of {found[0].span}: {search.remedy(found[0])}")
    paths = write(settings, plan, found, str(probe.meter))
    print("\n".join(map(str, paths)))
    return paths


def result_text(plan: SearchPlan, found: Sequence[BucketResult]) -> str:
    """The result as Open-Sora prints it; buckets without a batch size come with reason and remedy."""
    lines = ["[Search BS] Search result:", "Resolution, Frames, Batch size, Step time", *map(result_line, found)]
    sizes: dict[str, dict[int, int]] = {}
    for one in sorted(found, key=lambda one: plan.spans.index(one.span)):
        if one.batch_size is not None:
            sizes.setdefault(one.span.resolution, {})[one.span.num_frames] = one.batch_size
    return "\n".join([*lines, f"[Search BS] Bucket searched: {sizes}"])


def result_line(one: BucketResult) -> str:
    place = f"{one.span.resolution}, {one.span.num_frames}"
    if one.batch_size is None:
        return f"{place}, none: {search.remedy(one)}"
    limited = f" (limited by the rows of the table; {search.MORE_DATA})" if one.limit == "data" else ""
    return f"{place}, {one.batch_size}, {one.seconds:.2f}{limited}"


def bucket_config(plan: SearchPlan, found: Sequence[BucketResult]) -> dict[str, dict[int, tuple[float, int]]]:
    """A `bucket_config` for training, in the order of the plan; buckets without a batch size are left out."""
    sizes = {one.span: one.batch_size for one in found}
    config: dict[str, dict[int, tuple[float, int]]] = {}
    for span in plan.spans:
        size = sizes.get(span, span.lower)  # fixed batch sizes have a range of 0
        if size is not None:
            config.setdefault(span.resolution, {})[span.num_frames] = (1.0, size)
    return config


def write(settings: SearchSettings, plan: SearchPlan, found: Sequence[BucketResult], device: str) -> list[Path]:
    """Writes a training configuration and a table beside it, both or neither. Raises ConfigError."""
    config = output_of(settings)
    paths = [config, config.with_suffix(".md")]
    with atomic_write(*paths, make_folders=True, error=ConfigError) as [config, table]:
        config.write_text(config_text(settings, plan, found, device), encoding="utf-8")
        table.write_text(table_text(settings, plan, found, device), encoding="utf-8")
    return paths


def output_of(settings: SearchSettings) -> Path:
    """The path of the configuration; searches of single resolutions have separate ones."""
    if settings.output:
        return Path(settings.output).with_suffix(".py")
    name = f"search_bs-{settings.resolution}" if settings.resolution else "search_bs"
    return Path(settings.outputs) / f"{name}.py"


def config_text(settings: SearchSettings, plan: SearchPlan, found: Sequence[BucketResult], device: str) -> str:
    """The source of a configuration: the settings with the batch sizes found."""
    buckets = bucket_config(plan, found)
    Buckets(buckets)  # raises if training would refuse it
    lines = [f"# Batch sizes for {device}; {goal(plan, found)}."]
    lines += [f"# {one.span}: left out, {search.remedy(one)}" for one in found if one.batch_size is None]
    lines += ["bucket_config = {"]
    lines += [f'    "{resolution}": {entries!r},' for resolution, entries in buckets.items()]
    lines += ["}", ""]
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if field.name not in NOT_WRITTEN and not _is_default(field, value):
            lines.append(f"{field.name} = {pprint.pformat(value, width=100, sort_dicts=False)}")
    return "\n".join(lines) + "\n"


def _is_default(field: dataclasses.Field, value: Any) -> bool:
    return field.default is not dataclasses.MISSING and value == field.default


def table_text(settings: SearchSettings, plan: SearchPlan, found: Sequence[BucketResult], device: str) -> str:
    """All buckets as a Markdown table, under the conditions it is valid for."""
    by_span = {one.span: one for one in found}
    rows = [HEADS, ("---",) * len(HEADS)]
    for span in plan.spans:
        rows.append(_row(by_span.get(span, BucketResult(span, span.lower, math.nan, "fixed"))))
    valid = {
        "device": device,
        "torch": torch.__version__,
        "model": settings.model["type"],
        "dtype": settings.dtype,
        "grad_checkpoint": settings.grad_checkpoint,
        "goal": goal(plan, found),
    }
    lines = ["# Batch sizes", "", *(f"- {name}: {value}" for name, value in valid.items()), ""]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)]) + "\n"


def _row(one: BucketResult) -> tuple[str, ...]:
    place = (one.span.resolution, str(one.span.num_frames))
    if one.batch_size is None:
        return (*place, "none", "", "", search.remedy(one))
    if math.isnan(one.seconds):
        return (*place, str(one.batch_size), "", "", LIMITS[one.limit])
    speed = one.batch_size / one.seconds
    return (*place, str(one.batch_size), f"{one.seconds:.2f}", f"{speed:.3g}", LIMITS[one.limit])


def goal(plan: SearchPlan, found: Sequence[BucketResult]) -> str:
    """The goal of the search, in words."""
    if plan.base is None:
        return f"a step takes less than {plan.target:g} s"
    return f"a step takes less than the {found[0].seconds:.2f} s of the largest batch of {plan.base}"

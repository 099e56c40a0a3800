"""How fast a device is: speeds of earlier runs on this machine, or a short trial."""

from __future__ import annotations

import json
import statistics
import time
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Annotated, NamedTuple

import torch
from pydantic import Field

from opensora.acceleration.device import is_cpu, synchronize
from opensora.config.schema import Name, Number, Schema, check
from opensora.errors import MediaError
from opensora.files import atomic_write, cache_path, read_json
from opensora.profiling.memory_meter import MemoryMeter
from opensora.profiling.operation_counter import Cost, num_bytes
from opensora.profiling.peak_flops import known_peak

LAUNCH = 1e-5  # seconds that an operation takes at least
RUNS_KEPT = 8  # last runs of a device and stage
MIN_SECONDS = 10.0  # of a run that is recorded
MIN_NOMINAL_SECONDS = 0.1  # of a run that is recorded; below, something else took the time
BUSY = 20  # runs this many times slower than a trial were on a busy machine
UNSURE = 4  # times a trial's duration, at worst


class Span(NamedTuple):
    """Seconds that work takes, at best and at worst, and the source of the estimate."""

    least: float
    most: float
    source: str


class _Run(Schema):
    """A recorded run of a stage; `pace` is its seconds for each second at the nominal speed."""

    device: Name
    stage: Name
    pace: Annotated[Number, Field(gt=0)]
    seconds: Annotated[Number, Field(ge=MIN_SECONDS)]


def seconds(cost: Cost, device: torch.device, stage: str, dtype: torch.dtype = torch.float32) -> float:
    """Seconds that a stage of this cost takes at best on a device that computes in `dtype`."""
    return span(cost, device, stage, dtype).least


def span(cost: Cost, device: torch.device, stage: str, dtype: torch.dtype = torch.float32) -> Span:
    """The duration of a stage: from the fastest to the median of the last runs, or from a trial.

    Runs far slower than the trial are left out. Nothing is faster than the device's peak.
    """
    trial, key = _trial(device, dtype), device_key(device, dtype)
    recorded = [run.pace for run in _runs() if (run.device, run.stage) == (key, stage)]
    paces = [pace for pace in recorded[-RUNS_KEPT:] if pace <= BUSY * trial]
    source = f"{len(paces)} earlier run{'s' * (len(paces) > 1)} here" if paces else "a moment's trial"
    fast, slow = (min(paces), statistics.median(paces)) if paces else (trial, UNSURE * trial)
    launch, peak = LAUNCH * cost.calls, known_peak(device, dtype)
    floor = (cost.products + cost.convolutions) / peak if peak else 0.0
    least, most = (max(cost.nominal_seconds * pace, floor) + launch for pace in (fast, slow))
    return Span(least, most, source)


def remember(device: torch.device, stage: str, cost: Cost, taken: float, dtype: torch.dtype = torch.float32) -> None:
    """Records how long a stage took on a device, if it was long enough to tell the device's speed."""
    launch = LAUNCH * cost.calls
    if taken < MIN_SECONDS or cost.nominal_seconds < MIN_NOMINAL_SECONDS or launch > taken / 2:
        return
    pace = (taken - launch) / cost.nominal_seconds
    run = _Run(device=device_key(device, dtype), stage=stage, pace=pace, seconds=taken)
    same = [one for one in _runs() if (one.device, one.stage) == (run.device, run.stage)][1 - RUNS_KEPT :]
    others = [one for one in _runs() if (one.device, one.stage) != (run.device, run.stage)]
    text = json.dumps([one.model_dump() for one in [*others, *same, run]])
    with suppress(MediaError), atomic_write(_file(), make_folders=True) as [temporary]:
        temporary.write_text(text, encoding="utf-8")


def _runs() -> list[_Run]:
    """The recorded runs; none if the file cannot be read. Entries of older versions lack `seconds`."""
    with suppress(MediaError):
        known = check(list[dict], read_json(_file()), error=MediaError)
        return check(list[_Run], [run for run in known if "seconds" in run], error=MediaError)
    return []


def _file() -> Path:
    return cache_path("paces.json")


def device_key(device: torch.device, dtype: torch.dtype) -> str:
    """A device in the record: a CPU's threads, or a card's name and memory; and the dtype unless float32."""
    key = f"{device.type}-{torch.get_num_threads()}" if is_cpu(device) else str(MemoryMeter(device))
    return key if dtype == torch.float32 else f"{key}-{str(dtype).removeprefix('torch.')}"


@cache
def _trial(device: torch.device, dtype: torch.dtype) -> float:
    """Seconds for each second at the nominal speed, from some milliseconds of matrix products and sums."""
    one = torch.ones(1024, 1024, device=device, dtype=dtype)
    large = torch.ones(8, 1024, 1024, device=device, dtype=dtype)
    count, times = 1 if is_cpu(device) else 32, []  # an accelerator's launches take longer than one product
    for _attempt in range(3):  # the first starts threads and loads kernels
        begin = time.perf_counter()
        for _ in range(count):
            one @ one
            large + large
        synchronize(device)
        times.append(time.perf_counter() - begin)
    work = Cost(products=2.0 * 1024**3, moved=3.0 * num_bytes(large)).times(count)
    return min(times) / work.nominal_seconds

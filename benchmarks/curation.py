"""Curation of footage: executors and decoding, memory of a worker on a 4K file, and a ledger of a million results.

python -m benchmarks.curation [--parts throughput memory ledger] [--files 24] [--frames 240] [--items 1000000]
                              [--stages probe ... quality] [--repeats 2] [--output results]

throughput: `motion` on rendered files, in one process, on a pool of two, and in one process that decodes whole files.
memory: the peak of a process that runs a stage on a 3840x2160 file, and on one four times as long.
ledger: microseconds and bytes for each result that is put, found, and scanned by a run with nothing left to do.
"""

from __future__ import annotations

import multiprocessing
import resource
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from opensora.curation.clip import Clip
from opensora.curation.execution.ledger import Key, Ledger, Result, open_ledger
from opensora.curation.execution.local import run_pool, run_serial
from opensora.curation.execution.settings import Limits
from opensora.curation.execution.task import Task
from opensora.curation.stages import registry
from opensora.curation.stages.stage import Columns
from opensora.datasets.video import read_video
from opensora.datasets.video.writer import VideoEncoder

STAGES_4K = ["probe", "scenes", "health", "motion", "camera", "quality"]


@dataclass(frozen=True)
class WholeClip(Clip):
    """Decodes every frame into memory, as many tools do, and takes those that are asked for."""

    def frames(self, choose: Callable[[int], Sequence[int]], convert: Callable[..., Any] = np.asarray, *_: Any) -> Any:
        frames, fps = read_video(self.path)
        return [convert(frames[index]) for index in choose(len(frames))], fps


def render(path: Path, frames: int, height: int, width: int, seed: int) -> str:
    """A video of a texture that drifts to the right."""
    random = np.random.default_rng(seed)
    cells = np.kron(random.integers(0, 255, (height // 40 + 1, width // 40 + 12, 3), np.uint8), np.ones((40, 40, 1)))
    wide = cells.astype(np.uint8)
    views = np.lib.stride_tricks.sliding_window_view(wide[:height], width, axis=1)  # [H, offsets, 3, W]
    with VideoEncoder(path, 24, crf=28) as encoder:
        for number in range(frames):
            encoder.add(views[:, 2 * number % views.shape[1]].transpose(0, 2, 1))
    return str(path)


def processor_seconds() -> float:
    """Of this process and its ended children."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def throughput(folder: Path, files: int, frames: int, repeats: int) -> dict[str, Any]:
    paths = [render(folder / f"{number}.mp4", frames, 480, 640, number) for number in range(files)]
    stages = [registry.make("motion", {})]

    def tasks(kind: type[Clip]) -> Iterable[Task]:
        return (Task(number, kind(path), (0,)) for number, path in enumerate(paths))

    sides: dict[str, Callable[[], list[Columns]]] = {
        "one process": lambda: results(run_serial(tasks(Clip), stages)),
        "pool of 2": lambda: results(run_pool(tasks(Clip), stages, 2, Limits())),
        "one process, whole files": lambda: results(run_serial(tasks(WholeClip), stages)),
    }
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
    found: dict[str, list[Columns]] = {}
    for _ in range(repeats):
        for name, work in sides.items():
            began, spent = time.perf_counter(), processor_seconds()
            found[name] = work()
            times[name].append((time.perf_counter() - began, processor_seconds() - spent))
    assert found["one process"] == found["pool of 2"] == found["one process, whole files"]
    best = {name: tuple(map(min, zip(*one, strict=True))) for name, one in times.items()}
    base = best["one process"]
    return {
        name: {
            "seconds": clock, "processor_seconds": processor, "clips_per_second": files / clock,
            "times_as_fast_as_one_process": base[0] / clock, "processor_seconds_ratio": processor / base[1],
        }
        for name, (clock, processor) in best.items()
    }  # fmt: skip


def results(found: Iterable[Any]) -> list[Columns]:
    pairs = sorted((task.number, result.result.rows[0]) for task, result in found)
    return [row for _, row in pairs]


def memory(folder: Path, stages: Sequence[str]) -> dict[str, Any]:
    short, long = (render(folder / f"4k_{n}.mp4", n, 2160, 3840, 1) for n in (4, 16))
    return {stage: {"mib": peak_mib(stage, short), "mib_four_times_as_long": peak_mib(stage, long)} for stage in stages}


def peak_mib(stage: str, path: str) -> float:
    """The most memory of a new process that runs a stage on a file."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_measure, args=(theirs, stage, path))
    process.start()
    found = float(ours.recv())
    process.join()
    return found


def _measure(connection: Any, stage: str, path: str) -> None:
    made = registry.make(stage, {})
    made.setup()
    made.process(Clip(path))
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    connection.send(int(line.split()[1]) / 1024)  # getrusage would count the parent's memory before the start


def ledger(folder: Path, items: int) -> dict[str, Any]:
    path = folder / "ledger"
    columns = {"num_frames": 240, "width": 640, "height": 480, "aspect_ratio": 0.75, "resolution": 307200, "fps": 24.0}
    keys = [Key(f"{number:032x}:{number}-{number + 100}", "probe", "0123456789abcdef") for number in range(items)]
    np.random.default_rng(0).shuffle(keys)  # contents of files come in no order
    with open_ledger(path) as opened:
        put = timed(lambda: [opened.put(key, Result([columns])) for key in keys], items)
    size = sum(file.stat().st_size for file in folder.glob("ledger*"))
    with open_ledger(path) as opened:
        get = timed(lambda: [opened.get(key.item, [key[1:]]) for key in keys], items)
        scan = timed(lambda: resume(opened, keys), items)
    return {"items": items, "put_us": put, "get_us": get, "resume_us": scan, "bytes_per_item": size / items}


def resume(opened: Ledger, keys: Sequence[Key]) -> None:
    """What a second run asks the ledger: whether a result is missing, then the columns."""
    for _ in range(2):
        assert all(opened.get(key.item, [key[1:]]) != [None] for key in keys)


def timed(work: Callable[[], Any], items: int) -> float:
    """Microseconds for each item, of this process's processors."""
    began = time.process_time()
    work()
    return (time.process_time() - began) / items * 1e6


def main() -> None:
    from benchmarks import common  # here, so that workers do not import PyTorch

    parts = ["throughput", "memory", "ledger"]
    given = common.arguments(__doc__, repeats=2, parts=parts, stages=STAGES_4K, files=24, frames=240, items=1_000_000)
    report: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if "throughput" in given.parts:
            report["throughput"] = throughput(folder, given.files, given.frames, given.repeats)
        if "memory" in given.parts:
            report["memory"] = memory(folder, given.stages)
        if "ledger" in given.parts:
            report["ledger"] = ledger(folder, given.items)
    bars = {}
    if "throughput" in report:
        bars["processor seconds"] = {side: one["processor_seconds"] for side, one in report["throughput"].items()}
    if "memory" in report:
        bars["MiB on a 4K file"] = {stage: one["mib_four_times_as_long"] for stage, one in report["memory"].items()}
    common.save("curation", report, bars, given.output, unit="see groups")


if __name__ == "__main__":
    main()

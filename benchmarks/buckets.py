"""Seconds and memory of building the buckets of a table of 10 million rows, against a loop over rows.

python benchmarks/buckets.py [--rows N] [--table csv|parquet] [--output FILE]

The columns num_frames, height and width are made by NumPy, and the bucket configuration is that of the first training
stage of Open-Sora 1.2. Timed is an epoch as training builds it: the bucket of every row, then all batches in their
order. `--table` also writes the rows to a file, with paths and captions, and times reading that. Everything runs in one
fresh process on one thread. The loop, in plain Python, places 100,000 of the rows by the same draws, and has to come
to the same buckets.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import platform
import re
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from opensora.config import find_config, read_config
from opensora.datasets.aspect import NUM_PIXELS, SIZES
from opensora.datasets.bucket import DRAWS, Buckets, random_words
from opensora.datasets.samplers import make_epoch
from opensora.datasets.table import read_table

CONFIG, SEED, LOOP_ROWS = "opensora-v1-2/train/stage1", 1024, 100_000
SHAPES = [(144, 256), (240, 426), (360, 640), (480, 854), (720, 1280), (1080, 1920), (1280, 720), (512, 512), (96, 96)]
MOST_SECONDS, MOST_GB = 30, 4


def make_columns(count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """num_frames, height and width as a table has them: a fifth images, videos of up to 900 frames of many sizes."""
    generator = np.random.default_rng(0)
    shapes = np.array(SHAPES, np.float64)[generator.integers(0, len(SHAPES), count)]
    frames = np.where(generator.random(count) < 0.2, 1, generator.integers(10, 900, count)).astype(np.float64)
    return frames, shapes[:, 0].copy(), shapes[:, 1].copy()


def timed(function: Callable[[], Any]) -> tuple[Any, dict[str, float]]:
    """What a function returns, and its seconds by the clock and of the processor."""
    clock, busy = time.perf_counter(), time.process_time()
    result = function()
    return result, {"seconds": time.perf_counter() - clock, "processor_seconds": time.process_time() - busy}


def high_water() -> float:
    """GB that this process has needed at most."""
    return int(re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024 / 1e9


def build(config: dict, columns: tuple[np.ndarray, ...]) -> Any:
    """One epoch of batches."""
    placement = Buckets(config).assign(*columns, seed=SEED)
    return make_epoch(placement, SEED, 0, shuffle=True, drop_last=True)


def loop(config: dict, columns: tuple[list[int], ...], draws: dict[tuple[int, int], list[float]]) -> dict:
    """The rows of every bucket, found row by row: what `place` does, without arrays."""
    entries, found = list(enumerate(Buckets(config).entries)), defaultdict(list)
    for row, (frames, height, width) in enumerate(zip(*columns, strict=True)):
        passed = None
        for index, entry in entries:
            if entry.resolution == passed or 5 * height * width < 4 * NUM_PIXELS[entry.resolution]:
                continue
            if (frames != 1) if entry.num_frames == 1 else (frames < entry.num_frames):
                continue
            if draws[index, 0][row] >= entry.keep_frames:
                continue
            if draws[index, 1][row] >= entry.keep:
                passed = entry.resolution  # goes on to the next one
                continue
            sizes = SIZES[entry.resolution]
            ratio = min(sizes, key=lambda key: abs(height / width - float(key)))
            found[entry.resolution, entry.num_frames, ratio].append(row)
            break
    return found


def compare(config: dict, columns: tuple[np.ndarray, ...]) -> dict[str, float]:
    """Seconds of the loop and of `place` on the same rows, and their ratio; the two are made to agree."""
    columns = tuple(column[:LOOP_ROWS] for column in columns)
    count = len(columns[0])
    draws = {
        (index, which): ((random_words(count, SEED, 0, DRAWS, index, which) >> np.uint64(11)) * 2.0**-53).tolist()
        for index in range(len(Buckets(config).entries))
        for which in range(2)
    }
    whole = tuple(column.astype(int).tolist() for column in columns)
    found, slow = timed(lambda: loop(config, whole, draws))
    groups, fast = timed(lambda: Buckets(config).assign(*columns, seed=SEED).groups())
    buckets, _, rows, group = groups
    assert {tuple(bucket): rows[group == number].tolist() for number, bucket in enumerate(buckets)} == dict(found)
    ratio = slow["processor_seconds"] / fast["processor_seconds"]
    return {"rows": count, "loop": slow, "place": fast, "ratio": ratio}


def measure(num_rows: int, kind: str | None) -> dict[str, Any]:
    """All figures; to be run in a process of its own."""
    config = read_config(find_config(CONFIG))["bucket_config"]
    result: dict[str, Any] = {"rows": num_rows, "config": CONFIG, "peak_gb_before": high_water()}
    columns = make_columns(num_rows)
    if kind:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / f"table.{kind}"
            write_table(path, columns)
            result["peak_gb_before_reading"] = high_water()
            table, result["reading"] = timed(lambda: read_table(path))
        columns = table.sizes()
    epoch, result["building"] = timed(lambda: build(config, columns))
    result |= {"batches": len(epoch), "buckets": len(epoch.buckets), "placed": int(epoch.num_rows.sum())}
    result["peak_gb"] = high_water()
    del epoch
    result["against_a_loop"] = compare(config, columns)
    return result


def write_table(path: Path, columns: tuple[np.ndarray, ...]) -> None:
    """The rows with a path of 45 letters and a caption of 33 each, a piece at a time."""
    names, step, writer = ("num_frames", "height", "width"), 200_000, None
    file = open(path, "w") if path.suffix == ".csv" else None  # noqa: SIM115 (one of two kinds)
    if file:
        file.write("path,text," + ",".join(names) + "\n")
    for first in range(0, len(columns[0]), step):
        rows = range(first, min(first + step, len(columns[0])))
        cells = [column[rows.start : rows.stop].astype(int).tolist() for column in columns]
        paths = [f"/videos/part_{row % 1000:04d}/clip_number_{row:09d}.mp4" for row in rows]
        texts = [f"a caption of the clip no. {row:08d}" for row in rows]
        if file:
            file.writelines(f"{','.join(map(str, row))}\n" for row in zip(paths, texts, *cells, strict=True))
            continue
        import pyarrow
        from pyarrow import parquet

        part = pyarrow.table({"path": paths, "text": texts, **dict(zip(names, cells, strict=True))})
        writer = writer or parquet.ParquetWriter(path, part.schema)
        writer.write_table(part)
    for opened in filter(None, (file, writer)):
        opened.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--table", choices=("csv", "parquet"), help="also write and read a table of this kind")
    parser.add_argument("--output", type=Path, default=Path("outputs/benchmarks/buckets.json"))
    args = parser.parse_args()
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        result = pool.apply(measure, (args.rows, args.table))
    result["machine"] = platform.processor() or platform.machine()
    result["within_limits"] = result["building"]["seconds"] < MOST_SECONDS and result["peak_gb"] < MOST_GB
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(result, indent=1) + "\n")
    print(line(result))
    print(args.output)


def line(result: dict[str, Any]) -> str:
    building, against = result["building"], result["against_a_loop"]
    read = f", read in {result['reading']['seconds']:.1f} s" if "reading" in result else ""
    return (
        f"{result['rows']:,} rows{read}: {result['batches']:,} batches of {result['buckets']} buckets in "
        f"{building['seconds']:.1f} s ({building['processor_seconds']:.1f} s of the processor), "
        f"{result['peak_gb']:.2f} GB at most; {against['ratio']:.0f}x a loop over {against['rows']:,} rows"
    )


if __name__ == "__main__":
    main()

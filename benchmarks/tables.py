"""Tables of any size in bounded memory: filter, merge, set operations and sort, against reading the CSV alone.

python benchmarks/tables.py [--rows 10000000] [--folder FOLDER]

Each job runs in a process of its own: peak memory, seconds of the processor, rows per second. The table takes about
100 bytes a row, its results as much again.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

COLUMNS = ("path", "text", "num_frames", "height", "width", "fps", "aes", "flow")
READ = "import csv, sys\nfor name in sys.argv[1:]:\n    for row in csv.reader(open(name, newline='')): pass"
JOBS: dict[str, tuple[str, ...]] = {
    "filter": ("big.csv", "--where", "aes >= 5 and 2 < flow < 15 and contains(text, 'cat')"),
    "merge": ("big.csv", "other.csv", "--aesmin", "5"),
    "intersection": ("big.csv", "--intersection", "other.csv"),
    "deduplicate": ("big.csv", "other.csv", "--remove-path-duplication"),
    "sort": ("big.csv", "--sort", "aes"),
}


def write_table(path: Path, first: int, rows: int) -> None:
    """A table of random rows numbered from `first` on."""
    draw = random.Random(first)
    words = ("a cat", "a dog", "a boat", "two birds", "an old house", "rain")
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        for number in range(first, first + rows):
            text = f"{draw.choice(words)} near {draw.choice(words)}, filmed from above"
            scores = round(draw.gauss(5, 1), 2), round(draw.expovariate(0.1), 2)
            writer.writerow((f"clips/{number % 997:03}/{number:08}.mp4", text, 51, 720, 1280, 24, *scores))


def measured(argv: Sequence[str], folder: Path) -> dict[str, float]:
    """Seconds by the clock and of the processor, and peak memory in MiB, of a process that must succeed."""
    began = time.perf_counter()
    environment = {**os.environ, "TMPDIR": str(folder), "PYTHONPATH": str(Path(__file__).parents[1])}
    process = subprocess.Popen([sys.executable, *argv], cwd=folder, env=environment, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{argv} failed")
    seconds = time.perf_counter() - began
    return {
        "seconds": seconds,
        "processor_seconds": usage.ru_utime + usage.ru_stime,
        "peak_mib": usage.ru_maxrss / 1024,  # KiB on Linux
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=10_000_000, help="rows of the table; a second one has a tenth")
    parser.add_argument("--folder", help="where the tables are written and removed")
    parser.add_argument("--jobs", nargs="+", choices=JOBS, default=list(JOBS))
    parser.add_argument("--output", type=Path, default=Path("outputs/benchmarks/tables.json"))
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="opensora-tables-", dir=args.folder) as name:
        folder = Path(name)
        write_table(folder / "big.csv", 0, args.rows)
        write_table(folder / "other.csv", args.rows - args.rows // 20, args.rows // 10)  # half of it is in both
        report = {"rows": args.rows, "bytes": (folder / "big.csv").stat().st_size}
        report["read"] = measured(["-c", READ, "big.csv"], folder)
        print("read", report["read"], flush=True)
        for job in args.jobs:
            found = measured(["-m", "opensora", "data", "edit", *JOBS[job], "--output", "out.csv"], folder)
            found["rows_per_processor_second"] = args.rows / found["processor_seconds"]
            found["times_reading"] = found["processor_seconds"] / report["read"]["processor_seconds"]
            report[job] = found
            (folder / "out.csv").unlink()
            print(job, {key: round(value, 1) for key, value in found.items()}, flush=True)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()

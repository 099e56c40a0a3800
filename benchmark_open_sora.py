"""Times a request on a device and writes a JSON report; without weights, that of the embedded model.

python benchmark_open_sora.py [--device NAME] [--warmup-count 3] [--eval-count 5] [--benchmark-save-path FILE] [flags]
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from opensora.benchmark import check_report_path, run_benchmark, table_of, write_report
from opensora.utils.config_utils import run_program
from opensora.utils.device_guide import guide_parser, guide_settings


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark, prints its table and the path of its report."""
    parser = guide_parser("Time text encoder, denoising and decoding on a device.")
    parser.add_argument("--warmup-count", type=int, default=3, help="untimed runs at the start")
    parser.add_argument("--eval-count", type=int, default=5, help="timed runs")
    parser.add_argument("--benchmark-save-path", default="./benchmark/report.json", help="JSON file to write")
    args = parser.parse_args(argv)
    settings = guide_settings(args)
    check_report_path(args.benchmark_save_path)
    report = run_benchmark(settings, args.warmup_count, args.eval_count)
    print(table_of(report))
    print(write_report(report, args.benchmark_save_path))
    return 0


if __name__ == "__main__":
    sys.exit(run_program(main))

"""data: tables edited, split and converted."""

from __future__ import annotations

import argparse
from typing import Any

from opensora.cli import preflight
from opensora.cli.parser import Parser
from opensora.cli.program import one_line
from opensora.cli.verbs import data_clips, data_tables, data_views
from opensora.cli.verbs.verb import Verb, add_verbs
from opensora.curation.stages.names import STAGE_NAMES
from opensora.curation.tables.operations import OPERATIONS, Operation

CONVERT = {"integer": int, "number": float, "text": str, "list": str}


class _Append(argparse.Action):
    """Appends (operation, value): operations run in the order given."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        value = None if self.nargs == 0 else values
        namespace.operations = [*(namespace.operations or ()), (self.const, value)]


def add_operations(parser: Parser) -> None:
    """Adds one flag per operation."""
    group = parser.add_argument_group("operations, in the order given")
    for name, operation in OPERATIONS.items():
        options: dict[str, Any] = {} if operation.value == "none" else {"type": CONVERT[operation.value]}
        group.add_argument(
            f"--{name}", action=_Append, nargs=_nargs(operation), dest="operations", const=name,
            metavar=operation.metavar, help=f"{operation.help} [no]", default=None, **options,
        )  # fmt: skip


def _nargs(operation: Operation) -> int | str | None:
    if operation.value == "none":
        return 0
    return "+" if operation.value == "list" else None


def _add_edit(parser: Parser) -> None:
    parser.add_argument("input", nargs="+", metavar="TABLE", help="tables (.csv, .jsonl, .parquet) or glob patterns")
    parser.add_argument("--output", metavar="FILE", help="table to write [the first input's name, with the operations]")
    parser.add_argument("--format", choices=("csv", "parquet", "jsonl"), help="format, if --output is not given [csv]")
    parser.add_argument("--shard", type=int, metavar="N", help="write N tables of consecutive rows [one]")
    parser.add_argument("--seed", type=int, default=42, metavar="N", help="random seed of --shuffle [42]")
    parser.add_argument("--num-workers", type=int, default=4, metavar="N", help="threads that probe files [4]")
    parser.add_argument("--disable-parallel", action="store_true", help="probe files one after the other [no]")
    parser.add_argument("--force", action="store_true", help="replace existing tables [no]")
    add_operations(parser)


def run_edit(args: argparse.Namespace) -> int:
    from opensora.curation.tables.editing import EditRequest, edit

    workers = 1 if args.disable_parallel else args.num_workers
    how = (args.output, args.format, args.shard, args.seed, workers, args.force)
    result = edit(EditRequest(tuple(args.input), tuple(args.operations or ()), *how))
    for name, count in result.dropped.items():
        print(f"dropped by {one_line(name)}: {count:,}")
    for path, rows in result.written:
        print(f"{one_line(str(path))}: {rows:,} rows")
    return 0


def _add_curate(parser: Parser) -> None:
    parser.add_argument("source", metavar="INPUT", help="folder of videos and images, or a table of them")
    parser.add_argument("target", metavar="OUT", help="table to write: .csv, .jsonl or .parquet")
    text = f"stages in order, with commas between them: {', '.join(STAGE_NAMES)} [probe]"
    parser.add_argument("--stages", default="probe", metavar="NAMES", help=text)
    parser.add_argument("--set", nargs="+", default=[], metavar="STAGE.NAME=VALUE", help="settings of stages [none]")
    text = "results of all stages, taken up by the next run [OUT.ledger]; more are merged into the first"
    parser.add_argument("--ledger", nargs="+", metavar="FILE", help=text)
    text = "where stages run: processes of this machine, or tasks of a Ray cluster [local]"
    parser.add_argument("--executor", choices=("local", "ray"), default="local", help=text)
    text = "a running Ray cluster, such as auto or HOST:PORT [one of this machine, for this run]"
    parser.add_argument("--address", metavar="ADDRESS", help=text)
    text = "processes [one per core], 0 for this one without limits; with ray, tasks at once [two per core]"
    parser.add_argument("--workers", type=int, metavar="N", help=text)
    parser.add_argument("--shard", metavar="I/N", help="compute every Nth item from item I on, counted from 0 [all]")
    parser.add_argument(
        "--seconds", type=float, default=600, metavar="N", help="time limit of one stage on one item [600]"
    )
    parser.add_argument("--memory", type=int, default=4096, metavar="MIB", help="memory limit of a process [4096]")
    parser.add_argument("--retry-errors", action="store_true", help="try again what failed in earlier runs [no]")
    parser.add_argument("--force", action="store_true", help="replace an existing table [no]")


def _curate(args: argparse.Namespace) -> int:
    preflight.check_exists(args.source)
    from opensora.curation.curate import CurationSettings, curate
    from opensora.curation.execution.settings import ExecutorSettings, Limits
    from opensora.curation.options import parse_options, parse_shard

    ledger, *others = args.ledger or [None]
    limits = Limits(args.seconds, args.memory)
    report = curate(CurationSettings(
        args.source, args.target, tuple(args.stages.split(",")), parse_options(args.set), ledger, tuple(others),
        ExecutorSettings(args.executor, args.workers, limits, args.address), parse_shard(args.shard), args.retry_errors,
        args.force,
    ))  # fmt: skip
    print(f"{one_line(args.target)}: {report.rows:,} rows, {report.computed:,} results computed")
    if report.quarantined:
        print(f"{one_line(args.target)}.quarantine.jsonl: {report.quarantined:,} left out, with the reasons")
    return 0


def _add_footage(parser: Parser) -> None:
    parser.add_argument("folder", metavar="FOLDER", help="new folder for the videos, captions and truth.jsonl")
    parser.add_argument("--scenes", type=int, default=40, metavar="N", help="scenes of all films together [40]")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="random seed [0]")
    parser.add_argument("--image-size", type=int, nargs=2, default=(144, 256), metavar=("H", "W"), help="[144 256]")


def _footage(args: argparse.Namespace) -> int:
    from opensora.curation.footage.folder import FootageSettings, write_footage

    lines = write_footage(args.folder, FootageSettings(args.scenes, args.seed, *args.image_size))
    print(f"{one_line(args.folder)}: {len(lines):,} videos and the truth about them in truth.jsonl")
    return 0


SUBVERBS = {
    **data_clips.VERBS,
    **data_tables.VERBS,
    **data_views.VERBS,
    "curate": Verb(
        "make a training table from footage: scenes, scores, health; resumable",
        "opensora data curate my-videos clips.csv --stages probe,scenes,health", _add_curate, _curate,
    ),
    "edit": Verb(
        "filter, sort, merge, extend and convert tables",
        "opensora data edit videos.csv --info --fmin 17 --where 'height >= 240' --output clips.parquet",
        _add_edit, run_edit,
    ),
    "footage": Verb(
        "render raw footage with known scenes, camera moves, texts, copies and faults, to try curation on",
        "opensora data footage my-videos --scenes 40", _add_footage, _footage,
    ),
}  # fmt: skip


def _add_data(parser: Parser) -> None:
    add_verbs(parser, SUBVERBS, "TASK")


def _data(args: argparse.Namespace) -> int:
    raise AssertionError("the task's own action runs")


VERBS = {
    "data": Verb(
        "work on tables of videos, from raw footage to training data", SUBVERBS["edit"].example, _add_data, _data
    ),
}

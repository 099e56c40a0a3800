"""data cut, paths: clips as files, and the files of a table."""

from __future__ import annotations

import argparse

from opensora.cli import preflight
from opensora.cli.parser import Parser
from opensora.cli.program import one_line
from opensora.cli.verbs.verb import Verb

MAX_SHOWN = 10  # sources that are missing or differ


def _add_cut(parser: Parser) -> None:
    parser.add_argument("table", metavar="TABLE", help="table of clips, or a folder of videos")
    parser.add_argument("--output", required=True, metavar="FOLDER", help="folder for the files")
    parser.add_argument("--table", dest="target", metavar="FILE", help="table of the files to write [FOLDER/clips.csv]")
    text = "copy streams from key frame to key frame, instead of encoding the exact frames [no]"
    parser.add_argument("--copy", action="store_true", help=text)
    parser.add_argument("--lossless", action="store_true", help="keep every pixel, in large files [no]")
    text = "leave clips of fewer seconds out [none]"
    parser.add_argument("--min-seconds", type=float, default=0.0, metavar="N", help=text)
    parser.add_argument("--max-seconds", type=float, metavar="N", help="shorten clips to N seconds [whole]")
    parser.add_argument("--target-fps", type=float, metavar="N", help="lower the frame rate to N [as it is]")
    parser.add_argument("--shorter-size", type=int, metavar="N", help="scale the shorter side down to N [as it is]")
    parser.add_argument("--workers", type=int, metavar="N", help="processes [one per core], 0 for this one")
    parser.add_argument("--seconds", type=float, default=3600, metavar="N", help="time limit of one clip [3600]")
    parser.add_argument("--memory", type=int, default=4096, metavar="MIB", help="memory limit of a process [4096]")
    parser.add_argument("--force", action="store_true", help="replace the table; files are never replaced [no]")


def _cut(args: argparse.Namespace) -> int:
    preflight.check_exists(args.table)
    from opensora.curation.cutting.cut import CutSettings, cut_clips
    from opensora.curation.cutting.stage import Cut
    from opensora.curation.execution.settings import ExecutorSettings, Limits

    cut = Cut(
        args.output, args.copy, args.lossless, args.min_seconds, args.max_seconds, args.target_fps, args.shorter_size
    )
    executor = ExecutorSettings(workers=args.workers, limits=Limits(args.seconds, args.memory))
    settings = CutSettings(args.table, cut, args.target, executor, args.force)
    report = cut_clips(settings)
    short = f", {report.short:,} clips are too short" if report.short else ""
    print(f"{one_line(str(settings.target))}: {report.rows:,} rows{short}")
    if report.quarantined:
        print(f"{one_line(str(settings.target))}.quarantine.jsonl: {report.quarantined:,} left out, with the reasons")
    return 0


def _add_paths(parser: Parser) -> None:
    parser.add_argument("table", metavar="TABLE", help="table with the column path, or with the column id")
    parser.add_argument("root", nargs="?", metavar="FOLDER", help="folder of the media files")
    parser.add_argument("output", nargs="?", metavar="OUT", help="table to write, with the column path")
    parser.add_argument("--root", dest="root_flag", metavar="FOLDER", help="the same as FOLDER")
    parser.add_argument("--output", dest="output_flag", metavar="OUT", help="the same as OUT")
    parser.add_argument("--force", action="store_true", help="replace an existing table [no]")


def _paths(args: argparse.Namespace) -> int:
    root = args.root_flag or args.root
    output = args.output_flag or args.output or (args.root if args.root_flag else None)
    if not root or not output:
        from opensora.errors import ConfigError

        raise ConfigError("data paths needs a folder and a table to write; give TABLE FOLDER OUT")
    preflight.check_exists(args.table)
    preflight.check_exists(root)
    from opensora.curation.tables.paths import id_to_path
    from opensora.curation.tables.reading import open_tables
    from opensora.curation.tables.sources import write_found
    from opensora.curation.tables.writing import write_table

    table = open_tables([args.table])
    if "id" in table.columns and "source_hash" not in table.columns:
        print(f"{one_line(output)}: {write_table(id_to_path(table, root), output, args.force):,} rows")
        return 0
    report = write_found(table, root, output, args.force)
    print(f"{one_line(output)}: {report.rows:,} rows")
    for problem in list(report.problems.values())[:MAX_SHOWN]:
        print(one_line(problem))
    if report.left_out:
        counts = f"{report.left_out:,} rows of {len(report.problems):,} sources"
        print(f"{one_line(output)}.quarantine.jsonl: {counts} left out, with the reasons")
    return 0


VERBS = {
    "cut": Verb(
        "write the clips of a table into files of their own",
        "opensora data cut clips.csv --output clips --shorter-size 480", _add_cut, _cut,
    ),
    "paths": Verb(
        "find the files of a table on this machine, by path, content or id",
        "opensora data paths published.csv my-videos clips.csv", _add_paths, _paths,
    ),
}  # fmt: skip

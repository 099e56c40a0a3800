"""data show, report: what training sees, and what a table holds, for people."""

from __future__ import annotations

import argparse
from itertools import islice
from pathlib import Path

from opensora.cli import preflight
from opensora.cli.merge import settings_of
from opensora.cli.parser import Parser
from opensora.cli.program import one_line
from opensora.cli.verbs.verb import Verb
from opensora.config.settings import TrainSettings
from opensora.errors import ConfigError

MAX_CLIPS = 200


def _add_show(parser: Parser) -> None:
    parser.add_argument("data_path", metavar="TABLE", help="table to train on")
    parser.add_argument("config", metavar="CONFIG", help="training configuration with a data set of videos")
    parser.add_argument("--output", dest="target", required=True, metavar="FILE.png", help="picture to write")
    parser.add_argument("--clips", type=int, default=8, metavar="N", help=f"clips to show, at most {MAX_CLIPS} [8]")
    parser.add_argument("--step", type=int, default=0, metavar="N", help="first step to show, from 0 on [0]")
    parser.add_argument("--seed", type=int, metavar="N", help="random seed [that of the configuration]")
    parser.add_argument("--force", action="store_true", help="replace an existing picture [no]")
    parser.add_argument("--trust-config", action="store_true", help="run the configuration as a program [no]")
    parser.add_argument("--cfg-options", nargs="+", metavar="KEY=VALUE", help="other settings [none]")


def _show(args: argparse.Namespace) -> int:
    settings = settings_of(TrainSettings, args)
    preflight.check_training(settings, connecting=False)
    _check_target(args.target, ".png", args.force)
    for name, number, most in (("clips", args.clips, MAX_CLIPS), ("step", args.step + 1, 10**7)):
        if not 1 <= number <= most:
            raise ConfigError(f"--{name} is out of range; it may be up to {most:,}")
    from opensora.datasets.video import write_image
    from opensora.training.preview.clips import training_clips
    from opensora.training.preview.sheet import draw_sheet

    clips = list(islice(training_clips(settings, args.step), args.clips))
    write_image(draw_sheet(clips), args.target)
    print(f"{one_line(args.target)}: {len(clips)} clips of steps {clips[0].step} to {clips[-1].step}")
    return 0


def _check_target(target: str, suffix: str, force: bool) -> None:
    """Raises ConfigError for another suffix, and for an existing file unless it is to be replaced."""
    path = Path(target)
    if path.suffix.lower() != suffix:
        raise ConfigError(f"{target}: is written as {suffix}; name it so")
    if path.exists() and not force:
        raise ConfigError(f"{target} exists; name another file, or replace it with --force")


def _add_report(parser: Parser) -> None:
    parser.add_argument("input", nargs="+", metavar="TABLE", help="tables (.csv, .jsonl, .parquet) or glob patterns")
    parser.add_argument("--output", dest="target", required=True, metavar="FILE.html", help="page to write")
    text = "rule that rows must fulfil, as of data edit; several are tried in order [none]"
    parser.add_argument("--where", action="append", default=[], metavar="CONDITION", help=text)
    parser.add_argument("--examples", type=int, default=6, metavar="N", help="examples of each rule [6]")
    parser.add_argument("--force", action="store_true", help="replace an existing page [no]")


def _report(args: argparse.Namespace) -> int:
    _check_target(args.target, ".html", args.force)
    from opensora.curation.analysis.report import write_report

    found = write_report(args.input, args.target, args.where, args.examples)
    print(f"{one_line(args.target)}: {found.rows:,} rows, {found.kept:,} kept")
    return 0


VERBS = {
    "report": Verb(
        "write a page about a table: distributions, what each rule drops, examples",
        "opensora data report clips.csv --where 'aes >= 5' --output report.html", _add_report, _report,
    ),
    "show": Verb(
        "draw the clips of training steps: crops, frames, masks, captions as the model gets them",
        "opensora data show videos.csv embedded/train/finetune --output sheet.png", _add_show, _show,
    ),
}  # fmt: skip

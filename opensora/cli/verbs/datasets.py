"""table, buckets: data sets."""

from __future__ import annotations

import argparse

from opensora.cli import preflight
from opensora.cli.merge import settings_of
from opensora.cli.parser import Parser
from opensora.cli.program import one_line
from opensora.cli.verbs.verb import Verb
from opensora.config.settings import TrainSettings


def _table(args: argparse.Namespace) -> int:
    preflight.check_exists(args.folder)
    from opensora.datasets import make_table

    written = make_table(args.folder, args.table, args.force, args.captions)
    print(f"{one_line(args.table)}: {written.summary()}")
    return 0


def _buckets(args: argparse.Namespace) -> int:
    settings = settings_of(TrainSettings, args)
    preflight.check_exists(args.table)
    from opensora.datasets import bucket_report

    paths, sampler = bucket_report.load(
        args.table, settings, world_size=args.world_size, epoch=args.epoch, pad=args.pad
    )
    print(bucket_report.describe(sampler))
    for path in bucket_report.write(sampler, paths, args.save_dir, args.table):
        print(one_line(path))
    sampler.require_steps()
    return 0


def _add_table(parser: Parser) -> None:
    text = "folder of videos and images, each with its caption in a .txt of the same name"
    parser.add_argument("folder", metavar="FOLDER", help=text)
    parser.add_argument("table", metavar="OUT.csv", help="table to write, whole or not at all")
    parser.add_argument("--force", action="store_true", help="replace an existing table [no]")
    text = "files without a caption: caption them with their names, or refuse them [names]"
    parser.add_argument("--captions", choices=("names", "required"), default="names", help=text)


def _add_buckets(parser: Parser) -> None:
    parser.add_argument("table", metavar="TABLE", help="table with the columns path, num_frames, height and width")
    parser.add_argument("config", metavar="CONFIG", help="training configuration with a bucket_config")
    parser.add_argument("--world-size", type=int, default=1, metavar="N", help="number of data-parallel ranks [1]")
    parser.add_argument("--epoch", type=int, default=0, metavar="N", help="epoch to show; each has its own shuffle [0]")
    parser.add_argument("--seed", type=int, metavar="N", help="random seed [that of the configuration]")
    text = "repeat rows to fill the last batch of a bucket, instead of dropping it [no]"
    parser.add_argument("--pad", action="store_true", help=text)
    folder = "./samples/buckets"
    parser.add_argument("--save-dir", default=folder, metavar="FOLDER", help=f"output folder [{folder}]")
    parser.add_argument("--trust-config", action="store_true", help="run the configuration as a program [no]")
    parser.add_argument("--cfg-options", nargs="+", metavar="KEY=VALUE", help="other settings [none]")


VERBS = {
    "table": Verb(
        "write a table of the videos in a folder, to train on",
        "opensora table my-videos my-videos.csv", _add_table, _table,
    ),
    "buckets": Verb(
        "show the bucket of each row of a table, and why rows are dropped",
        "opensora buckets my-videos.csv embedded/train/finetune_buckets", _add_buckets, _buckets,
    ),
}  # fmt: skip

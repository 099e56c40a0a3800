"""data convert, webdataset, split, analyze: tables of other layouts, parts and figures of tables."""

from __future__ import annotations

import argparse

from opensora.cli import preflight
from opensora.cli.merge import settings_of
from opensora.cli.parser import Parser
from opensora.cli.program import one_line
from opensora.cli.verbs.verb import Verb
from opensora.config.settings import TrainSettings
from opensora.curation.convert.kinds import KINDS

TABLES = "tables (.csv, .jsonl, .parquet) or glob patterns"


def _add_convert(parser: Parser) -> None:
    kinds = "; ".join(f"{name}: {text}" for name, text in KINDS.items())
    parser.add_argument("kind", metavar="KIND", help=kinds)
    parser.add_argument("root", metavar="ROOT", help="folder or file of the data set")
    parser.add_argument("--output", metavar="FILE", help="table to write: .csv, .jsonl or .parquet [ROOT's name.csv]")
    text = "folder below ROOT to convert [imagenet: train, ucf101: videos, if they exist]"
    parser.add_argument("--split", metavar="NAME", help=text)
    parser.add_argument("--info", metavar="TABLE", help="vidprom: table with the columns uuid and prompt")
    text = "webdataset: new folder for the extracted media [the table's name without suffix]"
    parser.add_argument("--media", metavar="FOLDER", help=text)
    parser.add_argument("--force", action="store_true", help="replace an existing table [no]")


def _convert(args: argparse.Namespace) -> int:
    preflight.check_exists(args.root)
    from opensora.curation.convert.convert import convert
    from opensora.curation.convert.request import ConvertRequest

    request = ConvertRequest(args.kind, args.root, args.output, args.split, args.info, args.media, args.force)
    print(f"{one_line(str(request.target))}: {convert(request):,} rows")
    return 0


def _add_webdataset(parser: Parser) -> None:
    parser.add_argument("input", nargs="+", metavar="TABLE", help=TABLES)
    parser.add_argument("--output", required=True, metavar="FOLDER", help="new folder for the tars")
    parser.add_argument("--rows-per-tar", type=int, default=1000, metavar="N", help="rows of a tar [1000]")


def _webdataset(args: argparse.Namespace) -> int:
    from opensora.curation.convert.webdataset_writing import write_tars
    from opensora.curation.tables.reading import open_tables

    rows, tars = write_tars(open_tables(args.input), args.output, args.rows_per_tar)
    print(f"{one_line(args.output)}: {rows:,} rows in {tars:,} tars")
    return 0


def _add_split(parser: Parser) -> None:
    parser.add_argument("input", nargs="+", metavar="TABLE", help=TABLES)
    text = "table to write"
    parser.add_argument("-o", "--output", dest="target", required=True, metavar="FILE", help=text)
    parser.add_argument("-c", "--config", required=True, metavar="CONFIG", help="training configuration with buckets")
    parser.add_argument("-l", "--limit", type=int, default=200, metavar="N", help="most rows of a bucket [200]")
    parser.add_argument("--seed", type=int, metavar="N", help="random seed [that of the configuration]")
    parser.add_argument("--force", action="store_true", help="replace an existing table [no]")
    parser.add_argument("--trust-config", action="store_true", help="run the configuration as a program [no]")
    parser.add_argument("--cfg-options", nargs="+", metavar="KEY=VALUE", help="other settings [none]")


def _split(args: argparse.Namespace) -> int:
    settings = settings_of(TrainSettings, args)
    from opensora.curation.tables.split import split_by_bucket

    buckets = split_by_bucket(args.input, args.target, settings, args.limit, args.force)
    for bucket, count in buckets:
        print(f"{bucket}: {count:,} rows")
    print(f"{one_line(args.target)}: {sum(count for _, count in buckets):,} rows")
    return 0


def _add_analyze(parser: Parser) -> None:
    parser.add_argument("input", nargs="+", metavar="TABLE", help=TABLES)
    parser.add_argument("--save-img", metavar="FOLDER", help="write the histograms as pictures [no]")


def _analyze(args: argparse.Namespace) -> int:
    from opensora.curation.analysis.figures import figures_of
    from opensora.curation.analysis.text import describe
    from opensora.curation.tables.reading import open_tables

    figures = figures_of(open_tables(args.input))
    print(describe(figures))
    if args.save_img:
        from opensora.curation.analysis.pictures import save_pictures

        for path in save_pictures(figures, args.save_img):
            print(one_line(str(path)))
    return 0


VERBS = {
    "analyze": Verb(
        "count rows and hours, and show how the values of each column are distributed",
        "opensora data analyze videos.csv --save-img histograms", _add_analyze, _analyze,
    ),
    "convert": Verb(
        "write the table of a data set: folders, ImageNet, UCF101, VidProM, WebDataset, Hugging Face",
        "opensora data convert video my-videos --output videos.csv", _add_convert, _convert,
    ),
    "split": Verb(
        "take the first rows of each bucket of a training configuration",
        "opensora data split videos.csv -o few.csv -c embedded/train/finetune_buckets -l 200", _add_split, _split,
    ),
    "webdataset": Verb(
        "pack a table with its media into WebDataset tars",
        "opensora data webdataset videos.csv --output my-tars", _add_webdataset, _webdataset,
    ),
}  # fmt: skip

"""data convert, webdataset, split, analyze: tables of other layouts, parts and figures of tables."""

from __future__ import annotations

import argparse

from opensora.cli import preflight
from opensora.cli.parser import Parser
from opensora.cli.program import one_line
from opensora.cli.verbs.verb import Verb
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


VERBS = {
    "convert": Verb(
        "write the table of a data set: folders, ImageNet, UCF101, VidProM, WebDataset, Hugging Face",
        "opensora data convert video my-videos --output videos.csv", _add_convert, _convert,
    ),
    "webdataset": Verb(
        "pack a table with its media into WebDataset tars",
        "opensora data webdataset videos.csv --output my-tars", _add_webdataset, _webdataset,
    ),
}  # fmt: skip

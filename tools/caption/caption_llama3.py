"""Captions without their openings: python -m tools.caption.caption_llama3 TABLE, as `opensora data edit`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from opensora.cli.parser import Parser
from tools.door import Door, refuse


def _add_arguments(parser: Parser) -> None:
    parser.add_argument("meta_path", metavar="TABLE", help="table with the column text")
    parser.add_argument("--output_prefix", "--output-prefix", metavar="PREFIX", help="table to write, without .csv")
    reason = (
        "no language model runs here; captions lose their openings by rules. To write new ones: opensora data curate"
    )
    refuse(parser, f"{reason} TABLE OUT --stages captions", "--model", "--prompt", "--batch_size", "--key")


def _command(args: argparse.Namespace) -> list[str]:
    source = Path(args.meta_path)
    target = f"{args.output_prefix}.csv" if args.output_prefix else str(source.with_name(f"{source.stem}_llama3.csv"))
    return ["data", "edit", args.meta_path, "--refine-llm-caption", "--output", target]


DOOR = Door("tools.caption.caption_llama3", _add_arguments, _command)

if __name__ == "__main__":
    sys.exit(DOOR.run())

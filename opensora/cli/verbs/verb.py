"""One verb of the command line."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from typing import NamedTuple

from opensora.cli.parser import Parser


class Verb(NamedTuple):
    """A verb: its help text, an example command line, its arguments, and its action, which returns the exit status."""

    help: str
    example: str
    add_arguments: Callable[[Parser], None]
    run: Callable[[argparse.Namespace], int]


def add_verbs(parser: Parser, verbs: Mapping[str, Verb], metavar: str) -> None:
    """Adds a parser for each verb; parsed arguments carry the verb's action as `run`."""
    subparsers = parser.add_subparsers(required=True, metavar=metavar)
    for name, verb in verbs.items():
        description = f"{verb.help[0].upper()}{verb.help[1:]}."
        subparser = subparsers.add_parser(
            name, help=verb.help, description=description, example=verb.example, add_arguments=verb.add_arguments
        )
        subparser.set_defaults(run=verb.run, example=verb.example)
    parser.verbs = list(verbs)

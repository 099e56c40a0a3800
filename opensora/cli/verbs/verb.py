"""One verb of the command line."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import NamedTuple

from opensora.cli.parser import Parser


class Verb(NamedTuple):
    """A verb: its help text, an example command line, its arguments, and its action, which returns the exit status."""

    help: str
    example: str
    add_arguments: Callable[[Parser], None]
    run: Callable[[argparse.Namespace], int]

"""From a command line of Open-Sora's to one of `opensora`.

A door declares the original's flags and says which command does the same. Flags without an equivalent are refused, with
the reason and what to use.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from opensora.cli import main
from opensora.cli.parser import Parser
from opensora.cli.program import one_line, run_program
from opensora.errors import ConfigError


class Door(NamedTuple):
    """The program `name`, its arguments, and the arguments of `opensora` that do the same."""

    name: str
    add_arguments: Callable[[Parser], None]
    command: Callable[[argparse.Namespace], list[str]]

    def translate(self, argv: Sequence[str]) -> list[str]:
        """The arguments of `opensora`. Raises ConfigError for what is refused, SystemExit for unknown flags."""
        parser = Parser(prog=f"python -m {self.name}")
        self.add_arguments(parser)
        return self.command(parser.parse_args(list(argv)))

    def run(self) -> int:
        """Runs the command of this process's arguments; returns the exit status."""
        found: list[str] = []
        status = run_program(lambda: found.extend(self.translate(sys.argv[1:])))
        if status:
            return status
        print(f"same as: opensora {one_line(shlex.join(found))}", file=sys.stderr)
        return main(found)


def passed_on(*verbs: str) -> Callable[[Sequence[str]], int]:
    """A program whose flags are those of a command of `opensora`."""
    return lambda argv: main([*verbs, *argv])


class Refused(argparse.Action):
    """A flag that raises ConfigError with its `const`, the reason."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        raise ConfigError(f"{option_string}: {self.const}")


def refuse(parser: Parser, reason: str, *flags: str, nargs: int | str | None = None) -> None:
    """Declares flags that are refused."""
    for flag in flags:
        parser.add_argument(flag, action=Refused, const=reason, nargs=nargs, help=argparse.SUPPRESS)


def add_stage_arguments(parser: Parser) -> None:
    """What the programs have in common that compute columns of a table."""
    parser.add_argument("meta_path", metavar="TABLE", help="table with the column path, or a folder")
    parser.add_argument("--num_workers", "--num-workers", type=int, metavar="N", help="processes [one per core]")
    text = "size of a batch; has no effect, since clips are computed one by one"
    parser.add_argument("--bs", type=int, metavar="N", help=text)


def curated(args: argparse.Namespace, stages: str, suffix: str, *settings: str) -> list[str]:
    """`data curate TABLE STEM_SUFFIX.csv` with these stages and settings."""
    source = Path(args.meta_path)
    command = [
        "data",
        "curate",
        args.meta_path,
        str(source.with_name(f"{source.stem}_{suffix}.csv")),
        "--stages",
        stages,
    ]
    command += ["--set", *settings] if settings else []
    return command + (["--workers", str(args.num_workers)] if args.num_workers is not None else [])

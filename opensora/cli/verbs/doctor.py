"""doctor: the environment on one screen, for bug reports."""

from __future__ import annotations

import argparse
import json
import textwrap

from opensora.cli.environment import Entry, describe_environment
from opensora.cli.parser import Parser
from opensora.cli.program import one_line
from opensora.cli.verbs.verb import Verb

WIDTH, INDENT = 110, 11


def _doctor(args: argparse.Namespace) -> int:
    report = describe_environment()
    broken = [entry for entries in report.values() for entry in entries if entry.broken]
    if args.json:
        sections = {title: {entry.name: _fields(entry) for entry in found} for title, found in report.items()}
        print(json.dumps({"ok": not broken, **sections}, indent=2))
    else:
        print(format_report(report))
        print(f"broken: {', '.join(entry.name for entry in broken)}" if broken else "ok: opensora can run here")
    return 1 if broken else 0


def _fields(entry: Entry) -> dict[str, object]:
    fields: dict[str, object] = {"value": entry.value}
    return {**fields, "problem": entry.problem, "broken": entry.broken} if entry.problem else fields


def format_report(report: dict[str, list[Entry]]) -> str:
    """The report as text: a paragraph for each section, a line for each problem."""
    lines = []
    for title, entries in report.items():
        text = "; ".join(f"{entry.name} {entry.value}" for entry in entries) or "none set"
        lines += textwrap.wrap(
            one_line(text), WIDTH, initial_indent=title.ljust(INDENT), subsequent_indent=" " * INDENT,
            break_long_words=False, break_on_hyphens=False,
        )  # fmt: skip
        problems = [f"{entry.name}: {entry.problem}" for entry in entries if entry.problem]
        lines += [" " * INDENT + f"-> {one_line(problem)}" for problem in problems]
    return "\n".join(lines)


def _add_doctor(parser: Parser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON [no]")


VERBS = {
    "doctor": Verb(
        "show versions, devices, codecs and caches, for bug reports; fails if something is broken",
        "opensora doctor", _add_doctor, _doctor,
    ),
}  # fmt: skip

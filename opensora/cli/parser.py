"""Argument parser with exact flag names, published spellings, and one-line errors that suggest the nearest flag."""

from __future__ import annotations

import argparse
import re
import shutil
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NoReturn

from opensora.errors import ConfigError, did_you_mean

# Abbreviations in published documents. Otherwise flags are exact; only `_` may stand for `-` (`--prompt_path`).
PUBLISHED = {"--cfg": "--cfg-scale"}


class _HelpAll(argparse.Action):
    """Prints the help of all flags and exits."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        print(parser.format_help(everything=True), end="")
        parser.exit()


class StoreAction(argparse.Action):
    """Stores values as argparse does, but a repeated flag of several values (`--lora A --lora B`) adds to them."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        given = getattr(namespace, self.dest)
        several = option_string is not None and self.nargs in ("+", "*")
        setattr(namespace, self.dest, [*given, *values] if several and given is not self.default else values)


def _formatter(prog: str) -> argparse.HelpFormatter:
    return argparse.HelpFormatter(prog, max_help_position=34, width=min(shutil.get_terminal_size().columns, 120) - 2)


class Parser(argparse.ArgumentParser):
    """An ArgumentParser with exact flags and values such as `-1,0`. A wrong command line ends with a one-line error.

    A flag that takes any number of values may be repeated; one that takes a fixed number has its last values. The error
    of an incomplete command line shows `example`. `add_arguments` adds arguments when they are first needed: of all
    verbs, a command line has one.
    """

    def __init__(
        self, prog: str | None = None, *, example: str = "", add_arguments: Callable[[Any], None] | None = None,
        **kwargs: Any,
    ) -> None:  # fmt: skip
        super().__init__(prog, formatter_class=_formatter, allow_abbrev=False, **kwargs)
        self.register("action", None, StoreAction)
        self._negative_number_matcher = re.compile(r"-\.?\d")  # the rule of Python 3.14, for all versions
        self.example = example
        self._add_arguments = add_arguments
        self.advanced: set[str] = set()  # flags that only --help-all shows
        self.verbs: Sequence[str] = ()
        self.abbreviable: Sequence[str] = ()  # flags that accept unambiguous prefixes, as in Open-Sora 1.2

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As in argparse, but an unknown word is an error, and flags may use their published spellings."""
        self.complete()
        words = self._normalize(sys.argv[1:] if args is None else args)
        verb = next((word for word in words if not word.startswith("-")), None)
        if self.verbs and verb is not None and verb not in self.verbs:
            self.error(f"unknown verb {verb!r}{did_you_mean(verb, self.verbs)}")
        found, unknown = super().parse_known_args(words, namespace)
        if unknown:
            self._refuse(unknown)
        return found, unknown

    def complete(self) -> Parser:
        """The parser with all of its arguments."""
        add, self._add_arguments = self._add_arguments, None
        if add is not None:
            add(self)
        return self

    def error(self, message: str) -> NoReturn:
        message = message.replace("\n", " ")
        hint = f"; type: {self.example}" if self.example and "required" in message else ""
        see = f"see {self.prog} --help"
        self.exit(
            2, f"error: {message}{hint}" + (f" {see.capitalize()}" if message.endswith("?") else f"; {see}") + "\n"
        )

    def group(self, title: str) -> Any:
        """The argument group with this title, added if needed."""
        found = next((one for one in self._action_groups if one.title == title), None)
        return found or self.add_argument_group(title)

    def add_help_all(self) -> None:
        """Adds --help-all, which also shows the advanced flags."""
        self.add_argument("--help-all", action=_HelpAll, nargs=0, help="show every flag and exit")

    def format_help(self, everything: bool = False) -> str:
        formatter = self._get_formatter()
        formatter.add_usage(self.usage, self._actions, self._mutually_exclusive_groups)
        formatter.add_text(self.description)
        for group in self._action_groups:
            formatter.start_section(group.title)
            formatter.add_text(group.description)
            shown = [
                one for one in group._group_actions if everything or not self.advanced.intersection(one.option_strings)
            ]
            formatter.add_arguments(shown)
            formatter.end_section()
        formatter.add_text(self.epilog)
        return formatter.format_help()

    def _normalize(self, words: Iterable[str]) -> list[str]:
        """The words, with every flag in its exact spelling."""
        words = list(words)
        for number, word in enumerate(words, 1):
            _check_text(word, number)
        end = words.index("--") if "--" in words else len(words)
        return [self._flag(word) for word in words[:end]] + words[end:]

    def _flag(self, word: str) -> str:
        name, equals, value = word.partition("=")
        known = self._option_string_actions
        if not name.startswith("--") or name in known:
            return word
        dashed = name.replace("_", "-")
        dashed = PUBLISHED.get(dashed, dashed)
        matches = [flag for flag in self.abbreviable if flag.startswith(dashed)]
        if dashed not in known and len(matches) == 1:
            dashed = matches[0]
        return f"{dashed}{equals}{value}" if dashed in known else word

    def _refuse(self, unknown: Sequence[str]) -> NoReturn:
        flag = next((word for word in unknown if word.startswith("-") and word != "-"), None)
        if flag is None:
            self.error(f"{unknown[0]!r} is one word too many here; quote what belongs together, and put flags last")
        name = flag.partition("=")[0]
        known = [one for one in self._option_string_actions if one.startswith("--")]
        longer = [one for one in known if one.startswith(name)]
        self.error(f"unknown flag {name}{did_you_mean(name, longer or known)}")


def _check_text(word: str, number: int) -> None:
    """Raises ConfigError for text that no message, recipe or table can hold."""
    if "\0" in word:
        raise ConfigError(f"word {number} of the command line contains a NUL character; remove it")
    try:
        word.encode()
    except UnicodeEncodeError:
        raise ConfigError(f"{word!r} is not UTF-8 text; rename the file, or type it in UTF-8") from None

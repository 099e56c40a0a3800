"""Command lines: exact names of flags, spellings that were published, and refusals that name what was meant."""

from __future__ import annotations

import argparse
import re
import shutil
import sys
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

from opensora.errors import ConfigError, did_you_mean

# Abbreviations that documents publish. Beside them only `_` stands for `-` (`--prompt_path`): nothing is guessed.
PUBLISHED = {"--cfg": "--cfg-scale"}


class _HelpAll(argparse.Action):
    """Prints the help of all flags."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        print(parser.format_help(everything=True), end="")
        parser.exit()


def _formatter(prog: str) -> argparse.HelpFormatter:
    return argparse.HelpFormatter(prog, max_help_position=34, width=min(shutil.get_terminal_size().columns, 120) - 2)


class Parser(argparse.ArgumentParser):
    """An ArgumentParser for exact flags and values such as `-1,0`. A wrong command line is told in one line.

    `example` is what a command line that lacks something is told to look like.
    """

    def __init__(self, *args: Any, example: str = "", **kwargs: Any) -> None:
        super().__init__(*args, **{"formatter_class": _formatter, **kwargs}, allow_abbrev=False)
        self._negative_number_matcher = re.compile(r"-\.?\d")  # the rule of Python 3.14, for all versions
        self.example = example
        self.rare: set[str] = set()  # flags that --help leaves out
        self.verbs: Sequence[str] = ()  # one of which comes first
        self.beginnings: Sequence[str] = ()  # flags of which an unambiguous beginning does, as in the original program

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse does, but every word must be known. Words are spelt as the flags are."""
        words = self._spelt(sys.argv[1:] if args is None else args)
        verb = next((word for word in words if not word.startswith("-")), None)
        if self.verbs and verb is not None and verb not in self.verbs:
            self.error(f"unknown verb {verb!r}{did_you_mean(verb, self.verbs)}")
        found, unknown = super().parse_known_args(words, namespace)
        if unknown:
            self._refuse(unknown)
        return found, unknown

    def error(self, message: str) -> NoReturn:
        message = message.replace("\n", " ")
        hint = f"; type: {self.example}" if self.example and "required" in message else ""
        see = f"see {self.prog} --help"
        self.exit(
            2, f"error: {message}{hint}" + (f" {see.capitalize()}" if message.endswith("?") else f"; {see}") + "\n"
        )

    def group(self, title: str) -> Any:
        """The group of flags with this title."""
        found = next((one for one in self._action_groups if one.title == title), None)
        return found or self.add_argument_group(title)

    def add_help_all(self) -> None:
        """Adds --help-all, which shows the rare flags, too."""
        self.add_argument("--help-all", action=_HelpAll, nargs=0, help="show every flag and exit")

    def format_help(self, everything: bool = False) -> str:
        formatter = self._get_formatter()
        formatter.add_usage(self.usage, self._actions, self._mutually_exclusive_groups)
        formatter.add_text(self.description)
        for group in self._action_groups:
            formatter.start_section(group.title)
            formatter.add_text(group.description)
            shown = [
                one for one in group._group_actions if everything or not self.rare.intersection(one.option_strings)
            ]
            formatter.add_arguments(shown)
            formatter.end_section()
        formatter.add_text(self.epilog)
        return formatter.format_help()

    def _spelt(self, words: Iterable[str]) -> list[str]:
        """The words with the flags among them as they are known here."""
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
        begun = [flag for flag in self.beginnings if flag.startswith(dashed)]
        if dashed not in known and len(begun) == 1:
            dashed = begun[0]
        return f"{dashed}{equals}{value}" if dashed in known else word

    def _refuse(self, unknown: Sequence[str]) -> NoReturn:
        flag = next((word for word in unknown if word.startswith("-") and word != "-"), None)
        if flag is None:
            self.error(f"{unknown[0]!r} is one word too many here; quote what belongs together, and put flags last")
        name = flag.partition("=")[0]
        known = [one for one in self._option_string_actions if one.startswith("--")]
        begun = [one for one in known if one.startswith(name)]
        self.error(f"unknown flag {name}{did_you_mean(name, begun or known)}")


def _check_text(word: str, number: int) -> None:
    """Raises ConfigError for a name that no message, recipe or table could hold."""
    if "\0" in word:
        raise ConfigError(f"word {number} of the command line holds a NUL character; leave it out")
    try:
        word.encode()
    except UnicodeEncodeError:
        raise ConfigError(f"{word!r} is not UTF-8 text; rename the file, or type it in UTF-8") from None

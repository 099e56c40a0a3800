"""Errors that a user can fix. Each message says what is wrong, where, and the remedy."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

MAX_NAME = 200  # characters; longer names are not compared


class OpenSoraError(Exception):
    """Base class; the command line prints the message as one line and exits with status 1."""


class ConfigError(OpenSoraError, ValueError):
    """A setting, flag or configuration file is wrong."""


class ArgumentError(ConfigError, TypeError):
    """An argument of the Python interface is unknown, or contradicts another one."""


class Cancelled(OpenSoraError):
    """A call of a pipeline was interrupted."""


class WeightsError(OpenSoraError):
    """A checkpoint cannot be found, read, or does not fit the model."""


class MediaError(OpenSoraError):
    """An image or video cannot be read or written."""


class UnavailableError(OpenSoraError):
    """A server does not answer, or refuses for now: the same request may succeed later."""


def did_you_mean(name: str, choices: Iterable[str]) -> str:
    """`; did you mean 'x'?` for the nearest choice, or an empty string."""
    if len(str(name)) > MAX_NAME:
        return ""
    near = difflib.get_close_matches(str(name), [str(choice) for choice in choices], n=1, cutoff=0.5)
    return f"; did you mean '{near[0]}'?" if near else ""


def printable(text: object) -> str:
    """Escapes control, direction and lone surrogate characters (as `\\x1b`) for output to a terminal."""
    return _CONTROLS.sub(lambda found: found[0].encode("unicode_escape", "surrogatepass").decode(), str(text))


_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")

"""Functions row -> whether it stays."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable
from pathlib import PurePath

from opensora.curation.tables.expression import condition
from opensora.curation.tables.stream import Row, TableStream, number_of, text_of
from opensora.datasets.video import IMAGE_SUFFIXES
from opensora.errors import ConfigError

Keep = Callable[[Row], bool]
_URL = re.compile(r"(?:https?://|www\.)[^\s.]", re.IGNORECASE)
_SIGNS: dict[str, Callable[[float, float], bool]] = {">=": operator.ge, "<=": operator.le}


def where(table: TableStream, text: str) -> Keep:
    """Rows for which a condition holds; see `expression.condition`."""
    return condition(text, table)


def bound(table: TableStream, column: str, sign: str, limit: float, keep_missing: bool) -> Keep:
    """Rows whose number in a column is at least (`>=`) or at most (`<=`) a limit."""
    place, compare = table.index(column), _SIGNS[sign]

    def keep(row: Row) -> bool:
        value = number_of(row[place])
        return keep_missing if value is None else compare(value, limit)

    return keep


def images(table: TableStream, wanted: bool) -> Keep:
    """Images, by suffix, or everything else."""
    place = table.index("path")
    return lambda row: (PurePath(text_of(row[place])).suffix.lower() in IMAGE_SUFFIXES) is wanted


def path_contains(table: TableStream, part: str) -> Keep:
    place = table.index("path")
    return lambda row: part in text_of(row[place])


def present(table: TableStream, column: str) -> Keep:
    """Rows whose cell is not blank."""
    place = table.index(column)
    return lambda row: bool(text_of(row[place]).strip())


def without_url(table: TableStream) -> Keep:
    place = table.index("text")
    return lambda row: not _URL.search(text_of(row[place]))


def language(table: TableStream, wanted: str) -> Keep:
    """Rows whose caption py3langid finds to be in a language. Raises ConfigError without py3langid."""
    try:
        import py3langid
    except ImportError as error:
        raise ConfigError("--lang needs py3langid; pip install 'opensora[data]'") from error
    known = sorted(code for code, _ in py3langid.rank(""))
    if wanted not in known:
        raise ConfigError(f"language '{wanted}' is not known; choose one of {', '.join(known)}")
    place = table.index("text")
    return lambda row: py3langid.classify(text_of(row[place]))[0] == wanted

"""The columns of a table: accepted names, and validation of cells."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from decimal import Decimal
from typing import Any

import numpy as np

from opensora.config.schema import MAX_SHOWN, MAX_TEXT, Number, Text, check
from opensora.errors import ConfigError, did_you_mean

log = logging.getLogger("opensora")

TEXTS, NUMBERS = ("path", "text"), ("num_frames", "height", "width")
TIMES = ("start_pts", "end_pts")
CLIP = (*TIMES, "crop")
SPELLINGS = {
    "path": ("path", "video_path", "image_path", "file_path", "filepath", "file_name", "filename", "video", "image"),
    "text": ("text", "caption", "captions", "prompt", "description"),
    **{name: (name,) for name in (*NUMBERS, *CLIP)},
}  # the first name is the documented one
Where = Callable[[int], str]  # location of a row within a part, such as "line 3"


def find_columns(names: Sequence[str], source: str) -> dict[str, int]:
    """The index of each known column, by its documented name. Case and blanks do not matter.

    Raises ConfigError if two columns could be the same one.
    """
    plain = [name.strip().lower().replace(" ", "_").replace("-", "_") for name in names]
    found = {}
    for column, spellings in SPELLINGS.items():
        places = [place for place, name in enumerate(plain) if name in spellings]
        documented = [place for place in places if plain[place] == column]
        shown = " and ".join(repr(shortened(names[place].strip())) for place in places)
        if len(documented) > 1 or (not documented and len(places) > 1):
            problem = f"has the columns {shown}, each of which may be its '{column}'"
            raise ConfigError(f"{source}: {problem}; remove or rename all but one")
        if len(places) > 1:
            log.warning("%s: has %s; %r is read, as documented", source, shown, column)
        if places:
            found[column] = (documented or places)[0]
    return found


def missing_path_error(names: Sequence[str], source: str) -> ConfigError:
    """The error for a table without a column `path`."""
    near = [name for name in names if did_you_mean("path", [name])]
    problem = f"has no column 'path', only {', '.join(shortened(name) for name in names)[:200]}"
    return ConfigError(f"{source}: {problem}; {f'rename {shortened(near[0])!r}' if near else 'name one so'}")


def shortened(text: str) -> str:
    """A text truncated for a message."""
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}..."


class Notes:
    """Notes of a table reader: the columns found, and warnings with the number of rows and the first location."""

    def __init__(self, source: str) -> None:
        self.source = source
        self.columns: set[str] = set()
        self.counts: dict[str, int] = {}
        self.first: dict[str, str] = {}

    def add(self, problem: str, rows: Sequence[int], where: Where) -> None:
        if rows:
            self.counts[problem] = self.counts.get(problem, 0) + len(rows)
            self.first.setdefault(problem, where(rows[0]))

    def log(self) -> None:
        for problem, count in self.counts.items():
            log.warning("%s: %d rows, the first in %s, %s", self.source, count, self.first[problem], problem)


def texts(column: str, cells: Sequence[Any], where: Where, source: str) -> Sequence[str]:
    """Converts cells to texts: bytes are decoded, integers formatted, missing cells empty.

    Raises ConfigError naming the row for other values: fractions, NaN, lists, invalid UTF-8, over 100,000 characters.
    Paths may contain bytes that are not UTF-8, as file names do.
    """
    if not set(map(type, cells)) <= {str}:
        cells = [_text(column, cell, where, row, source) for row, cell in enumerate(cells)]
    if max(map(len, cells), default=0) > MAX_TEXT:
        row = next(row for row, cell in enumerate(cells) if len(cell) > MAX_TEXT)
        raise cell_error(source, where(row), column, f"holds {len(cells[row]):,} characters, more than {MAX_TEXT:,}")
    if column != "path":
        try:
            "".join(cells).encode()
        except UnicodeEncodeError:
            row = next(row for row, cell in enumerate(cells) if not _is_unicode(cell))
            raise cell_error(source, where(row), column, "is not UTF-8 text", "save the table as UTF-8") from None
    return cells


def _text(column: str, cell: Any, where: Where, row: int, source: str) -> str:
    if isinstance(cell, str):
        return cell
    if cell is None:
        return ""
    if isinstance(cell, bytes):
        return cell.decode("utf-8", "surrogateescape")
    if type(cell) is int and column != "path":
        return str(cell)
    return check(Text, cell, f"{source}: {where(row)}, column '{column}'", ConfigError, "write text there")


def _is_unicode(text: str) -> bool:
    return not any("\ud800" <= character <= "\udfff" for character in text)


def numbers(column: str, cells: Sequence[Any], where: Where, source: str, notes: Notes) -> np.ndarray:
    """Converts cells to float64 [N], NaN for non-numbers. Raises ConfigError for values such as True."""
    if not set(map(type, cells)) <= {str, int, float, Decimal, type(None)}:
        allowed = str | Number | None
        for row, cell in enumerate(cells):
            if not isinstance(cell, Decimal):
                check(allowed, cell, f"{source}: {where(row)}, column '{column}'", ConfigError, "write a number there")
    try:
        values = np.fromiter(map(float, cells), np.float64, len(cells))
    except (TypeError, ValueError, OverflowError):
        values = np.fromiter(map(_number, cells), np.float64, len(cells))
    values[~np.isfinite(values)] = math.nan
    lost = [
        row for row in np.flatnonzero(np.isnan(values)).tolist() if isinstance(cells[row], str) and cells[row].strip()
    ]
    notes.add(f"hold no number in column '{column}'; no bucket takes them", lost, where)
    return values


def _number(cell: Any) -> float:
    """A cell as float, or NaN."""
    try:
        return float(cell)
    except (TypeError, ValueError, OverflowError):
        return math.nan


def cell_error(source: str, where: str, column: str, problem: str, remedy: str = "correct the cell") -> ConfigError:
    """The error for an invalid cell."""
    return ConfigError(f"{source}: {where}, column '{column}': {problem}; {remedy}")

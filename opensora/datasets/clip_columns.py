"""The columns that make a row a part of its file: `start_pts`, `end_pts` and `crop`."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from opensora.datasets.columns import CLIP, TIMES, Where, shortened
from opensora.datasets.video.container import MAX_SIDE
from opensora.datasets.video.span import Crop, Span
from opensora.errors import ConfigError

NONE = np.iinfo(np.int64).min  # an empty cell
_INTEGER = re.compile(r"[+-]?[0-9]{1,18}(\.0*)?")  # also as float columns are written
_CROP = re.compile(r"([0-9]{1,5}) +([0-9]{1,5}) +([0-9]{1,5}) +([0-9]{1,5})")


def parse_span(start: Any, end: Any) -> Span | None:
    """The span in the cells start_pts and end_pts; None if both are empty. Raises ConfigError with the problem."""
    first, last = _time("start_pts", start), _time("end_pts", end)
    if first is None:
        if last is not None:
            raise ConfigError("end_pts is given without start_pts")
        return None
    if last is not None and last <= first:
        raise ConfigError(f"end_pts {last} is not after start_pts {first}")
    return Span(first, last)


def _time(column: str, cell: Any) -> int | None:
    text = "" if cell is None else str(cell).strip() if not isinstance(cell, bool) else "a boolean"
    if not text:
        return None
    if not _INTEGER.fullmatch(text):
        raise ConfigError(f"{column} {shortened(text)!r} is no integer")
    return int(text.partition(".")[0])


def parse_crop(cell: Any) -> Crop | None:
    """The rectangle `top left height width` in a cell; None if it is empty. Raises ConfigError with the problem."""
    text = "" if cell is None else str(cell).strip()
    if not text:
        return None
    if not (match := _CROP.fullmatch(text)):
        raise ConfigError(f"crop {shortened(text)!r} is not `top left height width` in pixels")
    crop = Crop(*map(int, match.groups()))
    if not (crop.height > 0 and crop.width > 0 and max(crop.top + crop.height, crop.left + crop.width) <= MAX_SIDE):
        raise ConfigError(f"crop {text!r} is empty, or goes beyond {MAX_SIDE} pixels")
    return crop


def parts(cells: Mapping[str, Sequence[Any]], count: int, where: Where, source: str) -> np.ndarray:
    """int64 [count, 6]: start, end, top, left, height, width of each row, `NONE` where there is none.

    Raises ConfigError naming the row for invalid cells.
    """
    if not cells:
        return np.broadcast_to(np.int64(NONE), (count, 6))
    found = np.full((count, 6), NONE, np.int64)
    starts, ends, crops = (cells.get(name) or (None,) * count for name in CLIP)
    for row, (start, end, crop) in enumerate(zip(starts, ends, crops, strict=True)):
        try:
            found[row, :2] = _numbers(parse_span(start, end), 2)
            found[row, 2:] = _numbers(parse_crop(crop), 4)
        except ConfigError as error:
            raise ConfigError(f"{source}: {where(row)}: {error}; correct the cell") from None
    return found


def _numbers(part: Span | Crop | None, count: int) -> list[int]:
    return [NONE if number is None else number for number in part or (None,) * count]


def check_columns(names: set[str], source: str) -> None:
    """Raises ConfigError for one of start_pts and end_pts without the other."""
    if len(there := [name for name in TIMES if name in names]) == 1:
        [other] = set(TIMES) - set(there)
        remedy = "add it, with empty cells where a clip goes to the end of its file"
        raise ConfigError(f"{source}: has a column {there[0]} and none {other}; {remedy}")

"""Checks of a table before the first step: missing files, missing texts, different tables on different ranks."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from opensora.datasets.datasets import CAPTIONS
from opensora.datasets.quarantine import UnreadableRow, max_unreadable
from opensora.datasets.table import Table, TextColumn
from opensora.errors import ConfigError, MediaError

logger = logging.getLogger("opensora")
Gather = Callable[[Any], list[Any]]  # value of this rank -> values of all ranks

MAX_NAMES = 3  # in a message
MAX_PATH = 120  # characters of a path in a message
NOT_THERE = "no such file"


def single_rank(value: Any) -> list[Any]:
    """`Gather` of a single rank."""
    return [value]


def missing_files(table: Table, gather: Gather = single_rank, rows: np.ndarray | None = None) -> list[UnreadableRow]:
    """The rows (of `rows`, or of all) whose files do not exist on some rank, with a warning.

    Raises MediaError if all are missing, or more than allowed.
    """
    rows = np.arange(len(table)) if rows is None else rows
    missing = table.missing()
    found = np.unique(np.concatenate(gather(np.intersect1d(missing.rows, rows))))
    if not len(found):
        return []
    names = _some(table, found)
    where, most = _tried(missing.tried), max_unreadable(len(rows))
    if len(found) == len(rows):
        remedy = "start in the folder that the paths are relative to, or fix them"
        raise MediaError(f"{table.source}: none of its {len(rows)} files exists: {names}; {where}; {remedy}")
    problem = f"{len(found)} of {len(rows)} files do not exist: {names}; {where}"
    if len(found) > most:
        remedy = "fix the paths or remove the rows"
        raise MediaError(f"{table.source}: {problem}; that is over the limit of {most}; {remedy}")
    logger.warning("%s: %s; their rows are left out", table.source, problem)
    return [UnreadableRow(row, table.path[row], NOT_THERE) for row in found.tolist()]


def check_texts(table: Table, captions: str = CAPTIONS[0], rows: np.ndarray | None = None) -> None:
    """Warns of rows (of `rows`, or of all) without text.

    Raises ConfigError if all lack it, more than allowed with "mostly", or any with "required".
    """
    rows = np.arange(len(table)) if rows is None else rows
    if table.text is None:
        problem = "has no column text, and without texts there is nothing to train on but videos"
        if captions != "optional":
            raise ConfigError(f"{table.source}: {problem}; add it, or set captions='optional' in the section dataset")
        logger.warning("%s: has no column text; every text is empty", table.source)
        return
    empty = empty_texts(table.text, rows)
    if not len(empty):
        return
    names = _some(table, empty)
    problem = f"{table.source}: {len(empty)} of {len(rows)} texts are empty: {names}"
    most = {"required": 0, "optional": len(rows)}.get(captions, max_unreadable(len(rows)))
    if len(empty) > most:
        limit = "captions='required' allows none" if captions == "required" else f"that is over the limit of {most}"
        remedy = "write them, remove the rows, or set captions='optional' in the section dataset"
        raise ConfigError(f"{problem}; {limit}; {remedy}")
    logger.warning("%s; they are trained on as they are", problem)


def empty_texts(texts: TextColumn, rows: np.ndarray) -> np.ndarray:
    """The `rows` whose texts are empty or blank."""
    return rows[[not texts[row].strip() for row in rows.tolist()]]


def same_on_all_ranks(cells: np.ndarray, source: str, gather: Gather = single_rank) -> None:
    """Raises ConfigError if ranks have read different tables under one name; `cells` are hashes of the rows."""
    digests = gather(hashlib.sha256(cells.tobytes()).digest())
    other = [str(rank) for rank, one in enumerate(digests) if one != digests[0]]
    if other:
        remedy = "give all machines the same one, and do not change it while a run starts"
        raise ConfigError(f"{source}: rank {', '.join(other)} reads another table than rank 0; {remedy}")


def _tried(paths: Sequence[str]) -> str:
    """Where the first file was looked for, in words."""
    if not paths:  # missing on another rank, or an empty cell
        return f"looked for from {os.getcwd()}, the working directory"
    return f"looked for {', '.join(map(_short, paths))} from {os.getcwd()}, the working directory"


def _some(table: Table, rows: np.ndarray) -> str:
    """The first files of some rows, and the number of the others, in words."""
    names = [_short(table.path[row]) or f"an empty cell in row {row}" for row in rows[:MAX_NAMES].tolist()]
    return ", ".join(names) + (f" and {len(rows) - MAX_NAMES} more" if len(rows) > MAX_NAMES else "")


def _short(path: str) -> str:
    """A path on one line."""
    line = " ".join(path.split())
    return line if len(line) <= MAX_PATH else f"...{line[-MAX_PATH:]}"

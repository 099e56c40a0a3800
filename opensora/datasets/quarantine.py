"""Unreadable files of a run: listed with reasons, counted, and limited in number."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from opensora.config.schema import Count, Schema, Text, check
from opensora.datasets.file_content import KEY_BYTES, content_key
from opensora.datasets.table import Table
from opensora.errors import MediaError
from opensora.files import parse_json

log = logging.getLogger("opensora")

MAX_UNREADABLE_SHARE = 0.05  # share of the rows of a table
MIN_UNREADABLE = 1  # this many unreadable files never stop a run that has others
MAX_LIST_BYTES = 2**28  # size of a list
MISSING = "0" * 2 * KEY_BYTES  # the content key of a file that does not exist


class UnreadableRow(NamedTuple):
    """An unreadable row and the reason."""

    row: int
    path: str
    reason: str


def max_unreadable(num_rows: int, share: float = MAX_UNREADABLE_SHARE) -> int:
    """The number of rows that may be unreadable; never all of them."""
    return max(min(max(MIN_UNREADABLE, int(share * num_rows)), num_rows - 1), 0)


class _Entry(Schema):
    """A line of the list."""

    row: Count
    path: Text
    reason: Text
    key: str | None = None


class Quarantine:
    """The unreadable rows of a run, over all ranks and resumes; each file or part of one is listed once.

    The list `path` has one JSON object per line: row, path, reason, and the content key of the file. Lists of other
    ranks are beside it, with the same name prefix; `former` folders hold those of the run being resumed. A listed row
    counts while row `row` of `table` is still that file with that content. `most` is the share of rows that may be
    unreadable. Only the rank that `writes` writes the list.
    """

    def __init__(
        self, path: str | Path, num_rows: int, most: float = MAX_UNREADABLE_SHARE, table: Table | None = None,
        former: Iterable[Path] = (), writes: bool = True,
    ) -> None:  # fmt: skip
        self.path, self.num_rows, self.table, self.writes = Path(path), num_rows, table, writes
        self.limit = max_unreadable(num_rows, most)
        self.rows: set[int] = set()
        content = _content(self.path)
        self.named = {(one.path, key) for one, key in _listed(content)}
        self.separator = "" if content.endswith(b"\n") or not content else "\n"  # after a crash
        self._count(self.path.parent)
        for folder in former:
            for one in self._count(folder):
                self._list(one)

    def __len__(self) -> int:
        return len(self.rows)

    def add(self, unreadable: Iterable[UnreadableRow]) -> None:
        """Adds the unreadable samples of a batch. Raises MediaError if all ranks together exceed the limit."""
        new = [one for one in unreadable if one.row not in self.rows]
        for one in new:
            self.rows.add(one.row)
            self._list(one)
        if new:
            self._count(self.path.parent)
        self.check()

    def check(self) -> None:
        """Raises MediaError if more files are unreadable than allowed."""
        if len(self.rows) > self.limit:
            problem = f"{len(self.rows)} of {self.num_rows} files cannot be read, over the limit of {self.limit}"
            raise MediaError(f"{problem}; they are listed with reasons in {self.path}; fix them, or remove their rows")

    def _count(self, folder: Path) -> list[UnreadableRow]:
        """Counts the rows listed in a folder that are still unreadable; returns the new ones."""
        found = []
        for path in sorted(folder.glob(f"{self.path.name.partition('.')[0]}*{self.path.suffix}")):
            for one, key in _listed(_content(path)):
                if one.row not in self.rows and self._still(one, key):
                    self.rows.add(one.row)
                    found.append(one)
        return found

    def _still(self, one: UnreadableRow, key: str | None) -> bool:
        if self.table is not None and (
            one.row >= len(self.table) or Path(self.table.path[one.row]).name != Path(one.path).name
        ):
            return False  # the list is of another table
        now = self._key(one)
        return key in (None, now) or now.startswith(MISSING)

    def _key(self, one: UnreadableRow) -> str:
        """The content key of the file, as hex, and the part of the file that the row stands for."""
        if self.table is None:
            return content_key(one.path).tobytes().hex()
        part = self.table.name(one.row).removeprefix(self.table.path[one.row])
        return content_key(self.table.file(one.row)).tobytes().hex() + part

    def _list(self, one: UnreadableRow) -> None:
        key = self._key(one)
        if {(one.path, None), (one.path, key)} & self.named:  # lists of earlier versions have no keys
            return
        self.named.add((one.path, key))
        log.warning("%s is skipped: %s", _name(one), one.reason)
        if not self.writes:
            return
        entry = {**one._asdict(), "key": key}
        try:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(self.separator + json.dumps(entry) + "\n")
            self.separator = ""
        except OSError as error:
            raise MediaError(f"{self.path}: cannot be written ({error.strerror}); free some space") from error


def _name(one: UnreadableRow) -> str:
    return one.path or f"row {one.row}"


def _content(path: Path) -> bytes:
    """The bytes of a list; empty if there is none."""
    with suppress(OSError):
        if path.is_file():
            with path.open("rb") as file:
                return file.read(MAX_LIST_BYTES)
    return b""


def _listed(content: bytes) -> Iterator[tuple[UnreadableRow, str | None]]:
    """Yields the entries of a list with their content keys; skips a truncated line."""
    for line in content.splitlines():
        with suppress(MediaError):
            entry = check(_Entry, parse_json(line, "a list of unreadable files"), error=MediaError)
            yield UnreadableRow(entry.row, entry.path, entry.reason), entry.key

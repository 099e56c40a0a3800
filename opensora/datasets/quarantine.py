"""Files that cannot be read: what is known of each, and how many of them a run bears."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from opensora.config.schema import Count, Schema, Text, check
from opensora.datasets.file_content import content_key
from opensora.datasets.table import Table
from opensora.errors import MediaError
from opensora.files import parse_json

log = logging.getLogger("opensora")

MOST_BROKEN = 0.05  # of the rows of a table
LEAST_BROKEN = 1  # so many broken files never stop a run that has others
MAX_LIST_BYTES = 2**28  # of a list of broken files


class Broken(NamedTuple):
    """A row that gives no sample, and why."""

    row: int
    path: str
    reason: str


def most_broken(num_rows: int, share: float = MOST_BROKEN) -> int:
    """How many of the rows of a table may be unusable; never all of them."""
    return max(min(max(LEAST_BROKEN, int(share * num_rows)), num_rows - 1), 0)


class _Entry(Schema):
    """A line of a list."""

    row: Count
    path: Text
    reason: Text
    key: str | None = None


class Quarantine:
    """The broken rows of a run, over its ranks and resumes: counted, each file named once in a list.

    The list is `path`, a JSON object a line: row, path, reason, and the key of the file's content. Those of other
    ranks lie beside it, under names that begin as its own; `former` folders have those of the run it goes on from. What
    they name counts as long as row `row` of `table` is that file with that content. `most` is the share of the table's
    rows that may be broken. Only the rank that `writes` has the list.
    """

    def __init__(
        self, path: str | Path, num_rows: int, most: float = MOST_BROKEN, table: Table | None = None,
        former: Iterable[Path] = (), writes: bool = True,
    ) -> None:  # fmt: skip
        self.path, self.num_rows, self.table, self.writes = Path(path), num_rows, table, writes
        self.limit = most_broken(num_rows, most)
        self.rows: set[int] = set()
        content = _content(self.path)
        self.named = {one.path: key for one, key in _listed(content)}
        self.mended = "" if content.endswith(b"\n") or not content else "\n"  # a crash may have cut off its last line
        self._count(self.path.parent)
        for folder in former:
            for one in self._count(folder):
                self._list(one)

    def __len__(self) -> int:
        return len(self.rows)

    def add(self, broken: Iterable[Broken]) -> None:
        """Takes up what `collate` set apart; MediaError once more files are broken than may be, on all ranks."""
        new = [one for one in broken if one.row not in self.rows]
        for one in new:
            self.rows.add(one.row)
            self._list(one)
        if new:
            self._count(self.path.parent)
        self.check()

    def check(self) -> None:
        """Raises MediaError when more files are broken than may be."""
        if len(self.rows) > self.limit:
            problem = f"{len(self.rows)} of {self.num_rows} files cannot be read, over the limit of {self.limit}"
            raise MediaError(
                f"{problem}; they are listed with reasons in {self.path}; mend them, or take out their rows"
            )

    def _count(self, folder: Path) -> list[Broken]:
        """Counts what the lists in a folder name, if that is still so; returns what is new of it."""
        found = []
        for path in sorted(folder.glob(f"{self.path.name.partition('.')[0]}*{self.path.suffix}")):
            for one, key in _listed(_content(path)):
                if one.row not in self.rows and self._still(one, key):
                    self.rows.add(one.row)
                    found.append(one)
        return found

    def _still(self, one: Broken, key: str | None) -> bool:
        if self.table is not None and (
            one.row >= len(self.table) or Path(self.table.path[one.row]).name != Path(one.path).name
        ):
            return False  # a row of another table
        now = self._key(one)
        return key in (None, now) or not int(now, 16)

    def _key(self, one: Broken) -> str:
        """Of the content of the file."""
        path = one.path if self.table is None else self.table.file(one.row)
        return content_key(path).tobytes().hex()

    def _list(self, one: Broken) -> None:
        key = self._key(one)
        if self.named.get(one.path, "") in (None, key):  # earlier versions listed no keys
            return
        self.named[one.path] = key
        log.warning("%s is skipped: %s", _name(one), one.reason)
        if not self.writes:
            return
        entry = {**one._asdict(), "key": key}
        try:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(self.mended + json.dumps(entry) + "\n")
            self.mended = ""
        except OSError as error:
            raise MediaError(f"{self.path}: cannot be written ({error.strerror}); free some space") from error


def _name(one: Broken) -> str:
    return one.path or f"row {one.row}"


def _content(path: Path) -> bytes:
    """Of a list; nothing where there is none."""
    with suppress(OSError):
        if path.is_file():
            with path.open("rb") as file:
                return file.read(MAX_LIST_BYTES)
    return b""


def _listed(content: bytes) -> Iterator[tuple[Broken, str | None]]:
    """The entries of a list, and the keys of their files; a line cut off by a crash has none."""
    for line in content.splitlines():
        with suppress(MediaError):
            entry = check(_Entry, parse_json(line, "a list of broken files"), error=MediaError)
            yield Broken(entry.row, entry.path, entry.reason), entry.key

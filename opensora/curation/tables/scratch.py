"""Rows that need each other, kept in a temporary SQLite file: any number of them, in little memory."""

from __future__ import annotations

import hashlib
import marshal
import os
import sqlite3
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from opensora.curation.tables.stream import Cell, Row
from opensora.errors import ConfigError

CACHE_KIB = 64 * 1024  # of SQLite's pages


class Scratch:
    """A temporary store of rows with sort keys, and of sets of keys."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self.connection = connection
        self._stores = 0

    def in_order(self, rows: Iterable[tuple[Cell, Row]], descending: bool = False) -> Iterator[Row]:
        """The rows by their keys: numbers first, then texts, missing keys last; equal keys in the order given."""
        name = f"rows{self.new_number()}"
        self.connection.execute(f"CREATE TABLE {name} (key, cells BLOB)")
        stored = ((_storable(key), marshal.dumps(row)) for key, row in rows)
        self.connection.executemany(f"INSERT INTO {name} VALUES (?, ?)", stored)
        direction = "DESC" if descending else "ASC"
        query = f"SELECT cells FROM {name} ORDER BY key IS NULL, typeof(key) = 'text', key {direction}, rowid"
        for (cells,) in self.connection.execute(query):
            yield marshal.loads(cells)
        self.connection.execute(f"DROP TABLE {name}")

    def new_number(self) -> int:
        """A number for the names of new tables."""
        self._stores += 1
        return self._stores

    def key_set(self) -> KeySet:
        """A new, empty set of keys."""
        return KeySet(self.connection, f"keys{self.new_number()}")

    def mapping(self, items: Iterable[tuple[str, str]]) -> KeyMapping:
        """A mapping of texts; the last item of a key counts."""
        return KeyMapping(self.connection, f"map{self.new_number()}", items)


class KeyMapping:
    """A mapping of texts to texts on disk."""

    def __init__(self, connection: sqlite3.Connection, name: str, items: Iterable[tuple[str, str]]) -> None:
        self.connection, self.name = connection, name
        connection.execute(f"CREATE TABLE {name} (key BLOB PRIMARY KEY, value TEXT) WITHOUT ROWID")
        data = ((_hashed(key), value) for key, value in items)
        connection.executemany(f"INSERT OR REPLACE INTO {name} VALUES (?, ?)", data)

    def get(self, key: str) -> str | None:
        found = self.connection.execute(f"SELECT value FROM {self.name} WHERE key = ?", (_hashed(key),)).fetchone()
        return None if found is None else found[0]


class KeySet:
    """A set of texts, stored as 16-byte hashes."""

    def __init__(self, connection: sqlite3.Connection, name: str) -> None:
        self.connection, self.name = connection, name
        connection.execute(f"CREATE TABLE {name} (key BLOB PRIMARY KEY) WITHOUT ROWID")

    def add(self, key: str) -> bool:
        """Adds a key; False if it is in already."""
        data = (_hashed(key),)
        return self.connection.execute(f"INSERT OR IGNORE INTO {self.name} VALUES (?)", data).rowcount == 1

    def update(self, keys: Iterable[str]) -> None:
        data = ((_hashed(key),) for key in keys)
        self.connection.executemany(f"INSERT OR IGNORE INTO {self.name} VALUES (?)", data)

    def __contains__(self, key: str) -> bool:
        data = (_hashed(key),)
        return self.connection.execute(f"SELECT 1 FROM {self.name} WHERE key = ?", data).fetchone() is not None


def _hashed(key: str) -> bytes:
    return hashlib.blake2b(key.encode("utf-8", "surrogateescape"), digest_size=16).digest()


def _storable(key: Cell) -> Cell | bytes:
    """A key that SQLite can store. Texts that are not UTF-8 are compared with replacement characters."""
    if isinstance(key, str):
        return None if not key else key.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    return key


@contextmanager
def scratch(folder: str | Path | None = None) -> Iterator[Scratch]:
    """A Scratch in a temporary folder, by default that of the operating system. Raises ConfigError on a full disk."""
    with tempfile.TemporaryDirectory(prefix="opensora-", dir=folder, ignore_cleanup_errors=True) as temporary:
        connection = sqlite3.connect(os.path.join(temporary, "rows.sqlite"), isolation_level=None)
        try:
            for pragma in (
                f"cache_size = -{CACHE_KIB}",
                "journal_mode = OFF",
                "synchronous = OFF",
                "temp_store = FILE",
            ):
                connection.execute(f"PRAGMA {pragma}")
            connection.execute("BEGIN")
            yield Scratch(connection)
        except sqlite3.OperationalError as error:
            raise ConfigError(
                f"temporary rows cannot be stored in {temporary} ({error}); set TMPDIR to a larger disk"
            ) from error
        finally:
            connection.close()

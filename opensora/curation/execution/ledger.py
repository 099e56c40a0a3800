"""The ledger: one SQLite file (WAL) with the result of every stage on every item. It survives kill -9.

A result is found again under (item, stage, stage hash). The item key names the content of a clip and the stage hash the
code, settings and weights of a stage, so that a second run computes what is missing or has changed, and nothing else.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from opensora.errors import ConfigError

SCHEMA_VERSION = 1
SCHEMA = """
CREATE TABLE IF NOT EXISTS results (
    item TEXT NOT NULL, stage TEXT NOT NULL, stage_hash TEXT NOT NULL,
    columns TEXT, error TEXT, attempts INTEGER NOT NULL,
    PRIMARY KEY (item, stage, stage_hash)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS tools (stage TEXT NOT NULL, stage_hash TEXT NOT NULL, provenance TEXT NOT NULL,
    PRIMARY KEY (stage, stage_hash)) WITHOUT ROWID;
"""


class Result(NamedTuple):
    """What a stage found for an item: rows of columns (several where it splits the item), or the error.

    `lasting` is False for an error that lies outside of the item; it is not stored, so that the next run tries again.
    """

    rows: list[dict[str, Any]] | None
    error: str | None = None
    attempts: int = 1
    lasting: bool = True


class Key(NamedTuple):
    """Where a result is stored."""

    item: str
    stage: str
    stage_hash: str


class Ledger:
    """Results by key. Only the process that opened it writes; workers send their results to it."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection

    def get(self, item: str, stages: Sequence[tuple[str, str]]) -> list[Result | None]:
        """The results of an item for stages (name, hash); None where there is none."""
        query = "SELECT stage, stage_hash, columns, error, attempts FROM results WHERE item = ?"
        found = {(stage, stage_hash): one for stage, stage_hash, *one in self._connection.execute(query, (item,))}
        return [_result(*found[stage]) if stage in found else None for stage in stages]

    def put(self, key: Key, result: Result) -> None:
        """Stores a result durably; a previous one of the key is replaced."""
        columns = None if result.rows is None else json.dumps(result.rows, ensure_ascii=False)
        self._connection.execute(
            "INSERT OR REPLACE INTO results VALUES (?, ?, ?, ?, ?, ?)", (*key, columns, result.error, result.attempts)
        )
        self.commit()

    def record_tool(self, stage: str, stage_hash: str, provenance: Mapping[str, Any]) -> None:
        """Records the tool, version, settings and weights behind a stage hash."""
        self._connection.execute(
            "INSERT OR REPLACE INTO tools VALUES (?, ?, ?)", (stage, stage_hash, json.dumps(provenance, sort_keys=True))
        )
        self.commit()

    def tools(self) -> dict[tuple[str, str], dict[str, Any]]:
        """(stage, stage hash) -> what is behind it."""
        rows = self._connection.execute("SELECT stage, stage_hash, provenance FROM tools")
        return {(stage, stage_hash): json.loads(provenance) for stage, stage_hash, provenance in rows}

    def forget_errors(self, items: Iterable[str]) -> None:
        """Removes the errors of items, so that they are tried again."""
        self._connection.executemany(
            "DELETE FROM results WHERE item = ? AND error IS NOT NULL", ((item,) for item in items)
        )
        self.commit()

    def import_from(self, path: str | Path) -> int:
        """Copies the results of another ledger that this one lacks; returns their number."""
        self.commit()
        with open_ledger(path):  # checks that it is one
            pass
        self._connection.execute("ATTACH ? AS other", (str(path),))
        try:
            count = self._connection.execute("INSERT OR IGNORE INTO results SELECT * FROM other.results").rowcount
            self._connection.execute("INSERT OR IGNORE INTO tools SELECT * FROM other.tools")
            self._connection.commit()
        finally:
            self._connection.execute("DETACH other")
        return count

    def commit(self) -> None:
        """Makes all changes durable."""
        self._connection.commit()


def _result(columns: str | None, error: str | None, attempts: int) -> Result:
    return Result(json.loads(columns) if columns else None, error, attempts)


@contextmanager
def open_ledger(path: str | Path) -> Iterator[Ledger]:
    """Opens a ledger, or creates it. Raises ConfigError for other files and if it cannot be written.

    Results are committed when the block ends, also by an exception.
    """
    path = Path(path)
    connection = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        connection = sqlite3.connect(path, timeout=60)
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = NORMAL")
        _prepare(connection, path)
        ledger = Ledger(connection)
        try:
            yield ledger
        finally:
            ledger.commit()
    except (sqlite3.DatabaseError, OSError) as error:
        raise ConfigError(f"{path}: cannot be used as a ledger ({error}); name another --ledger") from error
    finally:
        if connection is not None:
            connection.close()


def _prepare(connection: sqlite3.Connection, path: Path) -> None:
    """Creates the tables. Raises ConfigError for a database of another kind or of a later version."""
    version = connection.execute("PRAGMA user_version").fetchone()[0]
    tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
    if version > SCHEMA_VERSION or (tables and "results" not in tables):
        raise ConfigError(f"{path}: is a database, but not a ledger of this version; name another --ledger")
    connection.executescript(SCHEMA)
    connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
    connection.commit()

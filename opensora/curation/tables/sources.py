"""Finds the sources of a table on this machine, below a folder: by path, or by content."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from opensora.curation.tables.stream import Row, TableStream, text_of
from opensora.curation.tables.writing import WRITERS, check_target
from opensora.datasets.file_content import content_key, content_keys
from opensora.datasets.folder_table import find_media
from opensora.errors import ConfigError, MediaError
from opensora.files import atomic_write


class SourceReport(NamedTuple):
    """Rows written, rows left out, and the problem of each source that is missing or differs, by its path."""

    rows: int
    left_out: int
    problems: dict[str, str]


def write_found(table: TableStream, root: str | Path, target: str | Path, force: bool = False) -> SourceReport:
    """Writes the rows whose sources are below `root`, with these paths, and `TARGET.quarantine.jsonl` with the others.

    A source is the file whose path ends as that of the row, or any file of its content. It is compared with the column
    `source_hash`, if there is one: a hash of length, beginning, middle and end of the file. Raises ConfigError as
    `write_table` does, and MediaError if no source is found.
    """
    target, sources = Path(target), Sources(Path(root))
    check_target(target, force)
    path = table.index("path")
    key = table.columns.index("source_hash") if "source_hash" in table.columns else None
    left_out: list[dict[str, str]] = []
    problems: dict[str, str] = {}

    def rows() -> Iterator[Row]:
        for row in table.rows:
            source = text_of(row[path])
            try:
                found = sources.find(source, "" if key is None else text_of(row[key]))
            except MediaError as error:
                problems[source] = str(error)
                left_out.append({"path": source, "error": str(error)})
                continue
            yield [*row[:path], found, *row[path + 1 :]]

    quarantine = target.with_name(f"{target.name}.quarantine.jsonl")
    with atomic_write(target, quarantine, make_folders=True, error=ConfigError) as [table_file, quarantine_file]:
        count = WRITERS[target.suffix.lower()](TableStream(table.source, table.columns, rows()), table_file)
        if not count:
            first = next(iter(problems.values()), "it has no rows")
            raise MediaError(f"{table.source}: none of its sources is below {root}; the first: {first}")
        lines = (json.dumps(one, ensure_ascii=False) + "\n" for one in left_out)
        quarantine_file.write_text("".join(lines), "utf-8", "surrogateescape")
    return SourceReport(count, len(left_out), problems)


@dataclass
class Sources:
    """The media below a folder. Their contents are hashed when the first source is not found by its path."""

    root: Path
    _found: dict[tuple[str, str], str | MediaError] = field(default_factory=dict)
    _taken: dict[str, str] = field(default_factory=dict)  # file -> the path that it was found for

    def find(self, path: str, key: str) -> str:
        """The file of a path, with the content `key` unless that is empty. Raises MediaError if there is none."""
        if (path, key) not in self._found:
            try:
                self._found[path, key] = self._search(path, key)
            except MediaError as error:
                self._found[path, key] = error
        found = self._found[path, key]
        if isinstance(found, MediaError):
            raise found
        return found

    def _search(self, path: str, key: str) -> str:
        candidates = [file for file in self._named_alike(path) if os.path.isfile(file)]
        if not key:
            if not candidates:
                raise MediaError(f"{path}: is missing below {self.root}")
            if self._taken.setdefault(candidates[0], path) != path:
                problem = f"may be {candidates[0]}, which may be {self._taken[candidates[0]]} as well"
                raise MediaError(f"{path}: {problem}; only a column source_hash can tell")
            return candidates[0]
        same = next((file for file in candidates if _key(file) == key), self._by_content.get(key))
        if same is None and candidates:
            raise MediaError(f"{path}: {candidates[0]} differs from the source of the table")
        if same is None:
            raise MediaError(f"{path}: is missing below {self.root}, also under other names")
        return same

    def _named_alike(self, path: str) -> Iterator[str]:
        """The files below the root whose paths end as `path` does, those that agree most first."""
        parts = [part for part in path.replace("\\", "/").split("/") if part not in ("", ".")]
        if os.pardir not in parts and "\0" not in path:
            yield from (str(self.root.joinpath(*parts[first:])) for first in range(len(parts)))

    @cached_property
    def _by_content(self) -> dict[str, str]:
        files = [str(file) for file in find_media(self.root)]
        keys = [key.tobytes().hex() for key in content_keys(files)]
        return dict(zip(reversed(keys), reversed(files), strict=True))  # the first of equal files


def _key(file: str) -> str:
    return content_key(file).tobytes().hex()

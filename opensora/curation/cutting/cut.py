"""Cuts the clips of a table into files, and writes their table."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from opensora.curation.clip import Clip
from opensora.curation.cutting.stage import Cut, clip_name
from opensora.curation.execution.executor import open_executor
from opensora.curation.execution.ledger import Result
from opensora.curation.execution.progress import Progress
from opensora.curation.execution.settings import ExecutorSettings
from opensora.curation.execution.task import Task
from opensora.curation.items import read_items
from opensora.curation.tables.stream import Row, TableStream
from opensora.curation.tables.writing import WRITERS, check_target
from opensora.datasets.columns import CLIP, SPELLINGS
from opensora.errors import ConfigError, MediaError
from opensora.files import atomic_write, error_message


@dataclass(frozen=True)
class CutSettings:
    """What to cut, and how. source: a table of clips; table: of the files, by default `clips.csv` in `cut.folder`."""

    source: str
    cut: Cut
    table: str | None = None
    executor: ExecutorSettings = field(default_factory=ExecutorSettings)
    force: bool = False

    @property
    def target(self) -> Path:
        return Path(self.table or Path(self.cut.folder, "clips.csv"))


class CutReport(NamedTuple):
    """Numbers of rows written, of clips that are too short, and of clips that cannot be cut."""

    rows: int
    short: int
    quarantined: int


def cut_clips(settings: CutSettings) -> CutReport:
    """Writes the clips, their table, and `TABLE.quarantine.jsonl` with what cannot be cut.

    Files of an earlier run with the same settings are kept; other files are never replaced. Raises ConfigError for
    wrong settings and tables, and MediaError if no clip can be cut.
    """
    check_settings(settings.cut)
    check_target(settings.target, settings.force)
    try:
        Path(settings.cut.folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{settings.cut.folder}: cannot hold clips ({error_message(error)}); name another") from error
    clips = list(read_items(settings.source))
    results = _run(settings, clips)
    found = [(clip, results[clip_name(clip)]) for clip in clips]
    good = [(clip, result.rows[0]) for clip, result in found if result.rows and result.rows[0]["path"]]
    bad = [(clip, result) for clip, result in found if result.rows is None]
    if not good:
        first = bad[0][1].error if bad else "too short" if clips else "there are none"
        raise MediaError(f"{settings.source}: none of {len(clips)} clips can be cut; the first: {first}")
    _write(settings.target, _table(settings.source, good), bad)
    return CutReport(len(good), len(clips) - len(good) - len(bad), len(bad))


def check_settings(cut: Cut) -> None:
    """Raises ConfigError for settings out of bounds, and for those that a copy cannot have."""
    for name in ("min_seconds", "max_seconds", "target_fps", "shorter_size"):
        value = getattr(cut, name)
        if value is not None and not (0 if name == "min_seconds" else 1e-3) <= value <= 1e6:
            raise ConfigError(f"--{name.replace('_', '-')} {value} is out of bounds; give a number up to a million")
    if cut.max_seconds is not None and cut.max_seconds < cut.min_seconds:
        raise ConfigError(f"--max-seconds {cut.max_seconds} is below --min-seconds {cut.min_seconds}; leave one out")
    encoding = {"lossless": cut.lossless, "target-fps": cut.target_fps, "shorter-size": cut.shorter_size}
    if cut.copy and (given := [name for name, value in encoding.items() if value]):
        raise ConfigError(f"--copy does not encode, which --{given[0]} needs; leave one out")


def _run(settings: CutSettings, clips: Sequence[Clip]) -> dict[str, Result]:
    """The result of each distinct clip, by name."""
    distinct: dict[str, Clip] = {}
    for clip in clips:
        distinct.setdefault(clip_name(clip), clip)
    tasks = (Task(number, clip, (0,)) for number, clip in enumerate(distinct.values()))
    progress = Progress("cut", len(distinct), 0)
    results: dict[str, Result] = {}
    try:
        with open_executor(settings.executor) as execute:
            for task, found in execute(tasks, [settings.cut]):
                results[clip_name(task.clip)] = found.result
                if found.result.rows is None:
                    progress.warn(f"left out: {found.result.error}")
                progress.add(task, found)
    finally:
        progress.close()
    return results


def _table(source: str, good: Sequence[tuple[Clip, dict[str, Any]]]) -> TableStream:
    """The rows of the files: the columns of their clips but span and crop, with what is known of the files."""
    gone = (*CLIP, *SPELLINGS["path"])
    known = dict.fromkeys(column for clip, _ in good[:1] for column in (clip.row or {}) if column not in gone)
    columns = tuple(dict.fromkeys(["path", *known, *Cut.columns]))

    def rows() -> Iterator[Row]:
        for clip, file in good:
            cells = {**(clip.row or {}), **file}
            yield [cells.get(column) for column in columns]

    return TableStream(source, columns, rows())


def _write(target: Path, table: TableStream, bad: Sequence[tuple[Clip, Result]]) -> None:
    quarantine = target.with_name(f"{target.name}.quarantine.jsonl")
    with atomic_write(target, quarantine, make_folders=True, error=ConfigError) as [table_file, quarantine_file]:
        WRITERS[target.suffix.lower()](table, table_file)
        lines = (
            json.dumps({"path": clip.path, **_part(clip), "stage": "cut", "error": result.error}, ensure_ascii=False)
            for clip, result in bad
        )
        quarantine_file.write_text("".join(f"{line}\n" for line in lines), "utf-8", "surrogateescape")


def _part(clip: Clip) -> dict[str, Any]:
    return {} if clip.span is None else {"start_pts": clip.span.start, "end_pts": clip.span.end}

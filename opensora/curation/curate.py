"""Footage in, table out: stages on files, then on the clips that scene cuts make of them."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from opensora.curation.clip import Clip
from opensora.curation.execution.ledger import Key, Ledger, Result, open_ledger
from opensora.curation.execution.local import Limits, run_pool, run_serial
from opensora.curation.execution.task import StageResult, Task
from opensora.curation.items import read_items
from opensora.curation.stages import registry
from opensora.curation.stages.stage import Stage
from opensora.curation.tables.stream import Cell, Row, TableStream
from opensora.curation.tables.writing import WRITERS, check_target
from opensora.errors import ConfigError, MediaError
from opensora.files import atomic_write

log = logging.getLogger("opensora")

Executor: TypeAlias = Callable[[Iterable[Task], Sequence[Stage]], Iterator[tuple[Task, StageResult]]]


@dataclass(frozen=True)
class CurationSettings:
    """What to curate, and how.

    source: a folder of media or a table; target: the table to write; stages: names in order; options: stage name ->
    its settings; ledger: file of results, by default beside the target; other_ledgers: results to take over; workers:
    processes (0: this one); shard: (i, n) computes every nth item, from item i on.
    """

    source: str
    target: str
    stages: tuple[str, ...] = ("probe",)
    options: dict[str, dict[str, Any]] = field(default_factory=dict)
    ledger: str | None = None
    other_ledgers: tuple[str, ...] = ()
    workers: int = field(default_factory=lambda: os.cpu_count() or 1)
    shard: tuple[int, int] | None = None
    limits: Limits = field(default_factory=Limits)
    retry_errors: bool = False
    force: bool = False


class CurationReport(NamedTuple):
    """Numbers of rows written, of items left out, and of stage results that were computed in this run."""

    rows: int
    quarantined: int
    computed: int


class Entry(NamedTuple):
    """A clip, the columns known of it, and why it cannot be used, if so."""

    clip: Clip
    columns: dict[str, Cell]
    error: dict[str, Any] | None = None


def curate(settings: CurationSettings) -> CurationReport:
    """Runs the stages and writes the table, and `TARGET.quarantine.jsonl` with what cannot be used.

    Results are taken from the ledger where it has them. Raises ConfigError for unknown stages or settings, and as
    `write_table` does; MediaError if no item can be used.
    """
    target = Path(settings.target)
    check_target(target, settings.force)
    stages = [registry.make(name, settings.options.get(name, {})) for name in settings.stages]
    registry.check_order(stages)
    for stage in stages:
        stage.setup()
    ledger_path = settings.ledger or f"{settings.target}.ledger"
    with open_ledger(ledger_path) as ledger:
        for other in settings.other_ledgers:
            ledger.import_from(other)
        run = _Run(settings, ledger)
        entries = [Entry(clip, dict(clip.row or {})) for clip in run.of_shard(read_items(settings.source))]
        for part in registry.split_after_scenes(stages):
            entries = run.through(part, entries)
        for stage in stages:
            ledger.record_tool(stage.name, stage.stage_hash, stage.provenance)
    good, bad = [entry for entry in entries if not entry.error], [entry for entry in entries if entry.error]
    if not good:
        first = bad[0].error["error"] if bad and bad[0].error else "there are no items"
        raise MediaError(f"{settings.source}: none of {len(entries)} items can be used; the first: {first}")
    _write(target, _table(settings.source, good, stages), bad)
    return CurationReport(len(good), len(bad), run.computed)


class _Run:
    """The entries of a run on their way through the stages."""

    def __init__(self, settings: CurationSettings, ledger: Ledger) -> None:
        self.settings, self.ledger = settings, ledger
        self.computed = 0

    def of_shard(self, clips: Iterable[Clip]) -> Iterator[Clip]:
        if self.settings.shard is None:
            yield from clips
            return
        index, count = self.settings.shard
        yield from (clip for number, clip in enumerate(clips) if number % count == index)

    def through(self, stages: Sequence[Stage], entries: list[Entry]) -> list[Entry]:
        """The entries after these stages; those that a stage splits in the order of their parts."""
        if not stages:
            return entries
        usable = [entry for entry in entries if not entry.error]
        self._compute(stages, usable)
        result: list[Entry] = []
        for entry in entries:
            result += [entry] if entry.error else self._after(stages, entry)
        return result

    def _compute(self, stages: Sequence[Stage], entries: Sequence[Entry]) -> None:
        """Runs what the ledger lacks, and stores it."""
        hashes = [(stage.name, stage.stage_hash) for stage in stages]
        if self.settings.retry_errors:
            self.ledger.forget_errors(key for entry in entries if (key := _key(entry.clip)))
        for task, found in self._execute(self._tasks(stages, entries), stages):
            self.ledger.put(Key(task.clip.key, *hashes[found.stage]), found.result)
            self.computed += 1
            if found.result.rows is None:
                log.warning("left out: %s", found.result.error)

    def _execute(self, tasks: Iterable[Task], stages: Sequence[Stage]) -> Iterator[tuple[Task, StageResult]]:
        if self.settings.workers == 0:
            return run_serial(tasks, stages)
        return run_pool(tasks, stages, self.settings.workers, self.settings.limits)

    def _tasks(self, stages: Sequence[Stage], entries: Sequence[Entry]) -> Iterator[Task]:
        """A task per distinct clip with missing results; equal clips are computed once."""
        seen: set[str] = set()
        for number, entry in enumerate(entries):
            key = _key(entry.clip)
            if key is None or key in seen:
                continue
            seen.add(key)
            columns, missing = dict(entry.columns), []
            for index, stage in enumerate(stages):
                result = self.ledger.get(Key(key, stage.name, stage.stage_hash))
                if result is None:
                    missing.append(index)
                elif result.rows is None:
                    break
                elif not stage.splits:
                    columns |= result.rows[0]
            if missing:
                yield Task(number, Clip(entry.clip.path, entry.clip.span, entry.clip.crop, columns), tuple(missing))

    def _after(self, stages: Sequence[Stage], entry: Entry) -> list[Entry]:
        """The entry with the columns of the stages, or its parts."""
        key = _key(entry.clip)
        if key is None:
            return [_failed(entry, "read", Result(None, f"{entry.clip.path}: cannot be read; check the path"))]
        columns = dict(entry.columns)
        for stage in stages:
            result = self.ledger.get(Key(key, stage.name, stage.stage_hash))
            if result is None or result.rows is None:
                missing = Result(None, f"{entry.clip.path}: stage {stage.name} has no result")
                return [_failed(entry, stage.name, result or missing)]
            if stage.splits:
                parts = [columns | row | {f"{stage.name}_hash": stage.stage_hash} for row in result.rows]
                return [Entry(registry.part(entry.clip, row), row) for row in parts]
            columns |= result.rows[0] | {f"{stage.name}_hash": stage.stage_hash}
        return [Entry(entry.clip, columns)]


def _key(clip: Clip) -> str | None:
    try:
        return clip.key
    except MediaError:
        return None


def _failed(entry: Entry, stage: str, result: Result) -> Entry:
    span = {} if entry.clip.span is None else {"start_pts": entry.clip.span.start, "end_pts": entry.clip.span.end}
    error = {"path": entry.clip.path, **span, "stage": stage, "error": result.error, "attempts": result.attempts}
    return Entry(entry.clip, entry.columns, error)


def _table(source: str, entries: Sequence[Entry], stages: Sequence[Stage]) -> TableStream:
    """The rows of the usable entries: their own columns, those of the stages, then the hashes of the stages."""
    own = dict.fromkeys(column for entry in entries[:1] for column in (entry.clip.row or {}))
    of_stages = [column for stage in stages for column in stage.columns]
    columns = tuple(dict.fromkeys(
        ["path", *own, "source_hash", *of_stages, *(f"{stage.name}_hash" for stage in stages)]
    ))  # fmt: skip

    def row(entry: Entry) -> Row:
        known = entry.columns | {"path": entry.clip.path, "source_hash": entry.clip.source_hash}
        return [known.get(column) for column in columns]

    return TableStream(source, columns, map(row, entries))


def _write(target: Path, table: TableStream, bad: Sequence[Entry]) -> None:
    """Writes the table and its quarantine, both or none."""
    quarantine = target.with_name(f"{target.name}.quarantine.jsonl")
    with atomic_write(target, quarantine, make_folders=True, error=ConfigError) as [table_file, quarantine_file]:
        WRITERS[target.suffix.lower()](table, table_file)
        lines = (json.dumps(entry.error, ensure_ascii=False) + "\n" for entry in bad)
        quarantine_file.write_text("".join(lines), encoding="utf-8", errors="surrogateescape")

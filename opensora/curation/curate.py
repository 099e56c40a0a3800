"""Footage in, table out: stages on files, then on the clips that scene cuts make of them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from opensora.curation.clip import Clip
from opensora.curation.execution.executor import open_executor
from opensora.curation.execution.gate import Gate
from opensora.curation.execution.ledger import Key, Ledger, Result, open_ledger
from opensora.curation.execution.progress import Progress
from opensora.curation.execution.settings import ExecutorSettings
from opensora.curation.execution.task import Executor, Task
from opensora.curation.items import read_items
from opensora.curation.stages import registry
from opensora.curation.stages.stage import Stage
from opensora.curation.tables.stream import Cell, Row, TableStream, text_of
from opensora.curation.tables.writing import WRITERS, check_target
from opensora.errors import ConfigError, MediaError
from opensora.files import atomic_write


@dataclass(frozen=True)
class CurationSettings:
    """What to curate, and how.

    source: a folder of media or a table; target: the table to write; stages: names in order; options: stage name ->
    its settings; ledger: file of results, by default beside the target; other_ledgers: results to take over; executor:
    where the stages run; shard: (i, n) computes every nth item, from item i on.
    """

    source: str
    target: str
    stages: tuple[str, ...] = ("probe",)
    options: dict[str, dict[str, Any]] = field(default_factory=dict)
    ledger: str | None = None
    other_ledgers: tuple[str, ...] = ()
    executor: ExecutorSettings = field(default_factory=ExecutorSettings)
    shard: tuple[int, int] | None = None
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
        stage.check()
    ledger_path = settings.ledger or f"{settings.target}.ledger"
    with open_executor(settings.executor) as execute, open_ledger(ledger_path) as ledger:
        for other in settings.other_ledgers:
            ledger.import_from(other)
        run = _Run(settings, ledger, execute)
        entries = [Entry(clip, dict(clip.row or {})) for clip in run.of_shard(read_items(settings.source))]
        for group in registry.groups(stages):
            entries = run.through(group, entries)
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

    def __init__(self, settings: CurationSettings, ledger: Ledger, execute: Executor) -> None:
        self.settings, self.ledger, self.execute = settings, ledger, execute
        self.computed = 0
        self.passing: dict[Key, Result] = {}  # errors that are not stored

    def of_shard(self, clips: Iterable[Clip]) -> Iterator[Clip]:
        if self.settings.shard is None:
            yield from clips
            return
        index, count = self.settings.shard
        yield from (clip for number, clip in enumerate(clips) if number % count == index)

    def through(self, stages: Sequence[Stage], entries: list[Entry]) -> list[Entry]:
        """The entries after a group of stages; those that a stage splits in the order of their parts."""
        usable = [entry for entry in entries if not entry.error]
        reason = self._compute(stages, usable)
        result: list[Entry] = []
        for entry in entries:
            result += [entry] if entry.error else self._after(stages, entry, reason)
        return result

    def _compute(self, stages: Sequence[Stage], entries: Sequence[Entry]) -> str:
        """Runs what the ledger lacks, and stores it; returns why some clips were not tried, if so."""
        items: dict[str, int] = {}  # -> the first entry of each
        for number, entry in enumerate(entries):
            if item := _item(entry, stages):
                items.setdefault(item, number)
        if self.settings.retry_errors:
            self.ledger.forget_errors(items)
        tasks = list(self._tasks(stages, entries, items))
        if not tasks:
            return ""
        gate = Gate(stages)
        progress = Progress("+".join(stage.name for stage in stages), len(items), len(items) - len(tasks))
        try:
            for task, found in self.execute(gate.admitted(tasks), stages):
                stage = stages[found.stage]
                key = Key(_item(entries[task.number], stages) or "", stage.name, stage.stage_hash)
                if found.result.lasting:
                    self.ledger.put(key, found.result)
                else:
                    self.passing[key] = found.result
                self.computed += 1
                gate.add(found)
                progress.add(task, found)
                if found.result.rows is None:
                    progress.warn(f"left out: {found.result.error}")
        finally:
            progress.close()
        return gate.closed

    def _tasks(self, stages: Sequence[Stage], entries: Sequence[Entry], items: Mapping[str, int]) -> Iterator[Task]:
        """A task per distinct item with missing results; equal items are computed once."""
        for item, number in items.items():
            entry = entries[number]
            columns, missing = dict(entry.columns), []
            found = self.ledger.get(item, [(stage.name, stage.stage_hash) for stage in stages])
            for index, (stage, result) in enumerate(zip(stages, found, strict=True)):
                if result is None:
                    missing.append(index)
                elif result.rows is None:
                    break
                elif not stage.splits:
                    columns |= stage.completed(result.rows[0], columns)
            if missing:
                yield Task(number, Clip(entry.clip.path, entry.clip.span, entry.clip.crop, columns), tuple(missing))

    def _after(self, stages: Sequence[Stage], entry: Entry, reason: str) -> list[Entry]:
        """The entry with the columns of the stages, or its parts. `reason`: why a result may be missing."""
        item = _item(entry, stages)
        if item is None:
            return [_failed(entry, "read", Result(None, f"{entry.clip.path}: cannot be read; check the path"))]
        columns = dict(entry.columns)
        stored = self.ledger.get(item, [(stage.name, stage.stage_hash) for stage in stages])
        for stage, found in zip(stages, stored, strict=True):
            result = found or self.passing.get(Key(item, stage.name, stage.stage_hash))
            if result is None or result.rows is None:
                missing = Result(None, f"{entry.clip.path}: stage {stage.name} has no result; {reason}", 0)
                return [_failed(entry, stage.name, result or missing)]
            if stage.splits:
                parts = [columns | row | {f"{stage.name}_hash": stage.stage_hash} for row in result.rows]
                return [Entry(registry.part(entry.clip, row), row) for row in parts]
            columns |= stage.completed(result.rows[0], columns) | {f"{stage.name}_hash": stage.stage_hash}
        return [Entry(entry.clip, columns)]


def _item(entry: Entry, stages: Sequence[Stage]) -> str | None:
    """What names the work of a group on an entry: the content of its clip, and the columns that the stages read."""
    try:
        key = entry.clip.key
    except MediaError:
        return None
    inputs = [[name, text_of(entry.columns.get(name))] for stage in stages for name in stage.inputs]
    if not inputs:
        return key
    return f"{key}#{hashlib.sha256(json.dumps(inputs).encode()).hexdigest()[:16]}"


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

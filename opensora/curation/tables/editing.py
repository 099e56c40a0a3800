"""One edit of tables: inputs, operations in order, outputs."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from opensora.curation.tables.apply import edited
from opensora.curation.tables.ordering import shards
from opensora.curation.tables.reading import open_tables
from opensora.curation.tables.writing import check_target, write_tables

MAX_NAME = 120  # characters of a name made from operations


class EditRequest(NamedTuple):
    """What to edit: glob patterns of inputs, (operation, value) in order, and where to write."""

    inputs: tuple[str, ...]
    operations: tuple[tuple[str, Any], ...]
    output: str | None = None
    format: str | None = None
    num_shards: int | None = None
    seed: int = 42
    workers: int = 4
    force: bool = False


class EditResult(NamedTuple):
    """The tables written with their numbers of rows, and the rows dropped by each operation."""

    written: list[tuple[Path, int]]
    dropped: Mapping[str, int]


def edit(request: EditRequest) -> EditResult:
    """Runs the operations on the inputs, merged into one table. Raises ConfigError; then nothing is written."""
    table = open_tables(request.inputs)
    target = Path(request.output) if request.output else default_target(request)
    targets = [target]
    if request.num_shards:
        targets = [target.with_name(f"{target.stem}_{n}{target.suffix}") for n in range(request.num_shards)]
    for one in targets:
        check_target(one, request.force)
    with edited(table, request.operations, request.seed, request.workers) as (result, context):
        parts = shards(result, request.num_shards, context) if request.num_shards else [result]
        counts = write_tables(parts, targets, request.force)
    return EditResult(list(zip(targets, counts, strict=True)), context.dropped)


def default_target(request: EditRequest) -> Path:
    """Beside the first input: its name, then the operations."""
    first = Path(request.inputs[0])
    stem = re.sub(r"[*?\[\]]+", "", first.stem) or "table"
    words = [f"{name.replace('-', '')}{_short(value)}" for name, value in request.operations]
    suffix = f".{request.format}" if request.format else ".csv"
    return first.with_name("_".join([stem, *(words or ["merged"])])[:MAX_NAME] + suffix)


def _short(value: Any) -> str:
    text = "-".join(map(str, value)) if isinstance(value, list) else "" if value is None else str(value)
    return re.sub(r"[^\w.=-]+", "-", Path(text).name if "/" in text else text)[:40]

"""Applies operations to a table."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias

from opensora.curation.tables import captions, columns, filters, near_duplicates, ordering, paths, probing, sets
from opensora.curation.tables.context import Context
from opensora.curation.tables.scratch import scratch
from opensora.curation.tables.stream import TableStream

Function: TypeAlias = Callable[[TableStream, Any, Context], TableStream]


def _filter(name: str, make: Callable[[TableStream, Any], filters.Keep]) -> Function:
    """Keeps the rows that `make(table, value)` accepts, and counts the others."""

    def run(table: TableStream, value: Any, context: Context) -> TableStream:
        shown = f"--{name}" if value is None else f"--{name} {value}"
        return table.filtered(context.counted(shown, make(table, value)))

    return run


def _bound(name: str, column: str, sign: str, keep_missing: bool = False) -> Function:
    return _filter(name, lambda table, value: filters.bound(table, column, sign, value, keep_missing))


FUNCTIONS: dict[str, Function] = {
    "where": _filter("where", filters.where),
    "fmin": _bound("fmin", "num_frames", ">="),
    "fmax": _bound("fmax", "num_frames", "<="),
    "hwmax": _bound("hwmax", "resolution", "<="),
    "fsmax": _bound("fsmax", "filesize", "<="),
    "fpsmax": _bound("fpsmax", "fps", "<=", keep_missing=True),
    "aesmin": _bound("aesmin", "aes", ">="),
    "matchmin": _bound("matchmin", "match", ">="),
    "flowmin": _bound("flowmin", "flow", ">="),
    "img-only": _filter("img-only", lambda table, _: filters.images(table, True)),
    "vid-only": _filter("vid-only", lambda table, _: filters.images(table, False)),
    "path-subset": _filter("path-subset", filters.path_contains),
    "remove-empty-path": _filter("remove-empty-path", lambda table, _: filters.present(table, "path")),
    "remove-empty-caption": _filter("remove-empty-caption", lambda table, _: filters.present(table, "text")),
    "remove-url": _filter("remove-url", lambda table, _: filters.without_url(table)),
    "lang": _filter("lang", filters.language),
    "ext": _filter("ext", lambda table, _: paths.exists(table)),
    "remove-path-duplication": lambda table, _, context: sets.unique(table, "path", context),
    "remove-text-duplication": lambda table, _, context: sets.unique(table, "text", context),
    "remove-content-duplication": lambda table, _, context: sets.unique_content(table, context),
    "near-duplication": lambda table, _, context: near_duplicates.mark(table, context),
    "remove-near-duplication": lambda table, _, context: near_duplicates.remove(table, context),
    "difference": sets.difference,
    "intersection": sets.intersection,
    "sort": lambda table, column, context: ordering.sort(table, column, context, descending=True),
    "sort-ascending": lambda table, column, context: ordering.sort(table, column, context, descending=False),
    "shuffle": lambda table, _, context: ordering.shuffle(table, context),
    "head": lambda table, count, _: ordering.head(table, count),
    "columns": lambda table, names, _: columns.select(table, names),
    "drop": lambda table, names, _: columns.drop(table, names),
    "rename": lambda table, pairs, _: columns.rename(table, pairs),
    "train-column": lambda table, *_: columns.for_training(table),
    "info": lambda table, _, context: probing.add_information(table, context.workers),
    "video-info": lambda table, _, context: probing.add_information(table, context.workers),
    "filesize": lambda table, *_: paths.add_file_size(table),
    "relpath": lambda table, folder, _: paths.make_relative(table, folder),
    "abspath": lambda table, folder, _: paths.make_absolute(table, folder),
    "path-to-id": lambda table, *_: paths.add_id(table),
    "load-caption": lambda table, suffix, _: captions.load(table, suffix),
    "update-text": captions.update,
    "refine-llm-caption": lambda table, *_: captions.refine(table),
    "clean-caption": lambda table, *_: captions.clean(table),
    "merge-cmotion": lambda table, *_: captions.append_scores(table, ("cmotion",)),
    "score-to-text": lambda table, *_: captions.append_scores(table, ("aes", "flow", "cmotion")),
    "append-text": lambda table, text, _: captions.append(table, text),
    "count-num-token": lambda table, folder, _: captions.count_tokens(table, folder),
    "text-len": lambda table, *_: captions.add_length(table),
}


@contextmanager
def edited(
    table: TableStream, operations: Sequence[tuple[str, Any]], seed: int = 42, workers: int = 4
) -> Iterator[tuple[TableStream, Context]]:
    """The table after operations [(name, value)] in order, to be read within the block, and their Context.

    Raises ConfigError for a column that an operation needs and the table lacks, before any row is read.
    """
    with scratch() as store:
        context = Context(store, seed, workers)
        for name, value in operations:
            table = FUNCTIONS[name](table, value, context)
        yield table, context

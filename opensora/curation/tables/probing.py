"""Sizes and lengths of media, read from their headers and packets; no frame but the first is decoded."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from opensora.curation.tables.stream import Cell, Row, TableStream, text_of
from opensora.datasets.folder_table import media_size
from opensora.errors import MediaError

COLUMNS = ("num_frames", "width", "height", "aspect_ratio", "resolution", "fps")
IN_FLIGHT = 8  # items per worker
Item = TypeVar("Item")
Result = TypeVar("Result")


def add_information(table: TableStream, workers: int) -> TableStream:
    """With the columns of `COLUMNS`, empty for files that cannot be read."""
    place = table.index("path")
    wide = table.with_columns(COLUMNS, lambda row: (None,) * len(COLUMNS))
    places = [wide.columns.index(name) for name in COLUMNS]

    def probed(row: Row) -> Row:
        for n, cell in zip(places, _information(text_of(row[place])), strict=True):
            row[n] = cell
        return row

    return TableStream(wide.source, wide.columns, map_in_threads(probed, wide.rows, workers))


def _information(path: str) -> tuple[Cell, ...]:
    try:
        size = media_size(Path(path))
    except MediaError:
        return (None,) * len(COLUMNS)
    return size.num_frames, size.width, size.height, size.aspect_ratio, size.resolution, size.fps


def map_in_threads(function: Callable[[Item], Result], items: Iterable[Item], workers: int) -> Iterator[Result]:
    """`function` of each item, in order, by threads that run a bounded number of items ahead."""
    running: deque[Future[Result]] = deque()
    with ThreadPoolExecutor(workers) as pool:
        for item in items:
            running.append(pool.submit(function, item))
            if len(running) >= workers * IN_FLIGHT:
                yield running.popleft().result()
        while running:
            yield running.popleft().result()

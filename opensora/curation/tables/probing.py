"""Sizes and lengths of media, read from their headers and packets; no frame but the first is decoded."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from opensora.curation.tables.stream import Cell, Row, TableStream, text_of
from opensora.datasets.clip_columns import parse_crop, parse_span
from opensora.datasets.columns import CLIP
from opensora.datasets.folder_table import media_size
from opensora.errors import ConfigError, MediaError

COLUMNS = ("num_frames", "width", "height", "aspect_ratio", "resolution", "fps")
IN_FLIGHT = 8  # items per worker
Item = TypeVar("Item")
Result = TypeVar("Result")


def add_information(table: TableStream, workers: int) -> TableStream:
    """With the columns of `COLUMNS` of each clip, empty for those that cannot be read."""
    place, clip = table.index("path"), {name: table.columns.index(name) for name in CLIP if name in table.columns}
    wide = table.with_columns(COLUMNS, lambda row: (None,) * len(COLUMNS))
    places = [wide.columns.index(name) for name in COLUMNS]

    def probed(row: Row) -> Row:
        cells = {name: row[n] for name, n in clip.items()}
        for n, cell in zip(places, _information(text_of(row[place]), cells), strict=True):
            row[n] = cell
        return row

    return TableStream(wide.source, wide.columns, map_in_threads(probed, wide.rows, workers))


def _information(path: str, clip: Mapping[str, Cell]) -> tuple[Cell, ...]:
    try:
        span = parse_span(clip.get("start_pts"), clip.get("end_pts"))
        size = media_size(Path(path), span, parse_crop(clip.get("crop")))
    except (MediaError, ConfigError):
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

"""Reads Parquet tables; types and sizes are checked before decompression."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from opensora.config.schema import MAX_TEXT
from opensora.datasets import columns
from opensora.datasets.columns import TEXTS
from opensora.errors import ConfigError
from opensora.files import error_message, open_regular

TEXTUAL = (*TEXTS, "crop")
CHUNK = 2**11  # rows per chunk
FEW = 2**4  # rows per chunk for encodings that expand strongly
ROW_BYTES = 40  # memory per row besides its texts
# Limits on the decompressed size: a few bytes can expand to gigabytes.
LEAST_BYTES, MOST_TIMES = 2**26, 200


def parts(source: str) -> Iterator[tuple[int, Mapping[str, Sequence[Any]]]]:
    """Yields (index of the first row, cells by column) per chunk. Raises ConfigError for an invalid table."""
    with opened(source) as content:
        from pyarrow import types

        names = content.schema_arrow.names
        places = columns.find_columns(names, source)
        if "path" not in places:
            raise columns.missing_path_error(names, source)
        for column, place in places.items():
            _check_type(types, column, names[place], content.schema_arrow.types[place], source)
        left = budget(source)
        rows = check_sizes(content, [names[place] for place in places.values()], left, source)
        first = 0
        for batch in content.iter_batches(rows, columns=[names[place] for place in places.values()]):
            taken = {column: batch.column(names[place]) for column, place in places.items()}
            cells = {column: _cells(column, array, first, source) for column, array in taken.items()}
            left -= len(batch) * ROW_BYTES + sum(_length(cells[column]) for column in cells if column in TEXTUAL)
            if left < 0:
                raise too_large(source)
            yield first, cells
            first += len(batch)


@contextmanager
def opened(source: str) -> Iterator[Any]:
    """A `pyarrow.parquet.ParquetFile`. Raises ConfigError if it cannot be read, also within the block."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise ConfigError(f"{source}: Parquet needs pyarrow; pip install pyarrow, or save it as CSV") from error
    try:
        with open_regular(source, ConfigError) as file:
            yield parquet.ParquetFile(file)
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        if isinstance(error, ConfigError) or (isinstance(error, OSError) and error.errno):
            raise
        raise ConfigError(f"{source}: cannot be read as Parquet ({error_message(error)}); re-save it") from error


def budget(source: str) -> int:
    """The bytes that a file may expand to."""
    return LEAST_BYTES + MOST_TIMES * os.stat(source).st_size


def _check_type(types: Any, column: str, name: str, kind: Any, source: str) -> None:
    """Raises ConfigError for a column of another type than texts or numbers."""
    values = kind.value_type if types.is_dictionary(kind) else kind
    texts = (types.is_string, types.is_large_string, types.is_binary, types.is_large_binary, types.is_null)
    views = [getattr(types, check) for check in ("is_string_view", "is_binary_view") if hasattr(types, check)]
    whole = (types.is_integer,) if column != "path" else ()
    more = (types.is_integer, types.is_floating, types.is_decimal) if column not in TEXTUAL else whole
    if not any(check(values) for check in (*texts, *views, *more)):
        wanted = "texts" if column in TEXTUAL else "numbers"
        shown = columns.shortened(str(kind))
        raise ConfigError(f"{source}: row 0, column '{name}': holds {shown}, not {wanted}; save it as {wanted}")


def check_sizes(content: Any, names: Sequence[str], limit: int, source: str) -> int:
    """The rows per chunk. Raises ConfigError for columns that are much larger than the file."""
    size, few = 0, False
    for group in range(content.metadata.num_row_groups):
        of_group = content.metadata.row_group(group)
        for place in range(of_group.num_columns):
            chunk = of_group.column(place)
            if chunk.path_in_schema in names:
                size += chunk.total_uncompressed_size
                few = few or any(encoding.startswith("DELTA_") for encoding in chunk.encodings)
    if size > limit or content.metadata.num_rows * ROW_BYTES > limit:
        raise too_large(source)
    return FEW if few else CHUNK


def too_large(source: str) -> ConfigError:
    problem = f"would become more than {MOST_TIMES} times as large as the file"
    return ConfigError(f"{source}: {problem}; save it with shorter texts or less compression")


def _cells(column: str, array: Any, first: int, source: str) -> list[Any]:
    """The Python values of an Arrow array. Raises ConfigError for too long texts before converting them."""
    if column in TEXTUAL:
        from pyarrow import compute, types

        dictionary = types.is_dictionary(array.type)
        values = array.dictionary if dictionary else array
        if not types.is_null(values.type) and not types.is_integer(values.type):
            longest = compute.max(compute.binary_length(values)).as_py() or 0
            if longest > 4 * MAX_TEXT:
                place = f"rows {first} to {first + len(array) - 1}" if dictionary else f"row {_longest(values) + first}"
                problem = f"holds {longest:,} bytes, more than {MAX_TEXT:,} characters"
                raise columns.cell_error(source, place, column, problem, "shorten the cell")
    return array.to_pylist()


def _length(cells: Sequence[Any]) -> int:
    return sum(len(cell) for cell in cells if isinstance(cell, str | bytes))


def _longest(values: Any) -> int:
    from pyarrow import compute

    lengths = compute.binary_length(values)
    return compute.index(lengths, compute.max(lengths)).as_py()

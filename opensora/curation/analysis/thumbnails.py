"""Small pictures of rows."""

from __future__ import annotations

import base64
from collections.abc import Mapping

from opensora.curation.items import clip_of
from opensora.curation.tables.stream import Cell, TableStream, text_of
from opensora.datasets.video import encode_jpeg
from opensora.errors import OpenSoraError

SIDE = 192  # pixels of the long side


def thumbnail(row: Mapping[str, Cell], table: TableStream) -> str | None:
    """The middle frame of the row's clip as a `data:` URL of a JPEG; None if it cannot be read."""
    try:
        path = text_of(row[table.columns[table.index("path")]])
        [frame], _ = clip_of(dict(row), path, table.source).sampled(1)
        return f"data:image/jpeg;base64,{base64.b64encode(encode_jpeg(frame, SIDE)).decode()}"
    except (OpenSoraError, OSError, ValueError):
        return None

"""Captions read, replaced, cleaned and extended."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path

from opensora.curation.tables.clip_keys import clip_keys
from opensora.curation.tables.context import Context
from opensora.curation.tables.reading import open_table
from opensora.curation.tables.stream import Cell, Row, TableStream, number_of, text_of
from opensora.datasets.captions import append_score
from opensora.datasets.folder_table import read_caption
from opensora.errors import ConfigError

# Openings of captions by language models that say nothing about the content.
_SUBJECT = r"(?:the|this)\s+(?:given\s+|short\s+)?(?:video|image|clip|scene|footage|picture|photo(?:graph)?)"
_VERB = r"(?:shows?|depicts?|features?|captures?|showcases?|presents?|displays?|portrays?|begins with|starts with)"
_OPENING = re.compile(
    rf"^\s*(?:in\s+{_SUBJECT},?\s+(?:we see\s+|there (?:is|are)\s+)?|{_SUBJECT}\s+{_VERB}\s+)", re.IGNORECASE
)


def _changed(table: TableStream, change: Callable[[str], str]) -> TableStream:
    """The table with `change(caption)`; missing captions stay missing."""
    place = table.index("text")

    def changed(row: Row) -> Row:
        text = text_of(row[place])
        return [*row[:place], change(text) if text else row[place], *row[place + 1 :]]

    return table.mapped(changed)


def load(table: TableStream, suffix: str) -> TableStream:
    """Captions from the files beside the media, with another suffix; empty where there is none."""
    place, suffix = table.index("path"), f".{suffix.lstrip('.')}"

    def caption(row: Row) -> Sequence[Cell]:
        file = Path(text_of(row[place])).with_suffix(suffix)
        return [read_caption(file) if file.is_file() else None]

    return table.with_columns(("text",), caption)


def update(table: TableStream, other: str, context: Context) -> TableStream:
    """Captions from the table `other` for clips that it has, for paths if it has no parts of files; others stay."""
    found = open_table(other)
    text, (own, theirs) = found.index("text"), clip_keys(table, found)
    store = context.scratch.mapping((theirs(row), text_of(row[text])) for row in found.rows)
    wide = table if "text" in table.columns else table.with_columns(("text",), lambda row: [None])
    caption = wide.index("text")

    def changed(row: Row) -> Row:
        new = store.get(own(row))
        return row if new is None else [*row[:caption], new, *row[caption + 1 :]]

    return wide.mapped(changed)


def refine(table: TableStream) -> TableStream:
    """Captions without openings such as `The video shows`."""
    return _changed(table, without_opening)


def without_opening(text: str) -> str:
    """A caption without its opening, capitalised again."""
    short = _OPENING.sub("", text, count=1)
    return short[:1].upper() + short[1:] if short and short != text else text


def clean(table: TableStream) -> TableStream:
    """Captions cleaned as training cleans them for T5."""
    from opensora.models.text_encoder.cleaning import preprocess

    return _changed(table, preprocess)


def append(table: TableStream, text: str) -> TableStream:
    return _changed(table, lambda caption: caption + text)


def append_scores(table: TableStream, names: Sequence[str]) -> TableStream:
    """Captions with the scores of these columns (aes, flow, cmotion) that the table has, in 1.2's wording.

    Raises ConfigError if the table has none of them.
    """
    present = [name for name in names if name in table.columns]
    if not present:
        raise ConfigError(f"{table.source}: has none of the columns {', '.join(names)}; add scores first")
    text, places = table.index("text"), {name: table.index(name) for name in present}

    def scored(row: Row) -> Row:
        cells = {name: row[place] for name, place in places.items()}
        motion = text_of(cells.get("cmotion")).strip() or None
        caption = append_score(text_of(row[text]), number_of(cells.get("aes")), number_of(cells.get("flow")), motion)
        return [*row[:text], caption, *row[text + 1 :]]

    return table.mapped(scored)


def count_tokens(table: TableStream, folder: str) -> TableStream:
    """With `num_tokens` of each caption by the T5 tokenizer in a folder, the end token included."""
    from opensora.checkpoints.tokenizer import load_t5_tokenizer

    if not Path(folder).is_dir():
        raise ConfigError(f"--count-num-token {folder}: no such folder; name one that holds a T5 tokenizer")
    tokenizer = load_t5_tokenizer(Path(folder))
    place = table.index("text")
    return table.with_columns(("num_tokens",), lambda row: [len(tokenizer.encode(text_of(row[place])))])


def add_length(table: TableStream) -> TableStream:
    """With `text_len` of each caption in characters."""
    place = table.index("text")
    return table.with_columns(("text_len",), lambda row: [len(text_of(row[place]))])

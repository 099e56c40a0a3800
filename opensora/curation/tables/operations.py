"""The operations of `opensora data edit` by flag. `apply.py` has their functions; this module imports nothing heavy."""

from __future__ import annotations

from typing import Literal, NamedTuple


class Operation(NamedTuple):
    """How the flag of an operation is written."""

    help: str
    value: Literal["none", "text", "integer", "number", "list"] = "none"
    metavar: str | None = None


def _text(metavar: str, text: str) -> Operation:
    return Operation(text, "text", metavar)


def _number(text: str) -> Operation:
    return Operation(text, "number", "N")


def _columns(metavar: str, text: str) -> Operation:
    return Operation(text, "list", metavar)


OPERATIONS = {
    # rows
    "where": _text("CONDITION", "keep rows for which a condition holds, such as 'aes >= 5 and 2 < flow < 30'"),
    "fmin": _number("keep rows with at least N frames"),
    "fmax": _number("keep rows with at most N frames"),
    "hwmax": _number("keep rows with at most N pixels (height x width)"),
    "fsmax": _number("keep rows with a filesize of at most N bytes"),
    "fpsmax": _number("keep rows with at most N frames per second, and images"),
    "aesmin": _number("keep rows with an aesthetic score of at least N"),
    "matchmin": _number("keep rows with a matching score of at least N"),
    "flowmin": _number("keep rows with a motion score of at least N"),
    "img-only": Operation("keep images"),
    "vid-only": Operation("keep videos"),
    "path-subset": _text("TEXT", "keep rows whose path contains a text"),
    "remove-empty-path": Operation("drop rows without a path"),
    "remove-empty-caption": Operation("drop rows without a caption"),
    "remove-url": Operation("drop rows whose caption contains a URL"),
    "lang": _text("LANG", "keep rows whose caption is in a language (ISO 639-1, such as en)"),
    "ext": Operation("keep rows whose file exists"),
    # sets
    "remove-path-duplication": Operation("keep the first row of each path"),
    "remove-text-duplication": Operation("keep the first row of each caption"),
    "remove-content-duplication": Operation("keep the first row of each file content (SHA-256)"),
    "near-duplication": Operation("add duplicate_of, the clip that a row nearly repeats, by the column phash"),
    "remove-near-duplication": Operation("keep one row of each group of near duplicates, by the column phash"),
    "difference": _text("TABLE", "drop rows whose path is in another table"),
    "intersection": _text("TABLE", "keep rows whose path is in another table"),
    # order
    "sort": _text("COLUMN", "sort by a column, largest first"),
    "sort-ascending": _text("COLUMN", "sort by a column, smallest first"),
    "shuffle": Operation("shuffle the rows by --seed"),
    "head": Operation("keep the first N rows", "integer", "N"),
    # columns
    "columns": _columns("COLUMN", "keep these columns, in this order"),
    "drop": _columns("COLUMN", "remove columns"),
    "rename": _columns("OLD=NEW", "rename columns"),
    "train-column": Operation("keep the columns that training reads"),
    # files
    "info": Operation("probe each file: num_frames, width, height, aspect_ratio, resolution, fps"),
    "video-info": Operation("the same as --info"),
    "filesize": Operation("add the size of each file in bytes"),
    "relpath": _text("FOLDER", "make paths relative to a folder"),
    "abspath": _text("FOLDER", "put a folder before relative paths"),
    "path-to-id": Operation("add the column id: file names without suffix"),
    "load-caption": _text("SUFFIX", "read captions from the file of the same name with a suffix, such as txt"),
    # captions
    "update-text": _text("TABLE", "take captions from another table, by path"),
    "refine-llm-caption": Operation("remove openings such as 'The video shows' from captions"),
    "clean-caption": Operation("clean captions as training does for T5"),
    "merge-cmotion": Operation("append the camera motion to captions"),
    "score-to-text": Operation("append aes, flow and cmotion to captions"),
    "append-text": _text("TEXT", "append a text to captions"),
    "count-num-token": _text("FOLDER", "add num_tokens, by the T5 tokenizer in a folder"),
    "text-len": Operation("add text_len, the number of characters of captions"),
}

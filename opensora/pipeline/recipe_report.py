"""Prints the recipe of an output (mp4, png or .json) or of a draft as readable lines."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from opensora.pipeline import draft
from opensora.pipeline.output_names import DRAFT
from opensora.pipeline.recipe import Recipe, read_recipe

MEDIA = (".mp4", ".png", ".json", ".mov", ".mkv", ".webm", ".gif", ".webp", ".apng", ".jpg", ".jpeg")
MAX_LINES, MAX_VALUE = 200, 200  # lines of a report, characters of a value


def is_output(path: str | Path) -> bool:
    """Whether a file is an output or a draft, by its suffix, rather than a checkpoint."""
    return Path(path).is_file() and (Path(path).suffix.lower() in MEDIA or _is_draft(path))


def _is_draft(path: str | Path) -> bool:
    return str(path).lower().endswith(f"{DRAFT}.safetensors")


def describe_output(path: str | Path) -> str:
    """The recipe of an output in at most 200 lines. Raises MediaError where there is none, WeightsError for a draft."""
    if _is_draft(path):
        loaded = draft.load(path)
        progress = (
            f"draft: {loaded.state.step} of {loaded.state.num_steps} steps are done; opensora continue does the rest"
        )
        lines = [f"{path}: {progress}", *_lines(loaded.recipe)]
    else:
        lines = [f"{path}: made by opensora", *_lines(read_recipe(path))]
    more = [f"... and {len(lines) - MAX_LINES} lines more"] if len(lines) > MAX_LINES else []
    return "\n".join([*lines[:MAX_LINES], *more])


def _lines(recipe: Recipe) -> Iterator[str]:
    """One line for each entry; entries of a mapping are indented, None is left out."""
    for name, value in recipe.items():
        if not isinstance(value, Mapping):
            yield f"{name}: {_short(value)}"
            continue
        if value:
            yield f"{name}:"
        for key, entry in value.items():
            if entry is not None:
                yield f"  {str(key)[:MAX_VALUE]}: {_short(entry)}"


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    text = text.replace("\n", "\\n")
    return text if len(text) <= MAX_VALUE else f"{text[:MAX_VALUE]}... ({len(text)} characters)"

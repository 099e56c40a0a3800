"""Writes docs/config.md out of the declarations of settings and sections: `python -m opensora.config.document`."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from opensora.config import sections
from opensora.config.budget import MAX_BASES_DEPTH, MAX_BYTES, MAX_FILES
from opensora.config.fields import kinds
from opensora.config.legacy import LEGACY, OF_NO_EFFECT
from opensora.config.schema import MAX_PATH
from opensora.config.sections.common import Loaded, Section
from opensora.config.sections.models import Transformer
from opensora.config.settings import ExtractSettings, InferenceSettings, SearchSettings, TrainSettings

DOCUMENT = Path(__file__).parents[2] / "docs" / "config.md"
SAFE = 10**12
Row = tuple[str, str, str, str, str]
TITLES: Row = ("name", "type", "default", "meaning", "example")
SECTION_TITLES = {
    "model": "a diffusion model, or the autoencoder that is trained", "vae": "an autoencoder",
    "text_encoder": "a text encoder", "scheduler": "training's noise and the sampler", "dataset": "a data set",
}  # fmt: skip
INTRODUCTION = f"""# Configuration

Made from the declarations by `python -m opensora.config.document`; a test compares it with them.

A configuration is a Python file of plain values, `name = value`; it is read as data and never run. Allowed are texts,
numbers, `True`, `False`, `None`, lists, tuples, dicts, `dict(...)`, arithmetic and names assigned before; names that
begin with `_` stay private to the file. Files `.json` and `.yaml` (without aliases) hold the same names. A component
is a section, `name = dict(type="...", keyword=value)`.

- `_base_ = "other.py"` (or a list) takes the values of other files first; sections are merged, and one with
  `_delete_=True` replaces that of the base. A read takes at most {MAX_FILES} files, {MAX_BYTES // 10**6} MB and
  {MAX_BASES_DEPTH} bases one after the other.
- `{{{{ fileDirname }}}}`, `{{{{ fileBasename }}}}`, `{{{{ fileBasenameNoExtension }}}}` and `{{{{ fileExtname }}}}` in
  a text stand for the file's folder, name, name without extension, and extension. `{{{{$VAR:default}}}}` reads the
  environment, which `--trust-config` alone does: it runs the file as a program, by mmengine-lite.
- Flags win over the file: each setting below has the flag of its name, unless its meaning says otherwise, and
  `--cfg-options model.depth=4 save_fps=8` sets any of them.
- What a section leaves out, the `config.json` of its weights says, and else the defaults below. Larger models of a
  name, such as `STDiT3-3B/2`, have other sizes than these.
- A value of another type, one out of range, and an unknown name are refused before any work, with file, name and value.
  Whole numbers may be written `3.0`, tuples as lists.
"""


def document() -> str:
    """The text of docs/config.md."""
    parts = [INTRODUCTION, "## Inference\n", _table(_settings(InferenceSettings)), "## Training\n"]
    parts += [_table(_settings(TrainSettings)), "## Search of batch sizes\n", "Those of training, and:\n"]
    parts += [
        _table(_settings(SearchSettings, TrainSettings)),
        "## Encoding of features\n",
        "Those of training, and:\n",
    ]
    parts += [_table(_settings(ExtractSettings, TrainSettings))]
    parts += ["## Sections\n", "### Keys of every section with weights\n", _table(_keywords(Loaded))]
    parts += ["### Keywords of every diffusion model\n", _table(_keywords(Transformer, Loaded))]
    done: set[type[Section]] = set()
    for name, title in SECTION_TITLES.items():
        parts.append(f"### {name}: {title}\n")
        parts += [_component(kind, names) for kind, names in _components(name).items() if kind not in done]
        done |= set(_components(name))
    return "\n".join([*parts, _old()])


def _components(section: str) -> dict[type[Section], list[str]]:
    """What the section may be -> its names."""
    found: dict[type[Section], list[str]] = {}
    table = sections.MODELS if section == "model" else sections.SECTIONS[section]
    for name, kind in table.items():
        found.setdefault(kind, []).append(name)
    return found


def _component(kind: type[Section], names: list[str]) -> str:
    common = Transformer if issubclass(kind, Transformer) else Loaded if issubclass(kind, Loaded) else None
    listed = ", ".join(f"`{name}`" for name in names)
    return f"#### {listed}\n\n{kind.__doc__}\n\n{_table(_keywords(kind, common))}"


def _settings(kind: type, common: type | None = None) -> Iterator[Row]:
    known = {field.name for field in dataclasses.fields(common)} if common else ()
    for field in (field for field in dataclasses.fields(kind) if field.name not in known):
        required = field.default is dataclasses.MISSING
        example = field.metadata.get("example")
        example = field.default if example is None else example
        meaning = field.metadata.get("help") or field.metadata.get("about") or ""
        section = field.name in sections.SECTIONS or field.name == "discriminator"
        shape = "section" if section else type_text(kinds(kind)[field.name])
        shape += " or None" if section and not required else ""
        yield _row(field.name, shape, "required" if required else repr(field.default), meaning, example)
        yield from _below(field.name, kinds(kind)[field.name])


def _keywords(kind: type[BaseModel], common: type[Section] | None = None) -> Iterator[Row]:
    """The keywords of a section; without those that are the same in `common`."""
    for name, field in kind.model_fields.items():
        same = common.model_fields.get(name) if common else None
        if name == "type" or (same and (same.default, same.description) == (field.default, field.description)):
            continue
        shape = type_text(field.rebuild_annotation())
        yield _row(name, shape, repr(field.default), field.description or "", field.examples[0])
        yield from _below(name, field.rebuild_annotation())


def _below(name: str, kind: Any) -> Iterator[Row]:
    """The keys of a dict that is declared as one."""
    for one in (kind, *typing.get_args(kind)):
        if isinstance(one, type) and issubclass(one, BaseModel) and not issubclass(one, Section):
            for row in _keywords(one):
                yield (f"`{name}.{row[0][1:]}", *row[1:])


def _row(name: str, shape: str, default: str, meaning: str, example: Any) -> Row:
    default = default if default == "required" else f"`{default}`"
    return (f"`{name}`", shape, default, meaning, f"`{name}={_written(example)}`")


def _written(value: Any) -> str:
    """A value as a configuration has it."""
    if isinstance(value, dict) and isinstance(value.get("type"), str):
        return f"dict({', '.join(f'{key}={_written(item)}' for key, item in value.items())})"
    return repr(value).replace("'", '"')


def _table(rows: Iterator[Row]) -> str:
    lines = [TITLES, ("---",) * len(TITLES), *rows]
    if len(lines) == 2:
        return "No further keywords.\n"
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines) + "\n"


def _old() -> str:
    spellings = [f"`{old}` is `{new}`" for old, new in LEGACY.items() if new is not None]
    dropped = ", ".join(f"`{name}`" for name in sorted(OF_NO_EFFECT))
    return "\n".join([
        "## Older files\n",
        f"Spellings that are understood: {'; '.join(spellings)}. Data settings at the top level (`data_path`, "
        "`num_frames`, `frame_interval`, `image_size`) go into `dataset`; `use_image_transform=True` needs "
        "`num_frames=1`, and `root` is refused.\n",
        f"Accepted and said to have no effect where they are no settings above: {dropped}.\n",
    ])  # fmt: skip


def type_text(kind: Any) -> str:
    """What a value of an annotation may be, in words."""
    kind, limits = _unwrapped(kind)
    inner = typing.get_args(kind)
    if "words" in limits:
        return limits["words"]
    if isinstance(kind, type) and issubclass(kind, Section):
        return f"dict of the keywords of `{kind.model_fields['type'].default}`"
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return "dict"
    match typing.get_origin(kind):
        case typing.Literal:
            return " or ".join(f"`{one}`" for one in inner)
        case typing.Union | types.UnionType:
            several = list(dict.fromkeys(map(type_text, inner)))
            wider = {one.removeprefix("whole ") for one in several if one.startswith("whole ")} & set(several)
            return " or ".join(one for one in several if one.removeprefix("whole ") == one or one[6:] not in wider)
        case origin if origin is tuple and inner[-1] is not Ellipsis:
            items = list(map(type_text, inner))
            same = len(set(items)) == 1
            return f"tuple of {len(items)} {items[0]}" if same else f"({', '.join(items)})"
        case origin if origin in (tuple, list):
            return f"list of {type_text(inner[0])}"
        case origin if origin is dict:
            return f"dict of {type_text(inner[0])} to {type_text(inner[1])}"
    if kind in (int, float):
        return ("whole number" if kind is int else "number") + _range(limits)
    if kind is str:
        return "path" if limits.get("max_length") == MAX_PATH else "text"
    return {bool: "True or False", type(None): "None", dict: "dict"}[kind]


def _unwrapped(kind: Any) -> tuple[Any, dict[str, Any]]:
    """An annotation without its metadata, and the limits out of them; the last of a kind counts."""
    limits: dict[str, Any] = {}
    while typing.get_origin(kind) is typing.Annotated:
        kind, *metadata = typing.get_args(kind)
        for one in (one for item in metadata for one in getattr(item, "metadata", [item])):
            found = {name: getattr(one, name, None) for name in ("ge", "gt", "le", "lt", "max_length")}
            found["words"] = getattr(getattr(one, "func", None), "words", None)
            limits |= {name: value for name, value in found.items() if value is not None}
    return kind, limits


def _range(limits: dict[str, Any]) -> str:
    """Of numbers; bounds that only keep computers safe are left out."""
    words = {"ge": " from", "gt": " above", "le": " to", "lt": " below"}
    shown = {name: value for name, value in limits.items() if name in words and abs(value) < SAFE}
    return "".join(f"{words[name]} {shown[name]:.15g}" for name in words if name in shown)


if __name__ == "__main__":
    DOCUMENT.write_text(document(), encoding="utf-8")

"""WebDataset: tars whose members `KEY.mp4`, `KEY.txt` and `KEY.json` are one sample, extracted into a folder.

A tar may come from anyone: names of members are keys, never paths. Files are named `00002/0000017.mp4`, by tar and
sample.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from opensora.curation.convert.new_folder import new_folder
from opensora.curation.convert.request import ConvertRequest
from opensora.curation.convert.tar_members import Member, members
from opensora.curation.tables.reading import open_table
from opensora.curation.tables.writing import write_table
from opensora.datasets.folder_table import SUFFIXES
from opensora.errors import ConfigError, MediaError
from opensora.files import parse_json

CAPTIONS = (".txt", ".caption")
MAX_TEXT_BYTES = 2**18  # of a caption, or of the JSON of a sample


class Sample(NamedTuple):
    """A media file within a tar, and its cells."""

    media: Path
    cells: dict[str, Any]


def convert(request: ConvertRequest) -> int:
    """Extracts the media of all tars and writes their table: path, text, id (the key), and the values of the JSON.

    Raises ConfigError for a missing root and an existing media folder, MediaError for damaged or unusual tars.
    """
    tars = _tars(Path(request.root))
    folder = Path(request.media or request.target.with_suffix(""))
    with new_folder(folder) as temporary, tempfile.TemporaryDirectory(prefix="opensora-") as notes:
        listed = Path(notes, f"{Path(request.root).name}.jsonl")
        with listed.open("w", encoding="utf-8") as file:
            count = sum(_extract(tar, number, temporary, folder, file) for number, tar in enumerate(tars))
        if not count:
            raise ConfigError(f"{request.root}: holds no sample with a video or image; is it a WebDataset?")
        return write_table(open_table(listed), request.target, request.force)


def _tars(root: Path) -> list[Path]:
    if root.is_file():
        return [root]
    if not root.is_dir():
        raise ConfigError(f"{root}: no such file or folder; name a .tar file, or a folder of them")
    found = sorted(file for file in root.rglob("*.tar") if file.is_file())
    if not found:
        raise ConfigError(f"{root}: holds no .tar file; name another folder, or decompress them")
    return found


def _extract(tar: Path, number: int, temporary: Path, folder: Path, listed: TextIO) -> int:
    """Writes the media of a tar below `temporary` and a line for each into `listed`; returns the number of samples."""
    (temporary / f"{number:05}").mkdir()
    count = 0
    for key, group in _samples(tar):
        cells, suffix = _read(group, tar, temporary / "part")
        if suffix is None:
            continue
        name = f"{number:05}/{count:07}{suffix}"
        (temporary / "part").rename(temporary / name)
        listed.write(
            json.dumps({"path": str(folder / name), "text": cells.pop("text", None), "id": key, **cells}) + "\n"
        )
        count += 1
    return count


def _samples(tar: Path) -> Iterator[tuple[str, Iterator[Member]]]:
    """(key, members) of consecutive members with the same key."""
    return groupby(members(tar), lambda member: member.key)


def _read(group: Iterator[Member], tar: Path, part: Path) -> tuple[dict[str, Any], str | None]:
    """The cells of a sample, and the suffix of its media file, which is written to `part`; None without one.

    Raises MediaError for two media files.
    """
    cells: dict[str, Any] = {}
    suffix: str | None = None
    for member in group:
        kind = Path(member.name).suffix.lower()
        if kind in SUFFIXES:
            if suffix is not None:
                raise MediaError(f"{tar}: sample '{member.key}' holds several media files; split it")
            with part.open("wb") as file:
                while chunk := member.read(2**16):
                    file.write(chunk)
            suffix = kind
        elif kind in CAPTIONS:
            cells["text"] = " ".join(_content(member, tar).decode("utf-8", "replace").split())
        elif kind == ".json":
            cells = _json(member, tar) | cells
    return cells, suffix


def _content(member: Member, tar: Path) -> bytes:
    content = member.read(MAX_TEXT_BYTES + 1)
    if len(content) > MAX_TEXT_BYTES:
        raise MediaError(f"{tar}: {member.name}: is larger than {MAX_TEXT_BYTES:,} bytes, the limit")
    return content


def _json(member: Member, tar: Path) -> dict[str, Any]:
    """The values of a JSON object; `caption` is the text. Its path and id, if any, are not taken."""
    values = parse_json(_content(member, tar), f"{tar}: {member.name}", MediaError)
    if not isinstance(values, dict):
        raise MediaError(f"{tar}: {member.name}: must be a JSON object; correct it")
    text = values.pop("text", None) or values.pop("caption", None)
    cells = {name: value for name, value in values.items() if name not in ("path", "id", "caption")}
    return cells if text is None else cells | {"text": text}

"""Folders of media: any, or a folder per class."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

from opensora.curation.convert.request import ConvertRequest
from opensora.curation.tables.stream import Row, TableStream
from opensora.datasets.folder_table import IMAGES, VIDEOS, find_media
from opensora.errors import ConfigError
from opensora.files import read_bytes

SYNSETS = ("LOC_synset_mapping.txt", "words.txt", "synset_words.txt")  # lines `n01440764 tench, Tinca tinca`
MAX_SYNSETS = 2**24  # bytes
_SYNSET = re.compile(r"n\d{8}")


def media(request: ConvertRequest, suffixes: Collection[str]) -> TableStream:
    """`path, id, relpath` of the files below a folder that have these suffixes, sorted by path.

    `id` is the name without suffix, `relpath` the path below the folder.
    """
    base = split_folder(request, None)
    rows: Iterator[Row] = (
        [str(file), file.stem, os.path.relpath(file, base)] for file in find_media(base, suffixes=suffixes)
    )
    return TableStream(request.root, ("path", "id", "relpath"), rows)


def imagenet(request: ConvertRequest) -> TableStream:
    """`path, text` of ImageNet; names of synsets come from its own list, such as LOC_synset_mapping.txt."""
    base, names = split_folder(request, "train"), _synsets(Path(request.root))

    def caption(folder: str) -> str:
        if folder in names or not _SYNSET.fullmatch(folder):
            return names.get(folder, folder)
        wanted = " or ".join(SYNSETS)
        raise ConfigError(f"{base}: class '{folder}' has no name; put {wanted} into {request.root}")

    return _by_class(request, base, IMAGES, caption)


def ucf101(request: ConvertRequest) -> TableStream:
    """`path, text` of UCF101: `v_ApplyEyeMakeup_g01_c01.avi` in ApplyEyeMakeup shows `Apply Eye Makeup`."""
    base = split_folder(request, "videos")
    return _by_class(request, base, VIDEOS, lambda folder: re.sub(r"(?<=[a-z])(?=[A-Z])", " ", folder))


def split_folder(request: ConvertRequest, usual: str | None) -> Path:
    """The folder of a split below the root: the one named, the usual one if it exists, or the root itself."""
    root = Path(request.root)
    if not root.is_dir():
        raise ConfigError(f"{root}: no such folder; name the one that holds the data set")
    if request.split is not None:
        return root / request.split
    return root / usual if usual and (root / usual).is_dir() else root


def _by_class(
    request: ConvertRequest, base: Path, suffixes: Collection[str], caption: Callable[[str], str]
) -> TableStream:
    """`path, text`, where the caption comes from the first folder below `base`."""

    def row(file: Path) -> Row:
        folder, *inside = file.relative_to(base).parts
        if not inside:
            raise ConfigError(f"{file}: is in no folder of a class; name another --split")
        return [str(file), caption(folder)]

    return TableStream(request.root, ("path", "text"), map(row, find_media(base, suffixes=suffixes)))


def _synsets(root: Path) -> dict[str, str]:
    """Synset -> its names, from the first list that exists."""
    file = next((root / name for name in SYNSETS if (root / name).is_file()), None)
    if file is None:
        return {}
    lines = read_bytes(file, MAX_SYNSETS, ConfigError).decode("utf-8", "replace").splitlines()
    pairs = (line.split(maxsplit=1) for line in lines)
    return {pair[0]: pair[1].strip() for pair in pairs if len(pair) == 2}

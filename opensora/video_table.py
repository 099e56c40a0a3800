"""A table of the videos and images in a folder, as training reads it."""

from __future__ import annotations

import csv
import logging
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from opensora.datasets.video import IMAGE_SUFFIXES, VIDEO_SUFFIXES, is_image, read_image, read_span
from opensora.errors import ConfigError, MediaError
from opensora.files import replacing

log = logging.getLogger("opensora")

OTHER_SUFFIXES = {
    ".3gp", ".apng", ".asf", ".flv", ".gif", ".m2ts", ".m4v", ".mpeg", ".mpg", ".mts", ".ogv", ".ts", ".webm", ".wmv",
    ".avif", ".heic", ".heif", ".jxl",  # photos that are not read, which is said of each
}  # fmt: skip
SUFFIXES = {*VIDEO_SUFFIXES, *IMAGE_SUFFIXES, *OTHER_SUFFIXES}
CAPTION = ".txt"
READERS = 4  # threads; a file is mostly waited for
DECIMALS = 4


class Row(NamedTuple):
    """One file. Sizes are in pixels, `aspect_ratio` is height / width, `resolution` height x width."""

    path: str
    text: str
    num_frames: int
    width: int
    height: int
    aspect_ratio: float
    resolution: int
    fps: float | None  # of videos


class Made(NamedTuple):
    """What became of a folder."""

    num_rows: int
    broken: list[str]  # one line each: the file and what is wrong with it
    num_captions: int  # texts that came out of files


def make_table(folder: str | Path, target: str | Path, force: bool = False) -> Made:
    """Writes a CSV with a `Row` for each video and image below `folder`, in the order of their paths.

    Paths begin as `folder` is written. The text is that of the file of the same name that ends in .txt, or else the
    name itself in words. Files that cannot be read are left out and named. Raises ConfigError for a folder without
    videos or a table that is there already, and MediaError if no file can be read.
    """
    folder, target = Path(folder), Path(target)
    if target.suffix.lower() != ".csv":
        raise ConfigError(f"{target}: the table is written as CSV; name it so, with .csv at its end")
    if target.exists() and not force:
        raise ConfigError(f"{target} is there already; name another file, or replace it with --force")
    files = find_media(folder)
    with ThreadPoolExecutor(READERS) as pool:
        results = list(pool.map(_row_or_error, files))
    rows = [one for one in results if isinstance(one, Row)]
    broken = [one for one in results if isinstance(one, str)]
    for problem in broken:
        log.warning("left out: %s", problem)
    if not rows:
        raise MediaError(f"nothing in {folder} can be read, of {len(files)} found; the first: {broken[0]}")
    with (
        replacing(target, make_folders=True) as [temporary],
        temporary.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file,
    ):
        writer = csv.writer(file)
        writer.writerow(Row._fields)
        writer.writerows(rows)
    return Made(len(rows), broken, sum(_caption_file(Path(row.path)).is_file() for row in rows))


def find_media(folder: Path) -> list[Path]:
    """The videos and images below a folder, by their suffixes; hidden ones do not count. ConfigError without any."""
    if not folder.is_dir():
        raise ConfigError(f"{folder}: no such folder; name one that holds videos")
    files = sorted(_visible(folder))
    media = [file for file in files if file.suffix.lower() in SUFFIXES]
    if not media:
        known = ", ".join(sorted(SUFFIXES))
        raise ConfigError(f"{folder}: holds no videos or images ({known}); name another folder, or convert them")
    others = [file for file in files if file.suffix.lower() not in (*SUFFIXES, CAPTION)]
    if others:
        log.info("left alone, because of their suffixes: %d, such as %s", len(others), others[0])
    return media


def read_row(file: Path) -> Row:
    """The row of one file. Raises MediaError if it or its text cannot be read."""
    text, fps = caption_of(file), None
    if is_image(file):
        num_frames, (height, width) = 1, read_image(file).shape[:2]
    else:
        counts: list[int] = []

        def first_frame(total: int) -> list[int]:
            counts.append(total)
            return [0]

        [(height, width)], fps = read_span(file, first_frame, lambda frame: frame.shape[:2])
        [num_frames], fps = counts, round(fps, DECIMALS)
    ratio = round(height / width, DECIMALS)
    return Row(str(file), text, num_frames, width, height, ratio, height * width, fps)


def caption_of(file: Path) -> str:
    """The text beside a file, on one line, or else its name in words. MediaError if that text cannot be read."""
    beside = _caption_file(file)
    try:
        text = beside.read_text(encoding="utf-8-sig") if beside.is_file() else file.stem.replace("_", " ")
    except (OSError, UnicodeDecodeError) as error:
        raise MediaError(f"{file}: its text {beside.name} cannot be read; save it as UTF-8") from error
    return " ".join(text.split())


def _caption_file(file: Path) -> Path:
    return file.with_suffix(CAPTION)


def _visible(folder: Path) -> Iterator[Path]:
    for path in folder.rglob("*"):
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(folder).parts):
            yield path


def _row_or_error(file: Path) -> Row | str:
    try:
        return read_row(file)
    except MediaError as error:
        return str(error)

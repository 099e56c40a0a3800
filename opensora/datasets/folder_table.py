"""Makes a table of the videos and images in a folder, ready for training."""

from __future__ import annotations

import codecs
import csv
import logging
import os
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from opensora.config.schema import MAX_TEXT, Text, check
from opensora.datasets.video import (
    IMAGE_SUFFIXES,
    VIDEO_SUFFIXES,
    Crop,
    Span,
    is_image,
    read_image,
    read_span,
)
from opensora.errors import ConfigError, MediaError
from opensora.files import atomic_write, error_message, read_bytes

log = logging.getLogger("opensora")

VIDEOS = frozenset((
    *VIDEO_SUFFIXES, ".3gp", ".apng", ".asf", ".flv", ".gif", ".m2ts", ".m4v", ".mpeg", ".mpg", ".mts", ".ogv", ".ts",
    ".webm", ".wmv",
))  # fmt: skip
IMAGES = frozenset((*IMAGE_SUFFIXES, ".avif", ".heic", ".heif", ".jxl"))  # the last ones are reported as unsupported
SUFFIXES = VIDEOS | IMAGES
CAPTION = ".txt"
CAPTIONS = ("names", "required")  # files without a caption: use their names, or raise an error
_UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
THREADS = 4  # reading is mostly I/O
DECIMALS = 4


class Row(NamedTuple):
    """A row of the table. Sizes are in pixels; `aspect_ratio` is height / width, `resolution` height x width."""

    path: str
    text: str
    num_frames: int
    width: int
    height: int
    aspect_ratio: float
    resolution: int
    fps: float | None  # of videos


class TableReport(NamedTuple):
    """The result of `make_table`."""

    num_rows: int
    broken: list[str]  # one line per file or folder that was left out, with the reason
    num_captions: int  # rows with a caption from a .txt file
    num_named: int  # rows with a caption made from the file name

    def summary(self) -> str:
        """The counts in one line."""
        num_empty = self.num_rows - self.num_captions - self.num_named
        return (
            f"{self.num_rows} rows, {self.num_captions} with a caption of their own"
            + (f", {self.num_named} with one from their file names" if self.num_named else "")
            + (f", {num_empty} with an empty one" if num_empty else "")
            + (f"; left out: {len(self.broken)}" if self.broken else "")
        )


def make_table(folder: str | Path, target: str | Path, force: bool = False, captions: str = "names") -> TableReport:
    """Writes a CSV with one `Row` per video or image below `folder`, sorted by path.

    Paths start with `folder` as given. The caption of `boat.mp4` is the content of `boat.txt`, or else the words of the
    file name; `captions="required"` makes a missing .txt an error. Unreadable files are left out and reported. `force`
    replaces an existing table. Raises ConfigError for a folder without media, an existing table or a missing caption,
    and MediaError if no file can be read.
    """
    folder, target = Path(folder), Path(target)
    check(Literal[CAPTIONS], captions, "captions")
    if target.suffix.lower() != ".csv":
        raise ConfigError(f"{target}: the table is written as CSV; name it so, with .csv at its end")
    if target.exists() and not force:
        raise ConfigError(f"{target} already exists; name another file, or replace it with --force")
    problems: list[str] = []
    files = find_media(folder, problems)
    if captions == "required":
        _require_captions(files)
    with ThreadPoolExecutor(THREADS) as pool:
        results = list(pool.map(_row_or_error, files))
    rows = [one for one in results if isinstance(one, Row)]
    broken = [*problems, *(one for one in results if isinstance(one, str))]
    for problem in broken:
        log.warning("left out: %s", problem)
    if not rows:
        raise MediaError(f"nothing in {folder} can be read, of {len(files)} found; the first: {broken[0]}")
    with (
        atomic_write(target, make_folders=True) as [temporary],
        temporary.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file,
    ):
        writer = csv.writer(file)
        writer.writerow(Row._fields)
        writer.writerows(rows)
    named = [row for row in rows if not _caption_file(Path(row.path)).is_file()]
    if named:
        remedy = "write a .txt file beside each, or refuse them with --captions required"
        log.warning(
            "captions from file names: %d, such as %r of %s; %s", len(named), named[0].text, named[0].path, remedy
        )
    return TableReport(len(rows), broken, sum(bool(row.text) for row in rows) - len(named), len(named))


def find_media(folder: Path, problems: list[str] | None = None, suffixes: Collection[str] = SUFFIXES) -> list[Path]:
    """The files below a folder with these suffixes, without hidden ones, sorted. Raises ConfigError if there are none.

    Appends a line to `problems` for each folder that is not searched and each broken link.
    """
    if not folder.is_dir():
        raise ConfigError(f"{folder}: no such folder; name one that holds videos")
    files = sorted(_visible(folder, [] if problems is None else problems))
    media = [file for file in files if file.suffix.lower() in suffixes]
    if not media:
        known = ", ".join(sorted(suffixes))
        wanted = {VIDEOS: "videos", IMAGES: "images"}.get(frozenset(suffixes), "videos or images")
        raise ConfigError(f"{folder}: holds no {wanted} ({known}); name another folder, or convert them")
    others = [file for file in files if file.suffix.lower() not in (*SUFFIXES, CAPTION)]
    if others:
        log.info("ignored because of their suffixes: %d, such as %s", len(others), others[0])
    return media


class MediaSize(NamedTuple):
    """What a file shows, in frames and pixels; `fps` of videos."""

    num_frames: int
    width: int
    height: int
    fps: float | None

    @property
    def aspect_ratio(self) -> float:
        """Height / width."""
        return round(self.height / self.width, DECIMALS)

    @property
    def resolution(self) -> int:
        """Height x width."""
        return self.height * self.width


def read_row(file: Path) -> Row:
    """The row of a file. Raises MediaError if the file or its caption cannot be read."""
    text, size = caption_of(file), media_size(file)
    return Row(str(file), text, size.num_frames, size.width, size.height, size.aspect_ratio, size.resolution, size.fps)


def media_size(file: Path, span: Span | None = None, crop: Crop | None = None) -> MediaSize:
    """The size of an image or video, or of a part of it; of a video, only one frame is decoded. Raises MediaError."""

    def shape(frame: np.ndarray) -> tuple[int, ...]:
        return (frame if crop is None else crop.of(frame, file)).shape[:2]

    fps = None
    if span is None and is_image(file):
        num_frames, (height, width) = 1, shape(read_image(file))
    else:
        counts: list[int] = []

        def first_frame(total: int) -> list[int]:
            counts.append(total)
            return [0]

        [(height, width)], fps = read_span(file, first_frame, shape, span)
        [num_frames], fps = counts, round(fps, DECIMALS)
    return MediaSize(num_frames, width, height, fps)


def caption_of(file: Path) -> str:
    """The caption of a file on one line: its .txt, or else its name. Raises MediaError if the .txt cannot be read."""
    beside = _caption_file(file)
    try:
        return read_caption(beside) if beside.is_file() else _valid(_words(file.stem), file)
    except MediaError as error:
        raise MediaError(f"{file}: {error}") from error


def read_caption(file: Path) -> str:
    """The content of a caption file on one line. Raises MediaError if it cannot be read."""
    return _valid(_text(file), file)


def _valid(text: str, file: Path) -> str:
    try:
        return check(Text, " ".join(text.split()))
    except ConfigError as error:
        raise MediaError(f"{file}: its caption cannot be used, {error}; correct it") from error


def _words(name: str) -> str:
    """The words of a file name, as valid UTF-8."""
    return os.fsencode(name).decode("utf-8", "replace").replace("_", " ")


def _text(file: Path) -> str:
    """The content of a UTF-8 file, or of a UTF-16 file with a byte order mark."""
    content = read_bytes(file, 4 * MAX_TEXT)
    try:
        return content.decode("utf-16" if content.startswith(_UTF16) else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise MediaError(f"{file}: cannot be read; save it as UTF-8") from error


def _require_captions(files: Sequence[Path]) -> None:
    """Raises ConfigError unless each file has a non-empty caption file."""
    without = [file for file in files if not (_caption_file(file).is_file() and _caption_file(file).stat().st_size)]
    if without:
        problem = f"{len(without)} of {len(files)} files have no caption, such as {without[0]}"
        remedy = f"write it into {_caption_file(without[0]).name} beside it, or use file names with --captions names"
        raise ConfigError(f"{problem}; {remedy}")


def _caption_file(file: Path) -> Path:
    return file.with_suffix(CAPTION)


def _visible(folder: Path, problems: list[str]) -> Iterator[Path]:
    """The files below a folder, without hidden ones; linked folders are not followed."""

    def unreadable(error: OSError) -> None:
        problems.append(f"{error.filename}: the folder cannot be read ({error_message(error)}); check its permissions")

    for path, folders, names in os.walk(folder, onerror=unreadable):
        folders[:] = [name for name in folders if not name.startswith(".")]
        linked = [Path(path, name) for name in folders if os.path.islink(os.path.join(path, name))]
        problems += [
            f"{link}: is a link to a folder, which is not followed; name that folder itself" for link in linked
        ]
        for file in (Path(path, name) for name in names if not name.startswith(".")):
            if file.is_file():
                yield file
            elif file.suffix.lower() in SUFFIXES:
                problems.append(f"{file}: is not a file, or is a broken link; replace it")


def _row_or_error(file: Path) -> Row | str:
    try:
        return read_row(file)
    except MediaError as error:
        return str(error)

"""Where results go: no name is given twice, no other request's file is replaced, a result is there with all its parts.

A result has a number, and takes the next one that is free; or a name, by `prompt_as_path` or `output`. Only `overwrite`
lets it replace what lies there.
"""

from __future__ import annotations

import logging
import os
import unicodedata
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np

from opensora.config.settings import InferenceSettings
from opensora.datasets.video import contact_sheet, encode_image
from opensora.errors import ConfigError, MediaError, WeightsError
from opensora.files import adding, replacing, why
from opensora.pipeline.draft import SUFFIX
from opensora.pipeline.prompts import save_path_name
from opensora.pipeline.recipe import Recipe, check_folder, encode_output
from opensora.pipeline.request import Request
from opensora.signals import defer_stop_signals

logger = logging.getLogger("opensora")

IMAGE, VIDEO = ".png", ".mp4"


class Output(NamedTuple):
    """A result: where it lies, its frames uint8 [T, H, W, 3], and the preview's path if one was asked for.

    Of a draft this is what it looks like so far, and `state` the file from which it goes on.
    """

    path: Path
    frames: np.ndarray
    preview: Path | None = None
    state: Path | None = None


class Outputs:
    """The names of a run's results, and the writing of them."""

    def __init__(self, settings: InferenceSettings, num_frames: int, stops: bool) -> None:
        """For results of `num_frames`, or drafts of them that stop half-way. Raises ConfigError."""
        self.settings, self.stops = settings, stops
        self.folder, self.suffix = Path(settings.save_dir), IMAGE if num_frames == 1 else VIDEO
        if settings.output is not None:
            self.suffix = _checked_suffix(settings.output, self.suffix, num_frames)
            self.folder = Path(settings.output).parent
        self.may_replace: set[str] = set()  # paths at which an older copy of the very result may lie
        self._numbers: dict[str, tuple[int, int]] = {}  # path -> (number, sample); those without have a fixed name
        self._became: dict[int, int] = {}  # number -> the one that was free when the result was written
        self._last = -1  # of those

    def place(self, requests: Sequence[Request]) -> list[Request]:
        """The requests with the paths at which they will be written, if nobody else takes those before.

        Raises ConfigError where two of them would be one file, or a path is not UTF-8.
        """
        settings = self.settings
        if settings.output is not None:
            if settings.prompt_as_path:
                raise ConfigError("output and prompt_as_path both name the result; give one of the two")
            if len(requests) > 1:
                problem = f"output {settings.output!r} names one file, but {len(requests)} results are asked for"
                raise ConfigError(f"{problem}; name them with --save-dir and --sample-name")
            requests = [one._replace(path=settings.output[: -len(self.suffix)]) for one in requests]
        elif not settings.prompt_as_path:
            requests = self._numbered(requests)
        self._check_names(requests)
        return list(requests)

    def parts(self, path: str) -> list[Path]:
        """The files of a result: media, recipe, preview if asked for, and of a draft what it goes on from."""
        base = f"{path}{SUFFIX}" if self.stops else path
        suffixes = [self.suffix, ".json", *([".preview.png"] if self.settings.preview else [])]
        return [*(Path(f"{base}{one}") for one in suffixes), *([Path(f"{base}.safetensors")] if self.stops else [])]

    def keeps(self, path: str) -> bool:
        """Whether `prompt_as_path` finds a result there already, which is kept."""
        if not self.settings.prompt_as_path or self.settings.overwrite:
            return False
        found = next((one for one in (Path(f"{path}{self.suffix}"), self.parts(path)[0]) if one.is_file()), None)
        if found:
            logger.info("%s exists and is kept", found)
        return found is not None

    def check(self, paths: Sequence[str]) -> None:
        """Says what will be replaced. Raises MediaError where something is that may not be, before any work."""
        there = [(path, part) for path in paths for part in self.parts(path) if os.path.lexists(part)]
        for path, part in there:
            if not (part.is_file() or part.is_symlink()):
                raise MediaError(f"{part}: is no file, but a result is to be written there; move it away")
            if not self._replaces(path) and path not in self._numbers:
                remedy = "move it, choose another name, or replace it with --overwrite"
                raise MediaError(f"{part}: is there already, of another request; {remedy}")
        if there:
            more = f" and {len(there) - 1} more" if len(there) > 1 else ""
            logger.info("replaces %s%s", there[0][1], more)

    def write(
        self, path: str, frames: np.ndarray, recipe: Recipe, save_state: Callable[[Path, str], None] | None = None
    ) -> Output:
        """Writes frames uint8 [T, H, W, 3] with all parts, together or not at all.

        `save_state` writes to a file what a draft of that name goes on from. Raises MediaError.
        """
        with self._writing(path) as (temporaries, names):
            media, sidecar, *others = temporaries
            encode_output(frames, media, sidecar, self.settings.output_fps, recipe)
            if self.settings.preview:
                encode_image(contact_sheet(frames), others[0])
            if save_state:
                try:
                    save_state(others[-1], Path(path).name)
                except WeightsError as error:  # which names the temporary file
                    raise OSError(why(error.__cause__ or error)) from error
        preview, state = names[2] if self.settings.preview else None, names[-1] if save_state else None
        return Output(names[0], frames, preview, state)

    @contextmanager
    def _writing(self, path: str) -> Iterator[tuple[list[Path], list[Path]]]:
        """Temporary paths of the parts, and what they have become after the block."""
        if self._replaces(path):
            parts = self.parts(path)
            with replacing(*parts) as temporaries:
                yield temporaries, parts
        else:
            choices = self._choices(path)
            with adding(*next(choices), others=choices) as found:
                yield found

    def _replaces(self, path: str) -> bool:
        return self.settings.overwrite or path in self.may_replace

    def _choices(self, path: str) -> Iterator[list[Path]]:
        """The parts under the name asked for, then, of a numbered result, under the numbers that follow."""
        if path not in self._numbers:
            yield self.parts(path)
            return
        wanted, sample = self._numbers[path]
        number = self._became.get(wanted)  # all samples of a prompt have one number
        if number is None:
            number = wanted if wanted > self._last else self._next_free(self._last + 1)
        while True:
            self._became[wanted] = number
            self._last = max(self._last, number)
            yield self.parts(self._path(number, sample))
            number = self._next_free(number + 1)

    def _numbered(self, requests: Sequence[Request]) -> list[Request]:
        """The requests under the first numbers from theirs on of which none is taken."""
        first, of_each = self.settings.start_index, self.settings.num_sample
        taken = [] if self.settings.overwrite else self._entries()
        numbers = range(first, first + len(requests) // of_each)
        while clash := [number for number in numbers if self._is_taken(number, taken)]:
            numbers = range(clash[-1] + 1, clash[-1] + 1 + len(numbers))
        placed = []
        for position, request in enumerate(requests):
            number = numbers[position // of_each]
            placed.append(request._replace(path=self._path(number, request.sample)))
            self._numbers[placed[-1].path] = (number, request.sample)
        return placed

    def _path(self, number: int, sample: int) -> str:
        settings = self.settings
        return save_path_name(settings.save_dir, settings.sample_name, number, num_sample=settings.num_sample, k=sample)

    def _entries(self) -> list[str]:
        """What lies in the folder, as `_alike` has it, in order."""
        with suppress(OSError):
            return sorted(map(_alike, os.listdir(self.folder)))
        return []

    def _is_taken(self, number: int, entries: Sequence[str]) -> bool:
        """Whether any file has a number, of whatever kind and of whichever sample."""
        base = _alike(os.path.basename(save_path_name("", self.settings.sample_name, number)))

        def begins(text: str) -> bool:
            place = bisect_left(entries, text)
            return place < len(entries) and entries[place].startswith(text)

        return begins(f"{base}.") or begins(f"{base}-") or base in entries[bisect_left(entries, base) :][:1]

    def _next_free(self, number: int) -> int:
        entries = self._entries()
        while self._is_taken(number, entries):
            number += 1
        return number

    def _check_names(self, requests: Sequence[Request]) -> None:
        owners: dict[str, Request] = {}
        for request in requests:
            try:
                os.fspath(request.path).encode()
            except UnicodeEncodeError:
                raise ConfigError(f"the file name {request.path!r} is not UTF-8; choose another") from None
            for part in self.parts(request.path):
                other = owners.setdefault(_alike(str(part)), request)
                if other is not request:
                    both = f"prompts {other.prompt[:80]!r} and {request.prompt[:80]!r} would both be written to {part}"
                    raise ConfigError(f"{both}; leave out one of them, or --prompt-as-path to have them numbered")


def _checked_suffix(output: str, suffix: str, num_frames: int) -> str:
    """The suffix that `output` has, if it is of the kind that is made. Raises ConfigError otherwise."""
    path = Path(output)
    if path.suffix.lower() != suffix:
        made = "an image" if num_frames == 1 else f"a video of {num_frames} frames"
        raise ConfigError(f"output {output!r} is to hold {made}; name it {path.stem or 'result'}{suffix}")
    return path.suffix


def _alike(name: str) -> str:
    """The same for all spellings of a name that some file system takes to be one."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())


@contextmanager
def output_folder(path: str | Path) -> Iterator[None]:
    """Checks that `path` can be written to, and removes the folders made for it if nothing was written."""
    folder = Path(path)
    made = [part for part in (folder, *folder.parents) if not part.exists()]
    try:
        check_folder(folder)
        yield
    finally:
        with defer_stop_signals():
            for part in made:
                with suppress(OSError):
                    part.rmdir()

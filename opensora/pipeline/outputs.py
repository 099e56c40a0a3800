"""Writes the results of a run: never replaces files of other requests, and writes all files of a result or none.

Only `overwrite` permits replacing what exists at the path of a result.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from opensora.config.settings import InferenceSettings
from opensora.errors import ConfigError, MediaError, WeightsError
from opensora.files import atomic_create, atomic_write, error_message
from opensora.pipeline.output_names import DRAFT, OutputNames, same_file_key
from opensora.pipeline.request import Request

if TYPE_CHECKING:
    import numpy as np

    from opensora.pipeline.recipe import Recipe

logger = logging.getLogger("opensora")


class Output(NamedTuple):
    """A result: its media file, its frames uint8 [T, H, W, 3], and its preview if one was asked for.

    For a draft, the frames are decoded from x0 of its last step, and `state` is the file to continue from.
    """

    path: Path
    frames: np.ndarray
    preview: Path | None = None
    state: Path | None = None


class Outputs:
    """Names the results of a run and writes them."""

    def __init__(self, settings: InferenceSettings, num_frames: int, makes_drafts: bool) -> None:
        """For results of `num_frames` frames, or, with `makes_drafts`, drafts of them. Raises ConfigError."""
        self.settings, self.makes_drafts = settings, makes_drafts
        self.names = OutputNames(settings, num_frames)
        self._may_replace: set[str] = set()

    @property
    def folder(self) -> Path:
        """The folder of the results."""
        return self.names.folder

    def assign_paths(self, requests: Sequence[Request]) -> list[Request]:
        """The requests with the paths at which they will be written, unless another process takes these first.

        Raises ConfigError where two results would share a file, and for a path that is not UTF-8.
        """
        paths = self.names.assign([one.path for one in requests], [one.sample for one in requests])
        requests = [one._replace(path=path) for one, path in zip(requests, paths, strict=True)]
        owners: dict[str, Request] = {}
        for request in requests:
            try:
                os.fspath(request.path).encode()
            except UnicodeEncodeError:
                raise ConfigError(f"the file name {request.path!r} is not UTF-8; choose another") from None
            for file in self.files(request.path):
                other = owners.setdefault(same_file_key(str(file)), request)
                if other is not request:
                    both = f"prompts {other.prompt[:80]!r} and {request.prompt[:80]!r} would both be written to {file}"
                    raise ConfigError(f"{both}; remove one of them, or --prompt-as-path to have them numbered")
        return requests

    def files(self, path: str) -> list[Path]:
        """The files of a result: media, recipe, the preview if asked for, and the state of a draft."""
        base = f"{path}{DRAFT}" if self.makes_drafts else path
        suffixes = [self.names.suffix, ".json"]
        suffixes += [".preview.png"] if self.settings.preview else []
        suffixes += [".safetensors"] if self.makes_drafts else []
        return [Path(f"{base}{suffix}") for suffix in suffixes]

    def keeps_existing(self, path: str) -> bool:
        """Whether the result already exists and is kept, which `prompt_as_path` allows."""
        if not self.settings.prompt_as_path or self.settings.overwrite:
            return False
        finished = Path(f"{path}{self.names.suffix}")
        found = next((file for file in (finished, self.files(path)[0]) if file.is_file()), None)
        if found:
            logger.info("%s exists and is kept", found)
        return found is not None

    def allow_replacing(self, path: str) -> None:
        """Allows the result at this path to replace an existing file."""
        self._may_replace.add(path)

    def check_conflicts(self, paths: Sequence[str]) -> None:
        """Raises MediaError for a file that exists and may not be replaced."""
        for path, file in self._existing(paths):
            if not (file.is_file() or file.is_symlink()):
                raise MediaError(f"{file}: is not a file, but a result must be written there; move it")
            if not self._replaces(path) and not self.names.is_numbered(path):
                remedy = "move it, choose another name, or replace it with --overwrite"
                raise MediaError(f"{file}: already exists, from another request; {remedy}")

    def check(self, paths: Sequence[str]) -> None:
        """Logs which files will be replaced. Raises MediaError for one that may not be."""
        self.check_conflicts(paths)
        if existing := self._existing(paths):
            more = f" and {len(existing) - 1} more" if len(existing) > 1 else ""
            logger.info("replaces %s%s", existing[0][1], more)

    def _existing(self, paths: Sequence[str]) -> list[tuple[str, Path]]:
        return [(path, file) for path in paths for file in self.files(path) if os.path.lexists(file)]

    def write(
        self, path: str, frames: np.ndarray, recipe: Recipe, save_state: Callable[[Path, str], None] | None = None
    ) -> Output:
        """Writes frames uint8 [T, H, W, 3] and all other files of a result, together or not at all.

        `save_state(file, name)` writes the state of a draft. Raises MediaError.
        """
        from opensora.datasets.video import contact_sheet, encode_image
        from opensora.pipeline.output_files import encode_output

        with self._writing(path) as (temporaries, files):
            media, sidecar, *others = temporaries
            encode_output(frames, media, sidecar, self.settings.output_fps, recipe)
            if self.settings.preview:
                encode_image(contact_sheet(frames), others[0])
            if save_state:
                try:
                    save_state(others[-1], Path(path).name)
                except WeightsError as error:  # its message names the temporary file
                    raise OSError(error_message(error.__cause__ or error)) from error
        preview, state = files[2] if self.settings.preview else None, files[-1] if save_state else None
        return Output(files[0], frames, preview, state)

    @contextmanager
    def _writing(self, path: str) -> Iterator[tuple[list[Path], list[Path]]]:
        """Temporary paths of the files, and their final paths, which are known after the block."""
        if self._replaces(path):
            files = self.files(path)
            with atomic_write(*files) as temporaries:
                yield temporaries, files
        else:
            candidates = map(self.files, self.names.candidates(path))
            with atomic_create(*next(candidates), others=candidates) as found:
                yield found

    def _replaces(self, path: str) -> bool:
        return self.settings.overwrite or path in self._may_replace

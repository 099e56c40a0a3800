"""Names of results: by number, by prompt (`prompt_as_path`), or from `output`.

A numbered result takes the first free number, or the next one if another process takes that first.
"""

from __future__ import annotations

import hashlib
import os
import re
import unicodedata
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from opensora.config.settings import InferenceSettings
from opensora.errors import ConfigError

IMAGE, VIDEO = ".png", ".mp4"
DRAFT = ".draft"  # of the files of a draft, before their suffix
MAX_NAME_BYTES = 200  # of a file name, which leaves room for a suffix below the usual limit of 255


class OutputNames:
    """Paths without suffix of the results of a run."""

    def __init__(self, settings: InferenceSettings, num_frames: int) -> None:
        """Raises ConfigError for an `output` whose suffix does not fit a result of `num_frames`."""
        self.settings = settings
        self.folder = Path(settings.save_dir)
        self.suffix = IMAGE if num_frames == 1 else VIDEO
        if settings.output is not None:
            self.suffix = _checked_suffix(settings.output, self.suffix, num_frames)
            self.folder = Path(settings.output).parent
        self._numbers: dict[str, tuple[int, int]] = {}  # path -> (number, sample); other paths are fixed
        self._written: dict[int, int] = {}  # assigned number -> number under which the result was written
        self._last = -1  # the highest number written

    def assign(self, paths: Sequence[str], samples: Sequence[int]) -> list[str]:
        """The paths of the results, from the paths of `path_by_settings` and the sample numbers.

        Raises ConfigError for an `output` with several results.
        """
        settings = self.settings
        if settings.output is None:
            return list(paths) if settings.prompt_as_path else self._numbered(samples)
        if settings.prompt_as_path:
            raise ConfigError("output and prompt_as_path both name the result; give one of the two")
        if len(paths) > 1:
            problem = f"output {settings.output!r} names one file, but {len(paths)} results are requested"
            raise ConfigError(f"{problem}; name them with --save-dir and --sample-name")
        return [settings.output[: -len(self.suffix)] for _ in paths]

    def is_numbered(self, path: str) -> bool:
        """Whether the result may be written under another number."""
        return path in self._numbers

    def candidates(self, path: str) -> Iterator[str]:
        """The assigned path; for a numbered result, then paths with the next free numbers."""
        if path not in self._numbers:
            yield path
            return
        assigned, sample = self._numbers[path]
        number = self._written.get(assigned)  # all samples of a prompt have one number
        if number is None:
            number = assigned if assigned > self._last else self._next_free(self._last + 1)
        while True:
            self._written[assigned] = number
            self._last = max(self._last, number)
            yield self._path(number, sample)
            number = self._next_free(number + 1)

    def _numbered(self, samples: Sequence[int]) -> list[str]:
        """Paths with the first consecutive numbers that are free."""
        first, per_prompt = self.settings.start_index, self.settings.num_sample
        entries = [] if self.settings.overwrite else self._entries()
        numbers = range(first, first + len(samples) // per_prompt)
        while taken := [number for number in numbers if self._is_taken(number, entries)]:
            numbers = range(taken[-1] + 1, taken[-1] + 1 + len(numbers))
        paths = []
        for position, sample in enumerate(samples):
            number = numbers[position // per_prompt]
            paths.append(self._path(number, sample))
            self._numbers[paths[-1]] = (number, sample)
        return paths

    def _path(self, number: int, sample: int) -> str:
        settings = self.settings
        return save_path_name(settings.save_dir, settings.sample_name, number, num_sample=settings.num_sample, k=sample)

    def _entries(self) -> list[str]:
        """The names in the folder, normalized by `same_file_key` and sorted."""
        with suppress(OSError):
            return sorted(map(same_file_key, os.listdir(self.folder)))
        return []

    def _is_taken(self, number: int, entries: Sequence[str]) -> bool:
        """Whether any file has this number, whatever its suffix and sample."""
        base = same_file_key(os.path.basename(save_path_name("", self.settings.sample_name, number)))

        def exists(prefix: str) -> bool:
            position = bisect_left(entries, prefix)
            return position < len(entries) and entries[position].startswith(prefix)

        return exists(f"{base}.") or exists(f"{base}-") or base in entries[bisect_left(entries, base) :][:1]

    def _next_free(self, number: int) -> int:
        entries = self._entries()
        while self._is_taken(number, entries):
            number += 1
        return number


def path_by_settings(settings: InferenceSettings, prompt: str, index: int, sample: int) -> str:
    """The path of a sample of the prompt with this index, by number or by prompt, even if it exists."""
    name = (settings.sample_name, index, prompt, settings.prompt_as_path, settings.num_sample, sample)
    return save_path_name(settings.save_dir, *name)


def save_path_name(
    save_dir: str | os.PathLike[str], sample_name: str | None = None, sample_idx: int | None = None,
    prompt: str | None = None, prompt_as_path: bool = False, num_sample: int = 1, k: int | None = None,
) -> str:  # fmt: skip
    """The path of a sample without suffix: `DIR/sample_0007`, or `DIR/sample_0007-2` as number k of several.

    With `prompt_as_path` the prompt is the name, after `sample_name` if given. A name never leaves `save_dir`: slashes
    become `_`, and a name too long for a file system is cut and gets a hash of the whole. Raises ConfigError without
    `sample_idx` if the name needs it.
    """
    if prompt_as_path:
        name = f"{sample_name or ''}{prompt}"
    elif sample_idx is None:
        raise ConfigError("a sample's file name needs its index; give sample_idx, or prompt_as_path")
    else:
        name = f"{'sample' if sample_name is None else sample_name}_{sample_idx:04d}"
    if num_sample != 1:
        name += f"-{k}"
    name = re.sub(r"[/\\\x00-\x1f\x7f]", "_", name)
    if name in (".", ".."):
        name = "_" * len(name)
    whole = name.encode(errors="replace")
    if len(whole) > MAX_NAME_BYTES:
        name = f"{whole[: MAX_NAME_BYTES - 9].decode(errors='ignore')}-{hashlib.sha256(whole).hexdigest()[:8]}"
    return os.path.join(save_dir, name)


def _checked_suffix(output: str, suffix: str, num_frames: int) -> str:
    """The suffix of `output` in its own spelling. Raises ConfigError unless it is `suffix`."""
    path = Path(output)
    if path.suffix.lower() != suffix:
        content = "an image" if num_frames == 1 else f"a video of {num_frames} frames"
        raise ConfigError(f"output {output!r} will hold {content}; name it {path.stem or 'result'}{suffix}")
    return path.suffix


def same_file_key(name: str) -> str:
    """Equal for names that some file system treats as one file: they differ in case or Unicode composition."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())

"""Size limits of one configuration read, over all inherited files."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from opensora.errors import ConfigError
from opensora.files import read_bytes

MAX_BYTES = 1_000_000  # of all files together
MAX_VALUES = 1_000_000  # values and characters, counted once per reference
MAX_FILES = 100
MAX_BASES_DEPTH = 20  # levels of _base_
MAX_DEPTH = 50  # of nested values


@dataclass
class Budget:
    """What is left of the limits. Methods raise ConfigError, beginning with `where`, when a limit is exceeded."""

    bytes: int = MAX_BYTES
    values: int = MAX_VALUES
    files: list[Path] = field(default_factory=list)

    def read(self, path: Path, most: int = MAX_BYTES) -> str:
        """Reads another file of at most `most` bytes."""
        if len(self.files) == MAX_FILES:
            raise ConfigError(f"{self.files[0]}: is based on more than {MAX_FILES} files; write them into fewer")
        content = read_bytes(path, min(most, self.bytes), ConfigError)
        self.files.append(path)
        self.bytes -= len(content)
        try:
            return content.decode("utf-8-sig")
        except UnicodeDecodeError:
            raise ConfigError(f"{path}: is not UTF-8 text; not a configuration") from None

    def spend(self, size: int, where: str) -> None:
        self.values -= size
        if self.values < 0:
            raise ConfigError(f"{where}: the configuration holds more than {MAX_VALUES:,} values")

    def count(self, value: object, where: str, depth: int = 0) -> None:
        """Spends the size of `value` including shared values, so that nested repetition cannot grow without limit."""
        if depth > MAX_DEPTH:
            raise ConfigError(f"{where}: nested more than {MAX_DEPTH} levels deep")
        self.spend(len(value) if isinstance(value, str) else 1, where)
        if isinstance(value, dict):
            value = [*value.keys(), *value.values()]
        if isinstance(value, list | tuple):
            for item in value:
                self.count(item, where, depth + 1)

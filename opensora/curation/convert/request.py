"""What to convert."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple


class ConvertRequest(NamedTuple):
    """A data set of a kind of `KINDS` and the table to write.

    split: a folder below the root; info: the table of prompts of vidprom; media: the folder for what is extracted from
    tars, by default named as the table.
    """

    kind: str
    root: str
    output: str | None = None
    split: str | None = None
    info: str | None = None
    media: str | None = None
    force: bool = False

    @property
    def target(self) -> Path:
        """The table to write, by default in the current folder and named as the root."""
        return Path(self.output or f"{Path(self.root).resolve().stem}.csv")

"""What the operations of one edit share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from opensora.curation.tables.scratch import Scratch
from opensora.curation.tables.stream import Row


@dataclass
class Context:
    """The disk store, the seed, the number of threads, and the numbers of rows that operations dropped."""

    scratch: Scratch
    seed: int = 42
    workers: int = 4
    dropped: dict[str, int] = field(default_factory=dict)  # operation -> rows

    def counted(self, name: str, keep: Callable[[Row], bool]) -> Callable[[Row], bool]:
        """`keep`, counting the rows that it drops under `name`."""
        self.dropped.setdefault(name, 0)

        def counting(row: Row) -> bool:
            kept = keep(row)
            self.dropped[name] += not kept
            return kept

        return counting

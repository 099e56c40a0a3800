"""The data of a run: batches in numbered epochs, dealt to the ranks in turn and read ahead by threads.

All ranks share one endless order: the batches of epoch 0, then those of epoch 1, and so on. Each takes every
`ranks`-th of it. What a batch holds is a function of its place, and the place of a run is one (epoch, index): any
number of ranks goes on from there, and every batch of an epoch is served once.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple, Protocol

Read = Callable[[], Any]


class Place(NamedTuple):
    """Batch number `index` of an epoch."""

    epoch: int = 0
    index: int = 0


class Source(Protocol):
    """Batches in epochs."""

    def count(self, epoch: int) -> int:
        """How many batches an epoch has."""

    def reader(self, epoch: int, index: int) -> Read:
        """What reads that batch; it is called in any thread, and depends on nothing but its place."""


class Numbered:
    """Batches that are nothing but their number, counted on from epoch to epoch."""

    def __init__(self, per_epoch: int) -> None:
        self.per_epoch = max(per_epoch, 1)

    def count(self, epoch: int) -> int:
        return self.per_epoch

    def reader(self, epoch: int, index: int) -> Read:
        return partial(int, epoch * self.per_epoch + index)


class Feed:
    """The batches of one rank, one after another; `place` is that of the next batch of all ranks.

    `workers` threads read that many batches ahead; with 0 they are read when they are asked for. `placed(batch)` is
    what they do with a batch in the end. `waited` adds up the seconds that training waited for them.
    """

    def __init__(self, source: Source, rank: int = 0, ranks: int = 1, workers: int = 0) -> None:
        self.source, self.rank, self.ranks = source, rank, ranks
        self.waited, self.placed = 0.0, lambda batch: batch
        self._pool = ThreadPoolExecutor(workers, "reading") if workers else None
        self._ahead = workers + 1 if workers else 1
        self.go_to(Place())

    def go_to(self, place: Place) -> None:
        """Goes on from a saved place."""
        for future, _ in getattr(self, "_coming", ()):
            future.cancel()
        self.place = place
        self._coming: deque[tuple[Future, Place]] = deque()
        self._places = self._walk(place)

    def __next__(self) -> Any:
        began = time.perf_counter()
        while len(self._coming) < self._ahead:
            self._coming.append(self._start(next(self._places)))
        future, self.place = self._coming.popleft()
        batch = future.result()
        self.waited += time.perf_counter() - began
        return batch

    def close(self) -> None:
        """Reads no further."""
        if self._pool:
            self._pool.shutdown(wait=False, cancel_futures=True)

    def _start(self, places: tuple[Place, Place]) -> tuple[Future, Place]:
        """The batch at the first of two places, being read, and the second one."""
        read = self.source.reader(*places[0])
        if self._pool:
            return self._pool.submit(lambda: self.placed(read())), places[1]
        future: Future = Future()
        future.set_result(self.placed(read()))
        return future, places[1]

    def _walk(self, place: Place) -> Iterator[tuple[Place, Place]]:
        """For each turn the place of this rank's batch, and that of the next turn's first batch."""
        while True:
            following = self._forward(place, self.ranks)
            yield self._forward(place, self.rank), following
            place = following

    def _forward(self, place: Place, count: int) -> Place:
        epoch, index = place.epoch, place.index + count
        while index >= (here := self.source.count(epoch)):
            epoch, index = epoch + 1, index - here
        return Place(epoch, index)

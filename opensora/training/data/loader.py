"""The batches of a run: numbered epochs, distributed round-robin over the ranks and prefetched by threads.

All ranks share one endless sequence: the batches of epoch 0, then those of epoch 1, and so on; each rank takes every
`ranks`-th one. A batch is a function of its position, and the position of a run is one (epoch, index), so a run resumes
on any number of ranks and sees every batch of an epoch once.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple, Protocol

Read = Callable[[], Any]


class DataPosition(NamedTuple):
    """Batch number `index` of an epoch."""

    epoch: int = 0
    batch: int = 0


class BatchSource(Protocol):
    """Batches in epochs."""

    def count(self, epoch: int) -> int:
        """The number of batches of an epoch."""

    def reader(self, epoch: int, index: int) -> Read:
        """A function that reads a batch; it runs in any thread and depends on the position alone."""


class StepIndices:
    """Batches that are just their index, counted through all epochs."""

    def __init__(self, per_epoch: int) -> None:
        self.per_epoch = max(per_epoch, 1)

    def count(self, epoch: int) -> int:
        return self.per_epoch

    def reader(self, epoch: int, index: int) -> Read:
        return partial(int, epoch * self.per_epoch + index)


class PrefetchLoader:
    """Iterates over the batches of one rank; `position` is that of the next batch of all ranks.

    `workers` threads prefetch that many batches; with 0, batches are read on demand. `finalize(batch)` runs last, in
    the thread that reads, such as pinning memory. `waited` counts the seconds that training waited for data.
    """

    def __init__(
        self, source: BatchSource, rank: int = 0, ranks: int = 1, workers: int = 0,
        finalize: Callable[[Any], Any] = lambda batch: batch,
    ) -> None:  # fmt: skip
        self.source, self.rank, self.ranks, self.finalize = source, rank, ranks, finalize
        self.waited = 0.0
        self._pool = ThreadPoolExecutor(workers, "reading") if workers else None
        self._num_ahead = workers + 1 if workers else 1
        self._prefetched: deque[tuple[Future[Any], DataPosition]] = deque()
        self.go_to(DataPosition())

    def go_to(self, position: DataPosition) -> None:
        """Continues at a position; drops what was prefetched."""
        for future, _ in self._prefetched:
            future.cancel()
        self.position = position
        self._prefetched = deque()
        self._positions = self._walk(position)

    def __next__(self) -> Any:
        began = time.perf_counter()
        while len(self._prefetched) < self._num_ahead:
            self._prefetched.append(self._submit(*next(self._positions)))
        future, self.position = self._prefetched.popleft()
        batch = future.result()
        self.waited += time.perf_counter() - began
        return batch

    def close(self) -> None:
        """Stops prefetching."""
        if self._pool:
            self._pool.shutdown(wait=False, cancel_futures=True)

    def _submit(self, own: DataPosition, following: DataPosition) -> tuple[Future[Any], DataPosition]:
        """Starts reading the batch at `own`; returns its future and the position after it."""
        read = self.source.reader(*own)
        if self._pool:
            return self._pool.submit(lambda: self.finalize(read())), following
        future: Future[Any] = Future()
        future.set_result(self.finalize(read()))
        return future, following

    def _walk(self, position: DataPosition) -> Iterator[tuple[DataPosition, DataPosition]]:
        """For each round the position of this rank's batch, and of the first batch of the next round."""
        while True:
            following = self._advance(position, self.ranks)
            yield self._advance(position, self.rank), following
            position = following

    def _advance(self, position: DataPosition, count: int) -> DataPosition:
        epoch, index = position.epoch, position.batch + count
        while index >= (size := self.source.count(epoch)):
            epoch, index = epoch + 1, index - size
        return DataPosition(epoch, index)

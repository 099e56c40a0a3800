"""What the ranks tell each other before each step: the number of samples, unreadable files, and requests to stop."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from opensora.datasets.quarantine import Quarantine
from opensora.distributed.collectives import all_gather_objects, all_reduce_sum
from opensora.distributed.process_group import RankLayout
from opensora.training.data.batch import batch_field


class StepBatches(NamedTuple):
    """This rank's batches of a step with their weights, the samples of all ranks, and whether a rank asks to stop."""

    batches: Sequence[Any]
    samples: int
    stop: bool


class StepSynchronizer:
    """All-reduces the sample counts of a step and reweighs its batches.

    A batch without samples takes part with weight 0; the others weigh more, so that the mean over all ranks is the mean
    of the batches with samples. Unreadable files of all ranks go into one quarantine.
    """

    def __init__(self, layout: RankLayout, quarantine: Quarantine | None = None) -> None:
        self.layout, self.quarantine = layout, quarantine

    def __call__(self, batches: Sequence[Any], stop: bool = False) -> StepBatches:
        """Synchronizes the batches of one step; all ranks call this together. `stop` asks all ranks to stop.

        Raises MediaError on all ranks when too many files are unreadable.
        """
        samples = [_num_samples(batch) for batch in batches]
        unreadable = [one for batch in batches for one in batch_field(batch, "unreadable", ())]
        own = [float(sum(samples)), float(sum(map(bool, samples))), float(len(unreadable)), float(stop)]
        sums = all_reduce_sum(own, self.layout)
        if sums[2] and self.quarantine is not None:
            self.quarantine.add([one for part in all_gather_objects(unreadable, self.layout) for one in part])
        filled = sums[1] / (len(batches) * self.layout.world_size)  # share of batches with samples
        if 0 < filled < 1:
            batches = [_scaled(batch, 1 / filled) for batch in batches]
        return StepBatches(batches, int(sums[0]) // self.layout.sequence_size, sums[3] > 0)


def _num_samples(batch: Any) -> int:
    """The samples of a batch; 1 where it has no names."""
    names = batch_field(batch, "names", None)
    return 1 if names is None else len(names) if batch_field(batch, "weight", 1.0) else 0


def _scaled(batch: Any, factor: float) -> Any:
    """A batch with its weight multiplied. Only batches that have a weight can lack samples."""
    if isinstance(batch, dict):
        return {**batch, "weight": batch["weight"] * factor}
    return batch._replace(weight=batch.weight * factor)

"""What the ranks agree on before each step: how many samples it has, which files are broken, whether it is the last."""

from __future__ import annotations

from typing import Any, NamedTuple

from opensora.datasets.quarantine import Quarantine
from opensora.distributed.fsdp import Layout, gather, total


class Turn(NamedTuple):
    """The batches of a step with their weights, the samples of all ranks, and whether a rank asks to end."""

    batches: list[Any]
    samples: int
    stops: bool


class Turns:
    """The batches of steps as all ranks see them. A batch may know its `names`, its `weight`, and the `broken` files.

    A batch without samples takes part with weight 0, and the others weigh more, so that their mean over all ranks is
    that of the batches with samples. Broken files of all ranks are counted together, in one quarantine.
    """

    def __init__(self, layout: Layout, quarantine: Quarantine | None = None) -> None:
        self.layout, self.quarantine = layout, quarantine

    def __call__(self, batches: list[Any], stops: bool = False) -> Turn:
        """What all ranks know of a step; they call this together.

        Raises MediaError, on all of them, once more files are broken than may be.
        """
        samples = [_samples(batch) for batch in batches]
        broken = [one for batch in batches for one in _told(batch, "broken", ())]
        own = [float(sum(samples)), float(sum(map(bool, samples))), float(len(broken)), float(stops)]
        sums = total(own, self.layout)
        if sums[2] and self.quarantine is not None:
            self.quarantine.add([one for part in gather(broken, self.layout) for one in part])
        share = sums[1] / (len(batches) * self.layout.world_size)
        if 0 < share < 1:
            batches = [_weighed(batch, 1 / share) for batch in batches]
        return Turn(batches, int(sums[0]) // self.layout.sequence_size, sums[3] > 0)


def names_of(batches: list[Any]) -> list[str]:
    """Of the samples of a step's batches, where they have names."""
    return [name for batch in batches for name in _told(batch, "names", ())]


def _samples(batch: Any) -> int:
    """How many samples a batch has to train on; 1 where it has no names."""
    names = _told(batch, "names", None)
    return 1 if names is None else len(names) if _told(batch, "weight", 1.0) else 0


def _weighed(batch: Any, factor: float) -> Any:
    """A batch with its weight times `factor`; only batches that have one may lack samples."""
    if isinstance(batch, dict):
        return {**batch, "weight": batch["weight"] * factor}
    return batch._replace(weight=batch.weight * factor)


def _told(batch: Any, name: str, default: Any) -> Any:
    return batch.get(name, default) if isinstance(batch, dict) else getattr(batch, name, default)

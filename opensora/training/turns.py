"""What the ranks agree on before each step: how many samples it has, and which files are broken."""

from __future__ import annotations

from typing import Any

from opensora.acceleration.host_group import HostGroup
from opensora.datasets.quarantine import Broken, Quarantine


class Turns:
    """The batches of a step as all ranks see them; a batch knows its `names` and, where there are files, the `broken`.

    A batch without samples takes part with weight 0, and the others weigh more, so that their mean over all ranks is
    that of the batches with samples. Broken files of all ranks are counted together, in one quarantine.
    """

    def __init__(self, group: HostGroup, quarantine: Quarantine | None = None) -> None:
        self.group, self.quarantine = group, quarantine

    def __call__(self, batches: list[Any]) -> tuple[list[Any], int]:
        """The batches with their weights, and the number of samples on all ranks, which call this together.

        Raises MediaError, on all ranks, once more files are broken than may be.
        """
        names = [names_of(batch) for batch in batches]
        broken = [one for batch in batches for one in _broken(batch)]
        sums = self.group.numbers(sum(map(len, names)), sum(map(bool, names)), len(broken)).sum(dim=0).tolist()
        if sums[2] and self.quarantine is not None:
            self.quarantine.add([one for part in self.group.gather(broken) for one in part])
        share = sums[1] / (len(batches) * self.group.ranks)
        if 0 < share < 1:
            batches = [{**batch, "weight": batch["weight"] / share} for batch in batches]
        return batches, int(sums[0])


def names_of(batch: Any) -> list[str]:
    """Of the samples of a batch; a batch that is nothing but its number counts as one."""
    return list(batch["names"] if isinstance(batch, dict) else getattr(batch, "names", [str(batch)]))


def _broken(batch: Any) -> list[Broken]:
    return batch["broken"] if isinstance(batch, dict) else []

"""Results of a function of whole numbers, computed ahead by worker processes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import count
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from opensora.datasets.synthetic.dataset import MixedClips, to_model


class _Calls(Dataset):
    def __init__(self, function: Callable[[int], Any]) -> None:
        self.function = function

    def __getitem__(self, number: int) -> Any:
        return self.function(number)


def _as_it_is(result: Any) -> Any:
    return result


def map_ahead(function: Callable[[int], Any], numbers: Iterable[int], num_workers: int) -> Iterator[Any]:
    """`map(function, numbers)`, in order, computed by `num_workers` processes; 0: in this one."""
    if num_workers == 0:
        return map(function, numbers)
    return iter(
        DataLoader(
            _Calls(function), batch_size=None, sampler=numbers, num_workers=num_workers, collate_fn=_as_it_is
        )
    )  # fmt: skip


class VideosAhead:
    """`clips.videos(step)` on a device, rendered ahead by worker processes. The latest step is remembered."""

    def __init__(self, clips: MixedClips, num_workers: int, device: torch.device) -> None:
        self.clips, self.num_workers, self.device = clips, num_workers, device
        self.step, self.latest = -1, torch.empty(0)

    def __call__(self, step: int) -> Tensor:
        if step != self.step:
            if step != self.step + 1 or not self.latest.numel():
                self.following = map_ahead(self.clips.windows, count(step), self.num_workers)
            self.step, self.latest = step, to_model(next(self.following), self.device)
        return self.latest

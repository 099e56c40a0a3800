"""Guidance parallelism: the conditional and unconditional branches run on two groups of ranks.

Each group is a sequence for its branch (see `sequence_parallel`). Two groups of P / 2 exchange less than one of P: each
rank of a group sends 1 - 2 / P of its tokens instead of 1 - 1 / P, and once the prediction.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from opensora.distributed.process_group import RankLayout, start
from opensora.distributed.sequence_parallel import AllGather, SequenceSplit, sequence_parallel
from opensora.errors import ConfigError
from opensora.models.layers.transformer import PatchTransformer


def check_guidance_ranks(how: str, layout: RankLayout) -> None:
    """Raises ConfigError if `how` asks for two groups of ranks and their number is odd."""
    if how == "apart" and layout.sequence_size % 2:
        ranks = layout.sequence_size
        raise ConfigError(f"guidance_ranks 'apart' needs an even number of ranks, not {ranks}; use auto or together")


def guidance_parallel(model: PatchTransformer, layout: RankLayout, how: str = "auto", batch: int = 1) -> Any:
    """A model for inference over all ranks of a sequence; `batch` is the number of samples without guidance.

    how: "together" runs both branches over all ranks; "apart" and "auto" run each on half of the ranks, "auto" only if
    their number is even and the branches come in one batch. A single branch runs over all ranks. Raises ConfigError for
    models that cannot be split.
    """
    check_guidance_ranks(how, layout)
    split = sequence_parallel(model, layout)
    if split is None or how == "together" or layout.sequence_size % 2:
        return model
    assert layout.mesh is not None
    groups = start(torch.device(layout.mesh.device_type), layout.sequence_size // 2)
    return GuidanceParallel(model, split, groups, batch)


class GuidanceParallel:
    """A model that receives both guidance branches as one batch and computes that of its group of ranks.

    `groups` is the layout by branch: data rank 0 computes the conditional branch, 1 the unconditional one.
    """

    def __init__(self, model: PatchTransformer, split: SequenceSplit, groups: RankLayout, batch: int) -> None:
        assert groups.mesh is not None
        self.model, self.split, self.groups, self.batch = model, split, groups, batch
        self.branches = groups.mesh["data"].get_group()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def prepare(self, shape: Sequence[int], **conditioning: Any) -> dict[str, Any]:
        """The model's prepared conditioning; of both branches, only this group's is prepared."""
        if shape[0] != 2 * self.batch:
            return self.model.prepare(shape, **conditioning)
        return {"branch": self.model.prepare((self.batch, *shape[1:]), **self._own(conditioning))}

    def __call__(self, x: Tensor, timestep: Tensor, branch: Mapping[str, Any] | None = None, **others: Any) -> Tensor:
        """The predictions for x [2 B, ...] if prepared for a `branch`, else for x as it is."""
        if branch is None:
            return self.model(x, timestep, **others)
        index = self.groups.data_rank
        with self.split.using(self.groups):
            times = timestep if len(timestep) == 1 else timestep.chunk(2)[index]
            out = self.model(x.chunk(2)[index], times, **branch, **self._own(others))
        return AllGather.apply(out, self.branches).flatten(0, 1)

    def _own(self, both: Mapping[str, Any]) -> dict[str, Any]:
        """This group's rows of all tensors; a single row serves both branches."""
        index = self.groups.data_rank
        split = {n for n, v in both.items() if isinstance(v, Tensor) and v.ndim and len(v) > 1}
        return {n: v.chunk(2)[index] if n in split else v for n, v in both.items()}

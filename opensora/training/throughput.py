"""The throughput of a run: clips and tokens per second, time spent waiting for data, model FLOPs utilization (MFU)."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from opensora.acceleration.device import HOST
from opensora.checkpoints import builder
from opensora.distributed.collectives import all_reduce_mean
from opensora.distributed.process_group import RankLayout
from opensora.models.layers.transformer import PatchTransformer
from opensora.profiling.cost_model import CostModel
from opensora.profiling.peak_flops import peak_flops
from opensora.training.data.batch import TrainingBatch

TEXT_MULTIPLE = 64  # tokens


class StepCost:
    """Tokens and FLOPs of a training step, by the shape of its batch.

    Counts the forward pass on the meta device; the backward pass has twice as many FLOPs, half of which fall away for
    frozen weights. Recomputation by activation checkpointing, encoders and the optimizer are left out: model FLOPs, as
    in PaLM (Chowdhery et al. 2022, arXiv:2204.02311, appendix B). `model`, of `model_type`, may be sharded.
    """

    def __init__(self, model: PatchTransformer, model_type: str) -> None:
        self.model = builder.build_model({"type": model_type}, None, model.config)
        matrices = [parameter for parameter in model.parameters() if parameter.ndim > 1]
        trained = sum(matrix.numel() for matrix in matrices if matrix.requires_grad)
        self.passes = 2 + trained / max(sum(matrix.numel() for matrix in matrices), 1)
        self._costs = CostModel(torch.float32, HOST)
        self._known: dict[tuple[Any, ...], float] = {}

    def __call__(self, latents: Tensor, cond: Mapping[str, Tensor]) -> tuple[int, float]:
        """Tokens and FLOPs of a step on latents [B, C, T, H, W] with the conditioning `cond`, which has `y`."""
        batch, size = len(latents), tuple(latents.shape[2:])
        text = cond["y"].shape[-2] if cond["y"].ndim > 1 else 0
        if (size, text) not in self._known:
            self._known[size, text] = self._forward(size, text, cond)
        return batch * math.prod(self.model.token_grid(size)), batch * self.passes * self._known[size, text]

    def _forward(self, size: tuple[int, ...], text: int, cond: Mapping[str, Tensor]) -> float:
        """FLOPs of a forward pass for one sample."""
        sizes = {name: value[:1] for name, value in cond.items() if name not in ("y", "mask")}
        cost = self._costs.step(self.model, size, sizes, text, batch=1)
        return cost.products + cost.convolutions


class BatchCost:
    """(clips, tokens, FLOPs) of a training step on a batch. Text lengths are rounded up to multiples of TEXT_MULTIPLE,
    so few shapes are counted."""

    def __init__(self, model: PatchTransformer, model_type: str) -> None:
        self.cost = StepCost(model, model_type)

    def __call__(self, batch: TrainingBatch) -> tuple[int, int, float]:
        shape = list(batch.cond["y"].shape)
        if len(shape) == 4 and shape[2] > 1:
            shape[2] = -(-shape[2] // TEXT_MULTIPLE) * TEXT_MULTIPLE
        cond = {**batch.cond, "y": torch.empty(shape, device="meta")}
        return len(batch.names), *self.cost(batch.latents, cond)


class Throughput:
    """Accumulates what is done between two lines of the log.

    Each rank adds its own batches, `per_step` of them to a step; ranks of one sequence add the same batch each.
    """

    def __init__(
        self, device: torch.device, dtype: str = "bf16", layout: RankLayout | None = None, per_step: int = 1
    ) -> None:
        self.device, self.dtype, self.layout, self.per_step = device, dtype, layout or RankLayout(), per_step
        self.waited = 0.0  # seconds since the start of the run, when the last line was written
        self._reset()

    def _reset(self) -> None:
        self.began, self.batches, self.clips, self.tokens, self.flops = time.perf_counter(), 0, 0, 0, 0.0

    def add(self, clips: int, tokens: int = 0, flops: float = 0.0) -> None:
        """Adds a batch of this rank."""
        self.batches += 1
        self.clips, self.tokens, self.flops = self.clips + clips, self.tokens + tokens, self.flops + flops

    def pause(self, seconds: float) -> None:
        """Excludes time spent on something else, such as validation."""
        self.began += seconds

    def line(self, waited: float = 0.0) -> dict[str, float]:
        """The entries of a log line, and resets. All ranks call this together, with their devices synchronized.

        `waited` is how many seconds this rank has waited for data since the start of the run. `clips_per_s` and
        `tokens_per_s` are sums over all ranks; `data_wait` and `mfu` are fractions from 0 to 1, means over the ranks.
        `tokens_per_s` and `mfu` are missing where they were not counted.
        """
        seconds = max(time.perf_counter() - self.began, 1e-9)
        done = [self.clips, self.tokens, self.flops, (waited - self.waited) / seconds]
        clips, tokens, flops, waiting = all_reduce_mean(self._tensor(done), self.layout).tolist()
        line = {
            "step_s": seconds * self.per_step / max(self.batches, 1),
            "clips_per_s": clips * self.layout.data_size / seconds,
        }
        if tokens:
            line["tokens_per_s"] = tokens * self.layout.data_size / seconds
        line["data_wait"] = min(max(waiting, 0.0), 1.0)
        if flops:
            here = flops / self.layout.sequence_size
            line["mfu"] = here / (seconds * peak_flops(self.device, self.dtype))
        self.waited = waited
        self._reset()
        return {name: float(f"{value:.4g}") for name, value in line.items()}

    def _tensor(self, values: list[float]) -> Tensor:
        """float64, where the device supports it."""
        wide = torch.float64 if self.device.type == torch.empty(0).device.type else torch.float32
        return torch.tensor(values, dtype=wide, device=self.device)

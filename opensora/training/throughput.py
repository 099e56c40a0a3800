"""How much a run gets done: clips and tokens a second, its wait for data, and its share of the device's peak."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from opensora.checkpoints import builder
from opensora.distributed.fsdp import Layout, mean
from opensora.profiling import cost_model
from opensora.profiling.peak_flops import peak_flops


class StepCost:
    """Tokens and floating-point operations of a training step, by the shape of its batch.

    Only the forward pass of the model is counted, without numbers, on the meta device; the backward pass has twice as
    many operations, but half of those are saved for weights that are not trained. What activation checkpointing
    computes again, encoders and the optimizer are left out: model FLOPs, as in PaLM (Chowdhery et al. 2022,
    arXiv:2204.02311, appendix B). `model` is a model of the registered `model_type`, sharded or not.
    """

    def __init__(self, model: nn.Module, model_type: str) -> None:
        self.model = builder.build_model({"type": model_type}, None, model.config)
        matrices = [parameter for parameter in model.parameters() if parameter.ndim > 1]
        trained = sum(matrix.numel() for matrix in matrices if matrix.requires_grad)
        self.passes = 2 + trained / max(sum(matrix.numel() for matrix in matrices), 1)
        self._known: dict[tuple[Any, ...], float] = {}

    def __call__(self, latents: Tensor, cond: Mapping[str, Tensor]) -> tuple[int, float]:
        """The tokens and the operations of a step on latents [B, C, T, H, W], told `cond`, which has `y`."""
        batch, size = len(latents), tuple(latents.shape[2:])
        text = cond["y"].shape[-2] if cond["y"].ndim > 1 else 0
        if (size, text) not in self._known:
            self._known[size, text] = self._forward(size, text, cond)
        return batch * math.prod(self.model.token_grid(size)), batch * self.passes * self._known[size, text]

    def _forward(self, size: tuple[int, ...], text: int, cond: Mapping[str, Tensor]) -> float:
        """The operations of one forward pass for one sample."""
        told = {name: value[:1] for name, value in cond.items() if name not in ("y", "mask")}
        host = torch.empty(0).device
        work = cost_model.step(self.model, size, told, text, torch.float32, host, batch=1)
        cost = cost_model.count(work, host)
        return cost.products + cost.convolutions


class Throughput:
    """Adds up what is done between two lines of the log.

    Each rank adds what it does itself, one batch after another, `per_step` of them to a step; ranks of one sequence
    add the same batch each.
    """

    def __init__(
        self, device: torch.device, dtype: str = "bf16", layout: Layout | None = None, per_step: int = 1
    ) -> None:
        self.device, self.dtype, self.layout, self.per_step = device, dtype, layout or Layout(), per_step
        self.waited = 0.0  # seconds since the start of the run, when the last line was written
        self._start_anew()

    def _start_anew(self) -> None:
        self.began, self.batches, self.clips, self.tokens, self.flops = time.perf_counter(), 0, 0, 0, 0.0

    def add(self, clips: int, tokens: int = 0, flops: float = 0.0) -> None:
        """Counts a batch of this rank."""
        self.batches += 1
        self.clips, self.tokens, self.flops = self.clips + clips, self.tokens + tokens, self.flops + flops

    def pause(self, seconds: float) -> None:
        """Leaves out time that was spent on something else, such as validation."""
        self.began += seconds

    def line(self, waited: float = 0.0) -> dict[str, float]:
        """What goes into the log; starts anew. All ranks call it together, when their devices have done their work.

        `waited` is how many seconds this rank has waited for data since the start of the run. `clips_per_s` and
        `tokens_per_s` are those of all ranks, `data_wait` and `mfu` shares from 0 to 1, means over the ranks. `tokens`
        and `mfu` are left out where they were not counted.
        """
        seconds = max(time.perf_counter() - self.began, 1e-9)
        done = [self.clips, self.tokens, self.flops, (waited - self.waited) / seconds]
        clips, tokens, flops, waiting = mean(self._tensor(done), self.layout).tolist()
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
        self._start_anew()
        return {name: float(f"{value:.4g}") for name, value in line.items()}

    def _tensor(self, values: list[float]) -> Tensor:
        """Of float64 where the device has it."""
        wide = torch.float64 if self.device.type == torch.empty(0).device.type else torch.float32
        return torch.tensor(values, dtype=wide, device=self.device)

"""Finds the cause of a bad step by repeating it: the first module with a non-finite output, the parameters with
non-finite gradients, and the samples that alone cause it. Good steps pay nothing."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from opensora.distributed.collectives import all_gather_objects
from opensora.distributed.fsdp import local_shard
from opensora.distributed.process_group import RankLayout

Recompute = Callable[[], Tensor]  # losses of the step's samples [B], or their mean
RecomputeSample = Callable[[int], Tensor]  # row -> loss of that sample alone

DOMINANT = 0.5  # share of the gradient norm by which one sample causes a spike
MAX_NAMES = 8  # parameters in a message
LOSS, GRADIENTS, SPIKE = "the loss is not finite", "the gradients are not finite", "the gradient norm spikes"


@dataclass
class BadStep:
    """What is known of a bad step.

    module: the first, in the order of the forward pass, with a non-finite output ("" is the whole model); `where`
        describes how it arose
    parameters: with non-finite gradients, where all outputs are finite
    poisoned: the `samples` that alone cause it
    samples: the ids of the batch
    """

    step: int
    what: str
    loss: str
    grad_norm: str
    action: str
    module: str | None = None
    where: str = ""
    parameters: list[str] = field(default_factory=list)
    poisoned: list[str] = field(default_factory=list)
    samples: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        parts = [f"step {self.step}: {self.what} (loss {self.loss}, gradient norm {self.grad_norm})"]
        if self.module is not None:
            parts.append(f"first bad output: {self.module or 'the model'}, {self.where}")
        elif self.where:
            parts.append(self.where)
        if self.parameters:
            more = f" and {len(self.parameters) - MAX_NAMES} more" if len(self.parameters) > MAX_NAMES else ""
            parts.append(f"gradients of {', '.join(self.parameters[:MAX_NAMES])}{more}")
        if self.poisoned:
            parts.append(f"caused by the sample {' and '.join(self.poisoned)}")
        if self.samples:
            parts.append(f"the batch: {', '.join(self.samples)}")
        return "; ".join(parts)


class Diagnosis:
    """Repeats bad steps of `model`. All ranks call `run` together."""

    def __init__(self, model: nn.Module, layout: RankLayout) -> None:
        self.model, self.layout = model, layout

    def run(
        self, event: BadStep, grad_norm: float, ids: list[str],
        recompute: Recompute | None, recompute_sample: RecomputeSample | None,
    ) -> None:  # fmt: skip
        """Fills in what is found. Gradients are lost, if `recompute` is given."""
        event.samples = _union(ids, self.layout)
        if recompute is None:
            return
        losses, module = self._forward(event, recompute)
        if module is None and event.what != LOSS:
            event.parameters = self._non_finite_gradients(lambda: recompute().mean())
            if recompute_sample is None and losses.ndim:
                recompute_sample = lambda row: recompute()[row]  # noqa: E731
            causes = self._dominant_samples(ids, grad_norm, recompute_sample)
        else:
            causes = self._non_finite_samples(ids, losses, recompute_sample)
        if len(causes) < len(event.samples):  # a model that fails on every sample is not poisoned by one
            event.poisoned = causes
        if module is None and event.what == LOSS and losses.isfinite().all() and not causes:
            event.where = "finite when repeated: a device fault, or randomness outside of the generator"

    def _forward(self, event: BadStep, recompute: Recompute) -> tuple[Tensor, str | None]:
        """The recomputed losses, and the first module with a non-finite output."""
        with torch.no_grad(), NonFiniteOutput(self.model) as first:
            losses = recompute().detach()
        found = [one for one in all_gather_objects(first.found, self.layout) if one is not None]
        event.module, event.where = found[0] if found else (None, "")
        return losses, event.module

    def _non_finite_samples(
        self, ids: list[str], losses: Tensor, recompute_sample: RecomputeSample | None
    ) -> list[str]:
        """The ids of the samples, of all ranks, with a non-finite loss."""
        finite = losses.isfinite().tolist() if losses.ndim and len(losses) == len(ids) else [False] * len(ids)
        if not any(_concatenated(finite, self.layout)) and recompute_sample is not None:  # one may spoil the others
            with torch.no_grad():
                finite = [bool(recompute_sample(row).isfinite().all()) for row in self._rows(ids)][: len(ids)]
        return _union([name for name, good in zip(ids, finite, strict=True) if not good], self.layout)

    def _rows(self, ids: list[str]) -> list[int]:
        """The rows of the batch; the last one repeats until all ranks have the same number of forward passes."""
        return [min(row, len(ids) - 1) for row in range(max(all_gather_objects(len(ids), self.layout)))]

    def _non_finite_gradients(self, loss: Callable[[], Tensor]) -> list[str]:
        """The names of the parameters with non-finite gradients."""
        with self._gradients(loss) as gradients:
            bad = [name for name, gradient in gradients.items() if not local_shard(gradient).isfinite().all()]
        return _union(bad, self.layout)

    def _dominant_samples(
        self, ids: list[str], grad_norm: float, recompute_sample: RecomputeSample | None
    ) -> list[str]:
        """The ids of the samples that cause most of the gradient norm; empty with several ranks."""
        if self.layout.world_size > 1 or recompute_sample is None:
            return []
        found = []
        for row, name in enumerate(ids):

            def share(row: int = row) -> Tensor:
                return recompute_sample(row).mean() / len(ids)

            with self._gradients(share) as gradients:
                norm = float(nn.utils.get_total_norm(gradients.values()))
            if norm > DOMINANT * grad_norm if math.isfinite(grad_norm) else not math.isfinite(norm):
                found.append(name)
        return found

    @contextmanager
    def _gradients(self, loss: Callable[[], Tensor]) -> Iterator[dict[str, Tensor]]:
        """The gradients of a loss by parameter name; the model has none before and after."""
        self.model.zero_grad(set_to_none=True)
        with torch.enable_grad():
            loss().backward()
        yield {name: one.grad for name, one in self.model.named_parameters() if one.grad is not None}
        self.model.zero_grad(set_to_none=True)


class NonFiniteOutput:
    """While entered, `found` is (module, where) of the first non-finite output of a model's modules, or None.

    If a module's input was already non-finite, the code around it or the batch is at fault. Needs eager execution:
    compiled modules call no hooks.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.found: tuple[str, str] | None = None
        self._bad_input: str | None = None  # the first module with a non-finite input

    def __enter__(self) -> NonFiniteOutput:
        self._hooks = ExitStack()
        for name, module in self.model.named_modules():
            before = module.register_forward_pre_hook(self._before(name), with_kwargs=True)
            after = module.register_forward_hook(self._after(name))
            self._hooks.callback(before.remove)
            self._hooks.callback(after.remove)
        return self

    def __exit__(self, *_: Any) -> None:
        self._hooks.close()

    def _before(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            if self.found is None and self._bad_input is None and not _is_finite((args, kwargs)):
                self._bad_input = name

        return hook

    def _after(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, out: Any) -> None:
            if self.found is None and not _is_finite(out):
                self.found = self._culprit(name, module)

        return hook

    def _culprit(self, name: str, module: nn.Module) -> tuple[str, str]:
        """The module at fault for the output of this one, and where in it."""
        kind, bad_input = type(module).__name__, self._bad_input
        if bad_input is None or not f"{name}.".startswith(f"{bad_input}." if bad_input else ""):
            broken = [key for key, one in module.named_parameters(recurse=False) if not _is_finite(one)]
            return name, f"{kind}, {f'its {broken[0]} is not finite' if broken else 'of finite input'}"
        if bad_input == "":
            return name, f"{kind}, but the batch itself is not finite"
        return bad_input.rpartition(".")[0], f"in its own code, before {bad_input}"


def _is_finite(value: Any) -> bool:
    tensors = [one for one in tree_leaves(value) if isinstance(one, Tensor) and one.is_floating_point()]
    return all(bool(local_shard(one).isfinite().all()) for one in tensors)


def _concatenated(values: Sequence[Any], layout: RankLayout) -> list[Any]:
    """The values of all ranks, in one list."""
    return [one for part in all_gather_objects(list(values), layout) for one in part]


def _union(values: Sequence[str], layout: RankLayout) -> list[str]:
    """The values of all ranks in order, without duplicates: ranks of one sequence have the same."""
    return list(dict.fromkeys(_concatenated(values, layout)))

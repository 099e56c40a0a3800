"""CUDA graphs: model evaluations captured once and replayed.

Where a step is short, as with images and small videos, launching its kernels takes longer than running them. A replayed
graph launches the same kernels at once and gives the same numbers.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from opensora.errors import ConfigError

MAX_GRAPHS = 4  # kept at once, each with its own memory
Output = TypeVar("Output")


def capture(work: Callable[[], Output], device: torch.device) -> tuple[Callable[[], None], Output]:
    """Captures `work` as a graph; returns its replay function and the output tensors that a replay fills.

    Nothing is computed during capture.
    """
    graph = torch.accelerator.Graph()
    with torch.Stream(device), graph:
        output = work()
    return graph.replay, output


def check_graphs(device: torch.device) -> None:
    """Raises ConfigError unless a device captures graphs."""
    try:
        trial = torch.zeros(1, device=device)
        replay, _ = capture(lambda: trial.add_(1), device)
        replay()
    except (AttributeError, RuntimeError, NotImplementedError) as error:
        why = f"PyTorch {torch.__version__} cannot capture graphs on device '{device}'"
        raise ConfigError(f"graphs: {why}; remove --graphs") from error


class _Graph(NamedTuple):
    inputs: list[Any]  # arguments whose tensors a replay reads
    output: Tensor  # filled by a replay
    replay: Callable[[], None]


class CapturedModel:
    """Calls a model on an accelerator through captured graphs, without gradients.

    There is one graph for each combination of shapes, dtypes and other argument values. The first call of a
    combination runs the model as a warm-up; the second captures it.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.graphs: deque[tuple[Any, _Graph | None]] = deque(maxlen=MAX_GRAPHS)  # by signature; None: warmed up

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    @torch.inference_mode()
    def __call__(self, x: Tensor, timestep: Tensor, **others: Any) -> Tensor:
        values, structure = tree_flatten((x, timestep, others))
        signature = structure, [_signature(value) for value in values]
        entry = next((entry for entry in self.graphs if entry[0] == signature), None)
        if entry is None:
            self.graphs.append((signature, None))
            return self.model(x, timestep, **others)
        graph = entry[1]
        if graph is None:
            graph = self._capture(values, structure, x.device)
            self.graphs.remove(entry)
            self.graphs.append((signature, graph))
        else:
            torch._foreach_copy_(_tensors(graph.inputs), _tensors(values))
        graph.replay()
        return graph.output.clone()  # the next replay overwrites the output

    def forget(self) -> None:
        """Drops all graphs, of a model whose layers have changed."""
        self.graphs.clear()

    def _capture(self, values: list[Any], structure: TreeSpec, device: torch.device) -> _Graph:
        inputs = [value.clone() if isinstance(value, Tensor) else value for value in values]
        x, timestep, others = tree_unflatten(inputs, structure)
        try:
            replay, output = capture(lambda: self.model(x, timestep, **others), device)
        except RuntimeError as error:
            reason = " ".join(str(error).split())[:150]
            raise ConfigError(f"this model cannot be captured ({reason}); remove --graphs") from error
        return _Graph(inputs, output, replay)


def _signature(value: Any) -> Any:
    return (value.shape, value.dtype, value.device) if isinstance(value, Tensor) else value


def _tensors(values: list[Any]) -> list[Tensor]:
    return [value for value in values if isinstance(value, Tensor)]

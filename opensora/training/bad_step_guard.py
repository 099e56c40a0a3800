"""Watches the steps of a run: a loss or gradients that are not finite, or that jump, never reach the weights.

A bad step is looked into by taking it again: which module was the first to give numbers that are not finite, or which
gradients are not, and which samples alone do the same. Ordinary steps pay for none of that.
"""

from __future__ import annotations

import logging
import math
import statistics
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from opensora.acceleration.device import read_later
from opensora.config.settings import TrainSettings
from opensora.distributed.fsdp import Layout, gather, local, mean
from opensora.errors import OpenSoraError

logger = logging.getLogger("opensora")
Again = Callable[[], Tensor]
Alone = Callable[[int], Tensor]

MEMORY, ENOUGH = 200, 50  # gradient norms that are remembered, and how many it takes to know what is usual
OVERFLOWS = 24  # in a row, in fp16: enough to bring the scale of the loss from 2**16 below 1
SHARE = 0.5  # of a gradient's norm; a sample that has more of it makes it jump
NAMED = 8  # parameters in a message
LOSS, GRADIENTS, SPIKE = "the loss is not finite", "the gradients are not finite", "the gradients jump"


@dataclass
class BadStep:
    """What is known of a bad step.

    module: the first, in the order of the forward pass, whose output was not finite ("" is the whole model), and
        `where` that came about
    parameters: whose gradients were not finite, with all outputs finite
    poisoned: those of `samples`, the ids of the batch, that alone do what the batch did
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
            more = f" and {len(self.parameters) - NAMED} more" if len(self.parameters) > NAMED else ""
            parts.append(f"gradients of {', '.join(self.parameters[:NAMED])}{more}")
        if self.poisoned:
            parts.append(f"caused by the sample {' and '.join(self.poisoned)}")
        if self.samples:
            parts.append(f"the batch: {', '.join(self.samples)}")
        return "; ".join(parts)


class Question(NamedTuple):
    """What is asked about a step.

    bad: 1 where the optimizer must leave it out, else 0, on the device: nothing has to wait to know it there
    numbers: gives the loss, the gradient norm and `bad`, once the device has computed them
    """

    bad: Tensor
    numbers: Callable[[], list[float]]


class Guard:
    """Says what becomes of each step of a run, as `on_bad_step`, `max_bad_steps` and `spike_factor` have it.

    `tell` gets a line for the log about each bad step. All ranks call `ask` and `answer`, or `check`, together and get
    the same answer. A step is answered for before the next one is asked about.
    """

    def __init__(
        self, model: nn.Module, settings: TrainSettings, layout: Layout | None = None,
        tell: Callable[[dict[str, Any]], None] | None = None,
    ) -> None:  # fmt: skip
        self.model, self.settings, self.layout, self.tell = model, settings, layout or Layout(), tell
        self.norms: deque[float] = deque(maxlen=MEMORY)
        self.in_a_row = self.overflows = 0

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run has to know, as JSON has it."""
        return {"norms": list(self.norms), "in_a_row": self.in_a_row, "overflows": self.overflows}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from `state_dict()`."""
        self.norms = deque(state["norms"], maxlen=MEMORY)
        self.in_a_row, self.overflows = state["in_a_row"], state["overflows"]

    def ask(self, loss: Tensor, norm: Tensor) -> Question:
        """Asks about a step, without waiting for the device. `loss` and `norm` are those of `check`."""
        shared = mean(torch.stack([value.detach().float() for value in (loss, norm)]), self.layout)
        bad = 1 - (shared.isfinite().all() & (shared[1] <= self._limit())).float()
        return Question(bad, read_later(torch.cat([shared, bad[None]])))

    def check(
        self, loss: Tensor, norm: Tensor, sample_ids: Sequence[Any] = (), step: int = 0,
        again: Again | None = None, alone: Alone | None = None,
    ) -> str:  # fmt: skip
        """The answer, at once: it is here that a step waits for the device. See `answer`.

        `loss` and `norm` (of the gradients, before clipping) are scalars.
        """
        return self.answer(self.ask(loss, norm), sample_ids, step, again, alone)

    def answer(
        self, question: Question, sample_ids: Sequence[Any] = (), step: int = 0,
        again: Again | None = None, alone: Alone | None = None,
    ) -> str:  # fmt: skip
        """What becomes of the step, "go", "skip" or "roll back", as soon as the device knows.

        It is either asked before the optimizer takes the step, or after an optimizer that obeys `question.bad`.

        "skip": the gradients are thrown away, and nothing else changes but the scale of the loss in fp16. "roll back":
        so they are, and the weights and all that goes with them come from the last checkpoint, while the data goes on
        after this batch, as another order may pass where this one failed (PaLM, Chowdhery et al. 2022,
        arXiv:2204.02311, section 5.1); without a checkpoint it means "skip". In fp16 overflowing gradients are left
        to the scaler as long as a smaller scale may help: "go", although `bad` is 1.

        `again()` repeats the forward pass of this rank's part of the step with the same noise and gives the loss of
        each sample [B], in the order of `sample_ids`, or of all together. `alone(i)` does so for one sample without the
        others; it tells which sample is to blame where they have no losses of their own, or where only gradients are
        bad. Gradients are lost when it is not "go". Raises OpenSoraError when the run has to stop.
        """
        loss_value, norm_value, bad = question.numbers()
        what = self._judge(loss_value, norm_value, bool(bad))
        if math.isfinite(norm_value):
            self.norms.append(norm_value)
        if what is None:
            self.in_a_row = 0
            return "go"
        self.in_a_row += 1
        stops = self.settings.on_bad_step == "stop" or self.in_a_row >= self.settings.max_bad_steps
        action = "stop" if stops else {"skip": "skip", "rollback": "roll back"}[self.settings.on_bad_step]
        event = BadStep(step, what, f"{loss_value:.4g}", f"{norm_value:.4g}", action)
        with torch.compiler.set_stance("force_eager"):
            self._look_into(event, norm_value, [str(one) for one in sample_ids], again, alone)
        if self.tell is not None and self.layout.is_main:
            known = {name: value for name, value in asdict(event).items() if value not in (None, "", [])}
            self.tell({"step": known.pop("step"), "bad_step": known})
        if stops:
            raise OpenSoraError(f"{event}; {self._remedy(event)}")
        logger.warning("%s: %s", event, action)
        return action

    def _limit(self) -> float:
        """The largest gradient norm that is no jump."""
        factor = self.settings.spike_factor
        return factor * statistics.median(self.norms) if factor and len(self.norms) >= ENOUGH else math.inf

    def _judge(self, loss: float, norm: float, bad: bool) -> str | None:
        """What is wrong with a step, if anything is."""
        if not math.isfinite(loss):
            return LOSS
        if not math.isfinite(norm):
            self.overflows += 1
            return None if self.settings.dtype == "fp16" and self.overflows <= OVERFLOWS else GRADIENTS
        self.overflows = 0
        return SPIKE if bad else None

    def _look_into(self, event: BadStep, norm: float, ids: list[str], again: Again | None, alone: Alone | None) -> None:
        """Takes the step again, and fills in what comes out."""
        event.samples = _united(ids, self.layout)
        if again is None:
            return
        losses, finding = self._forward(event, again)
        if finding is None and event.what != LOSS:
            event.parameters = self._bad_gradients(lambda: again().mean())
            bad = self._heavy(ids, norm, alone or (lambda row: again()[row]) if losses.ndim or alone else None)
        else:
            bad = self._not_finite(ids, losses, alone)
        if len(bad) < len(event.samples):  # a model that fails on every sample is not poisoned by one
            event.poisoned = bad
        if finding is None and event.what == LOSS and losses.isfinite().all() and not bad:
            event.where = "taken again it is finite: a fault of the device, or of what is not drawn from the generator"

    def _forward(self, event: BadStep, again: Again) -> tuple[Tensor, str | None]:
        """The losses of the step taken again; the module whose output is the first that is not finite."""
        with torch.no_grad(), Watch(self.model) as watch:
            losses = again().detach()
        found = [one for one in gather(watch.found, self.layout) if one is not None]
        event.module, event.where = found[0] if found else (None, "")
        return losses, event.module

    def _not_finite(self, ids: list[str], losses: Tensor, alone: Alone | None) -> list[str]:
        """The ids of the samples, of all ranks, whose losses are not finite."""
        finite = losses.isfinite().tolist() if losses.ndim and len(losses) == len(ids) else [False] * len(ids)
        if not any(_joined(finite, self.layout)) and alone is not None:  # one may have spoilt the others
            with torch.no_grad():
                finite = [bool(alone(row).isfinite().all()) for row in self._rows(ids)][: len(ids)]
        return _united([name for name, good in zip(ids, finite, strict=True) if not good], self.layout)

    def _rows(self, ids: list[str]) -> list[int]:
        """The rows of the batch; the last one again and again, as long as other ranks have more: all go together."""
        return [min(row, len(ids) - 1) for row in range(max(gather(len(ids), self.layout)))]

    def _bad_gradients(self, loss: Callable[[], Tensor]) -> list[str]:
        """The names of the parameters whose gradients are not finite."""
        with self._gradients(loss) as gradients:
            bad = [name for name, gradient in gradients.items() if not local(gradient).isfinite().all()]
        return _united(bad, self.layout)

    def _heavy(self, ids: list[str], norm: float, alone: Alone | None) -> list[str]:
        """The ids of the samples to which most of the gradient goes back; known on a single rank only."""
        if self.layout.world_size > 1 or alone is None:
            return []
        heavy = []
        for row, name in enumerate(ids):
            with self._gradients(lambda row=row: alone(row).mean() / len(ids)) as gradients:
                share = float(nn.utils.get_total_norm(gradients.values()))
            if share > SHARE * norm if math.isfinite(norm) else not math.isfinite(share):
                heavy.append(name)
        return heavy

    @contextmanager
    def _gradients(self, loss: Callable[[], Tensor]) -> Iterator[dict[str, Tensor]]:
        """The gradients of a loss by the names of the parameters; there are none before and after."""
        self.model.zero_grad(set_to_none=True)
        with torch.enable_grad():
            loss().backward()
        yield {name: one.grad for name, one in self.model.named_parameters() if one.grad is not None}
        self.model.zero_grad(set_to_none=True)

    def _remedy(self, event: BadStep) -> str:
        rows = f"{self.in_a_row} bad steps in a row" if self.in_a_row > 1 else "the run stops here"
        resume = "go on from the last checkpoint with --load"
        if event.poisoned:
            return f"{rows}; remove that sample and {resume}"
        if event.what == SPIKE:
            return f"{rows}; {resume} and a lower lr, or with a larger spike_factor if such gradients are usual"
        return f"{rows}; {resume} and a lower lr, grad_clip or dtype fp32"


class Watch:
    """While it is open, `found` is (module, where) of the first output of a model's modules that is not finite.

    Where the first thing that is not finite was given to a module, it came about in the code around it, or with the
    batch. Compiled modules have to run as they are written.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model, self.found = model, None
        self._given: str | None = None  # the first module that was given something not finite

    def __enter__(self) -> Watch:
        self._stack = ExitStack()
        for name, module in self.model.named_modules():
            before = module.register_forward_pre_hook(self._before(name), with_kwargs=True)
            after = module.register_forward_hook(self._after(name))
            self._stack.callback(before.remove)
            self._stack.callback(after.remove)
        return self

    def __exit__(self, *_: Any) -> None:
        self._stack.close()

    def _before(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            if self.found is None and self._given is None and not _finite((args, kwargs)):
                self._given = name

        return hook

    def _after(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, out: Any) -> None:
            if self.found is None and not _finite(out):
                self.found = self._blamed(name, module)

        return hook

    def _blamed(self, name: str, module: nn.Module) -> tuple[str, str]:
        """Which module is to blame for the output of this one, and where in it."""
        kind, given = type(module).__name__, self._given
        if given is None or not f"{name}.".startswith(f"{given}." if given else ""):
            broken = [key for key, one in module.named_parameters(recurse=False) if not _finite(one)]
            return name, f"{kind}, {f'its {broken[0]} is not finite' if broken else 'of finite input'}"
        if given == "":
            return name, f"{kind}, but the batch itself is not finite"
        return given.rpartition(".")[0], f"in its own code, before {given}"


def _finite(value: Any) -> bool:
    tensors = [one for one in tree_leaves(value) if isinstance(one, Tensor) and one.is_floating_point()]
    return all(bool(local(one).isfinite().all()) for one in tensors)


def _joined(values: Sequence[Any], layout: Layout) -> list[Any]:
    return [one for part in gather(list(values), layout) for one in part]


def _united(values: Sequence[str], layout: Layout) -> list[str]:
    """What any rank has, in order, once each; ranks of one sequence have the same."""
    return list(dict.fromkeys(_joined(values, layout)))

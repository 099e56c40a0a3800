"""A small training run: made, and gone on with from a checkpoint as the command line would; and small weights."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from opensora.checkpoints.save import save_file
from opensora.cli.program import run_program
from opensora.config.settings import TrainSettings
from opensora.training.trainer import Trainer


def trainer(outputs: Path, max_steps: int, load: str | None = None) -> Trainer:
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 4)

    def loss(step: int, generator: torch.Generator) -> torch.Tensor:
        return model(torch.randn(2, 4, generator=generator)).square().mean()

    settings = TrainSettings(
        model={"type": "STDiT3"}, dtype="fp32", max_steps=max_steps, outputs=str(outputs), tensorboard=False, load=load
    )
    return Trainer(settings, model, loss, torch.device("cpu"), 8)


def resume(arguments: Sequence[str]) -> int:
    """The exit code of a run of four steps that goes on from a checkpoint of two; it prints where the result is."""
    outputs, load = arguments
    return run_program(lambda: print(trainer(Path(outputs), 4, load).run()))


def make_run(arguments: Sequence[str]) -> int:
    """Two steps, and their checkpoint."""
    trainer(Path(arguments[0]), 2).run()
    return 0


def make_weights(arguments: Sequence[str]) -> int:
    """The same weights as model.safetensors and model.pt."""
    state = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 4)).state_dict()
    for name in ("model.safetensors", "model.pt"):
        save_file(state, Path(arguments[0]) / name)
    return 0

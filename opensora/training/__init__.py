"""The training loop, its data, losses, checkpoints and reports. May import `pipeline` and below.

result = opensora.training.train("embedded/train/finetune", dataset={"data_path": "videos.csv"}, max_steps=100)
opensora.training.export(result.folder, "my-model")
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from opensora.training.result import TrainResult
    from opensora.training.run import export, extract, train

__all__ = ["TrainResult", "export", "extract", "train"]


def __getattr__(name: str) -> Any:
    """Imports the public functions on first use, with PyTorch."""
    if name == "TrainResult":
        from opensora.training.result import TrainResult

        return TrainResult
    if name in __all__:
        from opensora.training import run

        return getattr(run, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

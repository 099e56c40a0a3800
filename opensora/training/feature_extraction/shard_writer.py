"""Writes the files of a features folder atomically."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from opensora.checkpoints.save import save_file
from opensora.errors import ConfigError, MediaError
from opensora.files import error_message
from opensora.training.feature_extraction.identity import replace_text


class ShardWriter:
    """Writes into `folder`; features are stored as `dtype`."""

    def __init__(self, folder: Path, dtype: torch.dtype, dtype_name: str) -> None:
        self.folder, self.dtype, self.dtype_name = folder, dtype, dtype_name

    def cast(self, features: Tensor, file: str) -> Tensor:
        """Features in the stored type. Raises ConfigError if it cannot hold them."""
        stored = features.to(self.dtype)
        if not stored.isfinite().all():
            problem = f"features beyond what {self.dtype_name} can hold, or NaN"
            raise ConfigError(f"{self.folder / file}: {problem}; set save_dtype='bf16', or dtype='fp32' if it is NaN")
        return stored

    def save(self, file: str, **tensors: Tensor) -> None:
        """Writes a shard, and removes what a killed run left of it. Raises MediaError when writing fails."""
        path = self.folder / file
        for leftover in path.parent.glob(f".*.{path.name}"):
            shutil.rmtree(leftover, ignore_errors=True)
        temporary = path.with_name(f".{os.getpid()}.{path.name}")  # a folder: safetensors may leave files of its own
        try:
            temporary.mkdir(parents=True)
            save_file(tensors, temporary / ".whole.safetensors")
            os.replace(temporary / ".whole.safetensors", path)
        except OSError as error:
            raise self._unwritable(path, error) from error
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    def save_json(self, file: str, value: Any) -> None:
        """Writes a JSON file. Raises MediaError when writing fails."""
        try:
            replace_text(self.folder / file, json.dumps(value, indent=1))
        except OSError as error:
            raise self._unwritable(self.folder / file, error) from error

    def _unwritable(self, path: Path, error: OSError) -> MediaError:
        return MediaError(
            f"{path}: cannot be written ({error_message(error)}); free some space, or name another --save-dir"
        )

"""Stand-ins for the frozen encoders, and small tables of videos for them."""

from __future__ import annotations

import csv
import hashlib
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from opensora.checkpoints import builder
from opensora.datasets.video import write_image, write_video
from opensora.training.feature_extraction.extract import ExtractSettings

BUCKETS = {"144p": {1: (1.0, 2), 9: (0.7, 2), 17: ((1.0, 0.5), 2)}, "240p": {9: (0.6, 3)}}
SIZES = ((240, 426), (144, 256), (256, 144), (200, 200))


class Vae:
    """Latents that tell frames apart: averages of 8 x 8 pixels, one latent frame for every 4 frames."""

    out_channels = 3

    def __init__(self, stop_after: int | None = None, factor: float = 1.0) -> None:
        self.clips, self.stop_after, self.factor = 0, stop_after, factor

    def get_latent_size(self, size: Any) -> list[int]:
        return [-(-size[0] // 4), size[1] // 8, size[2] // 8]

    def encode(self, x: Tensor, sample: bool = True) -> Tensor:
        assert not sample and x.dtype == torch.float32 and x.min() >= -1 and x.max() <= 1
        if x.shape[2] > 1 or self.stop_after is not None:
            self.clips += len(x)
        if self.stop_after is not None and self.clips > self.stop_after:
            raise KeyboardInterrupt
        height, width = self.get_latent_size(x.shape[2:])[1:]
        frames = x[:, :, ::4, : height * 8, : width * 8]
        return frames.unflatten(-1, (width, 8)).unflatten(-3, (height, 8)).mean((-1, -3)) * self.factor


class TextEncoder:
    """A token for each character; remembers what it was given."""

    model_max_length = 300

    def __init__(self) -> None:
        self.texts: list[str] = []

    def encode(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        self.texts += texts
        length = max(map(len, texts), default=0)
        mask = torch.tensor([[1] * len(text) + [0] * (length - len(text)) for text in texts])
        codes = torch.tensor([[ord(c) / 128 for c in text] + [0.0] * (length - len(text)) for text in texts])
        return codes[:, None, :, None].expand(-1, 1, -1, 4) * torch.arange(1, 5), mask


def use(
    monkeypatch: pytest.MonkeyPatch, vae: Vae | None = None, text: TextEncoder | None = None, hashes: Any = None
) -> None:
    """Makes the sections `vae` and `text_encoder` stand for these, with weights of these hashes."""
    encoders = {"vae": vae or Vae(), "text_encoder": text or TextEncoder()}

    def load(section: Any, what: str, *_: Any) -> tuple[Any, Any]:
        return encoders[what], SimpleNamespace(sha256=(hashes or {}).get(what, what), path=None)

    monkeypatch.setattr(builder, "load_component", load)


def write_rows(path: Path, rows: list[tuple]) -> Path:
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("path", "text", "num_frames", "height", "width"))
        writer.writerows(rows)
    return path


def make_rows(folder: Path, count: int = 12, first: int = 0, seed: int = 0) -> list[tuple]:
    """Rows of videos of several sizes and lengths, every fifth an image, written into `folder`."""
    folder.mkdir(exist_ok=True)
    rows = []
    for number in range(first, first + count):
        generator = np.random.default_rng((seed, number))
        height, width = SIZES[number % len(SIZES)]
        length = 1 if number % 5 == 4 else int(generator.integers(9, 24))
        coarse = generator.integers(0, 256, (length, height // 8 + 1, width // 8 + 1, 3), dtype=np.uint8)
        frames = coarse.repeat(8, axis=1).repeat(8, axis=2)[:, :height, :width]
        path = folder / (f"{number}.png" if length == 1 else f"{number}.mp4")
        write_image(frames[0], path) if length == 1 else write_video(frames, path, 24)
        rows.append((path, f"clip {number}" + "!" * (number % 4), length, height, width))
    return rows


def settings(table: Path, folder: Path, **changes: Any) -> ExtractSettings:
    made = dict(
        dataset={"type": "VariableVideoTextDataset", "data_path": str(table)}, bucket_config=BUCKETS,
        vae={"type": "VideoAutoencoderKL"}, text_encoder={"type": "t5"}, save_dir=str(folder), num_workers=0,
        bin_size=3, device="cpu", dtype="fp32", seed=7,
    )  # fmt: skip
    return ExtractSettings(**{**made, **changes})


def contents(folder: Path) -> dict[str, str]:
    """The hash of every file of a folder, by its name, hidden ones too; where the table lies does not count."""
    files = (file for file in sorted(folder.rglob("*")) if file.is_file())
    return {str(file.relative_to(folder)): hashlib.sha256(_content(file)).hexdigest() for file in files}


def _content(file: Path) -> bytes:
    content = file.read_bytes()
    return json.dumps({**json.loads(content), "table": ""}).encode() if file.name == "plan.json" else content

"""The result of a call in memory: frames with their frame rate and recipe, which can be saved and shown."""

from __future__ import annotations

import base64
import html
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from opensora.datasets.video import encode_image, encode_video
from opensora.errors import MediaError
from opensora.pipeline.output_files import write_video
from opensora.pipeline.recipe import Recipe

if TYPE_CHECKING:
    from PIL.Image import Image

OUTPUT_TYPES = ("np", "pt", "pil", "latent")


@dataclass(frozen=True, eq=False)
class Video:
    """A generated video, or an image (one frame).

    frames: by `output_type`: "np" uint8 [T, H, W, 3]; "pt" float32 [T, 3, H, W] in [0, 1]; "pil" a list of images;
        "latent" the latents float32 [C, T', H', W'] of the (last) clip
    fps: frames per second
    recipe: everything needed to generate it again; `save` writes it into the file
    pixels: uint8 [T, H, W, 3], whatever `frames` is; empty for "latent"
    """

    frames: Any
    fps: float
    recipe: Recipe
    pixels: np.ndarray

    @classmethod
    def of(cls, pixels: np.ndarray, latents: Tensor, fps: float, recipe: Recipe, output_type: str = "np") -> Video:
        """The video of decoded frames uint8 [T, H, W, 3] and latents [C, T', H', W']."""
        frames: Any = pixels
        if output_type == "pt":
            frames = torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous().float() / 255
        elif output_type == "pil":
            frames = _images(pixels)
        elif output_type == "latent":
            frames, pixels = (
                latents.clone(),
                np.empty((0, 0, 0, 3), np.uint8),
            )  # a normal tensor, not an inference-mode one
        return cls(frames, fps, recipe, pixels)

    def save(self, path: str | Path) -> Path:
        """Writes .mp4 or .gif (.png for one frame), and its recipe beside it as .json, both or neither.

        The .mp4 or .png holds the recipe too. Existing files are replaced. Raises MediaError.
        """
        if not len(self.pixels):
            raise MediaError(f"{path}: latents cannot be saved as a video; remove output_type='latent'")
        return write_video(path, self.pixels, self.fps, self.recipe)

    def _repr_html_(self) -> str | None:
        """The video itself, for notebooks."""
        if not len(self.pixels):
            return None
        caption = html.escape(str(self.recipe["prompt"]), quote=True)
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / ("image.png" if len(self.pixels) == 1 else "video.mp4")
            if len(self.pixels) == 1:
                encode_image(self.pixels[0], file)
            else:
                encode_video(self.pixels, file, self.fps)
            data = base64.b64encode(file.read_bytes()).decode()
        if len(self.pixels) == 1:
            return f'<img alt="{caption}" src="data:image/png;base64,{data}">'
        return f'<video title="{caption}" controls autoplay loop muted src="data:video/mp4;base64,{data}"></video>'

    def __repr__(self) -> str:
        if not len(self.pixels):
            return f"Video(latents of shape {list(self.frames.shape)}, {self.recipe['prompt']!r})"
        count, height, width, _ = self.pixels.shape
        return f"Video({count} frames of {height}x{width} at {self.fps:g} fps, {self.recipe['prompt']!r})"


def _images(pixels: np.ndarray) -> list[Image]:
    from PIL import Image

    return [Image.fromarray(frame) for frame in pixels]

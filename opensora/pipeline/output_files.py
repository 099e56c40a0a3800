"""Writes frames with their recipe: into the metadata of the file, and into a JSON file beside it."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np

from opensora.datasets.video import encode_image, encode_video
from opensora.errors import MediaError
from opensora.files import atomic_write
from opensora.pipeline.output_names import IMAGE, VIDEO
from opensora.pipeline.recipe import KEY, Recipe, with_output


def write_video(path: str | os.PathLike[str], frames: np.ndarray, fps: float, recipe: Recipe) -> Path:
    """Writes frames uint8 [T, H, W, 3] as .mp4 or .gif, one frame as .png, with the recipe beside it as .json.

    The .mp4 or .png holds the recipe too. Existing files are replaced, folders are created; both files appear complete
    or neither does. Raises MediaError for another suffix, and where a file cannot be written.
    """
    path = Path(path)
    suffixes = (VIDEO, ".gif") if len(frames) > 1 else (IMAGE,)
    if path.suffix.lower() not in suffixes:
        content = "an image" if len(frames) == 1 else f"a video of {len(frames)} frames"
        raise MediaError(f"{path}: will hold {content}; name it {path.stem or 'out'}{suffixes[0]}")
    recipe = with_output(recipe, frames, fps)
    with atomic_write(path, path.with_suffix(".json"), make_folders=True) as (media, sidecar):
        if path.suffix.lower() == ".gif":
            _encode_gif(frames, media, fps)
        else:
            _encode(frames, media, fps, recipe)
        _write_recipe(recipe, sidecar)
    return path


def encode_output(frames: np.ndarray, media: Path, sidecar: Path, fps: float, recipe: Recipe) -> None:
    """Writes the media file and the JSON file of a result to temporary paths; OSError where writing fails."""
    recipe = with_output(recipe, frames, fps)
    _encode(frames, media, fps, recipe)
    _write_recipe(recipe, sidecar)


def _encode(frames: np.ndarray, path: Path, fps: float, recipe: Recipe) -> None:
    metadata = {KEY: json.dumps(recipe, ensure_ascii=False)}
    if len(frames) > 1:
        encode_video(frames, path, fps, metadata)
    else:
        encode_image(frames[0], path, metadata)


def _write_recipe(recipe: Recipe, path: Path) -> None:
    path.write_text(json.dumps(recipe, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


def _encode_gif(frames: np.ndarray, path: Path, fps: float) -> None:
    """Writes frames uint8 [T, H, W, 3] as an animated GIF that loops forever; OSError where writing fails."""
    from PIL import Image

    first, *others = map(Image.fromarray, frames)
    duration = round(1000 / fps)  # milliseconds
    first.save(path, format="gif", save_all=True, append_images=others, duration=duration, loop=0)

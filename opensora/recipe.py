"""The self-description of an output: everything needed to make it again, inside the file and beside it."""

from __future__ import annotations

import hashlib
import json
import platform
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from opensora import __version__
from opensora.datasets.video import encode_image, encode_video, read_metadata
from opensora.errors import MediaError
from opensora.files import replacing

FORMAT = 1
KEY = "opensora_recipe"  # of the metadata of the mp4 or png
Recipe = dict[str, Any]


def make_recipe(
    prompt: str, encoded_prompts: list[str], seed: int, sample_index: int, *,
    settings: dict, weights: dict[str, str], references: dict[str, str] | None = None,
) -> Recipe:  # fmt: skip
    """The recipe of one output, without its pixels (`write_output` adds those).

    `encoded_prompts` holds the text given to the encoder, one per loop; `settings` every resolved setting, JSON-able;
    `weights` a hash per component, `references` one per file or URL.
    """
    return {
        "format": FORMAT, "program": program(), "prompt": prompt, "encoded_prompts": encoded_prompts, "seed": seed,
        "sample_index": sample_index, "settings": settings, "weights": weights, "references": references or {},
    }  # fmt: skip


def program() -> dict[str, str]:
    """The versions of what runs here."""
    versions = {"opensora": __version__, "torch": torch.__version__}
    return {**versions, "python": platform.python_version(), "platform": platform.platform()}


def frames_digest(frames: np.ndarray) -> str:
    """The SHA-256, in hexadecimal, of the bytes of frames uint8 [T, H, W, 3] in row-major order."""
    return hashlib.sha256(np.ascontiguousarray(frames)).hexdigest()


def write_output(frames: np.ndarray, path_without_suffix: str | Path, fps: float, recipe: Recipe) -> Path:
    """Writes frames uint8 [T, H, W, 3] as NAME.mp4 (NAME.png for one frame) and NAME.json, and returns the media path.

    The recipe, with the digest and size of the frames added under "output", goes into both files. Both appear
    complete or neither does. Raises MediaError where they cannot be written.
    """
    num_frames, height, width = frames.shape[:3]
    output = {"sha256": frames_digest(frames), "num_frames": num_frames, "height": height, "width": width, "fps": fps}
    recipe = {**recipe, "output": output}
    metadata = {KEY: json.dumps(recipe, ensure_ascii=False)}
    media = Path(f"{path_without_suffix}.{'mp4' if num_frames > 1 else 'png'}")
    with replacing(media, f"{path_without_suffix}.json") as (temporary_media, temporary_sidecar):
        if num_frames > 1:
            encode_video(frames, temporary_media, fps, metadata)
        else:
            encode_image(frames[0], temporary_media, metadata)
        temporary_sidecar.write_text(json.dumps(recipe, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
    return media


def read_recipe(path: str | Path) -> Recipe:
    """The recipe of an output: from a .json, from the .mp4 or .png itself, or from the .json beside it.

    Raises MediaError if there is none, or if a newer program wrote it.
    """
    path, text = Path(path), None
    if path.suffix.lower() != ".json":
        text, sidecar = read_metadata(path).get(KEY), path.with_suffix(".json")
        if text is None and not sidecar.is_file():
            raise MediaError(f"{path}: holds no recipe, nor is {sidecar.name} beside it; was it written by opensora?")
        path = sidecar if text is None else path
    try:
        recipe = json.loads(path.read_text(encoding="utf-8") if text is None else text)
    except (OSError, ValueError) as error:
        raise MediaError(f"{path}: cannot be read as JSON ({getattr(error, 'strerror', None) or error})") from error
    if not isinstance(recipe, dict) or not isinstance(recipe.get("format"), int):
        raise MediaError(f"{path}: is not the recipe of an output")
    if recipe["format"] > FORMAT:
        raise MediaError(f"{path}: a newer program wrote this recipe (format {recipe['format']}); update opensora")
    return recipe


def check_folder(path: str | Path) -> Path:
    """The folder, created where missing and proven writable before anybody waits for a video; MediaError otherwise."""
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(bytes(4096))
    except OSError as error:
        reason = error.strerror or error
        raise MediaError(f"{folder}: outputs cannot be saved there ({reason}); choose another --save-dir") from error
    return folder

"""Recipes: everything needed to generate an output again, stored in its metadata and in a JSON file beside it.

Recipes are untrusted: a recipe sets only the settings in `RECIPE_SETTINGS`. The caller alone sets network access, API
keys and output paths.
"""

from __future__ import annotations

import dataclasses
import hashlib
import platform
import re
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import Field

from opensora import __version__
from opensora.config.schema import Count, Int, Name, NonNegative, Positive, Schema, Sha256, Text, check
from opensora.config.settings import InferenceSettings
from opensora.datasets.video import read_metadata
from opensora.errors import MediaError, OpenSoraError
from opensora.files import open_bounded, parse_json, read_json
from opensora.pipeline.adapter_uses import adapter_uses

FORMAT = 1
KEY = "opensora_recipe"  # of the metadata of the mp4 or png
TOKENIZER = "tokenizer"  # its entry among the hashes of the weights; older recipes have none
Recipe = dict[str, Any]

# Settings that a recipe or draft may set: the content of the frames and how they are computed. All others keep their
# defaults, whatever the file says.
RECIPE_SETTINGS = frozenset((
    "model", "vae", "text_encoder", "lora", "fuse_lora", "any_base",
    "scheduler", "dtype", "cpu_dtype", "linear", "attention", "device", "memory",
    "compile", "graphs", "guidance_ranks", "batch_size", "seed", "prompt", "negative_prompt", "refined", "aes", "flow",
    "camera_motion",
    "num_sample", "num_frames", "image_size", "resolution", "aspect_ratio", "multi_resolution", "fps", "frame_interval",
    "save_fps", "loop", "condition_frame_length", "condition_frame_edit", "align", "reference_path", "mask_strategy",
    "watermark", "preview", "verbose", "steps_until", "draft", "cache", "max_error", "cache_threshold", "cache_prompts",
    "cache_table", "guidance_interval",
))  # fmt: skip
USER_SETTINGS = frozenset((
    "save_dir", "sample_name", "output", "overwrite", "prompt_as_path", "prompt_path", "start_index", "end_index",
    "outputs", "offline", "allow_downloads", "llm_refine", "llm_base_url", "llm_model", "prompt_generator",
    "image", "first_frame", "last_frame", "extend", "keep", "edit", "strength", "cache_psnr",
    "dataset", "num_workers", "perceptual_loss_weight", "kl_loss_weight",
))  # fmt: skip
USER_SECTION_KEYS = ("cache_dir", "local_files_only")  # the folder of downloads, and whether to download

MAX_MEDIA_BYTES = 2**40  # of an mp4 or png; only its metadata is read
MAX_THREADS = 1024
Threads = Annotated[Positive, Field(le=MAX_THREADS)]


class _Output(Schema):
    sha256: Sha256
    num_frames: Positive
    height: Positive
    width: Positive
    fps: NonNegative


class _Draft(Schema):
    steps: Positive
    of: Positive


class DraftRecipe(Schema):
    """The recipe in a draft, whose output does not exist yet."""

    format: Annotated[Positive, Field(le=FORMAT)]
    program: dict[Name, Name]
    threads: Threads | None = None  # CPU threads; older recipes lack it
    prompt: Text
    encoded_prompts: list[Text]
    seed: Int
    sample_index: Annotated[Count, Field(lt=2**31)]
    settings: dict[Name, Any]  # checked by `settings_of`
    weights: dict[Name, Sha256]
    references: dict[Text, Sha256]
    draft: _Draft | None = None


class OutputRecipe(DraftRecipe):
    """The recipe in an output."""

    output: _Output


def make_recipe(
    prompt: str, encoded_prompts: list[str], seed: int, sample_index: int, *,
    settings: dict, weights: dict[str, str], references: dict[str, str] | None = None,
) -> Recipe:  # fmt: skip
    """The recipe of one output, without its pixels (`with_output` adds those).

    `encoded_prompts` holds the text given to the encoder, one per loop; `settings` every resolved setting, JSON-able;
    `weights` a hash per component, `references` one per file or URL. The current number of threads is recorded,
    since it changes the last bits of sums.
    """
    return {
        "format": FORMAT, "program": program(), "threads": torch.get_num_threads(), "prompt": prompt,
        "encoded_prompts": encoded_prompts, "seed": seed, "sample_index": sample_index, "settings": settings,
        "weights": weights, "references": references or {},
    }  # fmt: skip


def program() -> dict[str, str]:
    """The versions of opensora, torch, Python and the platform."""
    versions = {"opensora": __version__, "torch": torch.__version__}
    return {**versions, "python": platform.python_version(), "platform": platform.platform()}


def frames_digest(frames: np.ndarray) -> str:
    """The SHA-256, in hexadecimal, of the bytes of frames uint8 [T, H, W, 3] in row-major order."""
    return hashlib.sha256(np.ascontiguousarray(frames).data).hexdigest()


def with_output(recipe: Recipe, frames: np.ndarray, fps: float) -> Recipe:
    """The recipe with the digest and size of its frames under "output"."""
    num_frames, height, width = frames.shape[:3]
    output = {"sha256": frames_digest(frames), "num_frames": num_frames, "height": height, "width": width, "fps": fps}
    return {**recipe, "output": output}


def read_recipe(path: str | Path) -> Recipe:
    """Reads the recipe of an output from a .json, from a .mp4 or .png, or from the .json beside it.

    Raises MediaError for a missing or invalid recipe, and for one of a newer program.
    """
    path, text = Path(path), None
    if path.suffix.lower() != ".json":
        with open_bounded(path, MAX_MEDIA_BYTES):
            pass  # raises for a device or pipe
        text, sidecar = read_metadata(path).get(KEY), path.with_suffix(".json")
        if text is None and not sidecar.is_file():
            raise MediaError(f"{path}: holds no recipe, nor is {sidecar.name} beside it; was it written by opensora?")
        path = sidecar if text is None else path
    recipe = read_json(path) if text is None else parse_json(text, str(path))
    return check_recipe(recipe, OutputRecipe, str(path), MediaError)


def check_recipe(recipe: Any, kind: type[DraftRecipe], where: str, error: type[OpenSoraError]) -> Recipe:
    """Validates a recipe against `kind`, except its settings, which `settings_of` checks. Raises `error`."""
    if not isinstance(recipe, dict) or "format" not in recipe:
        raise error(f"{where}: is not the recipe of an output")
    if check(Positive, recipe["format"], f"{where}: format", error) > FORMAT:
        raise error(f"{where}: a newer program wrote this recipe (format {recipe['format']}); update opensora")
    check(kind, recipe, f"{where}: its recipe is incomplete or damaged", error)
    return recipe


def settings_of(recipe: Recipe, where: str) -> InferenceSettings:
    """The settings of a recipe: those in `RECIPE_SETTINGS` from the file, defaults for all others.

    Raises ConfigError for an invalid setting, MediaError for one that needs the network; messages start with `where`.
    """
    fields = {one.name: one for one in dataclasses.fields(InferenceSettings)}
    known = {name: value for name, value in recipe["settings"].items() if name in fields or name not in USER_SETTINGS}
    stated = InferenceSettings.from_config(known, where)
    if recipe["sample_index"] >= stated.num_sample:
        problem = f"its recipe is of sample {recipe['sample_index']}, but makes {stated.num_sample} of the prompt"
        raise MediaError(f"{where}: {problem}")
    users: dict[str, Any] = {name: field.default for name, field in fields.items() if name not in RECIPE_SETTINGS}
    if stated.llm_refine and stated.refined is None:
        problem = "it asks for prompts refined by a language model, but contains none"
        remedy = "a recipe cannot call a language model: generate again with --llm-refine True"
        raise MediaError(f"{where}: {problem}; {remedy}")
    sections: dict[str, Any] = {
        name: _without_user_keys(value, f"{where}: {name}")
        for name in RECIPE_SETTINGS
        if isinstance(value := getattr(stated, name), dict) and name not in ("refined", "cache_table")
    }
    for use in adapter_uses(stated.lora):
        _check_local(use.path, f"{where}: lora")
    for text in stated.reference_path or ():
        for source in text.split(";"):
            _check_local(source, f"{where}: reference_path")
    return dataclasses.replace(stated, **users, **sections)


def _without_user_keys(section: dict[str, Any], where: str) -> dict[str, Any]:
    kept = {name: value for name, value in section.items() if name not in USER_SECTION_KEYS}
    for name, value in kept.items():
        if isinstance(value, dict):
            kept[name] = _without_user_keys(value, f"{where}.{name}")
        elif isinstance(value, str):
            _check_local(value, f"{where}.{name}")
    return kept


def _check_local(path: str, where: str) -> None:
    """Raises MediaError for a UNC path, which Windows resolves over the network."""
    if re.match(r"[/\\]{2}", path):
        raise MediaError(f"{where}: {path[:80]!r} names another host; a recipe cannot contact it")

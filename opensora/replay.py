"""Makes an output again from its recipe alone, and says whether the result is identical."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from opensora.errors import ConfigError, MediaError, WeightsError
from opensora.pipeline import Output, VideoPipeline
from opensora.recipe import Recipe, read_recipe
from opensora.settings import InferenceSettings


class Replay(NamedTuple):
    """The repeated output, whether its decoded frames are the same bytes, and what may explain a difference."""

    output: Output
    identical: bool
    differences: list[str]


def replay(
    file: str | Path, save_dir: str | Path, device: str | None = None, weights: Mapping[str, str | None] | None = None
) -> Replay:
    """Repeats the output `file` into `save_dir`.

    `weights` says where a part ("model", "vae", "text_encoder") lies now, if not where the recipe says. Raises
    MediaError when the file holds no usable recipe, and what generation raises.
    """
    recipe = read_recipe(file)
    try:
        settings = _settings(recipe, Path(file), Path(save_dir), device, weights or {})
        sample, expected = recipe["sample_index"], recipe["output"]["sha256"]
        weights_then, then = dict(recipe["weights"]), dict(recipe["program"])
    except ConfigError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise MediaError(f"{file}: its recipe is incomplete or damaged ({error!r})") from error
    pipeline = VideoPipeline(settings)
    # Every sample of a prompt is made by itself: only the one asked for stays.
    pipeline.requests = [request for request in pipeline.requests if request.sample == sample]
    if not pipeline.requests:
        raise MediaError(f"{file}: its recipe is of sample {sample}, but makes {settings.num_sample} of the prompt")
    try:
        output = next(pipeline.generate())
    except WeightsError as error:
        flags = "--ckpt-path, --vae-path or --text-encoder-path"
        raise WeightsError(f"{error}; if the weights of the recipe have moved, say where with {flags}") from error
    again = read_recipe(output.path)
    differences = [f"other {part} weights" for part, sha in again["weights"].items() if weights_then.get(part) != sha]
    now = again["program"]
    differences += [f"{name} {then.get(name)} then, {now[name]} now" for name in now if now[name] != then.get(name)]
    return Replay(output, again["output"]["sha256"] == expected, differences)


def _settings(
    recipe: Recipe, file: Path, save_dir: Path, device: str | None, weights: Mapping[str, str | None]
) -> InferenceSettings:
    settings = recipe["settings"]
    if save_dir.resolve() == Path(settings["save_dir"]).resolve():
        raise ConfigError(f"{save_dir} is where the original lies; choose another --save-dir")
    changed = {
        "prompt": [recipe["prompt"]], "prompt_path": None, "start_index": 0, "end_index": None,
        "prompt_as_path": False, "save_dir": str(save_dir), "sample_name": f"{file.stem}-replay",
        "device": device or settings["device"],
    }  # fmt: skip
    changed |= {part: {**settings[part], "from_pretrained": source} for part, source in weights.items() if source}
    return InferenceSettings.from_config({**settings, **changed}, f"{file}: recipe")

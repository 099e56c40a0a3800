"""Outputs again: made from a recipe alone and compared, or a draft taken to its end."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from opensora.draft import Draft, differences, load
from opensora.errors import ConfigError, MediaError, OpenSoraError, WeightsError
from opensora.pipeline import Output, VideoPipeline
from opensora.recipe import Recipe, program, read_recipe
from opensora.references import content_hashes
from opensora.request import PARTS
from opensora.settings import InferenceSettings

logger = logging.getLogger("opensora")

ITS_OWN = ("prompt", "reference_path", "mask_strategy")  # settings with an entry for each result
ALONE = {"prompt_path": None, "start_index": 0, "end_index": None, "prompt_as_path": False}
MAY_DIFFER = ("device", "offline", "verbose", "preview", *(f"{part}.from_pretrained" for part in PARTS))


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
    MediaError when the file holds no usable recipe or a reference is no longer what it was, and what generation raises.
    """
    recipe = read_recipe(file)
    try:
        settings = _settings(recipe, Path(file), Path(save_dir), device, weights or {})
        sample, expected = recipe["sample_index"], recipe["output"]["sha256"]
        weights_then, then = dict(recipe["weights"]), dict(recipe["program"])
        _check_references(file, recipe)
    except OpenSoraError:
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
    found = [f"other {part} weights" for part, sha in again["weights"].items() if weights_then.get(part) != sha]
    return Replay(output, again["output"]["sha256"] == expected, found + _other_versions(then, again["program"]))


def finish(
    files: Iterable[str | Path], asked: Callable[[dict[str, Any]], dict[str, Any]] | None = None
) -> Iterator[Output]:
    """Takes drafts to their end: each output is what it would have been without a stop, bit for bit.

    `asked` turns the settings of a draft, as a configuration, into those wanted now, which may differ in where weights
    lie and where they run. Raises WeightsError for a file that is no draft or is damaged, and where weights are others
    than then; ConfigError where settings are, MediaError where references are; and what generation raises.
    """
    drafts = [load(file) for file in dict.fromkeys(map(Path, files))]
    by_path = {one.path: one.file for one in drafts}
    for one in drafts:
        if by_path[one.path] != one.file:
            both = f"{one.file} and {by_path[one.path]} would both become {one.path}"
            raise ConfigError(f"{both}; put one of them into a folder of its own")
    alike: dict[str, list[tuple[Draft, InferenceSettings]]] = {}
    for one in drafts:
        settings = _settings_now(one, asked or dict)
        _check_references(one.file, one.recipe)
        common = {name: value for name, value in dataclasses.asdict(settings).items() if name not in ITS_OWN}
        key = json.dumps([common, str(one.file.parent), one.recipe["weights"]])
        alike.setdefault(key, []).append((one, settings))
    pipelines = [_pipeline(*zip(*group, strict=True)) for group in alike.values()]
    for pipeline in pipelines:
        yield from pipeline.generate()


def _settings(
    recipe: Recipe, file: Path, save_dir: Path, device: str | None, weights: Mapping[str, str | None]
) -> InferenceSettings:
    settings = recipe["settings"]
    if save_dir.resolve() == Path(settings["save_dir"]).resolve():
        raise ConfigError(f"{save_dir} is where the original lies; choose another --save-dir")
    changed = {
        **ALONE, "prompt": [recipe["prompt"]], "save_dir": str(save_dir), "sample_name": f"{file.stem}-replay",
        "device": device or settings["device"],
    }  # fmt: skip
    changed |= {part: {**settings[part], "from_pretrained": source} for part, source in weights.items() if source}
    return InferenceSettings.from_config({**settings, **changed}, f"{file}: recipe")


def _check_references(file: str | Path, recipe: Recipe) -> None:
    """Raises MediaError where a reference of a recipe holds other bytes now."""
    for source, sha256 in recipe.get("references", {}).items():
        if (found := content_hashes(source)[source]) != sha256:
            problem = f"reference {source!r} is not what it was, sha256 {sha256[:12]} then, {found[:12]} now"
            raise MediaError(f"{file}: {problem}; put the original back")


def _other_versions(then: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    return [f"{name} {then.get(name)} then, {now[name]} now" for name in now if now[name] != then.get(name)]


def _settings_now(draft: Draft, asked: Callable[[dict[str, Any]], dict[str, Any]]) -> InferenceSettings:
    """The settings wanted now for what a draft was made with. Raises ConfigError where they mean something else."""
    recorded = {name: value for name, value in draft.recipe["settings"].items() if value is not None}
    then = InferenceSettings.from_config(recorded, f"{draft.file}")
    now = InferenceSettings.from_config(asked(recorded), f"{draft.file}")
    for name, was, value in differences(dataclasses.asdict(then), dataclasses.asdict(now)):
        if name not in MAY_DIFFER:
            problem = f"{name} was {was!r} for the draft and is {value!r} now"
            raise ConfigError(f"{draft.file}: {problem}; leave it out, or make the draft again")
    return now


def _pipeline(drafts: Sequence[Draft], settings: Sequence[InferenceSettings]) -> VideoPipeline:
    """What finishes drafts whose settings differ in `ITS_OWN` alone."""
    changed: dict[str, Any] = {**ALONE, "prompt": [one.recipe["prompt"] for one in drafts]}
    for name in ("reference_path", "mask_strategy"):
        given = [getattr(one, name) for one in settings]
        changed[name] = [value[0] if value else "" for value in given] if any(given) else None
    changed["save_dir"] = str(drafts[0].file.parent)
    pipeline = VideoPipeline(dataclasses.replace(settings[0], **changed))
    of_each = range(0, len(pipeline.requests), settings[0].num_sample)
    wanted = [pipeline.requests[first + one.recipe["sample_index"]] for first, one in zip(of_each, drafts, strict=True)]
    pipeline.requests = [request._replace(path=one.path) for request, one in zip(wanted, drafts, strict=True)]
    pipeline.drafts = {one.path: one for one in drafts}
    now = {**program(), "device": str(pipeline.device)}
    for one in drafts:
        if others := _other_versions({**one.recipe["program"], "device": one.device}, now):
            logger.warning("%s: the rest may not be what it would have been: %s", one.file, ", ".join(others))
    return pipeline

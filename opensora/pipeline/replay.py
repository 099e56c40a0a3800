"""Generates an output again from its recipe and compares the two, or finishes a draft.

Recipes and drafts are untrusted. `opensora.pipeline.recipe` lists the settings that they may set; the caller chooses
download sources and output paths. Nothing is downloaded without `allow_downloads`.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch

from opensora.config.schema import Text, check, shown
from opensora.config.settings import InferenceSettings
from opensora.errors import ConfigError, MediaError, OpenSoraError, WeightsError
from opensora.pipeline import prompts
from opensora.pipeline.adapter_uses import adapter_uses
from opensora.pipeline.draft import Draft, differences, load
from opensora.pipeline.frame_difference import FrameDifference, compare_frames
from opensora.pipeline.job_spec import JobSpec
from opensora.pipeline.outputs import Output
from opensora.pipeline.pipeline import VideoPipeline
from opensora.pipeline.recipe import (
    RECIPE_SETTINGS,
    TOKENIZER,
    USER_SECTION_KEYS,
    Recipe,
    program,
    read_recipe,
    settings_of,
)
from opensora.pipeline.reference_path import urls
from opensora.pipeline.references import content_hashes
from opensora.pipeline.request import PARTS

logger = logging.getLogger("opensora")

PER_RESULT = ("prompt", "reference_path", "mask_strategy")  # settings with an entry for each result
# Settings that may change when a draft is continued. Its prompts are already refined, so `llm_*` has no effect.
CHANGEABLE = (
    "device", "offline", "allow_downloads", "verbose", "preview", "overwrite", "llm_refine", "llm_base_url",
    "llm_model", "lora", *(f"{part}.{name}" for part in PARTS for name in ("from_pretrained", *USER_SECTION_KEYS)),
)  # fmt: skip


class Replay(NamedTuple):
    """The repeated output, compared with the original."""

    output: Output
    identical: bool  # the decoded frames have the same bytes
    differences: list[str]  # of weights and versions, which may explain other frames
    made_by: str  # the version of opensora that made the original
    frames: FrameDifference | None  # between both files; None if identical, or if the original cannot be compared


def replay(
    file: str | Path, save_dir: str | Path, device: str | None = None,
    weights: Mapping[str, str | None] | None = None, allow_downloads: bool = False, lora: Sequence[str] | None = None,
) -> Replay:  # fmt: skip
    """Repeats the output `file` into `save_dir`, with the recorded number of threads.

    `weights` says where a part ("model", "vae", "text_encoder") lies now, if not where the recipe says, and `lora`
    where its adapters lie, in their order. Hub ids and URLs in the recipe are used only with
    `allow_downloads`. Raises MediaError when the file holds no usable recipe or a reference is no longer what it was,
    and what generation raises.
    """
    file, save_dir = Path(file), Path(save_dir)
    recipe = read_recipe(file)
    if save_dir.resolve() == file.resolve().parent:
        raise ConfigError(f"{save_dir} is where the original is; choose another --save-dir")
    settings = settings_of(recipe, f"{file}: recipe")
    changed: dict[str, Any] = {
        "prompt": [recipe["prompt"]], "save_dir": str(save_dir), "sample_name": f"{file.stem}-replay",
        "device": device or settings.device, "offline": not allow_downloads, "allow_downloads": allow_downloads,
    }  # fmt: skip
    given = {part: source for part, source in (weights or {}).items() if source}
    changed |= {part: {**(getattr(settings, part) or {}), "from_pretrained": source} for part, source in given.items()}
    if lora:
        changed["lora"] = _moved(settings.lora, lora, f"{file}")
    settings = dataclasses.replace(settings, **changed)
    _check_references(file, recipe, settings)
    with recorded_threads(recipe), _suggest_flags(settings):
        pipeline = VideoPipeline(settings)
        output = next(pipeline.generate(JobSpec(settings, sample=recipe["sample_index"])))
    again = read_recipe(output.path)
    identical = again["output"]["sha256"] == recipe["output"]["sha256"]
    original = file.with_suffix(output.path.suffix)
    frames = None if identical else compare_frames(original, output.path, recipe["output"]["num_frames"])
    made_by = recipe["program"].get("opensora", "of an unknown version")
    return Replay(output, identical, _explanations(recipe, again), made_by, frames)


def finish(
    files: Iterable[str | Path], update: Callable[[dict[str, Any]], dict[str, Any]] | None = None
) -> Iterator[Output]:
    """Finishes drafts, with the recorded number of threads: each output is that of an uninterrupted run.

    `update` turns the settings of a draft, as a configuration, into those wanted now, which may differ only in
    `CHANGEABLE`. Raises WeightsError for a file that is not a draft or is damaged, and for other weights; ConfigError
    for other settings; MediaError for other references, or another result at its path; and what generation raises.
    """
    drafts = [load(file) for file in dict.fromkeys(map(Path, files))]
    by_path = {one.path: one.file for one in drafts}
    for one in drafts:
        if by_path[one.path] != one.file:
            both = f"{one.file} and {by_path[one.path]} would both become {one.path}"
            raise ConfigError(f"{both}; move one of them into another folder")
    alike: dict[str, list[tuple[Draft, InferenceSettings]]] = {}
    for one in drafts:
        settings = _settings_now(one, update or dict)
        _check_references(one.file, one.recipe, settings)
        common = {name: value for name, value in dataclasses.asdict(settings).items() if name not in PER_RESULT}
        key = json.dumps([common, str(one.file.parent), one.recipe["weights"], one.recipe.get("threads")])
        alike.setdefault(key, []).append((one, settings))
    specs = [(group[0], *_spec(*zip(*group, strict=True))) for group in alike.values()]
    for (first, settings), pipeline, spec in specs:
        with recorded_threads(first.recipe), _suggest_flags(settings):
            yield from pipeline.generate(spec)


def _check_references(file: Path, recipe: Recipe, settings: InferenceSettings) -> None:
    """Raises MediaError unless the references of a recipe have the recorded hashes."""
    stated = settings.reference_path[0] if settings.reference_path else None
    named = prompts.split_json(recipe["prompt"])[1].get("reference_path", stated)
    text = check(Text | None, named, f"{file}: reference_path", MediaError)
    if not settings.allow_downloads and (addresses := urls(text)):
        problem = f"reference {shown(addresses[0])} is a URL from a recipe"
        raise MediaError(f"{file}: {problem}; --allow-downloads fetches it")
    found, then = content_hashes(text), recipe["references"]
    for source, sha256 in then.items():
        if source not in found:
            raise MediaError(f"{file}: has a hash of {shown(source)}, which is no reference of its settings")
        if found[source] != sha256:
            problem = f"reference {source!r} is not what it was, sha256 {sha256[:12]} then"
            raise MediaError(f"{file}: {problem}; restore the original")
    if missing := [source for source in found if source not in then]:
        raise MediaError(f"{file}: has no hash of its reference {shown(missing[0])}; generate it again")


def _moved(then: Sequence[str] | None, now: Sequence[str], where: str) -> list[str]:
    """The adapters of a recipe at other paths; their strengths stay. Raises ConfigError for other adapters."""
    uses, paths = adapter_uses(then), adapter_uses(now)
    if len(uses) != len(paths):
        raise ConfigError(f"{where}: has {len(uses)} adapters, but lora names {len(paths)}; give one path for each")
    for use, found in zip(uses, paths, strict=True):
        if found.strength not in (use.strength, 1.0):  # 1 where none is stated
            problem = f"the strength of {found.path} was {use.strength:g} and is {found.strength:g} now"
            raise ConfigError(f"{where}: {problem}; leave it out")
    return [str(use._replace(path=found.path)) for use, found in zip(uses, paths, strict=True)]


def _explanations(then: Recipe, now: Recipe) -> list[str]:
    """The weights and versions that differ between two recipes."""
    found = []
    for part, sha256 in then["weights"].items():
        if now["weights"].get(part) != sha256:
            found.append("another tokenizer" if part == TOKENIZER else f"other {part} weights")
    return [*found, *_other_versions(_machine(then), _machine(now))]


def _machine(recipe: Recipe) -> dict[str, Any]:
    """The versions and the number of threads that computed an output."""
    return {**recipe["program"], "threads": recipe.get("threads")}


def _other_versions(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    return [
        f"{name} {'not recorded' if then.get(name) is None else then[name]} then, {now[name]} now"
        for name in now
        if now[name] != then.get(name)
    ]


def _settings_now(draft: Draft, update: Callable[[dict[str, Any]], dict[str, Any]]) -> InferenceSettings:
    """The current settings for finishing a draft. Raises ConfigError if they would change the result."""
    then = settings_of(draft.recipe, f"{draft.file}")
    recorded = {name: value for name, value in dataclasses.asdict(then).items() if value is not None}
    now = InferenceSettings.from_config(update(recorded), f"{draft.file}")
    if now.lora != then.lora:
        now = dataclasses.replace(now, lora=_moved(then.lora, now.lora or (), f"{draft.file}"))
    for name, was, value in differences(dataclasses.asdict(then), dataclasses.asdict(now)):
        if name in CHANGEABLE:
            continue
        problem = f"{name} was {shown(was)} for the draft and is {shown(value)} now"
        if name.partition(".")[0] not in RECIPE_SETTINGS:
            problem = f"{name} has no effect on a draft, whose result is saved beside it"
        raise ConfigError(f"{draft.file}: {problem}; remove it, or create the draft again")
    offline = now.offline or not now.allow_downloads
    return dataclasses.replace(now, offline=offline, llm_refine=False, llm_base_url=None, llm_model=None)


def _spec(drafts: Sequence[Draft], settings: Sequence[InferenceSettings]) -> tuple[VideoPipeline, JobSpec]:
    """The pipeline and the requests that finish drafts whose settings differ in `PER_RESULT` alone."""
    changed: dict[str, Any] = {"prompt": [one.recipe["prompt"] for one in drafts], "num_sample": 1}
    for name in ("reference_path", "mask_strategy"):
        given = [getattr(one, name) for one in settings]
        changed[name] = [value[0] if value else "" for value in given] if any(given) else None
    changed["save_dir"] = str(drafts[0].file.parent)
    whole = dataclasses.replace(settings[0], **changed)
    spec, pipeline = JobSpec(whole, drafts=drafts), VideoPipeline(whole)
    for one in drafts:
        if _is_result(spec.outputs.files(one.path)[0], one):
            spec.outputs.allow_replacing(one.path)
    now = {**program(), "device": str(pipeline.models.device)}
    for one in drafts:
        if others := _other_versions({**one.recipe["program"], "device": one.device}, now):
            logger.warning("%s: the rest may not be what it would have been: %s", one.file, ", ".join(others))
    return pipeline, spec


def _is_result(media: Path, draft: Draft) -> bool:
    """Whether a file is the finished result of this draft."""
    try:
        found = read_recipe(media)
    except OpenSoraError:
        return False
    return all(found.get(name) == value for name, value in draft.recipe.items() if name not in ("program", "threads"))


@contextmanager
def recorded_threads(recipe: Recipe) -> Iterator[None]:
    """Computes with the number of threads that a recipe records, if it does: another changes the last bits of sums."""
    before = torch.get_num_threads()
    torch.set_num_threads(recipe.get("threads") or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _suggest_flags(settings: InferenceSettings) -> Iterator[None]:
    """Adds the flags that may help to a WeightsError."""
    try:
        yield
    except WeightsError as error:
        remedy = "if weights have moved, give --ckpt-path, --vae-path or --text-encoder-path"
        if "(offline)" in str(error) and not settings.allow_downloads:
            remedy += "; --allow-downloads fetches those of the hub"
        raise WeightsError(f"{error}; {remedy}") from error

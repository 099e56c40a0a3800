"""Drafts: a file with the state of a sampler that stopped early and the recipe of the finished result.

The file is safetensors: the tensors of the state, and as metadata a JSON object with the recipe, and a SHA-256 over
both. A recipe names its weights and references by hash, so they cannot be replaced unnoticed. The SHA-256 detects
damage only: anybody can compute it, so the content of a draft is checked as untrusted input.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from opensora.checkpoints.read import read_metadata, read_state_dict
from opensora.checkpoints.save import save_file
from opensora.checkpoints.summary import content_hash
from opensora.config.schema import Name, Positive, Schema, check, shown
from opensora.config.settings import InferenceSettings
from opensora.errors import ConfigError, WeightsError
from opensora.files import check_file_name, open_bounded, parse_json
from opensora.pipeline.output_names import DRAFT
from opensora.pipeline.recipe import TOKENIZER, DraftRecipe, Recipe, check_recipe
from opensora.schedulers.common import SamplerState

FORMAT = 1
KEY, DIGEST = "opensora_draft", "sha256"  # of the metadata
DIVISOR = 3  # --draft takes a third of the steps
GENERATOR = "generator"  # the tensor with the state of the sampler's random numbers
GIVEN = "given"  # the tensor that marks latent frames that are still clean
MAX_BYTES = 2**32  # of the file
MAX_TENSORS = 16


class _Header(Schema):
    """The metadata of a draft."""

    format: Positive
    name: str
    done: Positive
    num_steps: Positive
    device: Name
    recipe: dict[Name, Any]


class Draft(NamedTuple):
    """A draft read from a file: the recipe of the finished result, and the sampler's state."""

    file: Path
    recipe: Recipe
    name: str  # file name of the finished result, without suffix
    state: SamplerState
    generator: Tensor  # the state of the generator that the sampler draws from
    device: str

    @property
    def path(self) -> str:
        """The path of the finished result, without suffix: in the folder of the draft."""
        return str(self.file.parent / self.name)


def steps_to_take(settings: InferenceSettings, scheduler: Any) -> int | None:
    """The number of steps of a draft, None for no draft. Raises ConfigError unless it is below the sampler's."""
    if not settings.draft and settings.steps_until is None:
        return None
    if settings.draft and settings.steps_until is not None:
        raise ConfigError("draft and steps_until both set the number of steps; give one of the two")
    num_steps = scheduler.num_steps
    taken = max(round(num_steps / DIVISOR), 1) if settings.draft else settings.steps_until
    if taken >= num_steps:
        remedy = f"stop after 1 to {num_steps - 1}" if num_steps > 1 else "take more with --num-sampling-steps"
        raise ConfigError(f"a draft after {taken} steps is the whole: the sampler takes {num_steps}; {remedy}")
    return taken


def save(file: Path, name: str, recipe: Recipe, state: SamplerState, generator: Tensor, device: str) -> None:
    """Writes the draft of the result `name` to a .safetensors file, atomically. Raises WeightsError."""
    header = {"format": FORMAT, "name": name, "done": state.step, "num_steps": state.num_steps, "device": device}
    text = json.dumps({**header, "recipe": recipe}, ensure_ascii=False)
    tensors = {"x": state.x, **state.carry, GENERATOR: generator}
    save_file(tensors, file, {KEY: text, DIGEST: _digest(text, tensors)})


def load(file: str | Path) -> Draft:
    """The draft in a file. Raises WeightsError for one that is not a draft, damaged, or from a newer program."""
    file = Path(file)
    if not file.exists():
        raise WeightsError(f"{file}: no such draft; give the {DRAFT}.safetensors file that generate wrote")
    with open_bounded(file, MAX_BYTES, WeightsError):
        pass  # refuses devices and pipes
    metadata = read_metadata(file)
    if KEY not in metadata:
        raise WeightsError(f"{file}: is not a draft; give the {DRAFT}.safetensors file that generate wrote")
    tensors = read_state_dict(file)
    if metadata.get(DIGEST) != _digest(metadata[KEY], tensors):
        raise WeightsError(f"{file}: is damaged, or was changed after it was written; create the draft again")
    header = parse_json(metadata[KEY], str(file), WeightsError)
    if isinstance(header, dict) and check(Positive, header.get("format"), f"{file}: format", WeightsError) > FORMAT:
        raise WeightsError(f"{file}: a newer program wrote this draft (format {header['format']}); update opensora")
    header = check(_Header, header, f"{file}: is incomplete or damaged", WeightsError, "create the draft again")
    recipe = check_recipe(dict(header.recipe), DraftRecipe, str(file), WeightsError)
    if header.done >= header.num_steps:
        raise WeightsError(f"{file}: stands after {header.done} of {header.num_steps} steps; create the draft again")
    _check_tensors(file, tensors)
    name = check_file_name(header.name, str(file), WeightsError)
    if (own := file.name.removesuffix(f"{DRAFT}.safetensors")) != file.name:
        name = check_file_name(own, str(file), WeightsError)  # the file may have been renamed since
    x, generator = tensors.pop("x"), tensors.pop(GENERATOR)
    return Draft(
        file, recipe, name, SamplerState(header.done, header.num_steps, x, x, tensors), generator, header.device
    )


def _check_tensors(file: Path, tensors: Mapping[str, Tensor]) -> None:
    """Raises WeightsError unless the tensors are those of a state: `x` [1, C, T, H, W] and others of its shape.

    GENERATOR is the state of a generator; GIVEN is [1, T] bool.
    """

    def require(holds: bool, problem: str) -> None:
        if not holds:
            raise WeightsError(f"{file}: {problem}; create the draft again")

    require(len(tensors) <= MAX_TENSORS, f"holds {len(tensors)} tensors, more than any sampler leaves")
    for name in ("x", GENERATOR):
        require(name in tensors, f"lacks the tensor '{name}'")
    shape = tensors["x"].shape
    require(len(shape) == 5 and shape[0] == 1 and 0 not in shape, f"'x' has the shape {list(shape)}, no latents")
    for name, tensor in tensors.items():
        where = f"tensor {name[:80]!r}"
        if name == GENERATOR:
            state = torch.Generator().get_state()
            fits = (tensor.dtype, tensor.shape) == (state.dtype, state.shape)
            require(fits, f"{where} is not a generator state")
        elif name == GIVEN:
            require((tensor.dtype, tensor.shape) == (torch.bool, (1, shape[2])), f"{where} is not [1, {shape[2]}] bool")
        else:
            require(tensor.shape == shape and tensor.is_floating_point(), f"{where} is not like 'x', {list(shape)}")
            require(bool(tensor.isfinite().all()), f"{where} holds values that are not finite")


def resume(draft: Draft, generator: torch.Generator) -> SamplerState:
    """The state that a sampler resumes from; `generator` continues where the draft's stopped. Raises WeightsError."""
    try:
        generator.set_state(draft.generator)
    except RuntimeError as error:
        raise WeightsError(f"{draft.file}: holds no generator state; create the draft again") from error
    return draft.state


def check_sampler(draft: Draft, num_steps: int, shape: tuple[int, ...]) -> None:
    """Raises ConfigError where a sampler of `num_steps` on latents [C, T, H, W] is not that of the draft."""
    drafted, current = (draft.state.num_steps, tuple(draft.state.x.shape[1:])), (num_steps, tuple(shape))
    if drafted != current:
        then, now = (f"{steps} steps on latents {list(size)}" for steps, size in (drafted, current))
        raise ConfigError(f"{draft.file}: was made by {then}, but its settings now mean {now}; create the draft again")


def check_unchanged(draft: Draft, now: Recipe) -> None:
    """Raises WeightsError or ConfigError if the recipe of the result is not that of the draft, versions excepted."""
    for part, sha256 in draft.recipe["weights"].items():
        if now["weights"].get(part) != sha256:
            what = "another tokenizer" if part == TOKENIZER else f"other {part} weights"
            problem = f"{draft.file}: was made with {what}, sha256 {sha256[:12]}"
            raise WeightsError(f"{problem}; give their paths, or create the draft again")
    then = {name: value for name, value in draft.recipe.items() if name not in ("program", "weights")}
    for name, was, value in differences(then, {name: now.get(name) for name in then}):
        problem = f"{name} was {shown(was)} for the draft and is {shown(value)} now"
        raise ConfigError(f"{draft.file}: {problem}; create the draft again")


def differences(then: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """`section.name`, old and new value of every setting that differs; None if one of the two lacks it."""
    for name in {**then, **now}:
        was, value = then.get(name), now.get(name)
        if isinstance(was, Mapping) and isinstance(value, Mapping):
            yield from differences(was, value, f"{prefix}{name}.")
        elif _as_json(was) != _as_json(value):
            yield f"{prefix}{name}", was, value


def _as_json(value: Any) -> Any:
    """The value after a round trip through JSON: a tuple becomes a list."""
    return list(value) if isinstance(value, tuple) else value


def _digest(text: str, tensors: Mapping[str, Tensor]) -> str:
    return hashlib.sha256(f"{text}\0{content_hash(tensors)}".encode()).hexdigest()

"""Prompts on their way from a file or the command line to the text encoder, and the names of what they become.

A prompt may give several texts, `|0|a sunny day|2|a rainy day`: each holds from its loop on. It may end in a JSON
object, `a wave.{"reference_path": "wave.png", "mask_strategy": "0"}`. The order of the steps is: `extract_json`, then
`prepare` (texts apart, scores, cleaning, texts together), then in each loop `text_of_loop`.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from collections.abc import Callable, Sequence
from typing import Any

from opensora.errors import ConfigError, did_you_mean
from opensora.models.text_encoder.cleaning import preprocess

log = logging.getLogger(__name__)

JSON_KEYS = ("reference_path", "mask_strategy")
MAX_NAME_BYTES = 200  # of a file name, which leaves room for a suffix below the usual limit of 255


def load_prompts(path: str | os.PathLike[str], start: int | None = None, end: int | None = None) -> list[str]:
    """Lines [start:end] of a text file (UTF-8), stripped; ConfigError if it cannot be read."""
    try:
        with open(path, encoding="utf-8-sig") as file:
            return [line.strip() for line in file][start:end]
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise ConfigError(f"prompt file '{path}' cannot be read: {reason}; give a text file, a prompt a line") from None


def extract_json(
    prompts: Sequence[str], references: Sequence[str], mask_strategies: Sequence[str]
) -> tuple[list[str], list[str], list[str]]:
    """The prompts without their JSON objects, and references and mask strategies with what the objects say instead."""
    split = [split_json(prompt) for prompt in prompts]
    references = [info.get("reference_path", given) for (_, info), given in zip(split, references, strict=True)]
    masks = [info.get("mask_strategy", given) for (_, info), given in zip(split, mask_strategies, strict=True)]
    return [text for text, _ in split], references, masks


def split_json(prompt: str) -> tuple[str, dict[str, str]]:
    """(the text around the last JSON object of a prompt, that object); a prompt without a `{` has an empty object.

    The last object is one that is not part of another brace. Nothing is stripped. Raises ConfigError for an object that
    is not JSON and for keys other than `JSON_KEYS`.
    """
    if "{" not in prompt:
        return prompt, {}
    decoder, found, position = json.JSONDecoder(), None, prompt.find("{")
    while position >= 0:
        try:
            info, end = decoder.raw_decode(prompt, position)
            found = (position, end, info)
        except json.JSONDecodeError:
            end = position + 1
        position = prompt.find("{", end)
    if found is None or prompt.count("{", 0, found[0]) > prompt.count("}", 0, found[0]):
        example = '{"reference_path": "image.png", "mask_strategy": "0"}'
        raise ConfigError(f"prompt {prompt!r}: what follows {{ is not JSON; write it like {example}, or leave {{ out")
    start, end, info = found
    for key in info:
        if key not in JSON_KEYS:
            hint = f"{did_you_mean(key, JSON_KEYS) or ';'} known are {' and '.join(JSON_KEYS)}"
            raise ConfigError(f"prompt {prompt!r}: unknown key '{key}' in its JSON{hint}")
    return prompt[:start] + prompt[end:], info


def split_segments(prompt: str) -> tuple[list[str], list[int] | None]:
    """(texts, the loops that they begin at); a prompt that does not begin with `|0|` is one text, without loops.

    Raises ConfigError if texts and loop numbers do not alternate.
    """
    texts, loops = _segments(prompt)
    if loops and loops != sorted(set(loops)):
        log.warning("prompt %r: loop numbers do not rise, so that some of its texts may never be used", prompt)
    return [text.strip() for text in texts] if loops else texts, loops


def _segments(prompt: str) -> tuple[list[str], list[int] | None]:
    if not prompt.startswith("|0|"):
        return [prompt], None
    parts = prompt.split("|")[1:]
    try:
        loops = [int(part) for part in parts[::2]]
    except ValueError:
        loops = []
    if len(loops) != len(parts[1::2]):
        raise ConfigError(f"prompt {prompt!r}: loop numbers and texts must alternate, as in |0|sunny|2|rainy")
    return parts[1::2], loops


def merge_segments(texts: Sequence[str], loops: Sequence[int] | None) -> str:
    """One prompt out of texts and their loops, the inverse of `split_segments`; without loops it is the first text."""
    if loops is None:
        if not texts:
            raise ConfigError("a prompt without loop numbers needs one text")
        return texts[0]
    if len(loops) < len(texts):
        raise ConfigError(f"{len(texts)} texts need as many loop numbers, not {len(loops)}")
    return "".join(f"|{loop}|{text}" for loop, text in zip(loops, texts, strict=False))


def text_of_loop(prompt: str, loop: int) -> str:
    """The text that holds in a loop (from 0): the first one whose successor begins later."""
    texts, loops = _segments(prompt)
    following = (loops or [])[1:]
    return next((text for text, begin in zip(texts, following, strict=False) if begin > loop), texts[-1])


def append_score(
    prompt: str, aes: float | None = None, flow: float | None = None, camera_motion: str | None = None
) -> str:
    """The prompt with ` aesthetic score: 6.5.`, motion score and camera motion after it.

    What is None, or in the prompt already, is left out. Raises ConfigError for a score that is not a number.
    """
    for label, value in (("aesthetic score", aes), ("motion score", flow), ("camera motion", camera_motion)):
        if value is None or f"{label}:" in prompt:
            continue
        try:
            prompt += f" {label}: {value}." if label == "camera motion" else f" {label}: {value:.1f}."
        except (TypeError, ValueError):
            raise ConfigError(f"{label} {value!r} is not a number; give one such as 6.5") from None
    return prompt


def prepare(prompt: str, *, refine: Callable[[str], str] = str, **scores: Any) -> str:
    """The prompt as the text encoder wants it: each of its texts refined, given `scores` (`append_score`), cleaned."""
    texts, loops = split_segments(prompt)
    return merge_segments([preprocess(append_score(refine(text), **scores)) for text in texts], loops)


def save_path_name(
    save_dir: str | os.PathLike[str], sample_name: str | None = None, sample_idx: int | None = None,
    prompt: str | None = None, prompt_as_path: bool = False, num_sample: int = 1, k: int | None = None,
) -> str:  # fmt: skip
    """The path of a sample without its extension: `DIR/sample_0007`, or `DIR/sample_0007-2` as number k of several.

    With `prompt_as_path` the prompt is the name, after `sample_name` if there is one. A name never leaves `save_dir`:
    slashes become `_`, and one that is too long for a file system is cut and gets a hash of the whole.
    Raises ConfigError if a number is needed and not given.
    """
    if prompt_as_path:
        name = f"{sample_name or ''}{prompt}"
    elif sample_idx is None:
        raise ConfigError("a sample's file name needs its index; give sample_idx, or prompt_as_path")
    else:
        name = f"{'sample' if sample_name is None else sample_name}_{sample_idx:04d}"
    if num_sample != 1:
        name += f"-{k}"
    name = re.sub(r"[/\\\x00-\x1f\x7f]", "_", name)
    if name in (".", ".."):
        name = "_" * len(name)
    whole = name.encode(errors="replace")
    if len(whole) > MAX_NAME_BYTES:
        name = f"{whole[: MAX_NAME_BYTES - 9].decode(errors='ignore')}-{hashlib.sha256(whole).hexdigest()[:8]}"
    return os.path.join(save_dir, name)

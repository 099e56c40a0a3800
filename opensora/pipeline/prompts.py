"""Prompts on their way from a file or the command line to the text encoder, and the names of what they become.

A prompt may give several texts, `|0|a sunny day|2|a rainy day`: each holds from its loop on. It may end in a JSON
object, `a wave.{"reference_path": "wave.png", "mask_strategy": "0"}`. The order of the steps is: `extract_json`, then
`prepare` (texts apart, scores, cleaning, texts together), then in each loop `text_of_loop`.
"""

from __future__ import annotations

import io
import json
import logging
import os
import re
from collections.abc import Callable, Sequence
from typing import Any

from opensora.config.schema import Schema, Text, check, shown
from opensora.errors import ConfigError
from opensora.files import parse_json, read_bytes
from opensora.models.text_encoder.cleaning import preprocess

log = logging.getLogger(__name__)

MAX_PROMPT = 20_000  # characters of a prompt, with all its texts and its JSON
MAX_TEXT = 5_000  # characters of one text: several times what any text encoder reads
MAX_BRACES = 100  # `{` in a prompt
MAX_FILE_BYTES, MAX_LINES = 64 * 2**20, 100_000  # of a prompt file
MAX_LOOP = 1_000_000  # that a text may begin at


class PromptJson(Schema):
    """What the JSON object of a prompt may say: the references of this prompt, and where they go."""

    reference_path: Text = ""
    mask_strategy: Text = ""


JSON_KEYS = tuple(PromptJson.model_fields)


def load_prompts(path: str | os.PathLike[str], start: int | None = None, end: int | None = None) -> list[str]:
    """Lines [start:end] of a text file (UTF-8), stripped; ConfigError if it cannot be read or is too large."""
    remedy = "give a text file, a prompt a line"
    try:
        text = read_bytes(path, MAX_FILE_BYTES, ConfigError).decode("utf-8-sig")
    except UnicodeDecodeError:
        raise ConfigError(f"prompt file '{path}' cannot be read: it is not UTF-8 text; {remedy}") from None
    except ConfigError as error:
        raise ConfigError(f"prompt file {error}" + ("" if ";" in str(error) else f"; {remedy}")) from None
    lines = [line.strip() for line in io.StringIO(text, newline=None)]
    if len(lines) > MAX_LINES:
        raise ConfigError(f"prompt file '{path}' has {len(lines):,} lines; give at most {MAX_LINES:,}")
    return lines[start:end]


def check_length(prompt: str) -> None:
    """Raises ConfigError for a prompt that is too long to look for anything in it."""
    if len(prompt) > MAX_PROMPT:
        problem = f"has {len(prompt):,} characters, and at most {MAX_PROMPT:,} are read"
        raise ConfigError(f"prompt {shown(prompt)} {problem}; shorten it")


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
    is not JSON or not a `PromptJson`.
    """
    check_length(prompt)
    if "{" not in prompt:
        return prompt, {}
    name = f"prompt {shown(prompt)}"
    if (braces := prompt.count("{")) > MAX_BRACES:
        raise ConfigError(f"{name} has {braces:,} {{, and at most {MAX_BRACES} are read; leave them out")
    found, position = None, prompt.find("{")
    while position >= 0:
        try:
            _, end = _EXTENT.raw_decode(prompt, position)
            found = (position, end)
        except json.JSONDecodeError:
            end = position + 1
        except RecursionError:
            raise ConfigError(f"{name}: its JSON is nested too deep; it holds texts only") from None
        position = prompt.find("{", end)
    if found is None or prompt.count("{", 0, found[0]) > prompt.count("}", 0, found[0]):
        example = '{"reference_path": "image.png", "mask_strategy": "0"}'
        raise ConfigError(f"{name}: what follows {{ is not JSON; write it like {example}, or leave {{ out")
    start, end = found
    told = parse_json(prompt[start:end], f"{name}: its JSON", ConfigError)
    info = check(PromptJson, told, f"{name}: its JSON", ConfigError, f"known are {' and '.join(JSON_KEYS)}")
    return prompt[:start] + prompt[end:], info.model_dump(exclude_unset=True)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object of these pairs. Raises ConfigError for a key that comes twice, of which one would be lost."""
    twice = {key for position, (key, _) in enumerate(pairs) if key in dict(pairs[:position])}
    if twice:
        raise ConfigError(f"the JSON of a prompt gives {shown(min(twice))} twice; give each key once")
    return dict(pairs)


# Finds where an object ends: numbers stay text, however long they are.
_EXTENT = json.JSONDecoder(parse_int=str, parse_float=str, object_pairs_hook=_once)


def split_segments(prompt: str) -> tuple[list[str], list[int] | None]:
    """(texts, the loops that they begin at); a prompt that does not begin with `|0|` is one text, without loops.

    Raises ConfigError if texts and loop numbers do not alternate.
    """
    texts, loops = _segments(prompt)
    if loops and loops != sorted(set(loops)):
        log.warning("prompt %s: loop numbers do not rise, so that some of its texts may never be used", shown(prompt))
    return [text.strip() for text in texts] if loops else texts, loops


def _segments(prompt: str) -> tuple[list[str], list[int] | None]:
    if not prompt.startswith("|0|"):
        return [prompt], None
    parts = prompt.split("|")[1:]
    numbers = [part for part in parts[::2] if re.fullmatch(r"\s*[+-]?[0-9]+\s*", part)]
    if len(numbers) != len(parts[1::2]) or len(parts) % 2:
        raise ConfigError(f"prompt {shown(prompt)}: loop numbers and texts must alternate, as in |0|sunny|2|rainy")
    if huge := [number for number in numbers if len(number.strip()) > len(str(MAX_LOOP)) or int(number) > MAX_LOOP]:
        problem = f"loop number {shown(huge[0])} is above {MAX_LOOP:,}"
        raise ConfigError(f"prompt {shown(prompt)}: {problem}; give a smaller one")
    return parts[1::2], [int(number) for number in numbers]


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
    return merge_segments([_cleaned(append_score(refine(text), **scores)) for text in texts], loops)


def _cleaned(text: str) -> str:
    """Raises ConfigError for a text that is too long to be cleaned."""
    if len(text) > MAX_TEXT:
        problem = f"has {len(text):,} characters, and at most {MAX_TEXT:,} are encoded"
        raise ConfigError(f"text {shown(text)} of a prompt {problem}; shorten it")
    return preprocess(text)

"""Parses prompts and prepares them for the text encoder.

A prompt may give several texts, `|0|a sunny day|2|a rainy day`: each applies from its loop on. It may end in a JSON
object, `a wave.{"reference_path": "wave.png", "mask_strategy": "0"}`. `read_prompt` takes all steps: it splits off the
JSON (`split_json`), prepares each text (`prepare`: refine, append scores, clean) and picks one for each loop
(`text_of_loop`).
"""

from __future__ import annotations

import io
import json
import logging
import os
import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

from opensora.config.schema import Schema, Text, check, shown
from opensora.config.settings import InferenceSettings
from opensora.datasets.captions import append_score
from opensora.errors import ConfigError
from opensora.files import parse_json, read_bytes
from opensora.models.text_encoder.cleaning import preprocess
from opensora.pipeline import prompt_refiner

logger = logging.getLogger("opensora")

MAX_PROMPT = 20_000  # characters of a prompt, with all its texts and its JSON
MAX_TEXT = 5_000  # characters of one text: several times what any text encoder reads
MAX_BRACES = 100  # `{` in a prompt
MAX_FILE_BYTES, MAX_LINES = 64 * 2**20, 100_000  # of a prompt file
MAX_LOOP = 1_000_000  # largest loop number in a prompt


class PromptJson(Schema):
    """The JSON object of a prompt: its references, and the mask strategy that places them."""

    reference_path: Text = ""
    mask_strategy: Text = ""


JSON_KEYS = tuple(PromptJson.model_fields)


class PreparedPrompt(NamedTuple):
    """A parsed prompt."""

    loop_texts: tuple[str, ...]  # what the text encoder reads in each loop
    conditions: dict[str, str]  # the `PromptJson` fields that the prompt gives


def read_prompt(prompt: str, settings: InferenceSettings) -> PreparedPrompt:
    """Prepares a prompt for each of `settings.loop` loops. Raises ConfigError for one without text.

    While its texts are still to be refined by a language model, they may be empty once cleaned.
    """
    if not prompt.strip():
        raise ConfigError("a prompt is empty; describe the video in it, or remove the blank line from the prompt file")
    _check_encodable(prompt, "prompt")
    segments, conditions = split_json(prompt)
    scores = {"aes": settings.aes, "flow": settings.flow, "camera_motion": settings.camera_motion}
    refine = partial(_refined_text, settings.refined)
    prepared, unscored = prepare(segments, refine=refine, **scores), prepare(segments, refine=refine)
    if not prompt_refiner.is_enabled(settings) and not unscored.strip():
        raise ConfigError(f"prompt {shown(prompt)} is empty once cleaned; describe the video in English words")
    if unused := [loop for loop in _segments(prepared)[1] or () if loop >= settings.loop]:
        values = (shown(prompt), unused[:10], settings.loop)
        logger.warning("prompt %s has texts for loops %s, but --loop is %d", *values)
    return PreparedPrompt(tuple(text_of_loop(prepared, loop) for loop in range(settings.loop)), conditions)


def negative_text(settings: InferenceSettings) -> str | None:
    """The negative prompt, cleaned like a prompt; None for the model's own null text.

    Raises ConfigError for an empty one, and for a model of classes.
    """
    text = settings.negative_prompt
    if text is None:
        return None
    if (settings.text_encoder or {}).get("type") == "classes":
        raise ConfigError("negative_prompt is a text, but these prompts are numbers of classes; remove it")
    _check_encodable(text, "negative_prompt")
    if split_segments(text)[1]:
        raise ConfigError("negative_prompt is one text for all loops; remove |0|")
    cleaned = prepare(text)
    if not cleaned.strip():
        raise ConfigError(f"negative_prompt {shown(text)} is empty once cleaned; give English words, or remove it")
    return cleaned


def _check_encodable(text: str, name: str) -> None:
    """Raises ConfigError for a text that is too long or not UTF-8."""
    check_length(text)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(f"{name} {shown(text)} is not UTF-8 text") from error


def _refined_text(refined: dict[str, Any] | None, text: str) -> str:
    """The text, or the recorded answer of the language model to it."""
    answer = text if refined is None else refined.get(text)
    if not isinstance(answer, str) or re.search("[\ud800-\udfff]", answer):
        raise ConfigError(f"refined has no text for {shown(text)}; remove refined to call the language model again")
    return answer


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
    """Raises ConfigError for a prompt that is too long to be parsed."""
    if len(prompt) > MAX_PROMPT:
        problem = f"has {len(prompt):,} characters, and at most {MAX_PROMPT:,} are read"
        raise ConfigError(f"prompt {shown(prompt)} {problem}; shorten it")


def split_json(prompt: str) -> tuple[str, dict[str, str]]:
    """Splits the last JSON object off a prompt: (the rest of the prompt, the object or {}).

    Raises ConfigError for an object that is nested in another brace, no JSON, or no `PromptJson`.
    """
    check_length(prompt)
    if "{" not in prompt:
        return prompt, {}
    name = f"prompt {shown(prompt)}"
    if (braces := prompt.count("{")) > MAX_BRACES:
        raise ConfigError(f"{name} has {braces:,} {{, and at most {MAX_BRACES} are read; remove them")
    found, position = None, prompt.find("{")
    while position >= 0:
        try:
            _, end = _OBJECT_DECODER.raw_decode(prompt, position)
            found = (position, end)
        except json.JSONDecodeError:
            end = position + 1
        except RecursionError:
            raise ConfigError(f"{name}: its JSON is nested too deep; its values must be strings") from None
        position = prompt.find("{", end)
    if found is None or prompt.count("{", 0, found[0]) > prompt.count("}", 0, found[0]):
        example = '{"reference_path": "image.png", "mask_strategy": "0"}'
        raise ConfigError(f"{name}: what follows {{ is not JSON; write it like {example}, or leave {{ out")
    start, end = found
    value = parse_json(prompt[start:end], f"{name}: its JSON", ConfigError)
    info = check(PromptJson, value, f"{name}: its JSON", ConfigError, f"known are {' and '.join(JSON_KEYS)}")
    return prompt[:start] + prompt[end:], info.model_dump(exclude_unset=True)


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object of these pairs. Raises ConfigError for a duplicate key."""
    duplicates = {key for position, (key, _) in enumerate(pairs) if key in dict(pairs[:position])}
    if duplicates:
        raise ConfigError(f"the JSON of a prompt gives {shown(min(duplicates))} twice; give each key once")
    return dict(pairs)


# Finds the end of an object. Numbers stay text: converting one of a million digits takes minutes.
_OBJECT_DECODER = json.JSONDecoder(parse_int=str, parse_float=str, object_pairs_hook=_unique_keys)


def split_segments(prompt: str) -> tuple[list[str], list[int] | None]:
    """(texts, the loop that each begins at); a prompt that does not begin with `|0|` is one text and has None.

    Raises ConfigError unless loop numbers and texts alternate.
    """
    texts, loops = _segments(prompt)
    if loops and loops != sorted(set(loops)):
        logger.warning(
            "prompt %s: loop numbers do not rise, so that some of its texts may never be used", shown(prompt)
        )
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
    """The inverse of `split_segments`; without loops, the first text."""
    if loops is None:
        if not texts:
            raise ConfigError("a prompt without loop numbers needs one text")
        return texts[0]
    if len(loops) < len(texts):
        raise ConfigError(f"{len(texts)} texts need as many loop numbers, not {len(loops)}")
    return "".join(f"|{loop}|{text}" for loop, text in zip(loops, texts, strict=False))


def text_of_loop(prompt: str, loop: int) -> str:
    """The text of a loop, counted from 0: the first text whose next one begins after it."""
    texts, loops = _segments(prompt)
    following = (loops or [])[1:]
    return next((text for text, begin in zip(texts, following, strict=False) if begin > loop), texts[-1])


def prepare(prompt: str, *, refine: Callable[[str], str] = str, **scores: Any) -> str:
    """Refines each text of a prompt, appends `scores` (`append_score`) and cleans it."""
    texts, loops = split_segments(prompt)
    return merge_segments([_cleaned(append_score(refine(text), **scores)) for text in texts], loops)


def _cleaned(text: str) -> str:
    """The text as the encoder takes it. Raises ConfigError for one that is too long."""
    if len(text) > MAX_TEXT:
        problem = f"has {len(text):,} characters, and at most {MAX_TEXT:,} are encoded"
        raise ConfigError(f"text {shown(text)} of a prompt {problem}; shorten it")
    return preprocess(text)

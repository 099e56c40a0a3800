"""Rewrites prompts with a language model, through any server with OpenAI's chat completions API.

The key comes from the environment alone and appears in no setting, recipe or message. It is sent to the given address
only: no redirect is followed, no proxy used. If the server fails, the prompt is used as written.
"""

from __future__ import annotations

import json
import logging
import os
import re
import time
from collections.abc import Iterable
from contextlib import closing
from urllib.parse import SplitResult, urlsplit

from opensora.config.settings import InferenceSettings
from opensora.errors import ConfigError, MediaError
from opensora.files import parse_json
from opensora.models.text_encoder.cleaning import preprocess
from opensora.pipeline.timeout import call_with_timeout

logger = logging.getLogger("opensora")

SECONDS = 30.0  # for a whole answer
PAUSE = 1.0  # before the second attempt
MAX_BYTES = 10**6
MAX_CHARACTERS = 10_000  # of an answer, about ten times what the instruction asks for
INSTRUCTION = (
    "You write prompts for a model that turns text into video. Rewrite the text of the user as one detailed paragraph "
    "in English, of at most 120 words. Describe the subject, what it does, the setting, the light and the camera. Keep "
    "everything that the user asks for and contradict none of it. Answer with the paragraph alone, without a title, an "
    "explanation or quotation marks."
)


class _Unusable(Exception):
    """An answer that cannot be used."""


def is_enabled(settings: InferenceSettings) -> bool:
    """Whether prompts are still to be refined; a recipe already holds the refined texts."""
    return settings.llm_refine and settings.refined is None


def endpoint(settings: InferenceSettings) -> tuple[SplitResult, str, str]:
    """(base URL, model, key) from settings and environment. Raises ConfigError, which shows neither URL nor key."""
    given = {"OPENAI_BASE_URL": settings.llm_base_url, "OPENAI_MODEL": settings.llm_model, "OPENAI_API_KEY": None}
    found = {name: (value or os.environ.get(name, "")).strip() for name, value in given.items()}
    if missing := [name for name, value in found.items() if not value]:
        raise ConfigError(f"llm_refine calls a language model; set {', '.join(missing)}")
    base, model, key = found.values()
    if not re.fullmatch(r"[!-~]+", key):
        raise ConfigError("OPENAI_API_KEY holds a space or a character that no key has; set it again")
    try:
        parts = urlsplit(base)
        valid = parts.hostname and parts.port != 0 and re.fullmatch(r"https?://[^@?#]+", base)
    except ValueError:
        valid = False
    if not valid or not re.fullmatch(r"[!-~]+", base):
        example = "http://localhost:8000/v1, without user name, ? and #"
        raise ConfigError(f"the base URL of the language model is not valid; write it like {example}")
    return parts, model, key


def refine_texts(texts: Iterable[str], where: tuple[SplitResult, str, str]) -> dict[str, str]:
    """Maps each text to the refined text, or to itself (with a warning) after a failure. Each text is sent once.

    After a failed connection the remaining texts are not sent.
    """
    from http.client import HTTPException

    refined = {text: text for text in texts}
    for text in filter(str.strip, refined):
        try:
            refined[text] = _refine(text, *where)
            logger.info("refined       %s", refined[text])
        except _Unusable as error:
            logger.warning("prompt %r stays unchanged: the language model's %s", text, error)
        except (OSError, HTTPException, ValueError) as error:  # ValueError: an invalid host name
            reason = getattr(error, "strerror", None) or type(error).__name__
            logger.warning("prompts from %r on stay unchanged: the language model cannot be reached (%s)", text, reason)
            break
    return refined


def _refine(text: str, base: SplitResult, model: str, key: str) -> str:
    messages = [{"role": "system", "content": INSTRUCTION}, {"role": "user", "content": text}]
    request = json.dumps({"model": model, "messages": messages}).encode()
    headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
    try:
        status, body = _post(base, request, headers)
    except TimeoutError:
        status = None
    if status is None or status >= 500:
        time.sleep(PAUSE)
        status, body = _post(base, request, headers)
    if status != 200:
        raise _Unusable(f"server answers {status}")
    return _read(body)


def _post(base: SplitResult, request: bytes, headers: dict[str, str]) -> tuple[int, bytes]:
    """The status and body of the answer, the body at most a byte over the limit. Raises TimeoutError."""

    from http.client import HTTPConnection, HTTPSConnection

    def post() -> tuple[int, bytes]:
        kind = HTTPSConnection if base.scheme == "https" else HTTPConnection
        with closing(kind(base.hostname or "", base.port, timeout=SECONDS)) as connection:
            connection.request("POST", f"{base.path.rstrip('/')}/chat/completions", request, headers)
            response = connection.getresponse()
            return response.status, response.read(MAX_BYTES + 1)

    try:
        return call_with_timeout(post, SECONDS)
    except TimeoutError:
        raise TimeoutError(0, f"no answer within {SECONDS:.0f} s") from None


def _read(body: bytes) -> str:
    """The text of an answer on one line, without <think> blocks and surrounding quotation marks."""
    try:
        answer = parse_json(body, "answer", max_bytes=MAX_BYTES)
        text = answer["choices"][0]["message"]["content"] or ""
        text = re.sub(r"<think>.*?</think>", " ", text, flags=re.DOTALL).encode(errors="ignore").decode()
    except (MediaError, LookupError, TypeError):
        raise _Unusable("answer is not a chat completion") from None
    if len(text) > MAX_CHARACTERS:
        raise _Unusable(f"answer has more than {MAX_CHARACTERS:,} characters")
    text = re.sub(r"^[\"“]([^\"“”]*)[\"”]$", r"\1", " ".join(text.split())).strip()
    if not preprocess(text).strip():
        raise _Unusable("answer is empty")
    return text

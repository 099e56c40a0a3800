"""A client of OpenAI's chat completions API, which many servers of language models have.

The key comes from the environment alone and appears in no setting, file or message. It is sent to the given address
only: no redirect is followed, no proxy used. Answers are untrusted: bounded, and reduced to one line of text.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from contextlib import closing
from typing import Any, NamedTuple
from urllib.parse import SplitResult, urlsplit

from opensora.errors import ConfigError, MediaError
from opensora.files import parse_json
from opensora.remote.timeout import call_with_timeout

MAX_BYTES = 10**6  # of an answer


class UnusableAnswer(Exception):
    """An answer that is no text of a language model; the message continues `the language model's`."""


class Endpoint(NamedTuple):
    """A server, the name of a model on it, and the key."""

    base: SplitResult
    model: str
    key: str

    def __repr__(self) -> str:
        return f"Endpoint({self.base.geturl()!r}, {self.model!r})"  # the key is shown nowhere


class Answer(NamedTuple):
    """Status, body (at most a byte over the limit) and the header Retry-After of an answer."""

    status: int
    body: bytes
    retry_after: str | None


def find_endpoint(base_url: str | None, model: str | None, user: str) -> Endpoint:
    """The endpoint of these settings, and of the environment where they are None; the key is from there.

    Raises ConfigError, which shows neither URL nor key; `user` names what calls the language model.
    """
    given = {"OPENAI_BASE_URL": base_url, "OPENAI_MODEL": model, "OPENAI_API_KEY": None}
    found = {name: (value or os.environ.get(name, "")).strip() for name, value in given.items()}
    if missing := [name for name, value in found.items() if not value]:
        raise ConfigError(f"{user} calls a language model; set {', '.join(missing)}")
    base, name, key = found.values()
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
    return Endpoint(parts, name, key)


def ask(endpoint: Endpoint, messages: Sequence[dict[str, Any]], seconds: float, **options: Any) -> Answer:
    """The answer to messages, whatever its status. `options` are further fields of the request.

    Raises TimeoutError after `seconds`, OSError and HTTPException for failed connections, ValueError for host names
    that are none.
    """
    from http.client import HTTPConnection, HTTPSConnection

    base, model, key = endpoint
    request = json.dumps({"model": model, "messages": list(messages), **options}).encode()
    headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}

    def post() -> Answer:
        kind = HTTPSConnection if base.scheme == "https" else HTTPConnection
        with closing(kind(base.hostname or "", base.port, timeout=seconds)) as connection:
            connection.request("POST", f"{base.path.rstrip('/')}/chat/completions", request, headers)
            response = connection.getresponse()
            return Answer(response.status, response.read(MAX_BYTES + 1), response.getheader("Retry-After"))

    try:
        return call_with_timeout(post, seconds)
    except TimeoutError:
        raise TimeoutError(0, f"no answer within {seconds:.0f} s") from None


def text_of(body: bytes, max_characters: int, whole: bool = False) -> str:
    """The text of an answer on one line, without <think> blocks and surrounding quotation marks; may be empty.

    Raises UnusableAnswer for other bodies and longer texts, with `whole` also for one that was cut off.
    """
    try:
        choice = parse_json(body, "answer", max_bytes=MAX_BYTES)["choices"][0]
        text = choice["message"]["content"] or ""
        text = re.sub(r"<think>.*?</think>", " ", text, flags=re.DOTALL).encode(errors="ignore").decode()
        cut_off = choice.get("finish_reason") == "length"
    except (MediaError, LookupError, TypeError, AttributeError):
        raise UnusableAnswer("answer is not a chat completion") from None
    if len(text) > max_characters:
        raise UnusableAnswer(f"answer has more than {max_characters:,} characters")
    if whole and cut_off:
        raise UnusableAnswer("answer is cut off at its limit of tokens")
    return re.sub(r"^[\"“]([^\"“”]*)[\"”]$", r"\1", " ".join(text.split())).strip()

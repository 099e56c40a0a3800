"""Requests to a language model's server that are repeated while it is busy or does not answer."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime
from typing import Any, NamedTuple

from opensora.errors import MediaError, UnavailableError
from opensora.remote.chat import Endpoint, ask

MAX_WAIT = 60.0  # seconds before a request is repeated
BUSY = (408, 409, 425, 429)  # and 500 and more: the same request may succeed later
REFUSED = (401, 402, 403, 404, 405)  # and redirects: whatever the request holds


class Patience(NamedTuple):
    """Requests in all, seconds of each, and of the first pause, which doubles each time."""

    tries: int
    seconds: float
    pause: float


def ask_patiently(
    endpoint: Endpoint, messages: Sequence[dict[str, Any]], patience: Patience, where: str, **options: Any
) -> bytes:
    """The body of an answer of status 200.

    After timeouts, failed connections and busy servers the request is repeated, when the server asks for it or after a
    pause. Raises UnavailableError if that does not help and for refused keys, MediaError for a request that the server
    refuses; the message begins with `where`.
    """
    from http.client import HTTPException

    reason = ""
    for attempt in range(patience.tries):
        wait = min(MAX_WAIT, patience.pause * 2**attempt * random.uniform(0.5, 1.5))
        try:
            answer = ask(endpoint, messages, patience.seconds, **options)
        except (OSError, HTTPException, ValueError) as error:  # ValueError: an invalid host name
            reason = f"cannot be reached ({getattr(error, 'strerror', None) or type(error).__name__})"
        else:
            if answer.status == 200:
                return answer.body
            reason = f"answers {answer.status}"
            if answer.status < 500 and answer.status not in BUSY:
                kind = UnavailableError if answer.status in REFUSED or answer.status < 400 else MediaError
                raise kind(f"{where}: the language model's server {reason}")
            asked_for = seconds_to_wait(answer.retry_after)
            wait = wait if asked_for is None else min(MAX_WAIT, asked_for)
        if attempt + 1 < patience.tries:
            time.sleep(wait)
    raise UnavailableError(f"{where}: the language model's server {reason}, asked {patience.tries} times")


def seconds_to_wait(header: str | None) -> float | None:
    """The seconds of a header Retry-After, a number or a date; None if it says nothing usable."""
    text = (header or "").strip()
    if text.isdecimal():
        return float(text[:9])
    try:
        wanted = parsedate_to_datetime(text)
        if wanted.tzinfo is None:
            return None
        return max(0.0, (wanted - datetime.now(timezone.utc)).total_seconds())
    except (ValueError, TypeError, OverflowError):
        return None

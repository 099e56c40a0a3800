"""Captions by a vision-language model: on any server with OpenAI's chat completions API."""

from __future__ import annotations

import base64
import random
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime
from typing import Any, ClassVar

from opensora.curation.clip import Clip
from opensora.curation.stages.stage import Columns, Place, Stage, execution_setting
from opensora.curation.tables.captions import without_opening
from opensora.datasets.captions import append_score
from opensora.datasets.video import encode_jpeg
from opensora.errors import ConfigError, MediaError, UnavailableError
from opensora.remote.chat import Answer, Endpoint, UnusableAnswer, ask, find_endpoint, text_of

MAX_CHARACTERS = 4_000  # of a caption
MAX_WAIT = 60.0  # seconds before a request is repeated
BUSY = (408, 409, 425, 429)  # and 500 and more: the same request may succeed later
REFUSED = (401, 402, 403, 404, 405)  # whatever the clip is
PROMPT = (
    "These are frames of one video clip, in order. Describe the clip in one paragraph of at most 120 words: the "
    "subject, what it does, the setting, the light and the style. Say only what is visible. Answer with the paragraph "
    "alone."
)


@dataclass(frozen=True)
class Captions(Stage):
    """text: the caption of `frames` frames at equal distances, shrunk to `side` pixels, by `model` on the server `url`.

    `refine` drops openings such as `The video shows`; `camera` appends the column cmotion, if there is one. A request
    is repeated after timeouts, failed connections and busy servers, up to `tries` times in all; the pause doubles each
    time, or is what the server asks for. `max_requests` clips are captioned in a run. The key is OPENAI_API_KEY.
    """

    url: str | None = execution_setting(None)
    model: str = ""
    prompt: str = PROMPT
    frames: int = 4
    side: int = 512
    max_tokens: int = 300
    refine: bool = execution_setting(True)
    camera: bool = execution_setting(True)
    concurrency: int = execution_setting(4)
    max_requests: int | None = execution_setting(None)
    tries: int = execution_setting(4)
    seconds: float = execution_setting(60.0)
    pause: float = execution_setting(1.0)

    name: ClassVar[str] = "captions"
    columns: ClassVar[tuple[str, ...]] = ("text",)

    @property
    def code(self) -> str:
        """A version of what is asked. Answers cost time or money: other changes of the code keep them."""
        return "1"

    @property
    def place(self) -> Place:
        return "server"

    @property
    def num_workers(self) -> int | None:
        return self.concurrency

    @property
    def max_items(self) -> int | None:
        return self.max_requests

    def check(self) -> None:
        if not (self.url and self.model):
            remedy = "--set captions.url=http://HOST:PORT/v1 captions.model=NAME"
            raise ConfigError(f"captions need a server of a vision-language model; name it with {remedy}")
        self._endpoint()
        bounds = {
            "frames": (1, 64), "side": (32, 4096), "max_tokens": (1, 100_000), "concurrency": (1, 256),
            "tries": (1, 20), "seconds": (0.001, 3600), "pause": (0, MAX_WAIT), "max_requests": (0, None),
        }  # fmt: skip
        for name, (least, most) in bounds.items():
            value = getattr(self, name)
            if value is not None and (value < least or (most is not None and value > most)):
                within = f"{least} or more" if most is None else f"{least} to {most}"
                raise ConfigError(f"captions.{name} must be {within}, not {value}")

    def setup(self) -> None:
        self._endpoint()

    def process(self, clip: Clip) -> Columns:
        pictures, _ = clip.sampled(self.frames, lambda frame: encode_jpeg(frame, self.side))
        content: list[dict[str, Any]] = [{"type": "text", "text": self.prompt}]
        for picture in pictures:
            url = f"data:image/jpeg;base64,{base64.b64encode(picture).decode()}"
            content.append({"type": "image_url", "image_url": {"url": url}})
        answer = self._asked(clip, [{"role": "user", "content": content}])
        try:
            text = text_of(answer.body, MAX_CHARACTERS, whole=True)
        except UnusableAnswer as error:
            raise MediaError(f"{clip.path}: the language model's {error}") from None
        text = " ".join("".join(letter for letter in text if letter.isprintable()).split())
        if not text:
            raise MediaError(f"{clip.path}: the language model's answer is empty")
        return {"text": text}

    def completed(self, columns: Columns, row: Mapping[str, Any]) -> Columns:
        """The caption refined, and with the camera motion that is known by now."""
        text = without_opening(columns["text"]) if self.refine else columns["text"]
        motion = str(row.get("cmotion") or "").strip() if self.camera else ""
        return {"text": append_score(text, camera_motion=motion or None)}

    def _endpoint(self) -> Endpoint:
        return find_endpoint(self.url, self.model, "stage captions")

    def _asked(self, clip: Clip, messages: list[dict[str, Any]]) -> Answer:
        """The answer of status 200. Raises UnavailableError, MediaError if the server refuses this clip."""
        from http.client import HTTPException

        reason = ""
        for attempt in range(1, self.tries + 1):
            wait: float | None = None
            try:
                answer = ask(self._endpoint(), messages, self.seconds, max_tokens=self.max_tokens)
            except (OSError, HTTPException, ValueError) as error:  # ValueError: an invalid host name
                reason = f"cannot be reached ({getattr(error, 'strerror', None) or type(error).__name__})"
            else:
                if answer.status == 200:
                    return answer
                reason = f"answers {answer.status}"
                if answer.status < 500 and answer.status not in BUSY:
                    kind = UnavailableError if answer.status in REFUSED or answer.status < 400 else MediaError
                    raise kind(f"{clip.path}: the language model's server {reason}")
                wait = seconds_to_wait(answer.retry_after)
            if attempt < self.tries:
                backoff = self.pause * 2 ** (attempt - 1) * random.uniform(0.5, 1.5)
                time.sleep(min(MAX_WAIT, backoff if wait is None else wait))
        raise UnavailableError(f"{clip.path}: the language model's server {reason}, asked {self.tries} times")


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

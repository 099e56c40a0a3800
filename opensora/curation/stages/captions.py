"""Captions by a vision-language model: of a server, or of a local folder."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from opensora.acceleration.device_names import check_device_name
from opensora.curation.clip import Clip
from opensora.curation.stages.stage import Columns, Place, Stage, execution_setting
from opensora.curation.tables.captions import without_opening
from opensora.datasets.captions import append_score
from opensora.datasets.video import encode_jpeg, fit_within
from opensora.errors import ConfigError, MediaError
from opensora.remote.chat import Endpoint, UnusableAnswer, find_endpoint, text_of
from opensora.remote.retries import MAX_WAIT, Patience, ask_patiently

MAX_CHARACTERS = 4_000  # of a caption
PROMPT = (
    "These are frames of one video clip, in order. Describe the clip in one paragraph of at most 120 words: the "
    "subject, what it does, the setting, the light and the style. Say only what is visible. Answer with the paragraph "
    "alone."
)
BOUNDS = {
    "frames": (1, 64), "side": (32, 4096), "max_tokens": (1, 100_000), "concurrency": (1, 256), "workers": (1, 256),
    "tries": (1, 20), "seconds": (0.001, 3600), "pause": (0, MAX_WAIT), "max_requests": (0, 10**9),
}  # fmt: skip


@dataclass(frozen=True)
class Captions(Stage):
    """text: the caption of `frames` frames at equal distances, of at most `side` pixels a side, by a vision-language
    model: `model` on the server `url` with OpenAI's chat completions API, or the local folder `model` for transformers.

    `refine` drops openings such as `The video shows`; `camera` appends the column cmotion, if there is one. At most
    `max_requests` clips are captioned in a run. For servers: `concurrency` requests run at once; one is repeated after
    timeouts (`seconds`), failed connections and busy servers, up to `tries` times in all; the pause doubles each time,
    or is what the server asks for; the key is OPENAI_API_KEY. Local models run on `device`, in `workers` processes.
    """

    url: str | None = execution_setting(None)
    model: str = ""
    prompt: str = PROMPT
    frames: int = 4
    side: int = 512
    max_tokens: int = 300
    refine: bool = execution_setting(True)
    camera: bool = execution_setting(True)
    max_requests: int | None = execution_setting(None)
    concurrency: int = execution_setting(4)
    tries: int = execution_setting(4)
    seconds: float = execution_setting(60.0)
    pause: float = execution_setting(1.0)
    device: str | None = execution_setting(None)
    workers: int | None = execution_setting(None)

    name: ClassVar[str] = "captions"
    columns: ClassVar[tuple[str, ...]] = ("text",)

    @property
    def code(self) -> str:
        """A version of what is asked. Answers cost time or money: other changes of the code keep them."""
        return "1"

    @property
    def place(self) -> Place:
        return "server" if self.url else "accelerator"

    @property
    def num_workers(self) -> int | None:
        return self.concurrency if self.url else self.workers

    @property
    def max_items(self) -> int | None:
        return self.max_requests

    def check(self) -> None:
        if not self.model or not (self.url or Path(self.model).is_dir()):
            remedy = "captions.url=http://HOST:PORT/v1 captions.model=NAME, or captions.model=FOLDER of a local one"
            raise ConfigError(f"captions need a vision-language model; name it with --set {remedy}")
        for name, (least, most) in BOUNDS.items():
            value = getattr(self, name)
            if value is not None and not least <= value <= most:
                raise ConfigError(f"captions.{name} must be {least} to {most:,}, not {value}")
        check_device_name(self.device)
        if self.url:
            self._endpoint()
        else:
            self.weights()

    def setup(self) -> None:
        if self.url:
            self._endpoint()
        else:
            self._local_model()

    def weights(self) -> Mapping[str, str]:
        if self.url:
            return {}
        from opensora.checkpoints.vision_language import vision_language_hash

        return {"model": vision_language_hash(self.model)}

    @property
    def provenance(self) -> dict[str, Any]:
        """With the name of a local model alone: its hash says which one it is, wherever it lies."""
        found = super().provenance
        name = self.model if self.url else Path(self.model).name
        return found | {"settings": found["settings"] | {"model": name}}

    def process(self, clip: Clip) -> Columns:
        frames, _ = clip.sampled(self.frames, lambda frame: fit_within(frame, self.side))
        text = self._by_server(clip, frames) if self.url else self._by_local_model(clip, frames)
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

    def _by_server(self, clip: Clip, frames: Sequence[np.ndarray]) -> str:
        content: list[dict[str, Any]] = [{"type": "text", "text": self.prompt}]
        for frame in frames:
            url = f"data:image/jpeg;base64,{base64.b64encode(encode_jpeg(frame)).decode()}"
            content.append({"type": "image_url", "image_url": {"url": url}})
        messages = [{"role": "user", "content": content}]
        patience = Patience(self.tries, self.seconds, self.pause)
        body = ask_patiently(self._endpoint(), messages, patience, clip.path, max_tokens=self.max_tokens)
        try:
            return text_of(body, MAX_CHARACTERS, whole=True)
        except UnusableAnswer as error:
            raise MediaError(f"{clip.path}: the language model's {error}") from None

    def _local_model(self) -> Any:
        from opensora.checkpoints.vision_language import load_vision_language

        return load_vision_language(self.model, self.device)

    def _by_local_model(self, clip: Clip, frames: Sequence[np.ndarray]) -> str:
        text, ended = self._local_model().answer(frames, self.prompt, self.max_tokens)
        if not ended:
            raise MediaError(f"{clip.path}: the language model's answer is cut off at its limit of tokens")
        return str(text)[:MAX_CHARACTERS]

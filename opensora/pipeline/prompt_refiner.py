"""Rewrites prompts with a language model. If the server fails, the prompt is used as written."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable

from opensora.config.settings import InferenceSettings
from opensora.models.text_encoder.cleaning import preprocess
from opensora.remote.chat import Endpoint, UnusableAnswer, ask, find_endpoint, text_of

logger = logging.getLogger("opensora")

SECONDS = 30.0  # for a whole answer
PAUSE = 1.0  # before the second attempt
MAX_CHARACTERS = 10_000  # of an answer, about ten times what the instruction asks for
INSTRUCTION = (
    "You write prompts for a model that turns text into video. Rewrite the text of the user as one detailed paragraph "
    "in English, of at most 120 words. Describe the subject, what it does, the setting, the light and the camera. Keep "
    "everything that the user asks for and contradict none of it. Answer with the paragraph alone, without a title, an "
    "explanation or quotation marks."
)


def is_enabled(settings: InferenceSettings) -> bool:
    """Whether prompts are still to be refined; a recipe already holds the refined texts."""
    return settings.llm_refine and settings.refined is None


def endpoint(settings: InferenceSettings) -> Endpoint:
    """The server of settings and environment. Raises ConfigError, which shows neither URL nor key."""
    return find_endpoint(settings.llm_base_url, settings.llm_model, "llm_refine")


def refine_texts(texts: Iterable[str], where: Endpoint) -> dict[str, str]:
    """Maps each text to the refined text, or to itself (with a warning) after a failure. Each text is sent once.

    After a failed connection the remaining texts are not sent.
    """
    from http.client import HTTPException

    refined = {text: text for text in texts}
    for text in filter(str.strip, refined):
        try:
            refined[text] = refine_text(text, where)
            logger.info("refined       %s", refined[text])
        except UnusableAnswer as error:
            logger.warning("prompt %r stays unchanged: the language model's %s", text, error)
        except (OSError, HTTPException, ValueError) as error:  # ValueError: an invalid host name
            reason = getattr(error, "strerror", None) or type(error).__name__
            logger.warning("prompts from %r on stay unchanged: the language model cannot be reached (%s)", text, reason)
            break
    return refined


def refine_text(text: str, where: Endpoint) -> str:
    """The refined text. Raises UnusableAnswer, or OSError, HTTPException and ValueError for failed connections."""
    messages = [{"role": "system", "content": INSTRUCTION}, {"role": "user", "content": text}]
    try:
        answer = ask(where, messages, SECONDS)
    except TimeoutError:
        answer = None
    if answer is None or answer.status >= 500:
        time.sleep(PAUSE)
        answer = ask(where, messages, SECONDS)
    if answer.status != 200:
        raise UnusableAnswer(f"server answers {answer.status}")
    refined = text_of(answer.body, MAX_CHARACTERS)
    if not preprocess(refined).strip():
        raise UnusableAnswer("answer is empty")
    return refined

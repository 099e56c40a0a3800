"""The language model that the operator of the server has named; requests choose neither it nor its address."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from http.client import HTTPException

from opensora.pipeline.prompt_refiner import refine_text
from opensora.remote.chat import Endpoint, UnusableAnswer
from opensora.serving.errors import ApiError

MAX_REQUESTS = 4  # of all clients, that it answers at once


class PromptRefiner:
    """Asks the language model, for a bounded number of requests at once."""

    def __init__(self, endpoint: Endpoint) -> None:
        self._endpoint = endpoint
        self._running = 0

    async def refine(self, text: str) -> str:
        """The refined text. Raises ApiError 429 while too many are asked for, 502 for a failed language model."""
        if self._running >= MAX_REQUESTS:
            raise ApiError(429, "the language model is busy", code="too_many_requests", retry_after=5)
        try:
            return await self._ask(text)
        except UnusableAnswer as error:
            problem = f"the language model's {error}"
        except (OSError, HTTPException, ValueError) as error:  # ValueError: an invalid host name
            problem = f"the language model cannot be reached ({type(error).__name__})"
        raise ApiError(502, f"{problem}; the prompt stays as it is", code="language_model_failed")

    def _ask(self, text: str) -> asyncio.Future[str]:
        """The refined text, once a thread has it. The thread does not keep the server from ending."""
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[str] = loop.create_future()

        def end(result: str | Exception) -> None:
            self._running -= 1
            if answer.done():  # the client has left
                return
            if isinstance(result, Exception):
                answer.set_exception(result)
            else:
                answer.set_result(result)

        def run() -> None:
            try:
                result: str | Exception = refine_text(text, self._endpoint)
            except Exception as error:
                result = error
            with contextlib.suppress(RuntimeError):  # the server has ended
                loop.call_soon_threadsafe(end, result)

        self._running += 1
        threading.Thread(target=run, name="language model", daemon=True).start()
        return answer

"""The planner: one process that opens uploads, checks requests down to the model, and plans them.

Whatever a hostile file does to it, no computation suffers: it is given a bounded time, and started again.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from opensora.serving.errors import ApiError, public
from opensora.serving.limits import Limits
from opensora.serving.process import WorkerProcess

MODULE = "opensora.serving.plan_worker"
START_SECONDS, ANSWER_SECONDS = 120.0, 60.0


class Planner:
    """Asks the planning process, one question after the other."""

    def __init__(self, models: list[str], device: str | None, folder: Path, limits: Limits) -> None:
        self.limits = limits
        self._process = WorkerProcess(MODULE, models=models, device=device, data=str(folder))
        self._lock = asyncio.Lock()
        self._waiting = 0

    @property
    def pid(self) -> int | None:
        """The id of the process, None while there is none."""
        return self._process.pid

    async def ask(self, **question: Any) -> dict[str, Any]:
        """The answer to {"probe": path}, {"check": request} or {"plan": request}. Raises ApiError for a refusal."""
        if self._waiting >= self.limits.max_plans:
            raise ApiError(429, "too many plans are waiting", code="too_many_plans", retry_after=5)
        self._waiting += 1
        try:
            async with self._lock:
                answer = await self._answer(question)
        finally:
            self._waiting -= 1
        if "error" in answer:
            raise ApiError(400, public(answer["error"]), code=answer.get("code"), param=answer.get("param"))
        return answer

    async def warm_up(self) -> None:
        """Starts the process, which takes seconds, before the first question."""
        async with self._lock:
            await self._started()

    async def stop(self) -> None:
        """Ends the process."""
        await self._process.kill()

    async def _started(self) -> bool:
        """Whether the process runs, which it may have to be started for."""
        if self._process.pid is not None:
            return True
        await self._process.start()
        if await self._process.receive(START_SECONDS) is not None:
            return True
        await self._process.kill()
        return False

    async def _answer(self, question: dict[str, Any]) -> dict[str, Any]:
        if not await self._started():
            raise ApiError(503, "plans cannot be made; see the log of the server", code="unavailable")
        try:
            self._process.send(**question)
            answer = await self._process.receive(ANSWER_SECONDS)
        except BaseException:  # a client that left; its answer would be taken for that of the next question
            await asyncio.shield(self._process.kill())
            raise
        if answer is None:
            await self._process.kill()
            raise ApiError(400, "the file or the request could not be checked in time; refused", code="unreadable")
        return answer

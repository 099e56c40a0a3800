"""Who listens to which jobs: progress, previews and changes of state, passed on as server-sent events."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from typing import Any

from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from opensora.serving.errors import ApiError
from opensora.serving.limits import Limits

MAX_WAITING = 64  # events that a slow reader may be behind; the oldest are dropped
HEARTBEAT = 15.0  # seconds between comments that keep a quiet stream open
Event = tuple[str, dict[str, Any]]  # its name and its data, which names the job as "id"


class Stream:
    """The events of one listener: of one job, or of all jobs of its key."""

    def __init__(self, owner: str, id: str | None) -> None:
        self.owner, self.id = owner, id
        self._waiting: asyncio.Queue[Event | None] = asyncio.Queue()

    def put(self, event: Event | None) -> None:
        """Passes an event on; None ends the stream."""
        if self._waiting.qsize() >= MAX_WAITING:
            self._waiting.get_nowait()
        self._waiting.put_nowait(event)

    async def text(self, first: list[Event], is_last: Callable[[Event], bool]) -> AsyncIterator[str]:
        """The stream as text: `first`, then what comes, until `is_last`."""
        for event in first:
            yield format_event(event)
            if is_last(event):
                return
        while True:
            try:
                event_or_end = await asyncio.wait_for(self._waiting.get(), HEARTBEAT)
            except asyncio.TimeoutError:
                yield ": still here\n\n"
                continue
            if event_or_end is None:
                return
            yield format_event(event_or_end)
            if is_last(event_or_end):
                return


def format_event(event: Event) -> str:
    """An event as text."""
    name, data = event
    return f"event: {name}\ndata: {json.dumps(data, ensure_ascii=False)}\n\n"


class EventResponse(StreamingResponse):
    """The answer that a stream is; the stream ends with it, whether it was ever read or not."""

    def __init__(self, events: Events, stream: Stream, text: AsyncIterator[str]) -> None:
        headers = {"cache-control": "no-store", "x-accel-buffering": "no"}
        super().__init__(text, media_type="text/event-stream", headers=headers)
        self._drop = lambda: events.drop(stream)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._drop()


class Events:
    """The open streams, of which there is a bounded number."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self._streams: set[Stream] = set()
        self.on_change: Callable[[], None] = lambda: None  # called when a stream opens or closes

    def __len__(self) -> int:
        return len(self._streams)

    def open(self, owner: str, id: str | None) -> Stream:
        """A new stream, until `drop`. Raises ApiError 429 where there are too many."""
        own = sum(stream.owner == owner for stream in self._streams)
        if len(self._streams) >= self.limits.max_streams or own >= self.limits.max_streams_per_key:
            raise ApiError(429, "too many open event streams; close some", code="too_many_streams", retry_after=10)
        stream = Stream(owner, id)
        self._streams.add(stream)
        self.on_change()
        return stream

    def drop(self, stream: Stream) -> None:
        """Forgets a stream, whose client is gone."""
        self._streams.discard(stream)
        self.on_change()

    def publish(self, owner: str, name: str, data: dict[str, Any]) -> None:
        """Passes an event of a job to those who listen to it."""
        for stream in self._streams:
            if stream.owner == owner and stream.id in (None, data["id"]):
                stream.put((name, data))

    def listens(self, owner: str, id: str) -> bool:
        """Whether anybody listens to a job."""
        return any(stream.owner == owner and stream.id in (None, id) for stream in self._streams)

    def close(self) -> None:
        """Ends all streams."""
        for stream in self._streams:
            stream.put(None)

"""Server-sent events: previews as they come, then the images, read by clients that may be slow or leave."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import msgspec
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

PING_S = 15.0  # without an event; a comment is sent then, so that proxies keep the connection
SEND_S = 60.0  # for which a client may leave what was sent unread


def event(kind: str, data: dict[str, Any]) -> bytes:
    """Encode an event."""
    return b"event: " + kind.encode() + b"\ndata: " + msgspec.json.encode(data) + b"\n\n"


async def until(news: asyncio.Event) -> AsyncIterator[bytes]:
    """Wait for news, and yield a comment whenever there are none for a while."""
    while not news.is_set():
        waiting = asyncio.ensure_future(news.wait())
        try:
            await asyncio.wait((waiting,), timeout=PING_S)
        finally:
            waiting.cancel()
        if not news.is_set():
            yield b": still here\n\n"
    news.clear()


class Events(Response):
    """Response whose body is a stream of events, which ends when the client leaves, or does not read for a while.

    Args:
        events: The events.
        left: A task that ends when the client leaves.
        abandoned: Is called then.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[bytes], left: asyncio.Task[None], abandoned: Callable[[], None]):
        super().__init__(headers={"cache-control": "no-store", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._events, self._left, self._abandoned = events, left, abandoned

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        writing = asyncio.ensure_future(self._write(send))
        complete = False
        try:
            await asyncio.wait((writing, self._left), return_when=asyncio.FIRST_COMPLETED)
            complete = writing.done() and writing.result()
        finally:
            writing.cancel()
            self._left.cancel()
            if not complete:
                self._abandoned()

    async def _write(self, send: Send) -> bool:
        """Send all events; return False if the client does not read them."""
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async for chunk in self._events:
            if not await _within(send({"type": "http.response.body", "body": chunk, "more_body": True})):
                return False
        return await _within(send({"type": "http.response.body", "body": b"", "more_body": False}))


async def _within(sending: Awaitable[None]) -> bool:
    try:
        await asyncio.wait_for(sending, SEND_S)
    except asyncio.TimeoutError:
        return False
    return True

"""One client's connection: a request's head has to be short, and to arrive."""

from __future__ import annotations

import asyncio
from functools import partial
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

HEAD_BYTES = 64 << 10
"""Longest head of a request, and of what stands behind a body's last chunk; as much again may be read before the server notices."""

_TOO_LONG = b"HTTP/1.1 431 Request Header Fields Too Large\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"
_TOO_SLOW = b"HTTP/1.1 408 Request Timeout\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"


class Connection(HttpToolsProtocol):
    """HTTP/1.1 as uvicorn speaks it, which by itself waits for a head for ever, and keeps one of any length in memory.

    Args:
        *arguments: Of uvicorn's protocol.
        head_seconds: Time in which a head must arrive: from the connection, and from a later request's first byte.
        **options: Of uvicorn's protocol.
    """

    def __init__(self, *arguments: Any, head_seconds: float, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._head_seconds = head_seconds
        self._head_bytes = 0
        self._late: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        """Begin to wait for the first request."""
        super().connection_made(transport)
        self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        """Wait no longer."""
        self._arrived()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Read on, and give up a head that does not end, or trailers, or a chunk's size; a part of a body begins the count anew."""
        self._head_bytes += len(data)
        super().data_received(data)
        if self._head_bytes > HEAD_BYTES:
            self._refuse(_TOO_LONG)

    def on_message_begin(self) -> None:
        """Wait for the head that has begun."""
        super().on_message_begin()
        self._head_bytes = 0
        if self._late is None:
            self._wait()

    def on_headers_complete(self) -> None:
        """Let the application have the request."""
        self._head_bytes = 0
        self._arrived()
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """Hand a part of the body on."""
        self._head_bytes = 0
        super().on_body(body)

    def _wait(self) -> None:
        self._late = self.loop.call_later(self._head_seconds, self._refuse, _TOO_SLOW)

    def _arrived(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None

    def _refuse(self, answer: bytes) -> None:
        self._arrived()
        if not self.transport.is_closing():
            self.transport.write(answer)
            self.transport.close()


def connection(head_seconds: float) -> Any:
    """Return what makes a connection, as uvicorn calls it."""
    return partial(Connection, head_seconds=head_seconds)

"""A running server: it listens, says where, and stops when it is told to."""

from __future__ import annotations

import asyncio
import math
import socket
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import uvicorn
from fastapi import FastAPI

from genembed.embedder import Embedder
from genembed.errors import ConfigurationError
from genembed.serve.app import create_app
from genembed.serve.connection import connection
from genembed.serve.limits import Limits
from genembed.serve.service import Service

if TYPE_CHECKING:
    from genembed.index import Index

KEEP_ALIVE_SECONDS = 5
LAST_SECONDS = 5
"""After the grace, for telling clients that their texts were given up."""


def run(
    embedder: Embedder,
    *,
    name: str,
    host: str,
    port: int,
    api_key: str | None,
    limits: Limits,
    grace: float,
    announce: Callable[[str], None],
    also: Mapping[str, Embedder] | None = None,
    index: Index | None = None,
) -> None:
    """Serve until SIGTERM or SIGINT; then take nothing new, and finish what was accepted.

    Args:
        embedder: The model.
        name: The name it is served under.
        host: Address to listen on.
        port: Port; 0 for a free one.
        api_key: What clients must send; None asks for nothing.
        limits: What is accepted.
        grace: Seconds for finishing.
        announce: Called with the server's address once it listens.
        also: Further models, by name, for the page.
        index: Documents for the page, made by one of the models.

    Raises:
        ConfigurationError: If it cannot listen there, or none of the models made the index.
    """
    listening = _socket(host, port)
    service = Service(embedder, name=name, limits=limits)
    config = config_of(create_app(service, api_key=api_key, grace=grace, also=also, index=index), limits=limits, grace=grace)
    address, taken = listening.getsockname()[:2]
    announce(f"http://{f'[{address}]' if ':' in address else address}:{taken}")
    _Server(config, service, grace).run(sockets=[listening])


def config_of(app: FastAPI, *, limits: Limits, grace: float) -> uvicorn.Config:
    """Return how an application is served."""
    return uvicorn.Config(
        app,
        http=connection(limits.body_seconds),
        ws="none",
        log_level="warning",
        access_log=False,  # addresses of clients are nobody's business by default
        server_header=False,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=math.ceil(grace) + LAST_SECONDS,
    )


class _Server(uvicorn.Server):
    """Closes the engine as soon as it is told to stop, so that what the grace leaves undone is answered, and not cut off."""

    def __init__(self, config: uvicorn.Config, service: Service, grace: float) -> None:
        super().__init__(config)
        self.service, self.grace = service, grace

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Wait for what is open."""
        closing = asyncio.create_task(asyncio.to_thread(self.service.close, grace=self.grace))
        await super().shutdown(sockets)
        await closing


def _socket(host: str, port: int) -> socket.socket:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        listening = socket.socket(family, kind, protocol)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen(socket.SOMAXCONN)
    except OSError as error:
        raise ConfigurationError(f"--host {host} --port {port}: {error.strerror or error}; choose another one.") from None
    return listening

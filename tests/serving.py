"""A server in this process, on a free port, for tests that need a real client."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn

from genembed import Embedder
from genembed.serve.app import create_app
from genembed.serve.limits import Limits
from genembed.serve.run import config_of
from genembed.serve.service import Service

NAME = "tiny"


@contextmanager
def served(embedder: Embedder, *, limits: Limits = Limits(), api_key: str | None = None) -> Iterator[tuple[str, Service]]:  # noqa: B008
    """Serve a model; give the server's address and the service behind it."""
    service = Service(embedder, name=NAME, limits=limits)
    config = config_of(create_app(service, api_key=api_key, grace=10.0), limits=limits, grace=10.0)
    server, listening = uvicorn.Server(config), socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        yield f"http://127.0.0.1:{listening.getsockname()[1]}", service
    finally:
        server.should_exit = True
        thread.join(30)
        listening.close()

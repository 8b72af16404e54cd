"""The server: many clients, one decode batch, an answer as soon as a text has halted."""

from __future__ import annotations

from importlib.util import find_spec

from genembed.errors import missing_extra

for _package in ("fastapi", "uvicorn", "orjson", "prometheus_client"):
    if find_spec(_package) is None:
        raise missing_extra("serve", _package)

"""What the server counts, for Prometheus."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from genembed.serve.live import LiveEngine

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Metrics:
    """Counters of one server, in a registry of their own."""

    def __init__(self, live: LiveEngine) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter("genembed_requests", "Requests answered.", ["route", "status"], registry=self.registry)
        buckets = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30)
        self.seconds = Histogram("genembed_request_seconds", "Time to the answer.", ["route"], buckets=buckets, registry=self.registry)
        self.registry.register(_EngineState(live))

    def text(self) -> bytes:
        """Return all of them in Prometheus' format."""
        return generate_latest(self.registry)


class _EngineState(Collector):
    """What the engine knows of itself, read when it is asked for."""

    def __init__(self, live: LiveEngine) -> None:
        self.live = live

    def collect(self) -> Iterator[Any]:
        """Yield the engine's gauges and counters."""
        yield GaugeMetricFamily("genembed_queue_tokens", "Prompt tokens that wait.", value=self.live.queued_tokens)
        yield GaugeMetricFamily("genembed_rows", "Texts under way.", value=self.live.under_way)
        yield CounterMetricFamily("genembed_texts", "Texts embedded.", value=self.live.answered)
        yield CounterMetricFamily("genembed_steps", "Refinement steps done.", value=self.live.steps_done)

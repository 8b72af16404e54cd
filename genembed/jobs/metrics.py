"""The state of a job for Prometheus: a text file that its node exporter collects."""

from __future__ import annotations

from genembed.errors import ConfigurationError, missing_extra
from genembed.jobs.status import Status

_GAUGES = {
    "rows": "Rows of the corpus",
    "done": "Rows that are safe, embedded or rejected",
    "in_work": "Rows embedded in shards that are not safe yet",
    "shards": "Shards of the corpus",
    "shards_done": "Shards that are safe",
    "rejects": "Rows that could not be embedded",
    "truncated": "Rows that lost their end to the length limit",
    "mean_steps": "Refinement steps of an embedded row, mean",
    "workers": "Workers at work",
    "rows_per_second": "Rows per second of all workers together",
    "tokens_per_second": "Prompt tokens per second of all workers together",
    "complete": "Whether the manifest is written",
}


def write_metrics(path: str, status: Status) -> None:
    """Write the file in one instant.

    Raises:
        ConfigurationError: If it cannot be written.
        MissingExtraError: If prometheus-client is not installed.
    """
    try:
        from prometheus_client import CollectorRegistry, Gauge, write_to_textfile
    except ModuleNotFoundError as error:
        raise missing_extra("jobs", "prometheus_client") from error
    registry = CollectorRegistry()
    for name, meaning in _GAUGES.items():
        Gauge(f"genembed_job_{name}", meaning, registry=registry).set(float(getattr(status, name)))
    try:
        write_to_textfile(path, registry)
    except OSError as error:
        raise ConfigurationError(f"{path}: cannot be written: {error.strerror or error}.") from error

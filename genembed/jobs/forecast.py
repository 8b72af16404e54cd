"""What a job will take: hours, bytes and money, counted from the model's shape or from a measured rate."""

from __future__ import annotations

from dataclasses import dataclass

from genembed.cost import Cost
from genembed.errors import ConfigurationError

DEVICES = {
    "h200": (989e12, 4.8e12),
    "h100": (989e12, 3.35e12),
    "a100": (312e12, 2.04e12),
    "l40s": (362e12, 0.864e12),
    "l4": (121e12, 0.3e12),
}
"""Dense half-precision operations, and bytes of memory, per second: the makers' data sheets (SXM forms, 80 GB for the A100)."""

EFFICIENCY = 0.5
"""Share of the device's peak that is assumed: no measurement, and the figure that every hour in the result hangs on."""

_ID_BYTES = 16
"""A row beside its vector: id, steps and flag, as compressed Parquet pages hold them."""


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """A corpus job that has not been run."""

    documents: int
    dimensions: int
    value_bytes: int
    """Of one number of a vector."""
    shard_rows: int
    documents_per_second: float
    """Of one device."""
    assumed: str
    """Where the rate comes from."""
    devices: int = 1
    price: float | None = None
    """Of a device for an hour."""

    @property
    def device_hours(self) -> float:
        """Hours of one device."""
        return self.documents / self.documents_per_second / 3600

    @property
    def hours(self) -> float:
        """Hours until the end, all devices at work to the last shard."""
        return self.device_hours / self.devices

    @property
    def bytes(self) -> int:
        """Size of the output."""
        return round(self.documents * (self.dimensions * self.value_bytes + _ID_BYTES))

    @property
    def shards(self) -> int:
        """Files of the output."""
        return -(-self.documents // self.shard_rows)

    @property
    def cost(self) -> float | None:
        """What it comes to; None without a price."""
        return None if self.price is None else self.device_hours * self.price


def counted_rate(cost: Cost, device: str, *, efficiency: float = EFFICIENCY, rows: int = 256) -> float:
    """Return the documents per second that a device should do, of one text as `cost` counts it.

    The prompt is bound by operations. A step reads the weights once for all rows of a batch, and each row's keys and values: it is
    bound by whichever takes longer.

        t = prompt / (e * peak) + max(steps / (e * peak), K * (weights / rows + cache) / (e * bandwidth))

    Args:
        cost: Of one document.
        device: One of `DEVICES`.
        efficiency: Share of the peaks that is reached.
        rows: Texts that are refined together.

    Raises:
        ConfigurationError: If the device is unknown, or the efficiency no share.
    """
    if device not in DEVICES:
        raise ConfigurationError(f"device {device!r} is unknown; choose one of {', '.join(DEVICES)}, or give a measured --rate.")
    if not 0 < efficiency <= 1:
        raise ConfigurationError(f"efficiency={efficiency}: a share of the peak, above 0 and at most 1.")
    operations, bandwidth = DEVICES[device]
    decoding = (cost.cached - cost.one_pass) / operations
    reading = cost.steps * (cost.weights_memory / rows + cost.cache_memory) / bandwidth
    return efficiency / (cost.one_pass / operations + max(decoding, reading))

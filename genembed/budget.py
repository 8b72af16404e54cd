"""How much is worked on at once."""

from __future__ import annotations

from dataclasses import dataclass

from genembed.errors import ConfigurationError


@dataclass(frozen=True, kw_only=True)
class Budget:
    """How much is worked on at once. Memory follows from this, whatever the number of texts."""

    batch_tokens: int = 32_768
    """Positions (prompt and generated, over all rows) whose keys and values one decode batch may hold."""
    max_rows: int = 256
    """Rows in one decode batch."""
    prefill_tokens: int = 1_024
    """Prompt tokens read in one pass; a longer prompt is read alone."""
    length_ratio: float = 3.0
    """Texts share a decode batch if the longest is at most this much longer than the shortest."""
    min_prefix: int = 4
    """Shared leading tokens below this number are not worth a cache of their own."""
    kept_prefixes: int = 8
    """Instructions whose keys and values are kept for later calls; 0 keeps none."""
    check_every: int | None = None
    """Steps between two looks at which rows are finished; until then these stay in the batch, and are answered with the vector of the
    step at which they halted. None: 1 on a CPU, and 4 on other devices, which a look would make wait."""
    record_steps: bool = True
    """On CUDA, record steps as graphs and replay them."""
    pack_weights: bool = True
    """On CPU in float32 or bfloat16, keep a packed copy of the weights: faster, for the memory of the copy."""
    native: bool | None = None
    """On CPU, take steps of few rows, and attention in all others, in C (Linux, with a C compiler). None: where that can be built; True: or
    refuse; False: never."""

    def __post_init__(self) -> None:
        """Check the values."""
        for name in ("batch_tokens", "max_rows", "prefill_tokens", "min_prefix"):
            if getattr(self, name) < 1:
                raise ConfigurationError(f"{name}={getattr(self, name)}: must be at least 1.")
        if self.kept_prefixes < 0:
            raise ConfigurationError(f"kept_prefixes={self.kept_prefixes}: must be at least 0.")
        if self.check_every is not None and self.check_every < 1:
            raise ConfigurationError(f"check_every={self.check_every}: must be at least 1.")
        if self.length_ratio < 1:
            raise ConfigurationError(f"length_ratio={self.length_ratio}: must be at least 1.")


DEFAULT_BUDGET = Budget()
"""Limits that suit a CPU with small models; 600 MB of keys and values for `mini`."""

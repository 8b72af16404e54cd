"""How much a server takes on."""

from __future__ import annotations

from dataclasses import dataclass

from genembed.errors import ConfigurationError


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a server accepts at a time, from one client and from all of them."""

    batch_tokens: int = 20_480
    """Positions, prompt and generated, whose keys and values the decode batch may hold: how many texts are under way follows from it."""
    queue_tokens: int = 262_144
    """Prompt tokens that may wait; more are refused with 429 and a time to come back, or at once in one request with 400."""
    concurrent_requests: int = 512
    """Requests that may be open."""
    client_batch: int = 2_048
    """Texts in one request."""
    request_bytes: int = 16 << 20
    """Length of a request's body."""
    steps: int = 20
    """Steps that a text may ask for."""
    body_seconds: float = 30.0
    """Time a client has to send a request."""

    def __post_init__(self) -> None:
        """Check the values."""
        for name in ("batch_tokens", "queue_tokens", "concurrent_requests", "client_batch", "request_bytes"):
            if getattr(self, name) < 1:
                raise ConfigurationError(f"{name}={getattr(self, name)}: must be at least 1.")
        if self.steps < 0:
            raise ConfigurationError(f"steps={self.steps}: must be at least 0.")

    def rows(self, max_length: int) -> int:
        """Return how many texts of a model may be under way.

        Raises:
            ConfigurationError: If not even one is.
        """
        longest = max_length + self.steps
        if longest > self.batch_tokens:
            raise ConfigurationError(
                f"batch_tokens={self.batch_tokens}: one text of {max_length} tokens and {self.steps} steps needs {longest}; allow more."
            )
        return self.batch_tokens // longest

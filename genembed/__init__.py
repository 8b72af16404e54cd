"""Generative text embeddings: a language model refines a text's vector step by step, and stops when it is stable."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from genembed.budget import Budget
    from genembed.embedder import Embedder, Refinement, load
    from genembed.errors import (
        CheckpointError,
        ConfigurationError,
        GenembedError,
        GenembedWarning,
        InputError,
        MissingExtraError,
        NonFiniteError,
        OutOfMemoryError,
    )
    from genembed.halting import ConvergeStop, FixedSteps, HaltingRule, Progress
    from genembed.pooling import Pooling
    from genembed.settings import ModelSettings

__version__ = "0.1.0"

__all__ = [
    "Budget",
    "CheckpointError",
    "ConfigurationError",
    "ConvergeStop",
    "Embedder",
    "FixedSteps",
    "GenembedError",
    "GenembedWarning",
    "HaltingRule",
    "InputError",
    "MissingExtraError",
    "ModelSettings",
    "NonFiniteError",
    "OutOfMemoryError",
    "Pooling",
    "Progress",
    "Refinement",
    "load",
]

_HOMES = ("errors", "budget", "halting", "pooling", "settings", "embedder")
"""Modules of the public names, the light ones first."""

if not TYPE_CHECKING:  # a type checker would take it as leave to use any name

    def __getattr__(name: str) -> object:
        """Import a public name when it is first used, so that `genembed --help` does not wait for Torch."""
        if name in __all__:
            for home in _HOMES:
                module = import_module(f"genembed.{home}")
                if name in vars(module):
                    return globals().setdefault(name, vars(module)[name])
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

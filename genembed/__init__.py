"""Generative text embeddings: a language model refines a text's vector step by step, and stops when it is stable."""

from genembed.embedder import Embedder, Refinement, load
from genembed.engine import Budget
from genembed.errors import (
    CheckpointError,
    ConfigurationError,
    GenembedError,
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

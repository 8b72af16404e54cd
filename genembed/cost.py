"""What an embedding costs: floating-point operations and memory, counted from a model's configuration alone.

One multiply-add is two operations. Norms, activations and softmaxes are left out: below one percent of a model of useful size.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from genembed.errors import CheckpointError, ConfigurationError

_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The numbers of a backbone that its cost follows from."""

    layers: int
    hidden: int
    attention: int
    """Query heads times their width."""
    keys: int
    """Key heads times their width."""
    vocabulary: int
    """Tokens that a soft token averages."""
    body: int
    """Weights of the linear layers of all blocks."""
    parameters: int
    """All weights, with the embeddings; tied ones once."""
    causal: bool = True
    """Whether a prompt position sees those before it alone."""

    @classmethod
    def of(cls, folder: Path, *, causal: bool = True, spoken: int | None = None) -> Shape:
        """Read a model folder's config.json, or a folder that has nothing else; no weight is loaded.

        Args:
            folder: Of the base model.
            causal: Whether prompts are read so.
            spoken: Tokens that a soft token averages; the whole vocabulary if None.

        Raises:
            CheckpointError: If there is no configuration of a known architecture.
            ConfigurationError: If a token does not pass all of the weights, as in a mixture of experts.
        """
        try:
            config = AutoConfig.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
            if hasattr(config, "is_decoder"):
                config.is_decoder = True  # an encoder is counted as the language model it is read as
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
        except (OSError, ValueError, KeyError) as error:
            raise CheckpointError(f"{folder}: no configuration of a known language model: {error}") from error
        shape = cls._of_model(config.get_text_config(), model)
        return replace(shape, causal=causal, vocabulary=shape.vocabulary if spoken is None else spoken)

    @classmethod
    def _of_model(cls, config: Any, model: nn.Module) -> Shape:
        if any(getattr(config, name, None) for name in _EXPERTS):
            raise ConfigurationError("a mixture of experts: each token passes some of the weights, which a configuration does not count.")
        heads = int(config.num_attention_heads)
        width = int(getattr(config, "head_dim", None) or config.hidden_size // heads)
        output = model.get_output_embeddings()  # type: ignore[operator]
        linear = [module for module in model.modules() if isinstance(module, (nn.Linear, Conv1D)) and module is not output]
        return cls(
            layers=int(config.num_hidden_layers),
            hidden=int(config.hidden_size),
            attention=heads * width,
            keys=int(getattr(config, "num_key_value_heads", None) or heads) * width,
            vocabulary=int(config.vocab_size),
            body=sum(module.weight.numel() for module in linear),
            parameters=sum(parameter.numel() for parameter in model.parameters()),
        )


@dataclass(frozen=True, kw_only=True)
class Cost:
    """One text of `tokens` prompt tokens, refined `steps` times; operations for the whole text."""

    shape: Shape
    tokens: int
    steps: int
    weight_bytes: int = 2
    """Of one weight, and of one kept key or value: 2 in half precision."""

    def __post_init__(self) -> None:
        """Check the values."""
        if self.tokens < 1 or self.steps < 0 or self.weight_bytes < 1:
            raise ConfigurationError(f"tokens={self.tokens}, steps={self.steps}: at least one token, and no negative number of steps.")

    @cached_property
    def one_pass(self) -> int:
        """Operations of one pass over the prompt, the embedding of a one-pass model."""
        return self._pass(self.tokens)

    @cached_property
    def cached(self) -> int:
        """Operations of a refinement that keeps keys and values: one pass, then one position a step."""
        shape, steps = self.shape, range(self.steps)
        attended = sum(self.tokens + k + 1 for k in steps)
        return self.one_pass + self.steps * (2 * shape.body + self._soft_token()) + 4 * shape.layers * shape.attention * attended

    @cached_property
    def recomputed(self) -> int:
        """Operations without a cache: K + 1 passes, each one position longer, as in the released training code."""
        return sum(self._pass(self.tokens + k) for k in range(self.steps + 1)) + self.steps * self._soft_token()

    @property
    def linear_one_pass(self) -> int:
        """Operations of linear layers alone, the output layer at every position: what profilers of modules count."""
        return self._linear(self.tokens)

    @property
    def linear_cached(self) -> int:
        """The same of a refinement with a cache."""
        return self._linear(self.tokens + self.steps)

    @property
    def linear_recomputed(self) -> int:
        """The same without a cache."""
        return sum(self._linear(self.tokens + k) for k in range(self.steps + 1))

    @property
    def attention_ratio(self) -> float:
        """Attention of a refinement without a cache against one pass.

        R = ((K + 1) N^2 + N K (K + 1) + K (K + 1) (2K + 1) / 6) / N^2                             (GIRCSE, appendix E, equation 9)
        """
        n, k = self.tokens, self.steps
        return ((k + 1) * n**2 + n * k * (k + 1) + k * (k + 1) * (2 * k + 1) / 6) / n**2

    @property
    def training_memory_ratio(self) -> float:
        """Attention maps of the longest pass against those of one pass, (N + K)^2 / N^2 (GIRCSE, appendix E, equation 10)."""
        return (self.tokens + self.steps) ** 2 / self.tokens**2

    @property
    def weights_memory(self) -> int:
        """Bytes of the weights."""
        return self.weight_bytes * self.shape.parameters

    @property
    def cache_memory(self) -> int:
        """Bytes of the keys and values of one text."""
        return self.weight_bytes * 2 * self.shape.layers * self.shape.keys * (self.tokens + self.steps)

    def _pass(self, positions: int) -> int:
        """One pass: a causal position i attends to i + 1 positions, any other to all."""
        shape = self.shape
        attended = positions * (positions + 1) // 2 if shape.causal else positions**2
        return 2 * shape.body * positions + 4 * shape.layers * shape.attention * attended

    def _soft_token(self) -> int:
        """Logits of one position, and the average of the embeddings under them."""
        return 2 * 2 * self.shape.vocabulary * self.shape.hidden

    def _linear(self, positions: int) -> int:
        return 2 * (self.shape.body + self.shape.vocabulary * self.shape.hidden) * positions

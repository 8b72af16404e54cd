"""Any Hugging Face causal LM, or an encoder read as a prefix language model, as refinement sees it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from genembed import cpu, cuda
from genembed.attention import ATTENTION_NAME, PackedAttention
from genembed.cpu import Product
from genembed.errors import ConfigurationError, NonFiniteError
from genembed.halting import HaltingRule
from genembed.settings import ModelSettings
from genembed.soft_token import Scores, blocked_soft_token, hard_token, recomputed_soft_token, straight_through

BLOCK = 4096
"""Vocabulary entries in one block of the soft token: the block's logits stay in cache for usual batches."""


class SoftTokenHead(nn.Module):
    """The head of an encoder that has none of its own: one linear layer and a layer norm before the tied output embeddings.

    Args:
        hidden: Length of a hidden state.
        vocab: Tokens of the model.
        tokens: Ids of the tokens it can speak, ascending; all if None. The two products with the vocabulary are most of a small
            model's step, and most of a vocabulary is never spoken.
    """

    tokens: Int[Tensor, "spoken"] | None

    def __init__(self, hidden: int, vocab: int, tokens: Int[Tensor, "spoken"] | None = None) -> None:
        super().__init__()
        self.dense = nn.Linear(hidden, hidden)
        self.norm = nn.LayerNorm(hidden)
        self.bias = nn.Parameter(torch.zeros(vocab if tokens is None else len(tokens)))
        self.register_buffer("tokens", tokens)

    def forward(self, hidden: Float[Tensor, "rows hidden"]) -> Float[Tensor, "rows hidden"]:
        """Move a last hidden state into the space of the output embeddings."""
        return self.norm(self.dense(hidden))  # type: ignore[no-any-return]


@dataclass(frozen=True)
class LogitHead:
    """From a last hidden state to next-token logits: W_phi and b_phi of equation 5, and what some families do beside it."""

    weight: Float[Tensor, "vocab hidden"]
    bias: Float[Tensor, "vocab"] | None = None
    transform: Callable[[Tensor], Tensor] | None = None
    finish: Scores = field(default_factory=Scores)
    """What comes after the product."""

    def prepare(self, hidden: Float[Tensor, "rows hidden"]) -> Float[Tensor, "rows hidden"]:
        """Apply what comes before the product with the output embeddings."""
        return hidden if self.transform is None else self.transform(hidden)

    def __call__(self, hidden: Float[Tensor, "rows hidden"]) -> Float[Tensor, "rows vocab"]:
        """Return the logits of the whole vocabulary."""
        return self.finish(nn.functional.linear(self.prepare(hidden), self.weight, self.bias))

    @classmethod
    def of(cls, model: PreTrainedModel) -> LogitHead:
        """Read the head of a Transformers model with a language-model head."""
        output, config = model.get_output_embeddings(), model.config.get_text_config()
        if output is None:
            raise ConfigurationError(f"{type(model).__name__} has no language-model head, so it cannot generate soft tokens.")
        predictions = getattr(getattr(model, "cls", None), "predictions", None)
        divisor = getattr(config, "logits_scaling", None)
        return cls(
            weight=output.weight,
            bias=getattr(output, "bias", None),
            transform=getattr(predictions, "transform", None),
            finish=Scores(
                scale=1.0 / divisor if divisor else float(getattr(config, "logit_scale", None) or 1.0),
                softcap=getattr(config, "final_logit_softcapping", None),
            ),
        )


class Backbone:
    """A language model reduced to what refinement needs: read prompts, make the next soft token, read one more position.

    Args:
        model: A Transformers model with a language-model head, in evaluation mode.
        settings: Attention mode and kind of token.
        head: Replaces the model's own language-model head (needed for encoders that come without one).
        stepper: Reads the generated positions, when an adapter works on those alone; the model itself otherwise.
        has_head: False for an encoder whose language-model head is not trained, so that it can only be read in one pass.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        settings: ModelSettings,
        *,
        head: SoftTokenHead | None = None,
        stepper: PreTrainedModel | None = None,
        has_head: bool = True,
    ) -> None:
        self.settings = settings
        self.model = model
        self.base: nn.Module = model.base_model
        self.stepper: nn.Module = stepper.base_model if stepper is not None else self.base
        self.embedding: nn.Module = model.get_input_embeddings()
        self.trained_head = head
        self.has_head = has_head
        self.read_vocabulary()
        if self.table.shape[1] != self.hidden_size:
            raise ConfigurationError(
                f"{type(model).__name__}: its input embeddings have {self.table.shape[1]} dimensions and its states {self.hidden_size}; a "
                "soft token cannot be read as an input."
            )
        self.embedding_scale = _embedding_scale(self.embedding)
        self.packable = True
        for part in self._parts:
            part.set_attn_implementation(ATTENTION_NAME)  # type: ignore[operator]
        self._vocabulary_is_packed = False

    @property
    def _parts(self) -> list[nn.Module]:
        """What reads prompts, and what reads generated positions if that is something else."""
        return [self.base, self.stepper] if self.adapter_on_generated_only else [self.base]

    @property
    def causal(self) -> bool:
        """Whether a prompt token sees only the tokens before it."""
        return self.settings.attention == "causal"

    @property
    def adapter_on_generated_only(self) -> bool:
        """Whether prompt and generated positions are read with different weights."""
        return self.stepper is not self.base

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights and hidden states."""
        return self.table.dtype

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self.table.device

    @property
    def table(self) -> Float[Tensor, "vocab hidden"]:
        """Input-embedding table E, before any scaling."""
        return self.embedding.weight  # type: ignore[return-value]

    @property
    def hidden_size(self) -> int:
        """Length of a hidden state, and so of an embedding."""
        return int(self.model.config.get_text_config().hidden_size)

    @property
    def has_sliding_window(self) -> bool:
        """Whether some layers see only the newest positions."""
        config = self.model.config.get_text_config()
        return bool(getattr(config, "sliding_window", None)) and getattr(config, "use_sliding_window", True)

    @property
    def max_positions(self) -> int | None:
        """Positions a model with learned absolute positions can read, otherwise None."""
        config = self.model.config.get_text_config()
        learned = config.model_type in ("bert", "gpt2", "gpt_neo", "opt")
        return int(config.max_position_embeddings) if learned else None

    def read_vocabulary(self) -> None:
        """Take the table and the head from the model as they are now; to be called again where training has put others in their place."""
        own, table = self.trained_head, self.table
        self.spoken = table if own is None or own.tokens is None else table[own.tokens].detach()
        self.head = LogitHead(self.spoken, bias=own.bias, transform=own) if own is not None else LogitHead.of(self.model)

    def check_halt(self, rule: HaltingRule) -> None:
        """Refuse a rule that this model cannot follow, with the reason.

        Raises:
            ConfigurationError: If the settings exclude the rule, or there is no head to generate with.
        """
        self.settings.check_halt(rule)
        if rule.max_steps > 0 and not self.has_head:
            raise ConfigurationError(
                f"halt={rule}: the model has no trained head to generate soft tokens with, so it is read in one pass: FixedSteps(0)."
            )

    def embed(self, input_ids: Int[Tensor, "*batch"]) -> Float[Tensor, "*batch hidden"]:
        """Look up input embeddings, with the scaling some families apply."""
        return self.embedding(input_ids)  # type: ignore[no-any-return]

    def new_cache(self) -> DynamicCache:
        """Return an empty cache that keeps every position, also of layers with a sliding window; the masks hide the rest."""
        return DynamicCache()

    def forward(
        self,
        embeddings: Float[Tensor, "rows length hidden"],
        *,
        positions: Int[Tensor, "rows length"],
        mask: Tensor,
        cache: DynamicCache | None,
        generated: bool,
    ) -> Float[Tensor, "rows length hidden"]:
        """Read a padded batch and return its last hidden states.

        Raises:
            ConfigurationError: Under Transformers' gradient checkpointing, which drops the cache with only a warning.
        """
        part = self.stepper if generated else self.base
        if cache is not None and any(layer.training and getattr(layer, "gradient_checkpointing", False) for layer in part.modules()):
            raise ConfigurationError(
                "Transformers' gradient checkpointing drops the KV cache, so soft tokens would see only themselves; turn it off "
                "(model.gradient_checkpointing_disable()) or refine with RecomputedRows."
            )
        output = part(
            inputs_embeds=embeddings, position_ids=positions, attention_mask=mask, past_key_values=cache, use_cache=cache is not None
        )
        return output.last_hidden_state  # type: ignore[no-any-return]

    def forward_packed(
        self,
        embeddings: Float[Tensor, "tokens hidden"],
        positions: Int[Tensor, "tokens"],
        *,
        rows: PackedAttention,
        generated: bool,
    ) -> Float[Tensor, "tokens hidden"]:
        """Read many texts as one row; `rows` attends within each of them."""
        part = self.stepper if generated else self.base
        # A 4-D mask is handed through untouched; our attention does not look at it.
        unused = embeddings.new_zeros(1, 1, 1, 1)
        output = part(inputs_embeds=embeddings[None], position_ids=positions[None], attention_mask=unused, use_cache=False, packed=rows)
        return output.last_hidden_state[0]  # type: ignore[no-any-return]

    def next_embeddings(self, hidden: Float[Tensor, "rows hidden"]) -> Float[Tensor, "rows hidden"]:
        """Turn last hidden states into the next input: a soft token (GIRCSE, equations 5 and 6) or a hard one."""
        embeddings = self._recomputed(hidden) if torch.is_grad_enabled() else None
        if self.settings.tokens == "hard":
            hard = hard_token(self.head(hidden.detach()), self.spoken)
            embeddings = hard if embeddings is None else straight_through(hard, embeddings)
        elif embeddings is None:
            embeddings = self._inferred(hidden)
        return embeddings if self.embedding_scale == 1.0 else embeddings * self.embedding_scale

    def pack_weights(self) -> None:
        """Make inference in float32 or bfloat16 on CPU faster; changes nothing elsewhere.

        The price is memory: a second copy of the linear layers, and two more of the vocabulary's table (as head, and transposed).
        """
        for part in self._parts:
            cpu.pack_linear_layers(part)
        packable = self.has_head and cpu.packable(self.head.weight) and cpu.operators_agree(self.dtype)
        if packable and not self._vocabulary_is_packed:
            self._vocabulary_is_packed = True
            vars(self).pop("_vocabulary_blocks", None)

    @cached_property
    def _vocabulary_blocks(self) -> list[tuple[Product, Product]]:
        """For each block of the vocabulary, its product with the head's weight and its product with the input embeddings."""
        head, table = self.head, self.spoken
        product, mix = (cpu.packed_product, _packed_mix) if self._vocabulary_is_packed else (_plain_product, _plain_mix)
        spans = [slice(start, start + BLOCK) for start in range(0, len(table), BLOCK)]
        return [(product(head.weight[span], None if head.bias is None else head.bias[span]), mix(table[span])) for span in spans]

    def _recomputed(self, hidden: Float[Tensor, "rows hidden"]) -> Float[Tensor, "rows hidden"]:
        head = self.head
        return recomputed_soft_token(
            head.prepare(hidden),
            head.weight,
            head.bias,
            self.spoken,
            temperature=self.settings.temperature,
            scores=head.finish,
            block=BLOCK,
        )

    def _inferred(self, hidden: Float[Tensor, "rows hidden"]) -> Float[Tensor, "rows hidden"]:
        head, prepared = self.head, self.head.prepare(hidden)
        if cuda.fuses(prepared, head.weight, self.spoken):
            average, _ = cuda.fused_soft_token(prepared, head.weight, head.bias, self.spoken, self.settings.temperature, head.finish)
            return average.to(hidden.dtype)
        return self._blocked(prepared).to(hidden.dtype)

    def _blocked(self, prepared: Float[Tensor, "rows hidden"]) -> Float[Tensor, "rows hidden"]:
        finish, wide = self.head.finish, torch.promote_types(prepared.dtype, torch.float32)
        logits = [lambda product=product: finish(product(prepared)).to(wide) for product, _mix in self._vocabulary_blocks]
        mixes = [mix for _product, mix in self._vocabulary_blocks]
        return blocked_soft_token(logits, mixes, temperature=self.settings.temperature)


def _plain_product(weight: Tensor, bias: Tensor | None) -> Product:
    return lambda inputs: nn.functional.linear(inputs, weight, bias)


def _plain_mix(table: Tensor) -> Product:
    return lambda weights: (weights.to(table.dtype) @ table).to(weights.dtype)


def _packed_mix(table: Tensor) -> Product:
    product = cpu.packed_product(table.T.contiguous())
    return lambda weights: product(weights.to(table.dtype)).to(weights.dtype)


def _embedding_scale(embedding: nn.Module) -> float:
    """Return the factor between the embedding layer's output and its table (sqrt(d) for Gemma, 1 for most).

    Raises:
        ConfigurationError: If the layer does something else than scaling, so that no average of table rows would be right.
    """
    table: Tensor = embedding.weight  # type: ignore[assignment]
    ids = torch.arange(min(8, len(table)), device=table.device)
    with torch.no_grad():
        rows, output = table[ids].cpu().double(), embedding(ids).cpu().double()  # not every device has float64
        if not bool(rows.isfinite().all()):
            raise NonFiniteError("the table of token embeddings holds NaN or infinity.")
        scale = float((rows * output).sum() / (rows * rows).sum().clamp_min(1e-300))
        if not torch.allclose(output, rows * scale, rtol=1e-2, atol=1e-6):
            raise ConfigurationError(
                f"{type(embedding).__name__} changes its table rows in a way that is not a scaling; soft tokens cannot follow it."
            )
    return 1.0 if abs(scale - 1.0) < 1e-6 else scale

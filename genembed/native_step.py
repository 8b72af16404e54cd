"""A whole refinement step of few rows in C, for the families whose layers are known: Llama, Mistral, Qwen2, Qwen3 and BERT.

Weights are read where they are, never copied. What the step gives is compared with the modules' own step before it is trusted.
"""

from __future__ import annotations

import ctypes
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from genembed import native
from genembed.backbone import Backbone, SoftTokenHead
from genembed.errors import GenembedWarning
from genembed.native import NativeError
from genembed.packed import PackedRows, SharedPrefix

_DECODERS = ("LlamaModel", "MistralModel", "Qwen2Model", "Qwen3Model")
_ACTIVATIONS = {"silu": 1, "swish": 1, "gelu": 2, "gelu_new": 3, "gelu_pytorch_tanh": 3, "relu": 4}
_ROPES = ("default", "linear", "llama3", "yarn")
"""Kinds of rotary positions that depend on the position alone, and not on the length of the text."""
_ROOT_MEAN_SQUARE, _LAYER_NORM = 1, 2
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3, torch.bfloat16: 0.1}
"""Of a state, as a share of the largest; the modules round all states to bfloat16, a step in C those that it returns."""


class Plan:
    """A backbone as the step in C reads it.

    Args:
        backbone: A model on CPU.

    Raises:
        NativeError: If its architecture, or something in it, is none that the step knows.
    """

    def __init__(self, backbone: Backbone) -> None:
        self.backbone = backbone
        self._read: list[tuple[Any, str, int]] = []
        self._merged: list[Any] = []
        self._rotations: tuple[Tensor, ...] = ()
        self.model = model = native.Model()
        part: Any = backbone.stepper
        if type(part).__name__ in _DECODERS:
            layers = self._decoder(part)
        elif type(part).__name__ == "BertModel":
            layers = self._encoder(part)
        else:
            raise NativeError(f"{type(part).__name__} is no architecture that steps in C know.")
        model.layers, model.num_layers = (native.Layer * len(layers))(*layers), len(layers)
        model.hidden, model.widest = backbone.hidden_size, max(layer.up.outputs for layer in layers)
        model.head = self._head()
        self._rotary = getattr(part, "rotary_emb", None)
        self.positions: int = 0 if self._rotary is not None else len(part.embeddings.position_embeddings.weight)
        """Positions that a row may have: those of a table, or those for which rotations are known."""
        self.reach(1)
        _check(model, layers)

    @property
    def fresh(self) -> bool:
        """Whether the model has the tensors that were read; what is in them may have changed."""
        merged = all(layer.merged for layer in self._merged)
        return merged and all(getattr(owner, name).data_ptr() == pointer for owner, name, pointer in self._read)

    def reach(self, positions: int) -> None:
        """Make sure that rotations are known for so many positions."""
        if self._rotary is None or positions <= self.positions:
            return
        length = 1 << (positions - 1).bit_length()
        real = torch.promote_types(self.backbone.dtype, torch.float32)
        cosines, sines = self._rotary(torch.zeros(1, dtype=real), torch.arange(length)[None])
        tables = cosines[0].contiguous(), sines[0].contiguous()
        self._rotations += tables  # the shorter ones stay: another thread may be reading them
        if cosines.shape[-1] != self.model.head_dim:
            raise NativeError(f"rotations of {cosines.shape[-1]} of {self.model.head_dim} dimensions are none that steps in C know.")
        self.model.cosines, self.model.sines = (table.data_ptr() for table in tables)
        self.positions = length

    def _decoder(self, part: Any) -> list[native.Layer]:
        """Norms stand before both halves of a layer, and after the last layer."""
        config, first = part.config, part.layers[0].self_attn
        if config.rope_parameters.get("rope_type") not in _ROPES:
            raise NativeError(f"rotary positions of kind {config.rope_parameters.get('rope_type')!r} are none that steps in C know.")
        self._shape(config.num_attention_heads, config.num_key_value_heads, first.head_dim, first.scaling, after_norm=False)
        self.model.final_norm = self._norm(part.norm)
        return [self._decoder_layer(layer) for layer in part.layers]

    def _decoder_layer(self, layer: Any) -> native.Layer:
        attention, mlp = layer.self_attn, layer.mlp
        # As in Mistral, whose layers ask their configuration, or in Qwen, whose layers may differ.
        window = getattr(attention, "sliding_window", attention.config.sliding_window if "Mistral" in type(attention).__name__ else None)
        return native.Layer(
            before_attention=self._norm(layer.input_layernorm),
            before_feed_forward=self._norm(layer.post_attention_layernorm),
            of_queries=self._norm(getattr(attention, "q_norm", None), self.model.head_dim),
            of_keys=self._norm(getattr(attention, "k_norm", None), self.model.head_dim),
            query=self._linear(attention.q_proj),
            key=self._linear(attention.k_proj),
            value=self._linear(attention.v_proj),
            output=self._linear(attention.o_proj),
            gate=self._linear(mlp.gate_proj),
            up=self._linear(mlp.up_proj),
            down=self._linear(mlp.down_proj),
            activation=_activation(attention.config.hidden_act),
            window=window if window and self.backbone.causal else 0,
        )

    def _encoder(self, part: Any) -> list[native.Layer]:
        """A norm follows each half of a layer, and the embeddings: it stands before the next half, which is added to what it gives."""
        config, first = part.config, part.encoder.layer[0].attention.self
        self._shape(config.num_attention_heads, config.num_attention_heads, first.attention_head_size, first.scaling, after_norm=True)
        embeddings = part.embeddings
        self.model.positions = self._pointer(embeddings.position_embeddings, "weight")
        self.model.token_type = self._pointer(embeddings.token_type_embeddings, "weight")
        norms = [embeddings.LayerNorm, *(layer.output.LayerNorm for layer in part.encoder.layer)]
        self.model.final_norm = self._norm(norms[-1])
        return [self._encoder_layer(layer, before, config) for layer, before in zip(part.encoder.layer, norms, strict=False)]

    def _encoder_layer(self, layer: Any, before: nn.Module, config: Any) -> native.Layer:
        attention = layer.attention.self
        return native.Layer(
            before_attention=self._norm(before),
            before_feed_forward=self._norm(layer.attention.output.LayerNorm),
            query=self._linear(attention.query),
            key=self._linear(attention.key),
            value=self._linear(attention.value),
            output=self._linear(layer.attention.output.dense),
            up=self._linear(layer.intermediate.dense),
            down=self._linear(layer.output.dense),
            activation=_activation(config.hidden_act),
        )

    def _head(self) -> native.Head:
        backbone, head = self.backbone, self.backbone.head
        if backbone.settings.tokens != "soft":
            raise NativeError(f"tokens={backbone.settings.tokens!r}: steps in C speak soft tokens alone.")
        if backbone.spoken.shape != head.weight.shape:
            raise NativeError(
                f"a table of shape {tuple(backbone.spoken.shape)} under a head of shape {tuple(head.weight.shape)} is no vocabulary."
            )
        dense, norm, activation = native.Linear(), native.Norm(), 0
        if isinstance(head.transform, SoftTokenHead):
            dense, norm = self._linear(head.transform.dense), self._norm(head.transform.norm)
        elif head.transform is not None:
            transform: Any = head.transform
            dense, norm = self._linear(transform.dense), self._norm(transform.LayerNorm)
            activation = _activation(backbone.model.config.hidden_act)
        return native.Head(
            dense=dense,
            norm=norm,
            activation=activation,
            vocabulary=native.Linear(self._pointer(head, "weight"), self._pointer(head, "bias"), *head.weight.shape),
            table=self._pointer(backbone, "spoken"),
            temperature=backbone.settings.temperature,
            scale=head.finish.scale,
            softcap=head.finish.softcap or 0.0,
            embedding_scale=backbone.embedding_scale,
        )

    def _shape(self, heads: int, kv_heads: int, head_dim: int, scale: float, *, after_norm: bool) -> None:
        model = self.model
        model.heads, model.kv_heads, model.head_dim = heads, kv_heads, head_dim
        model.attention_scale, model.after_norm = scale, after_norm

    def _linear(self, layer: Any) -> native.Linear:
        if getattr(layer, "merged", False):  # PEFT's layer around one whose weight has the adapter in it
            self._merged.append(layer)
            layer = layer.base_layer
        if type(layer) is not nn.Linear:
            raise NativeError(f"{type(layer).__name__} is no plain linear layer.")
        return native.Linear(self._pointer(layer, "weight"), self._pointer(layer, "bias"), *layer.weight.shape)

    def _norm(self, norm: nn.Module | None, size: int | None = None) -> native.Norm:
        if norm is None:
            return native.Norm()
        weight: Any = norm.weight
        if weight is None or weight.shape != (size or self.backbone.hidden_size,):
            raise NativeError(f"{type(norm).__name__} has no weight for each of {size or self.backbone.hidden_size} dimensions.")
        if type(norm) is nn.LayerNorm:
            return native.Norm(self._pointer(norm, "weight"), self._pointer(norm, "bias"), norm.eps, _LAYER_NORM)
        if self.backbone.dtype == torch.float64 and type(norm).__module__.startswith("transformers."):
            raise NativeError(f"{type(norm).__name__} rounds to float32 in a float64 model, which a step in C would not.")
        if type(norm).__name__.endswith("RMSNorm"):
            return native.Norm(self._pointer(norm, "weight"), None, norm.variance_epsilon, _ROOT_MEAN_SQUARE)
        raise NativeError(f"{type(norm).__name__} is no norm that steps in C know.")

    def _pointer(self, owner: Any, name: str) -> int | None:
        tensor: Tensor | None = getattr(owner, name)
        if tensor is None:
            return None
        if tensor.dtype != self.backbone.dtype or not tensor.is_contiguous():
            raise NativeError(
                f"{type(owner).__name__}.{name} is {tensor.dtype}, or not laid out in rows; the model is {self.backbone.dtype}."
            )
        self._read.append((owner, name, tensor.data_ptr()))
        return tensor.data_ptr()


class NativeRows:
    """Makes rows whose steps are done in C while they are few.

    Args:
        backbone: A model on CPU that can be packed.

    Raises:
        NativeError: If it is not, or nothing can be built.
    """

    def __init__(self, backbone: Backbone) -> None:
        if backbone.device.type != "cpu" or not backbone.packable:
            raise NativeError(f"on {backbone.device.type}" if backbone.packable else "read in padded batches")
        self.backbone = backbone
        self.library = native.library(backbone.dtype)
        self._plan: Plan | None = None
        self._reason: str | None = None

    @property
    def reason(self) -> str | None:
        """Why whole steps are not done in C, None if they are; attention is in any case."""
        self._current_plan()
        return self._reason

    def take(self, *, max_rows: int, max_tokens: int, prefix: SharedPrefix | None) -> PackedRows:
        """Return rows of this size over this prefix, without a row in them."""
        plan = self._current_plan()
        replay = None
        if plan is not None:
            plan.reach(max_tokens + (prefix.length if prefix else 0))
            replay = _Steps(plan, self.library)
        attention = native.Attention(self.library)
        return PackedRows(self.backbone, max_rows=max_rows, max_tokens=max_tokens, prefix=prefix, replay=replay, attention=attention)

    def give(self, rows: PackedRows) -> None:
        """Keep nothing."""

    def clear(self) -> None:
        """Keep nothing."""

    def _current_plan(self) -> Plan | None:
        if self._reason is None and (self._plan is None or not self._plan.fresh):
            try:
                self._plan = Plan(self.backbone)
                self._compare(self._plan)
            except NativeError as error:
                self._plan, self._reason = None, str(error)
        return self._plan

    @torch.inference_mode()
    def _compare(self, plan: Plan) -> None:
        """Compare two steps of two short prompts with the modules' own."""
        found = []
        prompts = [(torch.arange(length).numpy() + 7 * length) % len(self.backbone.table) for length in (5, 3)]
        plan.reach(8)
        for replay in (None, _Steps(plan, self.library)):
            rows = PackedRows(self.backbone, max_rows=2, max_tokens=7, replay=replay)
            rows.admit(prompts)
            rows.generate()
            rows.generate()
            found.append(rows.last_hidden.to(torch.float64))
        wrong = float((found[0] - found[1]).abs().max() / found[0].abs().max().clamp_min(1e-30))
        if not wrong <= _TOLERANCE[self.backbone.dtype] and bool(found[0].isfinite().all()):
            reason = f"a step in C differs from the modules' by {wrong:.2g} of the largest state"
            warnings.warn(f"{reason}; the modules' is used. Please report it, with the model's name.", GenembedWarning, stacklevel=2)
            raise NativeError(reason)


class _Steps:
    """Whole steps over the slots of one `PackedRows`."""

    def __init__(self, plan: Plan, library: ctypes.CDLL) -> None:
        self.plan = plan
        self.library = library
        self.most_rows = int(library.most_rows())
        self._space = torch.empty(0, dtype=torch.uint8)

    def __call__(self, rows: PackedRows) -> bool:
        """Add a soft token to every row, if they are few and have room, and tell whether it was done."""
        count = len(rows)
        if count > self.most_rows or rows.full or rows.prefix_length + rows.max_tokens > self.plan.positions:
            return False
        threads, model = torch.get_num_threads(), self.plan.model
        needed = self.library.space_of_step(model, count, threads)
        if len(self._space) < needed:
            self._space = torch.empty(needed, dtype=torch.uint8)
        states = rows.last_hidden.clone()
        self.library.step(model, rows.described, states.data_ptr(), self._space.data_ptr(), threads)
        rows.accept(states)
        return True


def _check(model: native.Model, layers: list[native.Layer]) -> None:
    """Refuse shapes that do not fit together: C would read what lies beside them."""
    hidden, queries, keys = model.hidden, model.heads * model.head_dim, model.kv_heads * model.head_dim
    expected = {(model.head.vocabulary.inputs, hidden)}
    if model.head.dense.weight is not None:
        expected |= {(model.head.dense.inputs, hidden), (model.head.dense.outputs, hidden)}
    for layer in layers:
        wide = layer.up.outputs
        expected |= {(own.inputs, hidden) for own in (layer.query, layer.key, layer.value, layer.up)}
        expected |= {(layer.query.outputs, queries), (layer.key.outputs, keys), (layer.value.outputs, keys), (layer.output.inputs, queries)}
        expected |= {(layer.output.outputs, hidden), (layer.down.inputs, wide), (layer.down.outputs, hidden)}
        if layer.gate.weight is not None:
            expected |= {(layer.gate.inputs, hidden), (layer.gate.outputs, wide)}
    wrong = {pair for pair in expected if pair[0] != pair[1]}
    if wrong or model.heads % model.kv_heads or not native.attends(model.head_dim, model.head_dim):
        heads = f"{model.heads} heads of {model.head_dim} dimensions over {model.kv_heads} of keys"
        raise NativeError(f"{heads}, and layers of sizes {sorted(wrong)} instead of one another, are not what steps in C can do.")


def _activation(name: Any) -> int:
    if name not in _ACTIVATIONS:
        raise NativeError(f"hidden_act={name!r} is none that steps in C know.")
    return _ACTIVATIONS[name]

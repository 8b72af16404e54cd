"""What a model folder says about itself, and the settings of the published model families."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal

from genembed.errors import ConfigurationError
from genembed.halting import ConvergeStop, FixedSteps, HaltingRule, is_number, rule_from_json, rule_to_json
from genembed.pooling import Pooling
from genembed.prompt import GIRCSE_TEMPLATE, LASER_TEMPLATE, PromptTemplate
from genembed.soft_token import check_temperature

FORMAT_VERSION = 1
"""Version of the settings file; a reader refuses a newer one."""

_CHOICES = {
    "attention": ("causal", "prefix", "bidirectional"),
    "tokens": ("soft", "hard"),
    "padding_side": ("left", "right"),
    "adapter_positions": ("all", "generated"),
}

_GENERATED, _TWENTY_STEPS = Pooling(), FixedSteps(20)


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """How a model turns text into a vector. Everything that changes a vector is here or in the weights."""

    attention: Literal["causal", "prefix", "bidirectional"] = "causal"
    """Who sees whom: `causal`; `prefix` (all of the prompt sees all of it, generated positions see everything before
    them); `bidirectional` (as `prefix`, and nothing can be generated)."""
    pooling: Pooling = _GENERATED
    """Which states make the embedding."""
    tokens: Literal["soft", "hard"] = "soft"
    """What is fed back: the average embedding under the next-token distribution, or the likeliest token."""
    temperature: float = 1.0
    """Temperature of the soft token's softmax, dimensionless."""
    halt: FixedSteps | ConvergeStop = _TWENTY_STEPS
    """The rule used when a call names none."""
    template: str = GIRCSE_TEMPLATE
    """Prompt with `{instruction}` and `{text}`; a text without an instruction is read bare."""
    query_instruction: str | None = None
    """Instruction of `encode_query` when a call names none."""
    document_instruction: str | None = None
    """Instruction of `encode_document` when a call names none."""
    special_tokens: Literal["tokenizer", "eos"] | tuple[tuple[str, ...], tuple[str, ...]] = ((), ())
    """Tokens before and after the prompt, by name; or `tokenizer`: the ones the tokenizer itself adds; or
    `eos`: the tokenizer's end-of-sequence token after the prompt."""
    padding_side: Literal["left", "right"] = "left"
    """Side of the padding in the reference loop; positions are explicit, so vectors do not depend on it."""
    max_length: int = 512
    """Longest prompt in tokens, special tokens included; longer texts are cut from the right."""
    adapter_positions: Literal["all", "generated"] = "all"
    """Whether the adapter works on every position, or on generated ones only, so that the prompt is read by the
    unchanged base model."""
    parallel_passes: int = 0
    """0: one soft token after the other, exactly. J: all of them at once, in J passes (`genembed.parallel`); several times faster for
    a text at a time, and slower in large batches."""
    matryoshka_dims: tuple[int, ...] = ()
    """Numbers of leading dimensions that the model was trained to be cut to, ascending; the full width needs no naming."""

    def __post_init__(self) -> None:
        """Check each value and the combinations that cannot work."""
        self._check_types()
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ConfigurationError(f"{name}={getattr(self, name)!r}: choose one of {', '.join(choices)}.")
        check_temperature(self.temperature)
        PromptTemplate(self.template)
        if self.max_length < 1:
            raise ConfigurationError(f"max_length={self.max_length}: at least one token is needed.")
        if self.tokens == "hard" and self.temperature != 1.0:
            raise ConfigurationError("temperature has no effect with tokens='hard': the likeliest token does not depend on it.")
        if self.parallel_passes and self.attention == "bidirectional":
            raise ConfigurationError(f"parallel_passes={self.parallel_passes} has no effect: bidirectional attention generates nothing.")
        self.check_halt(self.halt)

    def _check_types(self) -> None:
        """Refuse values of another type, as a settings file may hold them."""
        texts = {
            "template": self.template,
            "query_instruction": self.query_instruction or "",
            "document_instruction": self.document_instruction or "",
        }
        for name, value in texts.items():
            if not isinstance(value, str):
                raise ConfigurationError(f"{name}={value!r}: a string is needed.")
        if not isinstance(self.max_length, int) or isinstance(self.max_length, bool):
            raise ConfigurationError(f"max_length={self.max_length!r}: a whole number of tokens is needed.")
        if not isinstance(self.parallel_passes, int) or isinstance(self.parallel_passes, bool) or self.parallel_passes < 0:
            raise ConfigurationError(f"parallel_passes={self.parallel_passes!r}: a whole number is needed; 0 refines step by step.")
        if not is_number(self.temperature):
            raise ConfigurationError(f"temperature={self.temperature!r:.80}: a number is needed.")
        dims = self.matryoshka_dims
        if not isinstance(dims, tuple) or not all(type(one) is int and one > 0 for one in dims) or list(dims) != sorted(set(dims)):
            raise ConfigurationError(f"matryoshka_dims={dims!r}: ascending numbers of dimensions are needed, such as [64, 128].")
        if self.special_tokens not in ("tokenizer", "eos") and not _is_pair_of_names(self.special_tokens):
            raise ConfigurationError(
                f"special_tokens={self.special_tokens!r}: 'tokenizer', 'eos', or names before and after, as [['[CLS]'], ['[SEP]']]."
            )

    def check_halt(self, rule: HaltingRule) -> None:
        """Refuse a rule that this model cannot follow, with the reason.

        Raises:
            ConfigurationError: If a one-pass model is asked for steps, or a model whose embedding is made of generated
                states alone is asked for none.
        """
        if self.attention == "bidirectional" and rule.max_steps > 0:
            raise ConfigurationError(
                f"halt={rule}: bidirectional attention cannot generate, as earlier positions would have to see later ones; use "
                "FixedSteps(0), or attention='prefix' to generate after a bidirectional prompt."
            )
        if self.pooling.needs_steps and rule.max_steps == 0:
            raise ConfigurationError(
                "steps=0: this model pools generated states only, so at least one refinement step is needed; for a plain one-pass "
                "embedding use pooling='last' or 'mean'."
            )

    def to_json(self) -> dict[str, Any]:
        """Return the object written to the settings file."""
        values = {name.name: getattr(self, name.name) for name in fields(self)}
        values.update(pooling=asdict(self.pooling), halt=rule_to_json(self.halt))
        return {"format_version": FORMAT_VERSION, **values}

    @classmethod
    def from_json(cls, value: Mapping[str, Any], *, source: str) -> ModelSettings:
        """Read a settings file.

        Args:
            value: The parsed JSON object.
            source: Name of the file, for the error message.

        Raises:
            ConfigurationError: If a field is unknown or the format is newer than this library.
        """
        value = dict(value)
        version = value.pop("format_version", None)
        if version != FORMAT_VERSION:
            raise ConfigurationError(f"{source}: format_version {version!r} is not {FORMAT_VERSION}; a newer genembed may read it.")
        unknown = set(value) - {name.name for name in fields(cls)}
        if unknown:
            raise ConfigurationError(f"{source}: unknown settings {sorted(unknown)}; known: {sorted(name.name for name in fields(cls))}.")
        try:
            if "pooling" in value:
                value["pooling"] = Pooling(**value["pooling"])
            if "halt" in value and not isinstance(value["halt"], Mapping):
                raise ConfigurationError(f"halt={value['halt']!r}: an object is needed, such as {rule_to_json(GIRCSE.halt)}.")
            if "halt" in value:
                value["halt"] = rule_from_json(value["halt"])
            if isinstance(value.get("special_tokens"), list):
                before, after = value["special_tokens"]
                value["special_tokens"] = (tuple(before), tuple(after))
            if isinstance(value.get("matryoshka_dims"), list):
                value["matryoshka_dims"] = tuple(value["matryoshka_dims"])
            return cls(**value)
        except (TypeError, ValueError) as error:
            raise ConfigurationError(f"{source}: {error}") from error


def _is_pair_of_names(value: object) -> bool:
    sides = value if isinstance(value, tuple) and len(value) == 2 else (None, None)
    return all(isinstance(side, tuple) and all(isinstance(name, str) for name in side) for side in sides)


GIRCSE = ModelSettings()
"""GIRCSE as its evaluation code runs it: no special tokens, 512 tokens, 20 steps, mean of the generated states."""

LASER = replace(
    GIRCSE,
    template=LASER_TEMPLATE,
    special_tokens="tokenizer",
    pooling=Pooling(kind="generated", pool_prompt_state=True),
    halt=FixedSteps(2),
)
"""LaSER as its quick start runs it: the tokenizer's own special tokens; 3 'thinking steps' are the prompt's last state and
two generated ones."""

CAUSAL_EOS = replace(GIRCSE, special_tokens="eos", pooling=Pooling(kind="last"), halt=FixedSteps(0))
"""The one-pass baseline of the paper: the state of an end-of-sequence token, causal attention."""

BIDIRECTIONAL_AVG = replace(GIRCSE, attention="bidirectional", pooling=Pooling(kind="mean"), halt=FixedSteps(0))
"""The one-pass baseline of the paper: the mean of the prompt's states, bidirectional attention."""

HARD_TOKENS = replace(GIRCSE, tokens="hard")
"""Generation with the likeliest token instead of the soft one (InBedder-style)."""

PRESETS: Mapping[str, ModelSettings] = {
    "gircse": GIRCSE,
    "laser": LASER,
    "causal-eos": CAUSAL_EOS,
    "bidirectional-avg": BIDIRECTIONAL_AVG,
    "hard-tokens": HARD_TOKENS,
}
"""Settings by name, for folders without a settings file of their own."""


def preset_settings(preset: str | ModelSettings) -> ModelSettings:
    """Look a preset up; settings are returned as they are.

    Raises:
        ConfigurationError: If the name is unknown.
    """
    if isinstance(preset, ModelSettings):
        return preset
    if preset not in PRESETS:
        raise ConfigurationError(f"preset={preset!r} is unknown; choose one of {', '.join(PRESETS)}, or pass a ModelSettings.")
    return PRESETS[preset]

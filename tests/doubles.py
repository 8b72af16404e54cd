"""Tiny random models of every supported architecture, with a tokenizer that has tokens for any text."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor

from genembed import ConvergeStop, FixedSteps, ModelSettings, Pooling, Progress
from genembed.backbone import Backbone, SoftTokenHead
from genembed.graphs import FixedStep
from genembed.refine import refine
from genembed.rows import CachedRows
from genembed.tokens import TokenBatch, TokenIds

VOCAB = 320
HIDDEN = 32
BOS, EOS, UNKNOWN = "<s>", "</s>", "<unk>"

_SENTENCES = [
    "A language model refines the vector of a text step by step, and stops when it is stable.",
    "What is considered a business expense on a business trip?",
    "Alpha-lipoic acid lowers fasting glucose in patients with diabetes.",
    "Instruct: Given a claim, retrieve documents that support or refute the claim\nQuery: the claim",
]

_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}
_SLIDING = {"sliding_window": 8, "head_dim": 8}

FAMILIES: Mapping[str, Callable[[], transformers.PretrainedConfig]] = {
    "qwen2": lambda: transformers.Qwen2Config(**_SIZES, tie_word_embeddings=True),
    "mistral": lambda: transformers.MistralConfig(**_SIZES, sliding_window=None),
    "mistral-window": lambda: transformers.MistralConfig(**_SIZES, **_SLIDING),
    "llama": lambda: transformers.LlamaConfig(**_SIZES),
    "qwen3": lambda: transformers.Qwen3Config(**_SIZES, head_dim=8),
    "gemma": lambda: transformers.GemmaConfig(**_SIZES, head_dim=8),
    "gemma2": lambda: transformers.Gemma2Config(
        **_SIZES, **_SLIDING, query_pre_attn_scalar=8, attn_logit_softcapping=5.0, final_logit_softcapping=6.0
    ),
    "gemma3": lambda: transformers.Gemma3TextConfig(
        **_SIZES, **_SLIDING, query_pre_attn_scalar=8, layer_types=["sliding_attention", "full_attention"]
    ),
    "gpt2": lambda: transformers.GPT2Config(
        vocab_size=VOCAB, n_embd=HIDDEN, n_layer=2, n_head=4, n_positions=128, bos_token_id=0, eos_token_id=1
    ),
    "olmo": lambda: transformers.OlmoConfig(**_SIZES),
    "olmo2": lambda: transformers.Olmo2Config(**_SIZES),
    "bert": lambda: transformers.BertConfig(
        **{name: value for name, value in _SIZES.items() if name != "num_key_value_heads"} | {"max_position_embeddings": 128}
    ),
}
"""Two layers each; the windows are shorter than most prompts, and the soft caps are low enough to bend every score."""

FLOAT32_INSIDE = 5e-5
"""Tolerance against a pass of Transformers' own: it takes norms, angles and eager softmaxes in float32 even in a float64
model, and refinement amplifies the difference. Measured: at most 1.1e-5, after four refinement steps."""

ENCODERS = ("bert",)
CAUSAL_FAMILIES = tuple(family for family in FAMILIES if family not in ENCODERS)

PREFIX = ModelSettings(attention="prefix", pooling=Pooling(kind="mean", prompt_weight=2.0), special_tokens=((BOS,), (EOS,)), max_length=64)
"""Settings of the encoder double."""


@lru_cache
def tokenizer() -> transformers.PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer; its own special tokens are `<s>` before and `</s>` after the text."""
    bpe = Tokenizer(models.BPE(unk_token=UNKNOWN))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=[BOS, EOS, UNKNOWN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(_SENTENCES, trainer)
    bpe.post_processor = processors.TemplateProcessing(single=f"{BOS} $A {EOS}", special_tokens=[(BOS, 0), (EOS, 1)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token=BOS, eos_token=EOS, unk_token=UNKNOWN, pad_token=EOS, clean_up_tokenization_spaces=False
    )


@lru_cache
def model(family: str, seed: int = 0) -> transformers.PreTrainedModel:
    """Return a random model in float64, with weights large enough that logits are neither flat nor one-hot."""
    config = FAMILIES[family]()
    torch.manual_seed(seed)
    if family in ENCODERS:
        config.is_decoder = True
    made = transformers.AutoModelForCausalLM.from_config(config)
    _spread(made)
    _make_norms_exact(made)
    return made.double().eval().requires_grad_(False)


class ExactRMSNorm(torch.nn.Module):
    """The norm of Llama and its kin in the dtype of its input. Theirs rounds to float32 whatever the dtype, and refinement amplifies
    that: two exact ways would differ by 1e-5 after seven steps."""

    def __init__(self, norm: Any) -> None:
        super().__init__()
        self.weight, self.variance_epsilon = norm.weight, norm.variance_epsilon

    def forward(self, states: Tensor) -> Tensor:
        return self.weight * states * torch.rsqrt(states.square().mean(-1, keepdim=True) + self.variance_epsilon)


def _make_norms_exact(model: torch.nn.Module) -> None:
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child).__name__ in ("LlamaRMSNorm", "MistralRMSNorm", "Qwen2RMSNorm", "Qwen3RMSNorm"):
                setattr(module, name, ExactRMSNorm(child))


def is_unchanged(family: str) -> bool:
    """Whether the shared model of a family still has the weights it was made with; a test that changes them needs a copy."""
    made = model.__wrapped__(family).state_dict()
    return all(torch.equal(weight, made[name]) for name, weight in model(family).state_dict().items())


@lru_cache
def plain(family: str) -> transformers.PreTrainedModel:
    """Return a copy of the model that Transformers runs by itself, with its own eager attention."""
    made = copy.deepcopy(model(family))
    made.set_attn_implementation("eager")
    return made


@lru_cache
def head(seed: int = 0) -> SoftTokenHead:
    """Return a random soft-token head for the encoder doubles."""
    torch.manual_seed(seed)
    made = SoftTokenHead(HIDDEN, VOCAB)
    _spread(made)
    return made.double().eval().requires_grad_(False)


def _spread(module: torch.nn.Module) -> None:
    with torch.no_grad():
        for name, weight in module.named_parameters():
            if weight.ndim > 1:
                weight.normal_(0, 0.3)
            elif "bias" in name:
                weight.normal_(0, 0.1)


def settings_of(family: str, **changes: Any) -> ModelSettings:
    """Return settings under which a family can refine: GIRCSE's for causal models, prefix attention for encoders."""
    base = PREFIX if family in ENCODERS else ModelSettings()
    return ModelSettings(**{name: getattr(base, name) for name in base.__dataclass_fields__} | changes)


def backbone(family: str, **changes: Any) -> Backbone:
    """Return a float64 backbone over the shared model of a family."""
    return Backbone(model(family), settings_of(family, **changes), head=head() if family in ENCODERS else None)


def saved(family: str, root: Path) -> Path:
    """Save a family's model, tokenizer and settings under `root`, once, and return the folder."""
    folder = root / family
    if folder.is_dir():
        return folder
    made = model(family)
    whole = made.bert if family in ENCODERS else made
    whole.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    (folder / "genembed.json").write_text(json.dumps(settings_of(family).to_json()))
    if family in ENCODERS:
        save_file(head().state_dict(), folder / "soft_token_head.safetensors")
    return folder


class Replayed:
    """A recording that does the step again, as a GPU's would."""

    def __init__(self, step: FixedStep) -> None:
        self.replay = step.run


def trainable(backbone: Backbone) -> Backbone:
    """Return a backbone over a copy of the weights that wants gradients."""
    weights = copy.deepcopy(backbone.model).requires_grad_(True)
    head = None if backbone.trained_head is None else copy.deepcopy(backbone.trained_head).requires_grad_(True)  # type: ignore[arg-type]
    return Backbone(weights, backbone.settings, head=head)


def cast(backbone: Backbone, dtype: torch.dtype) -> Backbone:
    """Return a backbone over a copy of the weights in another dtype."""
    found = trainable(backbone)
    for module in (found.model, found.trained_head):
        if module is not None:
            module.requires_grad_(False).to(dtype)
    found.read_vocabulary()
    return found


def save_adapter(base: Path, folder: Path, *, seed: int = 1, named: str | None = None) -> Path:
    """Train nothing, and save a random LoRA adapter over `base` as the published GIRCSE folders are: adapter and tokenizer."""
    torch.manual_seed(seed)
    over = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64)
    targets = [name for name, part in over.named_modules() if name.rpartition(".")[2] in ("q_proj", "v_proj", "query", "value")]
    made = get_peft_model(over, LoraConfig(r=2, lora_alpha=4, target_modules=targets, task_type="CAUSAL_LM"))
    for name, weight in made.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(weight, 0, 0.3)
    made.peft_config["default"].base_model_name_or_path = named or str(base)
    made.save_pretrained(folder, save_embedding_layers=False)  # else PEFT asks the hub for the base model
    tokenizer().save_pretrained(folder)
    return folder


def prompts(lengths: Sequence[int], *, seed: int = 0, shared: int = 0) -> list[TokenIds]:
    """Return random token ids, `lengths` of them after `shared` leading ones that are the same in every prompt."""
    random = np.random.default_rng(seed)
    first = random.integers(3, VOCAB, size=shared)
    return [np.concatenate([first, random.integers(3, VOCAB, size=length)]) for length in lengths]


@dataclass(frozen=True)
class Schedule:
    """A halting rule that stops each text at a step written down before."""

    steps: tuple[int, ...]
    window: int = 0
    first_row: int = 0
    """Number of the first text in the caller's list."""

    @property
    def max_steps(self) -> int:
        return max(self.steps)

    def __call__(self, progress: Progress) -> Tensor:
        return progress.step >= torch.tensor(self.steps)[progress.index - self.first_row]


def alone(backbone: Backbone, ids: TokenIds, max_steps: int) -> Tensor:
    """Return z_0 .. z_K of one text, refined by itself in the reference loop; z_0 is zero where the pooling has none."""
    batch = TokenBatch.pad([ids])
    with torch.no_grad():
        rows = CachedRows(backbone, batch)
        start = backbone.settings.pooling.start(batch.index, rows.last_hidden, rows.mean_hidden, window=0).embedding
        return torch.cat([start, refine(backbone, batch, steps=max_steps)[0]]) if max_steps else start


def halting_step(trajectory: Tensor, rule: FixedSteps | ConvergeStop | Schedule, row: int) -> int:
    """Return k* of z_0 .. z_K as section 3.3 of the paper writes it, without our own halting code."""
    if isinstance(rule, Schedule):
        return rule.steps[row]
    if isinstance(rule, FixedSteps):
        return rule.steps
    cosine = {k: float(trajectory[k - 1] @ trajectory[k]) for k in range(2, rule.max_steps + 1)}
    for k in range(rule.min_steps, rule.max_steps):
        if all(cosine.get(k - back, -1.0) >= rule.threshold for back in range(rule.patience)):
            return k
    return rule.max_steps

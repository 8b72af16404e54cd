"""Our forward pass as a module of sentence-transformers: `SentenceTransformer(folder, trust_remote_code=True)`."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from genembed import checkpoint, cpu
from genembed.backbone import Backbone
from genembed.engine import Engine
from genembed.errors import ConfigurationError, GenembedWarning, InputError, missing_extra
from genembed.halting import ConvergeStop, FixedSteps, HaltingRule
from genembed.integrations.merging import MergedAdapter
from genembed.integrations.sentence_transformers_folder import ST_CONFIG, require_genembed, write_parts
from genembed.prompt import PromptTemplate
from genembed.settings import ModelSettings
from genembed.source import Source, resolve
from genembed.tokens import PromptTokenizer, TokenBatch, TokenIds, Tokenised, check_texts
from genembed.train.model import TrainableEmbedder

try:
    from sentence_transformers.base.modules import InputModule
    from sentence_transformers.util import get_device_name
except ModuleNotFoundError as error:
    raise missing_extra("sentence-transformers", "sentence-transformers>=6.0") from error


class GenerativeEmbedding(InputModule):  # type: ignore[misc]  # the library is not typed for us
    """Prompts in, refined unit vectors out; the first module of a `SentenceTransformer`.

    In evaluation mode, as in `encode`, texts go through our engine and halt by the rule; each gets its own `steps` and `truncated`
    (`encode(..., output_value=None)` returns them). In training mode every text is refined with gradients for as many steps as the
    rule has at most, and `trajectory` holds z_1 .. z_K. Trained are the adapter where the folder has one, otherwise all weights, and
    the soft-token head where there is one; the base's own dropout is off.
    """

    config_keys = ["max_seq_length", "halt"]  # noqa: RUF012  (theirs)
    forward_kwargs = {"steps", "halt", "truncate"}  # noqa: RUF012  (theirs)
    save_in_root = True

    def __init__(self, source: Source, *, device: str = "auto", dtype: str | torch.dtype = "auto") -> None:
        """Load a model.

        Args:
            source: The resolved model; its adapter stays apart from the base's weights.
            device: Where it is loaded; sentence-transformers moves it later.
            dtype: As for `genembed.load`.
        """
        super().__init__()
        self.embedder = _trainable(source, device=device, dtype=dtype)
        # Where the adapter reads generated positions alone, prompts are read by a second, frozen model.
        self.reader = self.embedder.backbone.model if self.embedder.backbone.adapter_on_generated_only else None
        self._engine: Engine | None = None
        self._merged: MergedAdapter | None = None
        self.train(False)

    @property
    def settings(self) -> ModelSettings:
        """How the model makes an embedding; `save` writes them."""
        return self.embedder.settings

    @property
    def halt(self) -> FixedSteps | ConvergeStop:
        """The rule of `encode` where a call names none; its largest number of steps is that of training."""
        return self.settings.halt

    @halt.setter
    def halt(self, rule: FixedSteps | ConvergeStop) -> None:
        self._change(replace(self.settings, halt=rule))

    @property
    def max_seq_length(self) -> int:
        """Tokens of the longest prompt; longer texts are cut from the right, flagged and warned of."""
        return self.settings.max_length

    @max_seq_length.setter
    def max_seq_length(self, tokens: int) -> None:
        self._change(replace(self.settings, max_length=tokens))

    @property
    def tokenizer(self) -> Any:
        """The tokenizer as Transformers loads it; `preprocess` adds the special tokens that the settings name."""
        return self.embedder.tokenizer.tokenizer

    def get_embedding_dimension(self) -> int:
        """Return the length of a vector."""
        return self.embedder.backbone.hidden_size

    def prompt(self, instruction: str | None) -> str:
        """Return what `encode(..., prompt=)` takes for an instruction: what the template puts before a text."""
        return PromptTemplate(self.settings.template).around(instruction)[0]

    def preprocess(
        self, inputs: Sequence[Any], prompt: str | None = None, *, truncate: str = "right", max_length: int | None = None, **_: Any
    ) -> dict[str, Tensor]:
        """Turn texts into padded token ids.

        Args:
            inputs: Texts.
            prompt: What stands before each text. The template's beginning with an instruction in it, as in the model's own prompts,
                brings the template's end with it; anything else is put before the texts as it is.
            truncate: Cut texts that are too long from the right and flag them, or refuse them (`error`).
            max_length: Most tokens of a prompt in this call; the model's own limit if None.
            **_: What other modules may ask for, such as `task`.

        Raises:
            TypeError: If an input is not a string.
            InputError: If a text has no tokens, or is too long with `truncate="error"`.
            ConfigurationError: If `truncate` is unknown.
        """
        check_texts(inputs)
        tokenizer = self.embedder.tokenizer
        if max_length is not None and max_length != self.max_seq_length:
            tokenizer = PromptTokenizer(tokenizer.tokenizer, replace(self.settings, max_length=max_length))
        instruction = _instruction(tokenizer.template, prompt)
        texts = [(prompt or "") + text for text in inputs] if instruction is None else list(inputs)
        tokenised = tokenizer(texts, instruction)
        _tell_truncated(tokenised, tokenizer.max_length, truncate)
        batch = TokenBatch.pad(tokenised.ids, side=self.settings.padding_side)
        return {"input_ids": batch.input_ids, "attention_mask": batch.mask.long(), "truncated": torch.from_numpy(tokenised.truncated)}

    def forward(self, features: dict[str, Any], *, steps: int | None = None, halt: HaltingRule | None = None, **_: Any) -> dict[str, Any]:
        """Add `sentence_embedding` and `steps`, and in training mode `trajectory`.

        Args:
            features: What `preprocess` returns, on the model's device.
            steps: Short for `halt=FixedSteps(steps)`.
            halt: When a text is finished; the model's own rule if None.
            **_: Options of `preprocess`, which gets the same ones.

        Raises:
            ConfigurationError: If `steps` and `halt` are both given, or the model cannot follow the rule.
            NonFiniteError: If an embedding came out non-finite or zero.
        """
        if halt is not None and steps is not None:
            raise ConfigurationError(f"halt={halt} and steps={steps} both say when to stop; give one of them.")
        rule = FixedSteps(steps) if steps is not None else self.halt if halt is None else halt
        prompts = _prompts(features["input_ids"], features["attention_mask"])
        return features | (self._with_gradients(prompts, rule) if self.training else self._refined(prompts, rule))

    def _with_gradients(self, prompts: list[TokenIds], rule: HaltingRule) -> dict[str, Tensor]:
        if not self.embedder.backbone.packable:
            name = type(self.embedder.backbone.model).__name__
            raise ConfigurationError(f"{name} is read in padded batches here, which cannot be trained; it can be evaluated: model.eval().")
        trajectory = self.embedder(prompts, rule.max_steps).vectors
        steps = torch.full((len(prompts),), rule.max_steps, device=trajectory.device)
        return {"sentence_embedding": trajectory[:, -1], "steps": steps, "trajectory": trajectory}

    def _refined(self, prompts: list[TokenIds], rule: HaltingRule) -> dict[str, Tensor]:
        engine = self._ready()
        vectors = np.zeros((len(prompts), self.get_embedding_dimension()), dtype=np.float32)
        steps = np.zeros(len(prompts), dtype=np.int64)
        with torch.inference_mode():
            for done in engine.run(prompts, rule):
                vectors[done.index], steps[done.index] = done.vectors, done.steps
        device = self.embedder.backbone.device
        return {"sentence_embedding": torch.from_numpy(vectors).to(device), "steps": torch.from_numpy(steps).to(device)}

    def _ready(self) -> Engine:
        """Return the engine over merged and packed weights, made when it is first wanted."""
        if self._engine is None:
            with torch.inference_mode(False), torch.no_grad():
                self._merged = None if self.embedder.adapter is None else MergedAdapter(self.embedder.adapter)
                self._engine = Engine(_again(self.embedder.backbone, self.settings))
        return self._engine

    def release(self) -> None:
        """Take the adapter out of the weights again, and drop the copies made for inference."""
        self._engine = None
        cpu.unpack_linear_layers(self)
        if self._merged is not None:
            self._merged.undo()
            self._merged = None

    def train(self, mode: bool = True) -> GenerativeEmbedding:
        """Switch between training, in which the weights are those that are trained, and inference."""
        if mode:
            self.release()
        super().train(mode)
        if self.reader is not None:
            self.reader.eval()
        return self

    def save(self, output_path: str, *_: Any, safe_serialization: bool = True, **__: Any) -> None:
        """Write the module's part of the folder, which `genembed.load` reads as well.

        Raises:
            ConfigurationError: If `safe_serialization` is False: we write no pickles.
        """
        if not safe_serialization:
            raise ConfigurationError("safe_serialization=False would write pickled weights, which run code when read; leave it out.")
        self.release()
        folder = Path(output_path)
        write_parts(self.embedder, folder)
        if (folder / ST_CONFIG).is_file():  # sentence-transformers writes it first, without what a model requires
            require_genembed(folder)

    @classmethod
    def load(
        cls,
        model_name_or_path: str,
        subfolder: str = "",
        token: bool | str | None = None,
        cache_folder: str | None = None,
        revision: str | None = None,
        local_files_only: bool = False,
        trust_remote_code: bool = False,
        model_kwargs: Mapping[str, Any] | None = None,
        processor_kwargs: Mapping[str, Any] | None = None,
        config_kwargs: Mapping[str, Any] | None = None,
        backend: str = "torch",
        **_: Any,
    ) -> GenerativeEmbedding:
        """Load the module from a folder or hub id; sentence-transformers calls this.

        Raises:
            ConfigurationError: If an option is given that has no effect here, such as another backend.
            CheckpointError: If the folder is not whole.
        """
        if backend != "torch":
            raise ConfigurationError(f"backend={backend!r}: the refinement loop runs in torch alone; leave the option out.")
        kwargs = dict(model_kwargs or {})
        dtype = kwargs.pop("dtype", kwargs.pop("torch_dtype", "auto"))
        unused = {"model_kwargs": kwargs, "processor_kwargs": processor_kwargs, "config_kwargs": config_kwargs}
        for name, value in unused.items():
            if value:
                raise ConfigurationError(f"{name}={dict(value)} has no effect on this model; leave it out (model_kwargs takes dtype).")
        place = {"token": token, "cache_folder": cache_folder, "revision": revision, "local_files_only": local_files_only}
        folder = cls.load_dir_path(model_name_or_path, subfolder, **place)
        found = resolve(folder or model_name_or_path, adapter=None, preset=None, offline=local_files_only)
        return cls(found, device=get_device_name(), dtype=dtype)

    def _change(self, settings: ModelSettings) -> None:
        """Follow other settings."""
        self.release()
        self.embedder.tokenizer = PromptTokenizer(self.tokenizer, settings)
        self.embedder.backbone = _again(self.embedder.backbone, settings)

    def state_dict(self, *arguments: Any, **options: Any) -> Any:
        """Return the weights as they are trained, the adapter apart from the base."""
        self.release()
        return super().state_dict(*arguments, **options)

    def _load_from_state_dict(self, *arguments: Any, **options: Any) -> None:
        self.release()
        super()._load_from_state_dict(*arguments, **options)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> GenerativeEmbedding:
        """Move or cast the weights, and what was made of them."""
        self.release()
        super()._apply(fn, recurse)
        self.embedder.backbone = _again(self.embedder.backbone, self.settings)
        return self

    def __getstate__(self) -> dict[str, Any]:
        self.release()  # packed copies cannot be sent to another process
        return dict(self.__dict__)


def _trainable(source: Source, *, device: str, dtype: str | torch.dtype) -> TrainableEmbedder:
    """Load a model whose adapter, or whose weights if it has none, want gradients."""
    loaded = checkpoint.load(replace(source, adapter=None), device=device, dtype=dtype)
    backbone, adapter = loaded.backbone, None
    if source.adapter is not None:
        alone = source.settings.adapter_positions == "generated"
        target = checkpoint.twin(backbone.model) if alone else backbone.model
        adapter = checkpoint.attach_adapter(target, source.adapter, trainable=True).to(backbone.device)
        backbone = _again(backbone, source.settings, stepper=target if alone else None)
    else:
        backbone.model.requires_grad_(True)
    if backbone.trained_head is not None:
        backbone.trained_head.requires_grad_(True)
    return TrainableEmbedder(backbone, PromptTokenizer(loaded.tokenizer.tokenizer, source.settings), source, adapter)


def _again(old: Backbone, settings: ModelSettings, *, stepper: Any = None) -> Backbone:
    """Make a backbone over the same weights anew: what it keeps of them may have moved or changed."""
    if stepper is None and old.adapter_on_generated_only:
        stepper = old.stepper
    made = Backbone(old.model, settings, head=old.trained_head, stepper=stepper, has_head=old.has_head)
    made.packable = old.packable
    return made


def _instruction(template: PromptTemplate, prompt: str | None) -> str | None:
    """Return the instruction in a prompt that is the template's beginning, otherwise None."""
    if not prompt:
        return None
    before, after = template.template.split("{text}")[0].split("{instruction}")
    fits = len(prompt) >= len(before) + len(after) and prompt.startswith(before) and prompt.endswith(after)
    return prompt[len(before) : len(prompt) - len(after)] if fits else None


def _tell_truncated(tokenised: Tokenised, limit: int, truncate: str) -> None:
    if truncate not in ("right", "error"):
        raise ConfigurationError(f"truncate={truncate!r}: choose 'right' or 'error'.")
    count = int(tokenised.truncated.sum())
    if not count:
        return
    if truncate == "error":
        raise InputError(
            f"{count} of {len(tokenised.ids)} texts of a batch are longer than {limit} tokens (the longest has {tokenised.longest}); "
            "shorten them, raise max_seq_length, or use truncate='right'."
        )
    warnings.warn(
        f"texts longer than {limit} tokens lost their end; encode(..., output_value=None) says which, truncate='error' refuses them.",
        GenembedWarning,
        stacklevel=3,
    )


def _prompts(input_ids: Tensor, mask: Tensor) -> list[TokenIds]:
    """Take the padding off again."""
    ids, seen = input_ids.cpu().numpy(), mask.bool().cpu().numpy()
    return [row[own] for row, own in zip(ids, seen, strict=True)]

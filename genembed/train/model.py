"""The model in training: a base, an adapter or all weights, perhaps a head; and the folder they are saved as."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.pytorch_utils import Conv1D

from genembed import cpu
from genembed.backbone import Backbone, SoftTokenHead
from genembed.checkpoint import ADAPTER_WEIGHTS, check_adapter, load, quiet, twin
from genembed.errors import CheckpointError, ConfigurationError
from genembed.halting import FixedSteps
from genembed.pooling import Pooling
from genembed.settings import ModelSettings
from genembed.source import HEAD_FILE, SETTINGS_FILE, Source, resolve, sha256
from genembed.tokens import PromptTokenizer, TokenIds
from genembed.train.gather import is_first_process
from genembed.train.recipe import Recipe
from genembed.train.sharding import own_part, whole
from genembed.train.trajectories import Trajectories, trajectories

WEIGHTS, WEIGHTS_INDEX = "model.safetensors", "model.safetensors.index.json"


class TrainableEmbedder(nn.Module):
    """A backbone whose trained weights are parameters of one module, so that any trainer can wrap it.

    The base model's own dropout is off, in training too: a text has one embedding, and a checkpointed layer computed twice gives
    the same. The adapter's dropout follows `train()`.
    """

    def __init__(self, backbone: Backbone, tokenizer: PromptTokenizer, source: Source, adapter: Any | None) -> None:
        super().__init__()
        self.backbone, self.tokenizer, self.source = backbone, tokenizer, source
        self.trained: nn.Module = adapter if adapter is not None else backbone.model
        self.adapter = adapter
        self.trained_head = backbone.trained_head

    @property
    def settings(self) -> ModelSettings:
        """How the model makes an embedding."""
        return self.backbone.settings

    def forward(self, prompts: Sequence[TokenIds], steps: int) -> Trajectories:
        """Refine texts with gradients."""
        if self.adapter is None:
            self.backbone.read_vocabulary()  # a trained table, or one that was gathered for this pass
        return trajectories(self.backbone, prompts, steps=steps)

    def train(self, mode: bool = True) -> TrainableEmbedder:
        """Switch the adapter's dropout, and the checkpointing of layers, on or off; all else stays in evaluation mode."""
        super().train(False)
        for name, module in self.named_modules():
            if "lora_dropout" in name:
                module.train(mode)
            # Only where it is checkpointed: some layers apply dropout by their own `training`.
            if isinstance(module, GradientCheckpointingLayer) and module.gradient_checkpointing:
                module.training = mode
        self.training = mode
        return self

    def checkpoint_layers(self) -> None:
        """Keep only the inputs of each layer for the backward pass.

        Our rows keep keys and values themselves, outside Transformers' cache, which checkpointing would drop.
        """
        for part in {id(part): part for part in (self.backbone.model, self.trained)}.values():
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # Transformers renames the method in version 6
                part.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]

    def save(self, folder: Path, settings: ModelSettings) -> None:
        """Write a folder that `genembed.load` reads.

        Every process must call this, as parts of weights are joined; the first one writes.
        """
        weights = None
        if isinstance(self, FSDPModule):
            self.reshard()
            weights = whole(self.backbone.model.state_dict(keep_vars=True))
        head = whole(self.trained_head.state_dict(keep_vars=True)) if self.trained_head is not None else None
        if not is_first_process():
            return
        folder.mkdir(parents=True, exist_ok=True)
        values: dict[str, Any] = settings.to_json()
        if self.adapter is None:
            with quiet():
                self.backbone.model.save_pretrained(folder, state_dict=weights)
            self.tokenizer.tokenizer.save_pretrained(folder)
        else:
            # Not `auto`, PEFT's default: that asks the hub for the base model's config.json.
            self.adapter.save_pretrained(folder, save_embedding_layers=False)
            (folder / "README.md").unlink(missing_ok=True)  # PEFT's empty model card
            weights = self.source.base / WEIGHTS
            values["base"] = {"sha256": sha256(weights)} if weights.is_file() else {}
        if head is not None:
            state = {name: value.detach().cpu().contiguous() for name, value in head.items()}
            save_file(state, folder / HEAD_FILE)
        (folder / SETTINGS_FILE).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")

    def restore(self, folder: Path) -> None:
        """Read the trained weights back from a folder that `save` wrote.

        Raises:
            CheckpointError: If they are not those of this model.
        """
        if isinstance(self, FSDPModule):
            self.reshard()  # an evaluation leaves the table and the head gathered
        if self.adapter is None:
            _copy_into(self.backbone.model, _full_weights(folder), folder, tied=True)
        else:
            from peft import set_peft_model_state_dict

            result = set_peft_model_state_dict(self.adapter, load_file(folder / ADAPTER_WEIGHTS))
            if result.unexpected_keys:
                raise CheckpointError(f"{folder}: its adapter has other weights than this run: {result.unexpected_keys[:3]}.")
        if self.trained_head is not None:
            _copy_into(self.trained_head, load_file(folder / HEAD_FILE), folder, tied=False)


def build(recipe: Recipe, sample: Callable[[PromptTokenizer], list[TokenIds]]) -> TrainableEmbedder:
    """Load the model a recipe starts from, and make its weights trainable.

    Args:
        recipe: The run.
        sample: Gives prompts of the training texts, where a new head is to speak the most frequent tokens alone.

    Raises:
        ConfigurationError: If the recipe's settings do not suit the model.
        CheckpointError: If the model does not load.
    """
    source = resolve(recipe.model, adapter=None, preset=recipe.settings, offline=False)
    if source.adapter is not None:
        raise ConfigurationError(f"model={recipe.model!r} is an adapter already; train from its base model, or merge it first.")
    settings = replace(source.settings, matryoshka_dims=tuple(sorted(recipe.objective.dimensions)) or source.settings.matryoshka_dims)
    recipe.check_settings(settings)
    # The soft-token head of an encoder may not exist yet, so the base is read as a one-pass model first.
    plain = replace(settings, pooling=Pooling(kind="mean"), halt=FixedSteps(0), adapter_positions="all")
    # What will be cut into parts has no room on a device of its own yet.
    device = "cpu" if recipe.fsdp else _device()
    loaded = load(replace(source, settings=plain if recipe.fit_head else settings), device=device, dtype="float32")
    _check_positions(recipe, loaded.backbone)
    model, tokenizer = loaded.backbone.model, PromptTokenizer(loaded.tokenizer.tokenizer, settings)
    head = _new_head(recipe, loaded.backbone, tokenizer, sample) if recipe.fit_head else loaded.backbone.trained_head
    if settings.adapter_positions == "generated" and recipe.lora is None:
        raise ConfigurationError("adapter_positions='generated' needs an adapter: lora=None trains one set of weights for all positions.")
    stepper = twin(model) if settings.adapter_positions == "generated" else None
    adapter = _adapted(stepper if stepper is not None else model, recipe)
    if adapter is None:
        model.requires_grad_(True)
    backbone = Backbone(model, settings, head=head, stepper=stepper, has_head=loaded.backbone.has_head or head is not None)
    if stepper is not None:
        cpu.pack_linear_layers(backbone.base)  # it reads prompts and is frozen
    if head is not None:
        head.requires_grad_(True)
    if adapter is None and not recipe.max_steps and not model.config.tie_word_embeddings:
        model.get_output_embeddings().requires_grad_(False)  # a one-pass model never uses it, and processes would wait for its gradient
    embedder = TrainableEmbedder(backbone, tokenizer, source, adapter)
    if recipe.checkpoint_layers:
        embedder.checkpoint_layers()
    return embedder.train()


def _new_head(
    recipe: Recipe, backbone: Backbone, tokenizer: PromptTokenizer, sample: Callable[[PromptTokenizer], list[TokenIds]]
) -> SoftTokenHead:
    if backbone.trained_head is not None or backbone.has_head:
        raise ConfigurationError(f"fit_head={recipe.fit_head}: {recipe.model} has a language-model head of its own; leave it out.")
    table, tokens = backbone.table, None
    if recipe.head_tokens:
        counts = torch.bincount(torch.cat([torch.from_numpy(ids).unique() for ids in sample(tokenizer)]), minlength=len(table))
        counts[tokenizer.tokenizer.all_special_ids] = 0
        most = counts.argsort(descending=True, stable=True)[: recipe.head_tokens]
        tokens = most[counts[most] > 0].sort().values.to(table.device)
    return SoftTokenHead(table.shape[1], table.shape[0], tokens).to(table.device)


def _adapted(model: PreTrainedModel, recipe: Recipe) -> Any | None:
    if recipe.lora is None:
        return None
    from peft import LoraConfig, get_peft_model

    targets = recipe.lora.targets if isinstance(recipe.lora.targets, str) else list(recipe.lora.targets)
    check_adapter({"peft_type": "LORA", "target_modules": targets}, "lora.targets")  # or what is saved could not be loaded
    config = LoraConfig(
        r=recipe.lora.rank,
        lora_alpha=recipe.lora.alpha,
        lora_dropout=recipe.lora.dropout,
        target_modules=targets,
        task_type="CAUSAL_LM",
        fan_in_fan_out=any(isinstance(layer, Conv1D) for layer in model.modules()),  # GPT-2's linear layers
        # An encoder's own head, which a soft-token head replaces, would never get a gradient.
        exclude_modules=r"cls\..*" if model.config.model_type == "bert" else None,
    )
    try:
        adapter = get_peft_model(model, config)
    except ValueError as error:
        raise ConfigurationError(f"lora.targets={recipe.lora.targets!r}: {error}") from error
    adapter.peft_config["default"].base_model_name_or_path = str(recipe.model)
    return adapter


def _check_positions(recipe: Recipe, backbone: Backbone) -> None:
    """Refuse texts and steps that a model with learned positions cannot read, before the run meets one."""
    steps = max(recipe.max_steps, *(recipe.evaluation.steps if recipe.evaluation is not None else ()), 0)
    longest = max(recipe.query_tokens, recipe.passage_tokens) + steps
    if backbone.max_positions is not None and longest > backbone.max_positions:
        raise ConfigurationError(
            f"query_tokens={recipe.query_tokens}, passage_tokens={recipe.passage_tokens} and {steps} steps need {longest} positions, but "
            f"this model has {backbone.max_positions}; use smaller limits."
        )


def _full_weights(folder: Path) -> dict[str, Tensor]:
    """Read all weights of a folder, from one file or from the several that an index names: Transformers splits large models."""
    index = folder / WEIGHTS_INDEX
    if not index.is_file():
        return load_file(folder / WEIGHTS)
    shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    return {name: weight for shard in shards for name, weight in load_file(folder / shard).items()}


def _copy_into(module: nn.Module, state: dict[str, Tensor], folder: Path, *, tied: bool) -> None:
    own = module.state_dict()
    result = module.load_state_dict(
        {name: own_part(weight, own[name]) if name in own else weight for name, weight in state.items()}, strict=False
    )
    if result.unexpected_keys or (result.missing_keys and not tied):
        raise CheckpointError(f"{folder}: its weights are not those of this run: {[*result.unexpected_keys, *result.missing_keys][:3]}.")


def _device() -> str:
    """Return this process's device: the launcher gives each process a GPU of its own."""
    if not torch.cuda.is_available():
        return "cpu"
    from accelerate import PartialState

    return str(PartialState().device)

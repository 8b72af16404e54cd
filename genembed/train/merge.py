"""From an adapter to full weights, for those who serve the model without PEFT."""

from __future__ import annotations

from pathlib import Path

from genembed.errors import ConfigurationError
from genembed.settings import ModelSettings, preset_settings
from genembed.source import resolve
from genembed.train.model import TrainableEmbedder
from genembed.train.recipe import Recipe


def check_mergeable(recipe: Recipe) -> None:
    """Refuse a recipe whose model cannot be merged, before it is trained.

    Raises:
        ConfigurationError: If no adapter is trained, or one for the generated positions alone.
    """
    if recipe.lora is None:
        raise ConfigurationError("--merge has no effect with lora=None: all weights are trained, and the model's folder has them in full.")
    given = recipe.settings
    settings = preset_settings(given) if given is not None else resolve(recipe.model, adapter=None, preset=None, offline=False).settings
    if settings.adapter_positions != "all":
        raise ConfigurationError(
            f"--merge: the adapter works on {settings.adapter_positions} positions alone, and the base model reads the prompt, so the two "
            "have no weights in common; leave --merge out, or train with adapter_positions='all'."
        )


def merge(model: TrainableEmbedder, folder: Path, settings: ModelSettings) -> None:
    """Add the adapter to the base model's weights, and write a folder that loads without PEFT.

    The model itself has no adapter afterwards. The weights are written in the dtype they were trained in.

    Args:
        model: A trained model with an adapter on all positions.
        folder: Created.
        settings: Written beside the weights.
    """
    assert model.adapter is not None
    assert model.backbone.settings.adapter_positions == "all"
    model.adapter.merge_and_unload()
    TrainableEmbedder(model.backbone, model.tokenizer, model.source, adapter=None).save(folder, settings)

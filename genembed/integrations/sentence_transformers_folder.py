"""A model folder that sentence-transformers reads with our forward pass: `genembed convert MODEL --to sentence-transformers OUT`."""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import genembed
from genembed.errors import ConfigurationError, missing_extra
from genembed.prompt import PromptTemplate
from genembed.settings import ModelSettings
from genembed.source import ADAPTER_CONFIG, BUILTIN, HEAD_FILE, SETTINGS_FILE, Source, read_json, resolve, sha256

if TYPE_CHECKING:
    from genembed.train.model import TrainableEmbedder

ST_CONFIG = "config_sentence_transformers.json"
MODULE = "genembed.integrations.sentence_transformers.GenerativeEmbedding"
NORMALIZE = "sentence_transformers.models.Normalize"
"""The path that every version of sentence-transformers knows; the one it writes itself is that of version 6."""

_REQUIREMENT = {"specifier": f">={genembed.__version__}", "reason": "it holds the forward pass of this model"}
_ADAPTER_FILES = ("adapter_model.safetensors",)
_MODEL_FILES = ("config.json", "generation_config.json", "*.safetensors", "*.safetensors.index.json")
_TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja"),
    *("tokenizer.model", "spiece.model", "vocab.json", "vocab.txt", "merges.txt"),
)


def write_folder(
    path_or_id: str | Path,
    output: str | Path,
    *,
    adapter: str | Path | None = None,
    preset: str | ModelSettings | None = None,
    offline: bool = False,
) -> Source:
    """Write a model as a folder for `SentenceTransformer(output, trust_remote_code=True)`; `genembed.load` reads it too.

    Weights are copied as they are: an adapter stays an adapter and names its base, a merged model stays whole. The folder appears
    when it is complete.

    Args:
        path_or_id: The model, as for `genembed.load`.
        output: The folder; new, or empty.
        adapter: Adapter over `path_or_id`.
        preset: How the model makes an embedding, where its folder does not say.
        offline: Never touch the network.

    Returns:
        The model that was written.

    Raises:
        ConfigurationError: If `output` holds files already, or there are neither settings nor a preset.
        CheckpointError: If the model's files are missing or do not belong together.
    """
    output = Path(output).expanduser().absolute()
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ConfigurationError(f"{output} is there already and is not an empty folder; remove it, or name another one.")
    source = resolve(path_or_id, adapter=adapter, preset=preset, offline=offline)
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}-") as staging:
        folder = Path(staging) / output.name
        folder.mkdir()
        _copy_weights(source, folder)
        write_settings(folder, source, source.settings)
        _write_modules(folder)
        _write_json(folder / ST_CONFIG, _config(source.settings))
        require_genembed(folder)
        (folder / "README.md").write_text(_card(source, output.name), encoding="utf-8")
        if output.exists():
            output.rmdir()
        folder.rename(output)
    return source


def write_parts(embedder: TrainableEmbedder, folder: Path) -> None:
    """Write a model in memory, perhaps trained further: everything but what sentence-transformers writes itself."""
    embedder.save(folder, embedder.settings)
    embedder.tokenizer.tokenizer.save_pretrained(folder)
    source = embedder.source
    if getattr(embedder.backbone.model, "_hf_peft_config_loaded", False):
        # Their add_adapter() put a LoRA adapter into a merged model: Transformers has saved that alone.
        source = replace(source, adapter=folder, named_adapter=str(folder))
    write_settings(folder, source, embedder.settings)


def write_settings(folder: Path, source: Source, settings: ModelSettings) -> None:
    """Write our settings file, and, for an adapter, which base it is over, so that it is found from any working directory."""
    values = settings.to_json()
    if source.adapter is not None:
        config = read_json(folder / ADAPTER_CONFIG)
        config["base_model_name_or_path"] = _base_name(source)
        _write_json(folder / ADAPTER_CONFIG, config)
        values["base"] = _declared_base(source)
    _write_json(folder / SETTINGS_FILE, values)


def require_genembed(folder: Path) -> None:
    """Have sentence-transformers say what to install where this package is missing, before it loads anything."""
    config = read_json(folder / ST_CONFIG)
    config["requirements"] = {**config.get("requirements", {}), "genembed": _REQUIREMENT}
    _write_json(folder / ST_CONFIG, config)


def prompts(settings: ModelSettings) -> dict[str, str]:
    """Return the prompts of queries and documents, as sentence-transformers puts them before texts."""
    template = PromptTemplate(settings.template)
    return {
        "query": template.around(settings.query_instruction)[0],
        "document": template.around(settings.document_instruction)[0],
    }


def _copy_weights(source: Source, folder: Path) -> None:
    if source.adapter is not None:
        _copy(source.adapter, (ADAPTER_CONFIG, *_ADAPTER_FILES), folder)
    else:
        _copy(source.base, _MODEL_FILES, folder)
    if source.head is not None:
        shutil.copyfile(source.head, folder / HEAD_FILE)
    _copy(source.tokenizer, _TOKENIZER_FILES, folder)


def _copy(origin: Path, patterns: tuple[str, ...], folder: Path) -> None:
    for file in (file for pattern in patterns for file in origin.glob(pattern)):
        if not file.name.startswith("consolidated"):  # the same weights once more, in another layout
            shutil.copyfile(file, folder / file.name)


def _base_name(source: Source) -> str:
    """Return a name of the base that holds anywhere: a hub id, or the whole path of a folder."""
    own = None if source.adapter is None else read_json(source.adapter / ADAPTER_CONFIG).get("base_model_name_or_path")
    name = source.name if source.named_adapter is not None else str(own or source.base)
    return str(source.base.resolve()) if name in BUILTIN or Path(name).expanduser().is_dir() else name


def _declared_base(source: Source) -> dict[str, Any]:
    """Return what the adapter says of its base, or the checksum of the base's weights."""
    own = read_json(source.adapter / SETTINGS_FILE) if source.adapter and (source.adapter / SETTINGS_FILE).is_file() else {}
    weights = source.base / "model.safetensors"
    base: dict[str, Any] = own.get("base") or ({"sha256": sha256(weights)} if weights.is_file() else {})
    return base


def _write_modules(folder: Path) -> None:
    modules = [
        {"idx": 0, "name": "0", "path": "", "type": MODULE},
        {"idx": 1, "name": "1", "path": "1_Normalize", "type": NORMALIZE},
    ]
    (folder / "1_Normalize").mkdir()
    _write_json(folder / "1_Normalize" / "config.json", {})
    (folder / "modules.json").write_text(json.dumps(modules, indent=2) + "\n", encoding="utf-8")


def _config(settings: ModelSettings) -> dict[str, Any]:
    return {
        "model_type": "SentenceTransformer",
        "prompts": prompts(settings),
        "default_prompt_name": None,
        "similarity_fn_name": "cosine",
    }


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def _card(source: Source, name: str) -> str:
    settings = source.settings
    facts = ["library_name: sentence-transformers", "pipeline_tag: sentence-similarity"]
    facts += ["tags: [sentence-transformers, sentence-similarity, feature-extraction, generative-embeddings]"]
    facts += [f"license: {licence}" for licence in _licences(source)]
    if source.adapter is not None and not Path(_base_name(source)).is_absolute():
        facts.append(f"base_model: {_base_name(source)}")
    lines = [
        *("---", *facts, "---", f"# {name}", ""),
        f"`{source.name}`, written by genembed {genembed.__version__} for sentence-transformers. A text's embedding is refined",
        f"step by step: {settings.halt}. Prompts are read up to {settings.max_length} tokens.",
        *("", "```python", "from sentence_transformers import SentenceTransformer  # and: pip install genembed", ""),
        f'model = SentenceTransformer("{name}", trust_remote_code=True)',
        'queries = model.encode_query(["how do I copy a folder?"])',
        'documents = model.encode_document(["Copy a directory tree."])',
        *("model.similarity(queries, documents)", "```", ""),
        "Only this way: tools that do not know the method pool a single pass, without a word, and their vectors are other ones.",
    ]
    return "\n".join(lines) + "\n"


def _licences(source: Source) -> list[str]:
    """Return the licence that the model's own card names, if it does."""
    card = (source.adapter or source.base) / "README.md"
    text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
    head = text.split("---")[1] if text.startswith("---") else ""
    return re.findall(r"^license:\s*([\w.-]+)\s*$", head, flags=re.MULTILINE)[:1]


def encode_with(folder: Path, texts: Sequence[str]) -> np.ndarray:
    """Embed bare texts as sentence-transformers does with a folder that was written."""
    try:
        from sentence_transformers import SentenceTransformer
    except ModuleNotFoundError as error:
        raise missing_extra("sentence-transformers", "sentence_transformers") from error
    model = SentenceTransformer(str(folder), trust_remote_code=True, device="cpu", local_files_only=True)
    return np.asarray(model.encode(list(texts), show_progress_bar=False))

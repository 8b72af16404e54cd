"""The model card: what settings and records of a folder say, and nothing that they do not."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from genembed.source import ADAPTER_CONFIG, SETTINGS_FILE, read_json

TAGS = ("sentence-similarity", "feature-extraction", "generative-embeddings", "GIRCSE", "ConvergeStop")

_SETTINGS = ("attention", "pooling", "tokens", "temperature", "halt", "max_length", "adapter_positions", "matryoshka_dims")
"""Those of a card; the rest shows in the prompt and in `genembed info`."""
_TRAINING = ("updates", "queries", "negatives", "min_steps", "max_steps", "learning_rate", "lora", "objective", "teacher", "seed")


def model_card(folder: Path, name: str, *, licence: str | None) -> str:
    """Return the README.md of a model folder.

    Args:
        folder: With settings; perhaps with `recipe.json`, `history.csv` and `calibration.json`.
        name: The name under which the model will be loaded.
        licence: If it is known.
    """
    recipe, calibration = _record(folder / "recipe.json"), _record(folder / "calibration.json")
    parts = [
        _front(folder, recipe, licence),
        f"# {name.rpartition('/')[2]}",
        "A text embedding model that refines its vector step by step and stops when it is stable, for "
        "[genembed](https://github.com/genembed/genembed).",
        _use(name),
        _settings(read_json(folder / SETTINGS_FILE)),
        _training(recipe, folder / "history.csv"),
        _calibration(calibration),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _record(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _front(folder: Path, recipe: Mapping[str, Any], licence: str | None) -> str:
    """Return the lines that the hub reads."""
    adapter = _record(folder / ADAPTER_CONFIG)
    base = adapter.get("base_model_name_or_path") or recipe.get("model")
    lines = ["library_name: genembed", "pipeline_tag: sentence-similarity", f"tags: [{', '.join(TAGS)}]"]
    if isinstance(base, str) and base.count("/") == 1 and not base.startswith((".", "/", "~")):
        lines += [f"base_model: {base}", f"base_model_relation: {'adapter' if adapter else 'finetune'}"]
    if licence is not None:
        lines.append(f"license: {licence}")
    return "\n".join(("---", *lines, "---"))


def _use(name: str) -> str:
    code = f"""import genembed

model = genembed.load("{name}")
documents = model.encode_document(["Copy a directory tree.", "Wait until all threads have reached the barrier."])
query = model.encode_query("how do I duplicate a folder?")
print(model.similarity(query, documents))"""
    return f"## Use\n\n```\npip install genembed\n```\n\n```python\n{code}\n```"


def _settings(settings: Mapping[str, Any]) -> str:
    rows = [(name, _shown(settings[name])) for name in _SETTINGS if settings.get(name) not in (None, [], ())]
    return f"## How it makes an embedding\n\n{_table(('setting', 'value'), rows)}\n\nPrompt: `{settings['template']!r}`"


def _training(recipe: Mapping[str, Any], history: Path) -> str:
    if not recipe:
        return ""
    rows = [(name, _shown(recipe[name])) for name in _TRAINING if recipe.get(name) is not None]
    parts = ["## Training", _table(("setting", "value"), rows), _data(recipe)]
    if history.is_file():
        parts.append(_last_measured(history))
    return "\n\n".join(part for part in parts if part)


def _data(recipe: Mapping[str, Any]) -> str:
    """Return the files of pairs, and their licences where the record has them."""
    files, licences = recipe.get("files") or [], recipe.get("licences") or {}
    rows = []
    for file in files:
        name = file.get("name") or Path(str(file["path"])).name
        rows.append((name, f"{file.get('weight') or 1:.3g}", str(licences.get(name.partition(".")[0], ""))))
    headings = ("training data", "weight", "licence") if licences else ("training data", "weight")
    return _table(headings, [row[: len(headings)] for row in rows]) if rows else ""


def _last_measured(history: Path) -> str:
    """Return the last quality on held-out pairs by number of steps."""
    with history.open(encoding="utf-8", newline="") as file:
        measured = [row for row in csv.DictReader(file) if any(value for name, value in row.items() if name.startswith("eval_mean_k"))]
    if not measured:
        return ""
    last = {name.removeprefix("eval_mean_k"): value for name, value in measured[-1].items() if name.startswith("eval_mean_k") and value}
    table = _table([f"K = {steps}" for steps in last], [[f"{float(value):.2f}" for value in last.values()]])
    return f"Mean quality on held-out pairs of the training data after {measured[-1]['step']} updates, in percent:\n\n{table}"


def _calibration(record: Mapping[str, Any]) -> str:
    """Return the rule that was calibrated, and what is certified of it."""
    if not record:
        return ""
    method = record["method"]
    rows = [("rule", _shown(record["rule"])), ("queries", record["queries"]), ("documents", record["corpus"]["documents"])]
    rows += [(name, _shown(method[name])) for name in ("rule", "loss", "epsilon", "delta") if method.get(name) is not None]
    caveats = "\n".join(f"- {caveat}" for caveat in record.get("caveats", ()))
    named = [(f"method: {name}" if name == "rule" and place else name, value) for place, (name, value) in enumerate(rows)]
    return f"## Calibration of the halting rule\n\n{record['reason']}\n\n{_table(('', ''), named)}\n\n{caveats}".rstrip()


def _shown(value: Any) -> str:
    """Show a value in one cell."""
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_shown(one)}" for name, one in value.items() if one not in (None, [], ()))
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_shown, value))
    return str(value)


def _table(headings: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|").replace("\n", " ") for cell in line) + " |" for line in lines)

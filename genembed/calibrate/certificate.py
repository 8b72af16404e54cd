"""The record of a calibration: what was measured, on what, what follows and what does not."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import genembed
from genembed.calibrate.choose import Choice
from genembed.embedder import Embedder
from genembed.errors import CheckpointError, ConfigurationError
from genembed.files import replacing
from genembed.halting import ConvergeStop, FixedSteps, rule_from_json, rule_to_json
from genembed.source import BUILTIN, SETTINGS_FILE, Source, read_json, sha256
from genembed.testsets import RetrievalSet

CERTIFICATE_FILE = "calibration.json"

CAVEATS = (
    "It holds for queries that are exchangeable with the development queries, under the same instruction and over the same corpus.",
    "A larger corpus has closer neighbours: Jaccard@10 measured on a sample of it is optimistic.",
    "Queries alone are halted; documents are refined to the end, and an index of halted documents is another index.",
)


def record(choice: Choice, model: Embedder, data: RetrievalSet, *, instruction: str | None, method: Mapping[str, Any]) -> dict[str, Any]:
    """Return what is written of a calibration, as one JSON object.

    Args:
        choice: What was found.
        model: The calibrated model.
        data: The development queries and their corpus.
        instruction: Of the queries.
        method: The method's name and settings.
    """
    return {
        "rule": rule_to_json(choice.rule),
        "reason": choice.reason,
        "method": dict(method),
        "model": model.source.name,
        "weights": _weights(model.source),
        "instruction": model.settings.query_instruction if instruction is None else instruction,
        "corpus": {"documents": len(data.documents), "sha256": data.fingerprint},
        "queries": len(data.queries),
        "queries_needed": choice.queries_needed,
        "candidates": [{**asdict(one), "rule": rule_to_json(one.rule)} for one in choice.candidates],
        "caveats": list(CAVEATS),
        "genembed": genembed.__version__,
    }


def write_record(path: Path, value: Mapping[str, Any]) -> None:
    """Write a record to a file of its own, for `--halt FILE` and `read_rule`."""
    with replacing(path) as file:
        file.write((json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


def settings_folder(source: Source) -> Path:
    """Return the folder whose settings a calibration may change.

    Raises:
        ConfigurationError: If the model is built in, or has no settings file.
    """
    if source.name in BUILTIN:
        raise ConfigurationError(f"{source.name} is part of the package and is not changed: name a file for the rule, -o rule.json.")
    for folder in (source.adapter, source.base):
        if folder is not None and (folder / SETTINGS_FILE).is_file():
            return folder
    raise ConfigurationError(f"{source.name} has no {SETTINGS_FILE} to write the rule into: name a file for it, -o rule.json.")


def write_into_model(folder: Path, value: Mapping[str, Any]) -> None:
    """Make the rule of a record the model's own, and put the record beside it."""
    settings = read_json(folder / SETTINGS_FILE)
    write_record(folder / CERTIFICATE_FILE, value)
    write_record(folder / SETTINGS_FILE, {**settings, "halt": value["rule"]})


def read_rule(path: str | Path) -> FixedSteps | ConvergeStop:
    """Read the halting rule of a record, or a rule alone as it stands in a settings file.

    Raises:
        CheckpointError: If the file is not JSON.
        ConfigurationError: If there is no rule in it.
    """
    value = read_json(Path(path))
    rule = value["rule"] if isinstance(value.get("rule"), dict) else value
    try:
        return rule_from_json(rule)
    except ConfigurationError as error:
        raise ConfigurationError(f"{path}: {error}") from error


def _weights(source: Source) -> dict[str, str]:
    """Return the SHA-256 of each file of weights, so that a certificate is not taken for that of another model."""
    folders = [folder for folder in (source.adapter, source.base) if folder is not None]
    files = [path for folder in folders for path in sorted(folder.glob("*.safetensors"))]
    if not files:
        raise CheckpointError(f"{source.name}: there are no weights to name in the certificate.")
    return {path.name: sha256(path) for path in files}

"""Put a trained `mini` into the package.

    python recipes/mini_publish.py --run runs/mini

Copies adapter, head, settings and recipe to genembed/builtin/mini, and the run's curves to docs/mini. The base model is named by
its package and its hub id instead of a path of this machine, and the licences of the sources are written into the recipe.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

from mini import BASE_PACKAGE, SOURCES

ROOT = Path(__file__).parents[1]
PACKAGED = ROOT / "genembed" / "builtin" / "mini"
FIGURES = ROOT / "docs" / "mini"
BASE_ID = "sentence-transformers/all-MiniLM-L6-v2"


def read(path: Path) -> dict[str, Any]:
    """Read a JSON object."""
    value: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return value


def write(path: Path, value: dict[str, Any]) -> None:
    """Write a JSON object."""
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    """Copy the run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True)
    run = parser.parse_args().run
    FIGURES.mkdir(parents=True, exist_ok=True)
    for name in ("adapter_model.safetensors", "soft_token_head.safetensors"):
        shutil.copyfile(run / name, PACKAGED / name)
    write(PACKAGED / "adapter_config.json", {**read(run / "adapter_config.json"), "base_model_name_or_path": BASE_ID})
    settings = read(run / "genembed.json")
    write(PACKAGED / "genembed.json", {**settings, "base": {"package": BASE_PACKAGE, "folder": "model", **settings["base"]}})
    recipe = read(run / "recipe.json")
    files = [{**file, "path": Path(file["path"]).name} for file in recipe["files"]]
    licences = {name: licence for name, (_rows, licence) in SOURCES.items()}
    write(PACKAGED / "recipe.json", {**recipe, "model": BASE_ID, "files": files, "licences": licences})
    for name in ("history.csv", "curves.png"):
        shutil.copyfile(run / name, FIGURES / name)


if __name__ == "__main__":
    main()

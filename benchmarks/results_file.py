"""What every benchmark says about the machine, and how its result file is named."""

from __future__ import annotations

import json
import platform
from datetime import date
from pathlib import Path
from typing import Any

import torch
import transformers

import genembed

RESULTS = Path(__file__).parent / "results"


def machine() -> dict[str, Any]:
    """Describe hardware and versions."""
    return {
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "genembed": genembed.__version__,
        "date": date.today().isoformat(),
    }


def write(theme: str, values: dict[str, Any], *, folder: Path = RESULTS, hardware: str | None = None) -> Path:
    """Write a result file and return its path; `hardware` says what was measured if that is not the processor."""
    about = machine()
    measured = hardware or f"cpu{about['threads']}"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{theme}_{measured}_{about['date']}.json"
    path.write_text(json.dumps({"benchmark": theme, "machine": about, **values}, indent=1) + "\n")
    return path


def newest(theme: str) -> tuple[Path, dict[str, Any]] | None:
    """Return the newest result file of a benchmark on a processor, whose names end in the date; None if there is none."""
    paths = sorted(RESULTS.glob(f"{theme}_cpu*.json"), key=lambda path: path.stem.rsplit("_", 1)[-1])
    return (paths[-1], json.loads(paths[-1].read_text())) if paths else None


def stored(theme: str) -> tuple[Path, dict[str, Any]]:
    """Return the newest result file of a benchmark, which must be there."""
    found = newest(theme)
    if found is None:
        raise SystemExit(f"no result file {theme}_*.json in {RESULTS}: run benchmarks/{theme.split('-')[0]}.py first")
    return found


def source(path: Path) -> str:
    """Return the link to a result file, from the root."""
    return f"[result file](benchmarks/results/{path.name})"


def is_kept(path: Path, *, again: bool) -> bool:
    """Say that a result is there and is left as it is."""
    if path.is_file() and not again:
        print(f"{path.name}: kept (--again measures it anew)", flush=True)
        return True
    return False


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor() or platform.machine())

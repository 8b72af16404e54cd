"""docs/tour.ipynb without Jupyter: its code cells run in order, and their outputs are stored.

python tests/notebook.py docs/tour.ipynb
"""

from __future__ import annotations

import base64
import contextlib
import io
import json
import os
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

DPI = 110


def run(notebook: Path) -> Iterator[tuple[dict[str, Any], str, list[bytes]]]:
    """Yield each code cell with what it printed and the figures it left open, in the current folder."""
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot

    names: dict[str, Any] = {"__name__": "__main__"}
    for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] != "code":
            continue
        stream = io.StringIO()
        with contextlib.redirect_stdout(stream), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="FigureCanvasAgg is non-interactive")
            exec(compile("".join(cell["source"]), str(notebook), "exec", dont_inherit=True), names)  # our own file
        pictures = []
        for number in pyplot.get_fignums():
            held = io.BytesIO()
            pyplot.figure(number).savefig(held, format="png", dpi=DPI, bbox_inches="tight", metadata={"Software": None})
            pictures.append(held.getvalue())
        pyplot.close("all")
        yield cell, stream.getvalue(), pictures


def outputs(printed: str, pictures: list[bytes]) -> list[dict[str, Any]]:
    """Return what a cell gave as Jupyter stores it."""
    stored: list[dict[str, Any]] = []
    if printed:
        stored.append({"name": "stdout", "output_type": "stream", "text": printed.splitlines(keepends=True)})
    for picture in pictures:
        data = {"image/png": base64.b64encode(picture).decode()}
        stored.append({"data": data, "metadata": {}, "output_type": "display_data"})
    return stored


def main(notebook: Path) -> None:
    """Store the outputs of the cells in the notebook."""
    notebook = notebook.resolve()
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        made = [outputs(printed, pictures) for _, printed, pictures in run(notebook)]
    whole = json.loads(notebook.read_text(encoding="utf-8"))
    for number, (cell, stored) in enumerate(zip([one for one in whole["cells"] if one["cell_type"] == "code"], made, strict=True), start=1):
        cell["execution_count"], cell["outputs"] = number, stored
    notebook.write_text(json.dumps(whole, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    main(Path(sys.argv[1]))

"""One target under coverage-guided fuzzing, in a process of its own: libFuzzer ends the process when its time is over.

python benchmarks/reliability/fuzz_worker.py TARGET FINDINGS CORPUS -max_total_time=60 -seed=1

Bytes on which the target fails are noted in the file FINDINGS, a JSON line for each place in the code, and the run goes on.
"""

from __future__ import annotations

import json
import logging
import sys
import tempfile
import traceback
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["genembed"]):
    import campaign  # noqa: F401 - puts what benchmarks and tests share on the path
    from fuzz_targets import made, tried

_PACKAGE = Path(__file__).parents[2] / "genembed"


def main() -> None:
    """Fuzz until the time is over."""
    name, findings, corpus = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    logging.disable(logging.CRITICAL)
    target = made(name, Path(tempfile.mkdtemp(dir=findings.parent)))
    for number, seed in enumerate(target.seeds):
        (corpus / f"seed-{number}").write_bytes(seed)
    seen: set[tuple[str, str]] = set()

    def one(content: bytes) -> None:
        try:
            tried(target.one, content)
        except BaseException as error:  # noqa: BLE001 - what is no error of ours is what is looked for
            place = next((f"{one.name}, {one.filename}" for one in reversed(traceback.extract_tb(error.__traceback__)) if _ours(one)), "")
            key = type(error).__name__, place
            if key not in seen:
                seen.add(key)
                line = {"error": f"{key[0]}: {str(error)[:200]}", "place": place, "content": content.hex()}
                with findings.open("a") as file:
                    file.write(json.dumps(line) + "\n")

    atheris.Setup([sys.argv[0], *sys.argv[4:], str(corpus)], one)
    atheris.Fuzz()


def _ours(frame: traceback.FrameSummary) -> bool:
    return Path(frame.filename).is_relative_to(_PACKAGE)


if __name__ == "__main__":
    main()

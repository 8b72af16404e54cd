"""What an index finds: filters, words, both together, the approximate index, and queries that halt when their hits are stable."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from genembed import CheckpointError, ConfigurationError, ConvergeStop, Embedder, FixedSteps, Progress, load
from genembed.index import Approximation, Index, Passage, approximate, table
from genembed.index.rank_stop import RankStop

TEXTS = {
    "a.md": "the cat sleeps on the warm roof",
    "b.md": "a dog sleeps in the garden",
    "c.py": "sleep(seconds): suspend the calling thread",
    "d.jsonl": "tomatoes grow in the garden",
}
PASSAGES = [
    Passage(text, path, text, path, path.rpartition(".")[2], {"year": year, "My venue": "ACL" if year > 2020 else None})
    for year, (path, text) in zip((2018, 2020, 2021, 2024), TEXTS.items(), strict=True)
]


@pytest.fixture(scope="module")
def bert(folder_of: Callable[[str], Path]) -> Embedder:
    return load(folder_of("bert"))


@pytest.fixture(scope="module")
def index(bert: Embedder, tmp_path_factory: pytest.TempPathFactory) -> Index:
    return Index.build(tmp_path_factory.mktemp("index") / "x", bert, PASSAGES, halt=FixedSteps(2))


@pytest.fixture(scope="module")
def many(bert: Embedder, tmp_path_factory: pytest.TempPathFactory) -> Index:
    passages = [Passage(f"text {row} {row * row}", str(row), "") for row in range(300)]
    return Index.build(tmp_path_factory.mktemp("many") / "x", bert, passages, halt=FixedSteps(1), ann=True)


@pytest.mark.parametrize(
    ("where", "paths"),
    [
        ("kind = 'md'", ["a.md", "b.md"]),
        ("kind = 'md' AND year > 2019", ["b.md"]),
        ("`My venue` IS NULL", ["a.md", "b.md"]),
        ("path LIKE '%.py' OR lower(text) LIKE '%tomatoes%'", ["c.py", "d.jsonl"]),
        ("year > 3000", []),
    ],
)
def test_a_filter_is_applied_before_the_nearest_are_taken(index: Index, bert: Embedder, where: str, paths: list[str]) -> None:
    query = bert.encode("garden")
    assert sorted(hit.path for hit in index.search(query, k=2, where=where)) == paths
    assert sorted(hit.path for hit in index.search_hybrid(query, "garden", k=2, where=where)) == paths
    assert {hit.path for hit in index.search_lexical("sleeps garden thread", where=where)} == set(paths)


@pytest.mark.parametrize("where", ["nope = 1", "year >", "", "year = 'x'", "year + 1"])
def test_a_bad_filter_is_one_clear_error(index: Index, where: str) -> None:
    for search in (
        lambda: index.search(np.ones(32, np.float32), where=where),
        lambda: index.search_lexical("garden", where=where),
        lambda: index.search_hybrid(np.ones(32, np.float32), "garden", where=where),
    ):
        with pytest.raises(ConfigurationError, match=r"filter .*: .*; write it as a condition of SQL") as raised:
            search()
        assert ".rs:" not in str(raised.value)


def test_hits_carry_what_was_kept_beside_the_text(index: Index) -> None:
    hit = index.search_lexical("tomatoes")[0]
    assert (hit.path, hit.kind, hit.metadata) == ("d.jsonl", "jsonl", {"year": 2024, "My venue": "ACL"})
    assert index.description.metadata == {"year": "int64", "My venue": "string"}


def test_a_lexical_search_ranks_by_bm25_of_stemmed_words(index: Index) -> None:
    assert {hit.path for hit in index.search_lexical("SLEEPING")} == {"a.md", "b.md", "c.py"}
    assert [hit.path for hit in index.search_lexical("garden tomatoes")] == ["d.jsonl", "b.md"]
    assert index.search_lexical("zebra") == index.search_lexical('"( AND') == index.search_lexical("") == []
    hits = index.search_lexical("garden")
    idf = math.log(1 + (4 - 2 + 0.5) / (2 + 0.5))
    assert [hit.path for hit in index.search_lexical("garden", k=1)] == [hits[0].path]
    assert 0 < hits[1].score <= hits[0].score < 2.2 * idf  # k1 + 1 times the weight of the word bounds its score


def test_a_hybrid_search_adds_the_reciprocal_ranks_of_both_lists(index: Index, bert: Embedder) -> None:
    query = bert.encode("garden")
    expected: dict[str, float] = {}
    for hits in (index.search(query), index.search_lexical("garden")):
        for rank, hit in enumerate(hits, start=1):
            expected[hit.path] = expected.get(hit.path, 0) + 1 / (60 + rank)
    hits = index.search_hybrid(query, "garden")
    assert {hit.path: hit.score for hit in hits} == pytest.approx(expected, abs=1e-3)
    assert [hit.score for hit in hits] == sorted((hit.score for hit in hits), reverse=True)
    assert index.search_hybrid(query, "garden", k=1) == hits[:1]


def test_an_approximate_index_is_measured_and_gives_true_cosines(many: Index, bert: Embedder) -> None:
    """LanceDB gives distances of scalar-quantised vectors that are twice as large; they must not become scores."""
    made = many.description.approximation
    assert made is not None
    assert (made.kind, made.neighbours, made.queries) == ("IVF_HNSW_SQ", 10, 100)
    assert made.recall > 0.9
    assert Index.open(many.folder).description.approximation == made
    query = bert.encode("text 7 49", halt=FixedSteps(1))
    exact = {hit.reference: hit.score for hit in many.search(query, k=300, exact=True)}
    found = many.search(query)
    assert (found[0].reference, len(found)) == ("7", 10)
    np.testing.assert_allclose([hit.score for hit in found], [exact[hit.reference] for hit in found], atol=1e-5)


def test_exact_overrides_the_approximate_index(many: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    nearest = table.nearest

    def noting(*arguments: object, **options: object) -> object:
        asked.append(options["approximate"])
        return nearest(*arguments, **options)

    monkeypatch.setattr(table, "nearest", noting)
    vector = np.ones(32, np.float32)
    for exact in (False, True):
        many.search(vector, exact=exact)
        many.nearest(vector, exact=exact)
        many.search_hybrid(vector, "text", exact=exact)
    assert asked == [True, True, True, False, False, False]


def test_recall_counts_the_neighbours_that_are_found(many: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    nearest = table.nearest

    def forgetful(*arguments: object, approximate: bool, **options: object) -> object:
        found = nearest(*arguments, approximate=False, **options)
        return found.slice(0, 5) if approximate else found

    monkeypatch.setattr(approximate, "nearest", forgetful)
    assert approximate.measured(many._table) == Approximation(kind="IVF_HNSW_SQ", recall=0.5, neighbours=10, queries=100)


def test_an_update_brings_the_approximate_index_up_to_date(bert: Embedder, tmp_path: Path) -> None:
    rule = FixedSteps(1)
    index = Index.build(tmp_path / "x", bert, PASSAGES, halt=rule)
    assert index.description.approximation is None
    index.update(bert, PASSAGES, halt=rule, ann=True)
    assert index.description.approximation == Approximation(kind="IVF_HNSW_SQ", recall=1.0, neighbours=10, queries=4)
    index.update(bert, [Passage("new", "new", "")], halt=rule)
    found = index.search(bert.encode("new", halt=rule), k=1)[0]
    assert (found.reference, found.score) == ("new", pytest.approx(1.0, abs=1e-5))
    assert index.description.approximation == Approximation(kind="IVF_HNSW_SQ", recall=1.0, neighbours=10, queries=5)
    index.delete("true")
    assert (len(index), index.search(np.ones(32, np.float32))) == (0, [])
    with pytest.raises(ConfigurationError, match="there are no texts"):
        Index.build(tmp_path / "y", bert, [], ann=True)


def progress(vectors: list[np.ndarray], steps: list[int], index: list[int] | None = None) -> Progress:
    rows = len(vectors)
    embedding = torch.tensor(np.stack(vectors))
    return Progress(
        torch.tensor(index if index is not None else list(range(rows))),
        torch.tensor(steps),
        embedding,
        torch.ones(rows),
        embedding,
        torch.zeros(rows, 0),
    )


@pytest.fixture(scope="module")
def two(index: Index) -> tuple[np.ndarray, np.ndarray]:
    """Vectors with different lists of the two nearest."""
    rows = index._table.search().select(["vector"]).limit(None).to_arrow()["vector"].to_pylist()
    first = np.asarray(rows[0], np.float32)
    other = next(np.asarray(row, np.float32) for row in rows[1:] if index.nearest(np.asarray(row), k=2) != index.nearest(first, k=2))
    return first, other


def test_a_query_halts_when_its_hits_have_not_changed_for_patience_steps(index: Index, two: tuple[np.ndarray, np.ndarray]) -> None:
    a, b = two
    rule = RankStop(index=index, patience=2, max_steps=9, hits=2)
    halted = [bool(rule(progress([vector], [step]))[0]) for step, vector in enumerate([0 * a, a, b, b, a, a, a, a])]
    assert halted == [False, False, False, False, False, False, True, True]
    assert repr(rule) == "RankStop(patience=2, max_steps=9, hits=2, where=None, exact=False)"
    assert (rule.max_steps, rule.window) == (9, 0)


def test_rows_are_told_apart_and_a_finished_row_may_be_shown_again(index: Index, two: tuple[np.ndarray, np.ndarray]) -> None:
    a, b = two
    rule = RankStop(index=index, patience=1, max_steps=3, hits=2)
    assert rule(progress([a, b], [1, 1], [4, 7])).tolist() == [False, False]
    assert rule(progress([a, a], [2, 2], [7, 4])).tolist() == [False, True]
    assert rule(progress([a, b], [2, 3], [4, 7])).tolist() == [True, True]
    assert rule(progress([a], [0], [4])).tolist() == [False]
    assert rule(progress([a], [1], [4])).tolist() == [False]


def test_a_refinement_that_halts_by_rank_is_the_one_with_as_many_steps(index: Index, bert: Embedder) -> None:
    texts = ["garden", "a cat that sleeps", "x"]
    done = bert.refine(texts, halt=RankStop(index=index, patience=2, max_steps=12))
    trajectory = bert.refine(texts, halt=FixedSteps(12), keep_trajectory=True).trajectory
    assert trajectory is not None
    for row, steps in enumerate(done.steps.tolist()):
        found = [index.nearest(vector) for vector in trajectory[row]]
        stable = [k for k in range(3, 12) if found[k - 3] == found[k - 2] == found[k - 1]]
        assert steps == (stable[0] if stable else 12)
        np.testing.assert_allclose(done.vectors[row], trajectory[row, steps - 1], atol=1e-5)
    assert done.steps.tolist() == bert.refine(texts, halt=RankStop(index=index, max_steps=12)).steps.tolist()


def test_only_texts_that_meet_the_filter_decide_when_a_query_halts(index: Index, bert: Embedder) -> None:
    rule = RankStop(index=index, patience=3, max_steps=12, where="path = 'a.md'")
    assert bert.refine(["garden"], halt=rule).steps.tolist() == [4]
    with pytest.raises(ConfigurationError, match="filter 'nope'"):
        bert.refine(["garden"], halt=RankStop(index=index, where="nope"))


@pytest.mark.parametrize(("name", "value"), [("patience", 0), ("max_steps", 0), ("hits", 0), ("patience", True)])
def test_a_rule_without_sense_is_refused(index: Index, name: str, value: int) -> None:
    with pytest.raises(ConfigurationError, match=rf"{name}={value!r}: an integer of at least 1"):
        RankStop(index=index, **{name: value})


def test_a_broken_table_is_no_filters_fault(bert: Embedder, tmp_path: Path) -> None:
    index = Index.build(tmp_path / "x", bert, PASSAGES, halt=ConvergeStop(threshold=0.9, max_steps=2))
    for file in (tmp_path / "x" / "passages.lance" / "data").iterdir():
        file.unlink()
    with pytest.raises(CheckpointError, match="damaged"):
        index.search(np.ones(32, np.float32), where="kind = 'md'")

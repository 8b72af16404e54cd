"""Mined negatives: equal to a search by hand, never a right answer, the same for the same seed; and `genembed mine`."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from genembed import ConfigurationError, load
from genembed.errors import DataError
from genembed.train import mine as mining
from genembed.train.mine import Embed, Mined, Mining, mine
from genembed.train.overlap import TextFilter, normalised
from genembed.train.pairs import BadRows, DataFile, Pair, read_pairs
from test_cli import Run, refused, run

__all__ = ["run"]  # the fixture

Row = dict[str, Any]


def spread(texts: Sequence[str]) -> np.ndarray:
    """Embed texts at random, each always the same, however it is set."""
    vectors = np.stack([np.random.default_rng(list(normalised(text).encode())).normal(size=6) for text in texts])
    return np.asarray(vectors / np.linalg.norm(vectors, axis=1, keepdims=True), dtype=np.float32)


def placed(cosines: Mapping[str, float]) -> Embed:
    """Embed texts so that each has the given cosine to every text that is not named."""
    return lambda texts: np.array([[c, np.sqrt(1 - c * c)] for c in (cosines.get(text, 1.0) for text in texts)], dtype=np.float32)


def written(path: Path, rows: Sequence[Row]) -> DataFile:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return DataFile(path=str(path))


def mined(folder: Path, rows: Sequence[Row], embed: Embed = spread, exclude: TextFilter | None = None, **changes: Any) -> list[Pair]:
    """Return the pairs of a file after mining; unless said otherwise, whatever is no right answer is a negative, nearest first."""
    settings = {"negatives": 100, "depth": 100, "max_ratio": 1e9, "nearest": True} | changes
    mine(written(folder / "in.jsonl", rows), folder / "out.jsonl", embed, Mining(**settings), exclude=exclude)
    return [pair for _, pair in read_pairs(DataFile(path=str(folder / "out.jsonl")), BadRows(), strict=True)]


def report(folder: Path, rows: Sequence[Row], embed: Embed = spread, exclude: TextFilter | None = None, **settings: Any) -> Mined:
    return mine(written(folder / "in.jsonl", rows), folder / "out.jsonl", embed, Mining(**settings), exclude=exclude)


def chain(count: int) -> list[Row]:
    return [{"query": f"query {number}", "pos": [f"passage {number}"]} for number in range(count)]


def by_hand(rows: Sequence[Row], row: Row, *, skip: int, depth: int, max_ratio: float) -> list[str]:
    """Return the candidates of a row, nearest first: every passage against the query, one by one."""
    same = [other for other in rows if normalised(other["query"]) == normalised(row["query"])]
    right = {normalised(text) for other in same for text in (other["query"], *other["pos"])} | set(map(normalised, row["neg"]))
    passages = {normalised(text): text for other in reversed(rows) for text in reversed(other["pos"])}

    def cosine(text: str) -> float:
        return float((spread([row["query"]]) * spread([text])).sum())

    ranked = sorted((text for key, text in passages.items() if key not in right), key=cosine, reverse=True)
    positive = min(map(cosine, row["pos"]))
    return [text for text in ranked[skip:depth] if cosine(text) <= positive - (1 - max_ratio) * abs(positive)]


TEXT = st.sampled_from([f"{word}{end}" for word in "abcdefghijkl" for end in ("", "!")]).map(str)
ROWS = st.lists(
    st.fixed_dictionaries({"query": TEXT, "pos": st.lists(TEXT, min_size=1, max_size=2), "neg": st.lists(TEXT, max_size=2)}),
    min_size=1,
    max_size=14,
).map(lambda rows: [row for row in rows if any(normalised(row["query"]) != normalised(text) for text in row["pos"])])


@given(rows=ROWS, seed=st.integers(0, 9), block=st.integers(1, 40), skip=st.integers(0, 2), max_ratio=st.sampled_from([0.5, 0.95, 1.5]))
def test_the_nearest_are_those_of_a_search_by_hand_whatever_the_blocks(
    tmp_path_factory: pytest.TempPathFactory, rows: list[Row], seed: int, block: int, skip: int, max_ratio: float
) -> None:
    if not rows:
        return
    folder = tmp_path_factory.mktemp("hand")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mining, "_COSINES", block)
        pairs = mined(folder, rows, negatives=3, skip=skip, depth=6, max_ratio=max_ratio, seed=seed)
    # What is read has lost the texts that say the same as their query or positive.
    read = [pair for _, pair in read_pairs(DataFile(path=str(folder / "in.jsonl")), BadRows())]
    kept = [{"query": pair.query, "pos": list(pair.positives), "neg": list(pair.negatives)} for pair in read]
    assert [pair.query for pair in pairs] == [row["query"] for row in kept]
    for row, pair in zip(kept, pairs, strict=True):
        expected = by_hand(kept, row, skip=skip, depth=6, max_ratio=max_ratio)[:3]
        assert list(map(normalised, pair.negatives)) == [*map(normalised, row["neg"]), *map(normalised, expected)]


@given(rows=ROWS, seed=st.integers(0, 9), limit=st.none() | st.integers(1, 9))
def test_a_mined_negative_is_never_right_for_its_query(
    tmp_path_factory: pytest.TempPathFactory, rows: list[Row], seed: int, limit: int | None
) -> None:
    if not rows:
        return
    right: dict[str, set[str]] = {}
    for row in rows:
        right.setdefault(normalised(row["query"]), {normalised(row["query"])}).update(map(normalised, row["pos"]))
    for pair in mined(tmp_path_factory.mktemp("right"), rows, seed=seed, limit=limit, nearest=False, negatives=5, keep_own=False):
        assert right[normalised(pair.query)].isdisjoint(map(normalised, pair.negatives))
        assert len(set(map(normalised, pair.negatives))) == len(pair.negatives)


def test_a_positive_of_a_row_that_was_not_drawn_is_right_for_its_query_too(tmp_path: Path) -> None:
    """Guards against right answers that are known of the drawn rows alone."""
    rows = [row for number in range(8) for row in ({"query": "q", "pos": [f"p{number}"]}, {"query": f"other {number}", "pos": ["p0"]})]
    for seed in range(8):
        for pair in mined(tmp_path, rows, limit=5, seed=seed):
            assert pair.query != "q" or not pair.negatives


def test_the_ratio_leaves_out_what_is_nearly_as_near_as_the_positive(tmp_path: Path) -> None:
    rows = [{"query": "q", "pos": ["right", "also right"]}, {"query": "r", "pos": ["near", "just below", "far", "opposite"]}]
    embed = placed({"right": 0.8, "also right": 0.5, "near": 0.476, "just below": 0.474, "far": 0.1, "opposite": -0.9})
    assert mined(tmp_path, rows, embed, max_ratio=0.95)[0].negatives == ("just below", "far", "opposite")
    assert report(tmp_path, rows, embed, max_ratio=0.95).above_ratio == 3  # one of q, and both right ones of r
    # Of a positive below 0, a share would be above the positive itself.
    embed = placed({"right": -0.5, "also right": -0.4, "near": -0.49, "just below": -0.51, "far": -0.526, "opposite": -0.9})
    assert mined(tmp_path, rows, embed, max_ratio=0.95)[0].negatives == ("far", "opposite")


def test_ranks_are_counted_without_the_right_answers_and_before_the_ratio(tmp_path: Path) -> None:
    rows = [{"query": "q", "pos": ["right"]}, {"query": "r", "pos": ["a", "b", "c", "d"]}]
    embed = placed({"a": 0.9, "right": 0.8, "b": 0.7, "c": 0.6, "d": 0.5})
    assert mined(tmp_path, rows, embed, negatives=2, skip=1, depth=3)[0].negatives == ("b", "c")
    assert mined(tmp_path, rows, embed, negatives=2, skip=0, depth=2, max_ratio=0.95)[0].negatives == ("b",)


def test_negatives_are_drawn_from_all_ranks_within_the_depth_alike(tmp_path: Path) -> None:
    rows = [{"query": "q", "pos": ["right"]}, {"query": "r", "pos": [f"p{rank}" for rank in range(6)]}]
    embed = placed({"right": 0.99, **{f"p{rank}": 0.9 - rank / 10 for rank in range(6)}})
    draws = [mined(tmp_path, rows, embed, negatives=2, depth=4, nearest=False, seed=seed)[0].negatives for seed in range(60)]
    assert {text for drawn in draws for text in drawn} == {"p0", "p1", "p2", "p3"}
    assert all(list(drawn) == sorted(drawn) for drawn in draws)
    assert len(set(draws)) == 6


def test_the_same_seed_writes_the_same_file_and_another_one_does_not(tmp_path: Path) -> None:
    def content(**changes: Any) -> bytes:
        report(tmp_path, chain(40), max_ratio=1e9, limit=20, **changes)
        return (tmp_path / "out.jsonl").read_bytes()

    assert content(seed=1) == content(seed=1) != content(seed=2)


def test_a_larger_limit_keeps_the_rows_of_a_smaller_one_in_the_order_of_the_file(tmp_path: Path) -> None:
    def queries(limit: int | None) -> list[str]:
        return [pair.query for pair in mined(tmp_path, chain(30), limit=limit)]

    few, more, every = queries(10), queries(20), queries(None)
    assert (len(few), len(more), every) == (10, 20, [row["query"] for row in chain(30)])
    assert set(few) < set(more)
    assert more == [query for query in every if query in more] != every[:20]


def test_the_draw_of_rows_has_no_preferred_place(tmp_path: Path) -> None:
    """Guards against a sample of the first rows: sorted files would give one topic alone."""
    drawn = [int(pair.query.split()[1]) for seed in range(40) for pair in mined(tmp_path, chain(20), limit=5, seed=seed)]
    assert set(drawn) == set(range(20))
    assert abs(np.mean(drawn) - 9.5) < 1.5


def test_rows_keep_what_they_have_unless_it_is_to_be_replaced(tmp_path: Path) -> None:
    rows = [
        {"query": "q", "pos": ["p", "é\n2"], "neg": ["own"], "prompt": "Find", "type": "symmetric_sts"},
        {"query": "r", "pos": ["s"], "neg": ["own", "p"], "type": "asymmetric"},
    ]
    before = [pair for _, pair in read_pairs(written(tmp_path / "in.jsonl", rows), BadRows())]
    after = mined(tmp_path, rows)
    assert [(pair.query, pair.positives, pair.instruction, pair.symmetric) for pair in after] == [
        (pair.query, pair.positives, pair.instruction, pair.symmetric) for pair in before
    ]
    assert [pair.negatives for pair in after] == [("own", "s"), ("own", "p", "é\n2")]
    assert [sorted(pair.negatives) for pair in mined(tmp_path, rows, keep_own=False)] == [["s"], ["p", "é\n2"]]


def test_a_row_without_candidates_stays_and_is_counted(tmp_path: Path) -> None:
    result = report(tmp_path, [{"query": "q", "pos": ["a", "b"]}, {"query": "Q!", "pos": ["c"]}], negatives=1)
    assert (result.rows, result.passages, result.negatives, result.rows_without) == (2, 3, 0, 2)
    assert str(result) == (
        f"{tmp_path / 'out.jsonl'}: 2 rows, 3 passages, 0.00 negatives mined for a row, 2 rows without any, 0 candidates too near, "
        "0 rows excluded, 0 bad rows"
    )


def test_bad_rows_are_left_out_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    result = report(tmp_path, [*chain(3), {"query": "alone", "pos": []}, {"query": "", "pos": ["x"]}], max_ratio=1e9)
    assert (result.rows, result.bad_rows, result.negatives) == (3, 2, 6)
    assert "2 rows left out (no positive: 1, empty text: 1)" in caplog.text


def test_excluded_texts_are_neither_rows_nor_candidates(tmp_path: Path) -> None:
    exclude = TextFilter.from_texts(["Query 0", "passage 1."])
    pairs = mined(tmp_path, [*chain(4), {"query": "both", "pos": ["passage 1", "kept"]}], exclude=exclude)
    assert [pair.query for pair in pairs] == ["query 2", "query 3", "both"]
    assert {text for pair in pairs for text in pair.negatives} == {"passage 2", "passage 3", "kept"}
    assert report(tmp_path, chain(4), exclude=exclude).excluded == 2
    with pytest.raises(DataError, match=r"in\.jsonl: no row can be used: 0 cannot be read, 2 are excluded"):
        report(tmp_path, chain(2), exclude=exclude)


def test_nothing_is_left_when_the_model_fails(tmp_path: Path) -> None:
    def fail(texts: Sequence[str]) -> np.ndarray:
        raise MemoryError

    with pytest.raises(MemoryError):
        report(tmp_path, chain(3), fail)
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


def test_scored_pairs_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="its pairs have scores, and the ranking loss"):
        report(tmp_path, [{"sentence1": "a", "sentence2": "b", "score": 0.5}])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"negatives": 0}, "negatives=0: must be at least 1"),
        ({"skip": -1}, "skip=-1: must be at least 0"),
        ({"limit": 0}, "limit=0: must be at least 1"),
        ({"skip": 48}, "skip=48 and depth=50 leave 2 ranks for negatives=4"),
        ({"skip": 60}, "skip=60 and depth=50 leave 0 ranks"),
        ({"max_ratio": 0.0}, "max_ratio=0.0: a share above 0"),
        ({"max_ratio": float("nan")}, "max_ratio=nan: a share above 0"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        Mining(**settings)


# The command


@pytest.fixture(scope="module")
def model(folder_of: Callable[[str], Path]) -> Path:
    return folder_of("qwen2")


def test_the_command_writes_what_the_library_writes(run: Run, model: Path, tmp_path: Path) -> None:
    files = [written(tmp_path / name, chain(count)) for name, count in (("a.jsonl", 5), ("b.jsonl", 7))]
    options = ["-m", model, "--steps", 2, "--negatives", 2, "--depth", 3, "--max-ratio", 1e9, "--seed", 3, "--limit", 6]
    outcome = run("mine", *(file.path for file in files), "-o", tmp_path / "new" / "mined", *options)
    assert (outcome.code, outcome.out.count("\n")) == (0, 2), outcome.err
    embed = partial(load(model).encode, steps=2)
    for file, line in zip(files, outcome.out.splitlines(), strict=True):
        result = mine(file, tmp_path / "library.jsonl", embed, Mining(negatives=2, depth=3, max_ratio=1e9, seed=3, limit=6))
        assert (tmp_path / "new" / "mined" / f"{file.source}.jsonl").read_bytes() == (tmp_path / "library.jsonl").read_bytes()
        assert line.partition(": ")[2] == str(result).partition(": ")[2]
    summary = run("mine", files[0].path, "-o", tmp_path / "new", *options, "--nearest", "--replace", "--json").json
    assert [(one["source"], one["rows"], one["negatives"]) for one in summary["files"]] == [("a", 5, 10)]


def test_the_command_keeps_excluded_texts_out(run: Run, model: Path, tmp_path: Path) -> None:
    file = written(tmp_path / "a.jsonl", chain(5))
    (tmp_path / "test.txt").write_text("passage 0\n")
    outcome = run("mine", file.path, "-o", tmp_path / "m", "-m", model, "--steps", 1, "--exclude", tmp_path / "test.txt")
    assert "a.jsonl: 4 rows, 4 passages, " in outcome.out
    assert ", 1 rows excluded, " in outcome.out


@pytest.mark.parametrize(
    ("line", "fragments"),
    [
        ("mine FILE -o . --negatives 0", ["negatives=0: must be at least 1"]),
        ("mine FILE -o .", ["-o .: pairs.jsonl would be written over what is read", "choose another folder"]),
        ("mine FILE other/pairs.jsonl -o x", ["would both be written to x/pairs.jsonl", "mine them one by one"]),
        ("mine SCORED -o x", ["its pairs have scores", "Leave the file out"]),
        ("mine nowhere.jsonl -o x", ["nowhere.jsonl: no such file"]),
        ("mine FILE -o x -m nowhere", ["nowhere"]),
        ("mine FILE -o x --text-column t", ["--text-column t: says how --exclude files are read, and there are none"]),
    ],
)
def test_a_mistake_ends_in_one_line_and_exit_code_2(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused_connections: list[str], line: str, fragments: Sequence[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other").mkdir()
    for name in ("pairs.jsonl", "other/pairs.jsonl"):
        written(tmp_path / name, chain(3))
    written(tmp_path / "scored.jsonl", [{"sentence1": "a", "sentence2": "b", "score": 0.5}])
    given = line.replace("FILE", str(tmp_path / "pairs.jsonl")).replace("SCORED", str(tmp_path / "scored.jsonl"))
    refused(run(*given.split()), *fragments)
    assert not (tmp_path / "x").exists()
    refused_connections.clear()

"""Batches of training pairs: no text twice in one, the same for a seed, files by weight, nothing that must not be trained on."""

from __future__ import annotations

import gzip
import json
import tracemalloc
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from genembed import ConfigurationError
from genembed.errors import DataError
from genembed.train import batches
from genembed.train.batches import BatchStream, held_out_pairs
from genembed.train.overlap import TextFilter, is_held_out, normalised, text_hash
from genembed.train.pairs import BadRows, DataFile, Pair

Row = dict[str, Any]


def data_file(folder: Path, name: str, rows: Iterable[Row | str], **options: Any) -> DataFile:
    path = folder / f"{name}.jsonl"
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), encoding="utf-8")
    return DataFile(path=str(path), **options)


def distinct(count: int, prefix: str = "") -> list[Row]:
    """Rows without a common text."""
    return [{"query": f"{prefix}q{number}", "pos": [f"{prefix}p{number}"], "neg": [f"{prefix}n{number}"]} for number in range(count)]


def queries(stream: Iterable[Sequence[Pair]]) -> list[str]:
    return [pair.query for batch in stream for pair in batch]


def letters(text: str) -> str:
    """What counts when two texts are compared, found in another way than by the code under test."""
    return "".join(letter for letter in text.lower() if letter.isalnum())


def texts(pair: Pair) -> set[str]:
    return {letters(text) for text in (pair.query, *pair.positives, *pair.negatives)}


WORDS = st.sampled_from([f"{case}{number}{mark}" for number in range(8) for case in "aA" for mark in ("", " !")])


@given(
    st.lists(st.tuples(WORDS, st.lists(WORDS, min_size=1, max_size=3), st.lists(WORDS, max_size=3)), min_size=1, max_size=12),
    st.booleans(),
    st.integers(1, 4),
    st.sampled_from([1, 3, 100]),
)
@settings(max_examples=30)
def test_no_text_of_a_pair_is_a_text_of_another_pair_in_the_batch(
    tmp_path: Path, rows: list[tuple[str, list[str], list[str]]], one_source: bool, batch_size: int, buffer: int
) -> None:
    written: list[Row] = [{"query": f"{query}?", "pos": pos, "neg": neg} for query, pos, neg in rows]
    files = [
        data_file(tmp_path, "odd", [*written[::2], *distinct(1, "o")]),
        data_file(tmp_path, "even", [*written[1::2], *distinct(1, "e")]),
    ]
    stream = BatchStream(files, batch_size=batch_size, one_source=one_source, shuffle_buffer=buffer, negatives=2)
    found: list[list[Pair]] = []
    with suppress(DataError):  # the words may be too few for a batch
        found.extend(islice(stream, 8))
    for batch in found:
        assert len(batch) == batch_size
        counts = Counter(text for pair in batch for text in texts(pair))
        assert {text: count for text, count in counts.items() if count > 1} == {}


def test_not_even_a_positive_that_was_not_drawn_is_a_negative_of_its_query(tmp_path: Path) -> None:
    """Guards against a right answer to one query that stands as a wrong one beside it because another answer was drawn."""
    rows = [{"query": "q", "pos": ["a", "b"]}, {"query": "r", "pos": ["B!", "c"]}, *distinct(6)]
    stream = BatchStream([data_file(tmp_path, "t", rows)], batch_size=4, seed=1)
    together = [{"q", "r"} <= {pair.query for pair in batch} for batch in islice(stream, 60)]
    assert not any(together)
    assert Counter(queries(islice(stream, 60)))["r"] > 5


def test_a_batch_has_its_size_one_positive_and_so_many_negatives_at_most(tmp_path: Path) -> None:
    rows = [{"query": f"q{n}", "pos": [f"p{n}", f"r{n}"], "neg": [f"n{n}.{m}" for m in range(n % 5)]} for n in range(20)]
    file = data_file(tmp_path, "t", rows)
    for negatives in (0, 1, 3):
        for batch in islice(BatchStream([file], batch_size=6, negatives=negatives), 10):
            assert [len(pair.positives) for pair in batch] == [1] * 6
            assert [len(set(pair.negatives)) for pair in batch] == [min(negatives, int(pair.query[1:]) % 5) for pair in batch]


def test_every_use_of_a_pair_draws_anew_among_its_positives_and_negatives(tmp_path: Path) -> None:
    row = {"query": "q", "pos": ["a", "b", "c"], "neg": ["x", "y", "z"], "prompt": "Find", "type": "symmetric_sts"}
    pairs = [pair for (pair,) in islice(BatchStream([data_file(tmp_path, "t", [row])], batch_size=1, negatives=2), 100)]
    assert {pair.positives for pair in pairs} == {("a",), ("b",), ("c",)}
    assert {pair.negatives for pair in pairs} == {(x, y) for x in "xyz" for y in "xyz" if x != y}
    assert {(pair.query, pair.instruction, pair.symmetric, pair.source, pair.score) for pair in pairs} == {("q", "Find", True, "t", None)}


@pytest.mark.parametrize("one_source", [True, False])
def test_the_same_seed_gives_the_same_batches_and_another_one_others(tmp_path: Path, one_source: bool) -> None:
    files = [data_file(tmp_path, name, distinct(30, name)) for name in "ab"]

    def first(seed: int) -> list[list[Pair]]:
        return list(islice(BatchStream(files, batch_size=4, one_source=one_source, seed=seed, shuffle_buffer=7), 25))

    assert first(0) == first(0)
    assert len({str(first(seed)) for seed in (0, 1, -1, 2)}) == 4
    stream = BatchStream(files, batch_size=4, one_source=one_source, shuffle_buffer=7)
    assert list(islice(stream, 10)) == list(islice(stream, 10)) == first(0)[:10]
    assert list(islice(stream, 10, 25)) == first(0)[10:]


def test_two_iterations_at_once_do_not_disturb_each_other(tmp_path: Path) -> None:
    stream = BatchStream([data_file(tmp_path, "t", [*distinct(9), "{"])], batch_size=2)
    ahead, behind = iter(stream), iter(stream)
    expected = [next(ahead) for _ in range(9)]
    assert [next(behind) for _ in range(9)] == expected
    assert stream.bad.rows == {"invalid JSON": 1}


@pytest.mark.parametrize("buffer", [1, 5, 1000])
def test_each_pass_over_a_file_gives_every_pair_once_in_another_order(tmp_path: Path, buffer: int) -> None:
    file = data_file(tmp_path, "t", distinct(24))
    stream = BatchStream([file], batch_size=4, shuffle_buffer=buffer, epochs=3)
    found = queries(stream)
    passes = [found[start : start + 24] for start in (0, 24, 48)]
    assert [sorted(one) for one in passes] == [sorted(row["query"] for row in distinct(24))] * 3
    assert len({tuple(one) for one in passes}) == (1 if buffer == 1 else 3)
    assert queries(islice(BatchStream([file], batch_size=4, shuffle_buffer=buffer), 18)) == found


def test_a_buffer_of_one_keeps_the_order_of_the_file(tmp_path: Path) -> None:
    stream = BatchStream([data_file(tmp_path, "t", distinct(10))], batch_size=1, shuffle_buffer=1, epochs=1)
    assert queries(stream) == [f"q{number}" for number in range(10)]


def test_no_more_pairs_are_in_memory_than_the_buffer_has_room_for(tmp_path: Path) -> None:
    """With room for ten, the first pair out is among the first ten of the file, and each further one among one more."""
    stream = BatchStream([data_file(tmp_path, "t", distinct(60))], batch_size=1, shuffle_buffer=10, epochs=1)
    assert all(int(query[1:]) < place + 10 for place, query in enumerate(queries(stream)))


def test_pairs_left_over_by_a_pass_begin_the_next_batch(tmp_path: Path) -> None:
    stream = BatchStream([data_file(tmp_path, "t", distinct(10))], batch_size=4)
    assert Counter(queries(islice(stream, 5))) == {f"q{number}": 2 for number in range(10)}


def test_with_epochs_the_last_incomplete_batch_is_dropped(tmp_path: Path) -> None:
    found = queries(BatchStream([data_file(tmp_path, "t", distinct(10))], batch_size=4, epochs=1))
    assert len(found) == len(set(found)) == 8


def test_of_a_part_of_a_pass_that_share_of_the_pairs_is_drawn(tmp_path: Path) -> None:
    counts = Counter(queries(BatchStream([data_file(tmp_path, "t", distinct(400))], batch_size=1, epochs=1.25)))
    assert set(counts.values()) == {1, 2}
    # 400 draws at 0.25: mean 100, standard deviation 8.7; five of them are allowed.
    assert abs(sum(counts.values()) - 500) < 44


@pytest.mark.parametrize("one_source", [True, False])
def test_with_epochs_a_short_file_leaves_the_mix_and_the_others_go_on(tmp_path: Path, one_source: bool) -> None:
    files = [data_file(tmp_path, "a", distinct(4, "a")), data_file(tmp_path, "b", distinct(40, "b"))]
    found = queries(BatchStream(files, batch_size=2, one_source=one_source, epochs=2))
    assert Counter(found) == {row["query"]: 2 for row in (*distinct(4, "a"), *distinct(40, "b"))}


def test_with_one_source_batches_come_from_one_file_each_drawn_by_weight(tmp_path: Path) -> None:
    files = [data_file(tmp_path, "a", distinct(5, "a"), weight=3.0), data_file(tmp_path, "b", distinct(20, "b"))]
    sources = [{pair.source for pair in batch} for batch in islice(BatchStream(files, batch_size=2), 400)]
    assert {frozenset(own) for own in sources} == {frozenset("a"), frozenset("b")}
    # Binomial at 3/4: mean 300, standard deviation 8.7; five of them are allowed.
    assert abs(sum(own == {"a"} for own in sources) - 300) < 44


def test_without_one_source_every_pair_is_drawn_by_weight(tmp_path: Path) -> None:
    files = [data_file(tmp_path, "a", distinct(30, "a"), weight=3.0), data_file(tmp_path, "b", distinct(30, "b"))]
    found = [[pair.source for pair in batch] for batch in islice(BatchStream(files, batch_size=4, one_source=False), 200)]
    assert sum({"a", "b"} == set(own) for own in found) > 100
    # Binomial of 800 draws at 3/4: mean 600, standard deviation 12.2; five of them are allowed.
    assert abs(sum(own.count("a") for own in found) - 600) < 62


def test_without_one_source_no_text_is_shared_between_files_either(tmp_path: Path) -> None:
    files = [data_file(tmp_path, "a", distinct(10)), data_file(tmp_path, "b", distinct(10))]
    for batch in islice(BatchStream(files, batch_size=8, one_source=False), 20):
        assert len({pair.query for pair in batch}) == 8


def test_pairs_with_and_without_scores_never_meet_in_a_batch(tmp_path: Path) -> None:
    scored = [{"sentence1": f"s{number}", "sentence2": f"t{number}", "score": 0.5} for number in range(6)]
    files = [data_file(tmp_path, "a", distinct(6)), data_file(tmp_path, "b", scored), data_file(tmp_path, "c", distinct(6))]
    found = [{pair.score for pair in batch} for batch in islice(BatchStream(files, batch_size=3), 30)]
    assert {frozenset(own) for own in found} == {frozenset({None}), frozenset({0.5})}
    with pytest.raises(ConfigurationError, match=r"would mix pairs with scores \(b\) and without \(a, c\) in a batch; use one_source=True"):
        BatchStream(files, batch_size=3, one_source=False)
    assert next(iter(BatchStream(files[::2], batch_size=3, one_source=False)))


def test_a_pair_that_collides_is_put_back_for_a_later_batch(tmp_path: Path) -> None:
    rows = [*distinct(12), {"query": "x", "pos": "same"}, {"query": "y", "pos": "Same."}, {"query": "z", "pos": "SAME"}]
    found = queries(islice(BatchStream([data_file(tmp_path, "t", rows)], batch_size=5, shuffle_buffer=15), 30))
    counts = Counter(found)
    # 150 pairs of 15 rows: ten uses of each, but for what the last batch and a collision at the end of a pass shift.
    assert {query: count for query, count in counts.items() if not 8 <= count <= 12} == {}
    assert len(counts) == 15


def test_a_text_that_half_the_pairs_share_neither_stops_the_stream_nor_fills_the_memory(tmp_path: Path) -> None:
    rows = [row for number, row in enumerate(distinct(40)) for row in (row, {"query": f"x{number}", "pos": "same"})]
    stream = BatchStream([data_file(tmp_path, "t", rows)], batch_size=8, shuffle_buffer=20, epochs=10)
    found = list(stream)
    same = [sum(pair.positives == ("same",) for pair in batch) for batch in found]
    assert max(same) == 1
    assert Counter(len(batch) for batch in found) == {8: len(found)}
    assert {pair.query for batch in found for pair in batch} >= {row["query"] for row in distinct(40)}
    # Of the 400 rows with the common text every one is in a batch or crowded out, but for those of the last batch and the two buffers.
    assert set(stream.crowded_out) == {"t"}
    assert 400 - 60 < stream.crowded_out["t"] + sum(same) <= 400


@pytest.mark.parametrize("epochs", [None, 1])
@pytest.mark.parametrize("rows", [distinct(3), [{"query": f"q{number}", "pos": f"p{number % 3}"} for number in range(30)]])
def test_a_file_that_cannot_fill_one_batch_is_refused(tmp_path: Path, rows: list[Row], epochs: int | None) -> None:
    stream = BatchStream([data_file(tmp_path, "t", rows)], batch_size=4, epochs=epochs)
    with pytest.raises(DataError, match=r"^t: no batch of 4 pairs that share no text can be made, only one of 3; use a smaller batch_size"):
        next(iter(stream))
    assert len(next(iter(BatchStream(stream.files, batch_size=3, epochs=epochs)))) == 3


def test_files_that_cannot_fill_one_batch_together_are_refused(tmp_path: Path) -> None:
    files = [data_file(tmp_path, name, distinct(3)) for name in "ab"]
    with pytest.raises(DataError, match=r"^a, b: no batch of 4 pairs .* only one of 3"):
        next(iter(BatchStream(files, batch_size=4, one_source=False)))


def test_a_long_file_of_one_text_is_refused_before_it_is_read_to_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches, "_FRUITLESS_PAIRS", 10)
    file = data_file(tmp_path, "t", [*({"query": f"q{number}", "pos": "same"} for number in range(50)), "the end, which is no JSON"])
    with pytest.raises(DataError, match=r"^t: no batch of 2 pairs"):
        next(iter(BatchStream([file], batch_size=2, shuffle_buffer=5, strict=True)))


def test_bad_rows_are_counted_once_over_all_passes_or_stop_the_stream_in_strict_mode(tmp_path: Path) -> None:
    file, bad = data_file(tmp_path, "t", [*distinct(3), "{", {"query": "q", "pos": []}]), BadRows()
    for _ in range(2):
        assert len(list(BatchStream([file], batch_size=1, epochs=3, bad=bad))) == 9
    assert bad.rows == {"invalid JSON": 1, "no positive": 1}
    with pytest.raises(DataError, match=r"t\.jsonl:4: invalid JSON"):
        next(iter(BatchStream([file], batch_size=1, strict=True)))


def test_a_file_without_a_pair_to_train_on_is_refused_with_what_was_wrong(tmp_path: Path) -> None:
    stream = BatchStream([data_file(tmp_path, "t", [{"query": "q", "pos": "q"}])], batch_size=1)
    with pytest.raises(
        DataError, match=r"(?s)t\.jsonl: no pair to train on; .*1 rows left out \(positive equals the query: 1\).*t\.jsonl:1: "
    ):
        next(iter(stream))


def test_held_out_pairs_and_training_pairs_are_all_pairs_and_share_none(tmp_path: Path) -> None:
    files = [data_file(tmp_path, "a", distinct(200, "x ")), data_file(tmp_path, "b", distinct(50, "X-"))]
    trained = set(queries(BatchStream(files, batch_size=1, epochs=1, held_out=0.2)))
    held_out = held_out_pairs(files, share=0.2)
    assert list(held_out) == ["a", "b"]
    kept = {pair.query for pairs in held_out.values() for pair in pairs}
    assert trained | kept == {row["query"] for row in (*distinct(200, "x "), *distinct(50, "X-"))}
    assert {letters(query) for query in trained} & {letters(query) for query in kept} == set()
    # 200 draws at 0.2: mean 40, standard deviation 5.7; five of them are allowed.
    assert abs(len(held_out["a"]) - 40) < 29


def test_held_out_pairs_are_whole_and_the_first_ones_of_their_file(tmp_path: Path) -> None:
    rows = [{"query": f"q{number}", "pos": ["a", "b"], "neg": ["x", "y"]} for number in range(40)]
    file = data_file(tmp_path, "t", rows)
    every = held_out_pairs([file], share=0.5)["t"]
    assert {(pair.positives, pair.negatives) for pair in every} == {(("a", "b"), ("x", "y"))}
    assert held_out_pairs([file], share=0.5, limit=3) == {"t": every[:3]}


@given(st.text(min_size=1), st.floats(0, 1), st.floats(0, 1))
def test_what_is_held_out_stays_so_at_a_larger_share(query: str, one: float, other: float) -> None:
    smaller, larger = sorted((one, other))
    assert is_held_out(query, smaller) <= is_held_out(query, larger)
    assert not is_held_out(query, 0.0)
    assert is_held_out(query, 1.0)


def test_texts_of_test_sets_are_kept_out_and_counted_once_over_all_passes(tmp_path: Path) -> None:
    rows: list[Row] = [
        {"query": "Secret, question?", "pos": ["p"]},
        {"query": "q1", "pos": ["SECRET answer", "fine 1"], "neg": ["secret wrong", "fine 2"]},
        {"query": "q2", "pos": ["secret answer"]},
        {"query": "q3", "pos": ["fine 3"], "neg": ["secret  wrong"]},
    ]
    file = data_file(tmp_path, "t", rows)
    exclude = TextFilter.from_texts(["secret question", " ", "Secret answer!", "secret wrong"])
    for _ in range(2):
        found = list(BatchStream([file], batch_size=1, epochs=2, exclude=exclude))
        assert {(pair.query, pair.positives, pair.negatives) for (pair,) in found} == {
            ("q1", ("fine 1",), ("fine 2",)),
            ("q3", ("fine 3",), ()),
        }
    assert exclude.dropped == {"pairs": 2, "positives": 1, "negatives": 2}


def test_a_filter_counts_what_it_keeps_out_of_held_out_pairs_too(tmp_path: Path) -> None:
    """Guards against a count that forgets training pairs because held-out ones further down were counted before."""
    file = data_file(tmp_path, "t", distinct(40))
    for first in (True, False):
        exclude = TextFilter.from_texts(f"n{number}" for number in range(40))
        stream = BatchStream([file], batch_size=1, epochs=1, held_out=0.5, exclude=exclude)
        trained = list(stream) if first else []
        held_out = held_out_pairs([file], share=0.5, exclude=exclude)["t"]
        trained = trained or list(stream)
        assert exclude.dropped == {"negatives": 40}
        assert {pair.negatives for pair in (*held_out, *(pair for (pair,) in trained))} == {()}


def test_long_texts_are_the_same_if_their_first_eighty_letters_are() -> None:
    start = "ab " * 40
    known = TextFilter.from_texts([f"{start}c", "short"])
    assert f"{start.upper()} another end" in known
    assert start in known
    assert start[:-3] not in known
    assert "Short." in known
    assert "short and more" not in known


def test_a_filter_holds_eight_bytes_for_each_text() -> None:
    known = TextFilter.from_texts(f"text {number}" for number in [*range(1000), *range(1000)])
    assert memoryview(known.hashes).nbytes == 8_000  # type: ignore[arg-type]
    assert "1000 texts" not in repr(known)
    assert [f"text {number}" in known for number in (0, 999, 1000)] == [True, True, False]
    assert "x" not in TextFilter.from_texts([])


@given(st.text(st.characters(max_codepoint=127)))
def test_of_an_ascii_text_letters_and_digits_are_compared_without_case(text: str) -> None:
    expected = letters(text)
    if expected:
        assert normalised(text) == normalised(f" {text.upper()}!\n") == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Stra\u00dfe 5\u00b2", "strasse52"),
        ("CAFE\u0301 \u2014 \uff21", "caf\u00e9a"),
        ("\u0915\u093f, \u0915\u093e", "\u0915\u093f\u0915\u093e"),  # vowels of Hindi are marks, which isalnum() would drop
        ("\u6771\u4eac\u3002", "\u6771\u4eac"),
        ("++", "++"),
        (" !=  = ", "!= ="),
        ("", ""),
    ],
)
def test_normal_forms(text: str, expected: str) -> None:
    assert normalised(text) == expected


def test_hashes_are_the_same_in_every_run() -> None:
    """A held-out pair must stay one when a run is resumed elsewhere."""
    assert text_hash("caf\u00e9") == 6302685136992524259
    assert text_hash("\ud800") == 4758185216457903464


def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    """10 MB of text, of which twenty pairs are held at a time."""
    path, text = tmp_path / "t.jsonl.gz", "word" * 6_000
    with gzip.open(path, "wt", compresslevel=1) as file:
        file.writelines(json.dumps({"query": f"q{number}", "pos": [f"{number} {text}"]}) + "\n" for number in range(400))
    stream = BatchStream([DataFile(path=str(path))], batch_size=10, shuffle_buffer=20, epochs=1)
    tracemalloc.start()
    try:
        assert sum(1 for _ in stream) == 40
        assert tracemalloc.get_traced_memory()[1] < 3_000_000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size=0: an integer of at least 1"),
        ({"batch_size": 2.0}, r"batch_size=2\.0: an integer"),
        ({"batch_size": True}, "batch_size=True: an integer"),
        ({"shuffle_buffer": 0}, "shuffle_buffer=0: an integer of at least 1"),
        ({"negatives": -1}, "negatives=-1: an integer of at least 0"),
        ({"seed": None}, "seed=None: an integer is needed"),
        ({"epochs": 0}, "epochs=0: a number above 0 is needed, or None"),
        ({"epochs": float("inf")}, "epochs=inf: a number above 0"),
        ({"epochs": True}, "epochs=True: a number above 0"),
        ({"held_out": 1.0}, r"held_out=1\.0: a share of at least 0 and below 1"),
        ({"held_out": "some"}, "held_out='some': a share"),
        ({"files": []}, "files is empty"),
        ({"files": [DataFile(path="absent.jsonl")]}, r"absent\.jsonl: no such file"),
        ({"files": [DataFile(path="a/x.jsonl"), DataFile(path="b/x.parquet")]}, r"several files are called 'x'; give each a name"),
    ],
)
@pytest.mark.usefixtures("untyped_caller")
def test_settings_that_cannot_work_are_refused_before_any_batch(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        BatchStream(**{"files": [data_file(tmp_path, "t", distinct(2))], "batch_size": 1, **options})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"share": 0}, "share=0: a share between 0 and 1"),
        ({"share": 1}, "share=1: a share"),
        ({"limit": 0}, "limit=0: an integer of at least 1"),
        ({"files": [DataFile(path="a/x.jsonl"), DataFile(path="b/x.jsonl")]}, "several files are called 'x'"),
    ],
)
@pytest.mark.usefixtures("untyped_caller")
def test_a_split_that_cannot_work_is_refused(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        held_out_pairs(**{"files": [data_file(tmp_path, "t", distinct(2))], "share": 0.5, **options})

"""What an index keeps of its vectors: fewer bits and fewer dimensions, searched as what they stand for."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from genembed import CheckpointError, ConfigurationError, Embedder, FixedSteps, load
from genembed.index import Index, Passage
from genembed.index.rank_stop import RankStop
from genembed.index.stored import _ROWS_AT_ONCE, Stored
from genembed.precision import OutputForm, Precision, Ranges, ranges_to_json, truncate
from test_cli import Run, refused, run

__all__ = ["run"]  # the fixture

TEXTS = [f"text {row} of {row * row % 17}" for row in range(40)]
PASSAGES = [Passage(text, f"row {row}", "", f"{row % 2}.md", "md", {"year": row}) for row, text in enumerate(TEXTS)]
QUERY = "text 7 of 15"
CUT = 16


@pytest.fixture(scope="module")
def folder(folder_of: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with ranges, trained to be cut (so its settings say)."""
    made = tmp_path_factory.mktemp("forms") / "model"
    load(folder_of("bert")).save_pretrained(made)
    settings = json.loads((made / "genembed.json").read_text())
    (made / "genembed.json").write_text(json.dumps({**settings, "matryoshka_dims": [CUT]}))
    vectors = load(made).encode([f"another text, {row}" for row in range(30)], steps=2)
    ranges = {dims: Ranges.of(truncate(vectors, dims)) for dims in (vectors.shape[1], CUT)}
    (made / "ranges.json").write_text(json.dumps(ranges_to_json(ranges)))
    return made


@pytest.fixture(scope="module")
def bert(folder: Path) -> Embedder:
    return load(folder)


@pytest.fixture
def build(bert: Embedder, tmp_path: Path) -> Callable[..., Index]:
    def built(precision: Precision, dims: int | None = None, texts: int = len(TEXTS), **options: bool) -> Index:
        return Index.build(
            tmp_path / "x", bert, PASSAGES[:texts], halt=FixedSteps(2), form=bert.form(precision, dims), overwrite=True, **options
        )

    return built


@pytest.mark.parametrize("dims", [None, CUT])
@pytest.mark.parametrize(("precision", "kind"), [("float32", "float"), ("float16", "halffloat"), ("int8", "int8"), ("binary", "int8")])
def test_hits_are_ranked_by_the_cosine_of_the_query_with_what_the_codes_stand_for(
    bert: Embedder, build: Callable[..., Index], precision: Precision, kind: str, dims: int | None
) -> None:
    index, form = build(precision, dims), bert.form(precision, dims)
    query = bert.encode(QUERY, steps=2)
    restored = form.restore(form(bert.encode_document(TEXTS, steps=2)))
    cosines = restored @ truncate(query, dims or len(query))
    hits = Index.open(index.folder).search(3 * query, k=len(TEXTS))
    assert sorted(hit.reference for hit in hits) == sorted(passage.reference for passage in PASSAGES)
    expected = [cosines[int(hit.reference.split()[1])] for hit in hits]
    tolerance = 2e-3 if precision == "float16" else 1e-5  # LanceDB rounds the query to half precision too
    np.testing.assert_allclose([hit.score for hit in hits], expected, atol=tolerance)
    assert sorted(expected, reverse=True) == expected or precision == "float16"
    kept = index._table.schema.field("vector").type
    assert str(kept.value_type) == kind
    assert kept.list_size * kept.value_type.bit_width // 8 == form.bytes_per_vector


@pytest.mark.parametrize("precision", ["float16", "int8", "binary"])
def test_filters_words_and_ranks_work_on_every_form(bert: Embedder, build: Callable[..., Index], precision: Precision) -> None:
    index, query = build(precision), bert.encode(QUERY, steps=2)
    every = index.search(query, k=len(TEXTS))
    old = [hit for hit in every if hit.metadata["year"] < 9 and hit.path == "1.md"]
    assert index.search(query, k=3, where="year < 9 AND path = '1.md'") == old[:3]
    assert index.search(query, k=50, where="year > 99") == []
    assert index.nearest(query, k=2, where="year > 99") == ()
    hybrid = index.search_hybrid(query, QUERY, k=5)
    assert hybrid[0].text == QUERY
    assert hybrid[0].score == pytest.approx(2 / 61, abs=2e-3)
    assert bert.refine([QUERY], halt=RankStop(index=index, patience=1, hits=3)).steps[0] >= 2
    with pytest.raises(ConfigurationError, match="filter 'nope = 1'"):
        index.search(query, where="nope = 1")


def test_a_search_over_several_batches_of_codes_finds_the_nearest_of_all(
    build: Callable[..., Index], bert: Embedder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards against a best row of an early batch that is forgotten, or a late one that is not reached."""
    index, query = build("int8"), bert.encode(QUERY, steps=2)
    whole = index.search(query, k=7)
    assert len(TEXTS) < _ROWS_AT_ONCE, "one batch would hold everything, so nothing would be compared"
    monkeypatch.setattr("genembed.index.stored._ROWS_AT_ONCE", 3)
    again = index.search(query, k=7)
    assert [hit.reference for hit in again] == [hit.reference for hit in whole]
    np.testing.assert_allclose([hit.score for hit in again], [hit.score for hit in whole], atol=1e-6)


def test_an_update_keeps_the_form_and_the_ranges_of_the_index(build: Callable[..., Index], bert: Embedder, folder: Path) -> None:
    index = build("int8", None, 30)
    before = index.description.stored
    other = load(folder)
    other.ranges = {dims: Ranges(own.minimum - 1, own.maximum + 1) for dims, own in other.ranges.items()}
    moved = [Passage(TEXTS[0], "elsewhere", "", "0.md", "md", {"year": 1}), *PASSAGES[1:]]
    done = index.update(other, moved, halt=FixedSteps(2), prune=["0.md", "1.md"])
    assert (done.embedded, done.moved, done.unchanged) == (10, 1, 29)
    assert Index.open(index.folder).description.stored == before
    query, form = bert.encode(QUERY, steps=2), bert.form("int8")
    cosines = np.sort(form.restore(form(bert.encode_document(TEXTS, steps=2))) @ query)[::-1]
    np.testing.assert_allclose([hit.score for hit in index.search(query, k=len(TEXTS))], cosines, atol=1e-5)


def test_half_precision_has_an_approximate_index_and_codes_have_none(build: Callable[..., Index], bert: Embedder) -> None:
    made = build("float16", ann=True).description.approximation
    assert made is not None
    assert made.recall > 0.9
    with pytest.raises(ConfigurationError, match=r"--ann: an approximate index is made of numbers.*int8 codes; keep them in float16"):
        build("int8", ann=True)
    index = build("binary")
    with pytest.raises(ConfigurationError, match="kept as binary codes"):
        index.update(bert, PASSAGES, halt=FixedSteps(2), ann=True)


@pytest.mark.usefixtures("untyped_caller")
def test_what_an_index_cannot_keep_is_refused(bert: Embedder, folder_of: Callable[[str], Path], tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="precision='uint8': an index keeps float32, float16, int8, binary; choose one"):
        Stored.of(bert.form("uint8"), ann=False)
    with pytest.raises(ConfigurationError, match=r"the model has no ranges.*genembed calibrate-ranges MODEL texts\.txt"):
        Index.build(tmp_path / "x", bert, PASSAGES, form=load(folder_of("bert")).form("int8"))
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("untyped_caller")
def test_a_description_whose_form_cannot_be_is_damage(build: Callable[..., Index], tmp_path: Path) -> None:
    index = build("int8")
    file = index.folder / "genembed-index.json"
    made = json.loads(file.read_text())
    for wrong in ({"precision": "int4"}, {**made["stored"], "scale": 1}, "int8"):
        file.write_text(json.dumps({**made, "stored": wrong}))
        with pytest.raises(CheckpointError, match="the index is damaged"):
            Index.open(index.folder)


def test_an_index_of_before_forms_were_noted_is_one_of_float32(bert: Embedder, tmp_path: Path) -> None:
    index = Index.build(tmp_path / "x", bert, PASSAGES[:3], halt=FixedSteps(1))
    file = index.folder / "genembed-index.json"
    made = json.loads(file.read_text())
    del made["stored"]
    file.write_text(json.dumps(made))
    assert Index.open(index.folder).description == index.description
    assert index.description.stored == Stored()


def test_the_command_keeps_what_is_asked_for_and_says_so(folder: Path, tmp_path: Path, run: Run) -> None:
    (tmp_path / "texts.txt").write_text("\n".join(TEXTS) + "\n")
    index = ("index", tmp_path / "texts.txt", "-o", tmp_path / "x", "-m", folder, "--steps", 1)
    made = run(*index, "--precision", "int8", "--dims", CUT)
    assert "40 passages of 16 dimensions in int8, 1.00 steps" in made.out
    hit = json.loads(run("search", tmp_path / "x", TEXTS[3], "-k", 1, "--steps", 1, "--json").out)["hits"][0]
    assert hit["text"] == TEXTS[3]
    assert hit["score"] > 0.95
    said = json.loads(run(*index, "--update", "--precision", "int8", "--json").out)
    assert said["unchanged"] == 40
    assert said["stored"] == {"precision": "int8", "dimensions": CUT}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--update", "--precision", "binary"], "keeps int8; leave it out"),
        (["--update", "--dims", "16"], "keeps 32; leave it out"),
        (["--overwrite", "--precision", "int8", "--ann"], "keep them in float16"),
        (["--overwrite", "--dims", "12"], "truncate_dim=12: this model was trained to give 16, 32"),
    ],
)
def test_the_command_refuses_a_form_that_does_not_fit(
    folder: Path, tmp_path: Path, run: Run, build: Callable[..., Index], options: list[str], message: str
) -> None:
    build("int8")
    (tmp_path / "texts.txt").write_text("a text")
    refused(run("index", tmp_path / "texts.txt", "-o", tmp_path / "x", "-m", folder, "--steps", 2, *options), message)
    refused(run("index", "-o", tmp_path / "x", "--delete", "year = 1", "--precision", "int8"), "leave paths and other options out")


def test_a_stored_form_is_that_of_the_model_when_it_was_built() -> None:
    ranges = Ranges(np.float32([-0.5, -0.25]), np.float32([0.5, 0.125]))
    form = OutputForm(precision="int8", dimensions=2, ranges=ranges)
    stored = Stored.of(form, ann=False)
    assert stored.form is not None
    assert stored.form.ranges is not None
    np.testing.assert_array_equal(stored.form.ranges.maximum, ranges.maximum)
    assert Stored.of(None, ann=True)(np.ones((2, 3), np.float32)).dtype == np.float32

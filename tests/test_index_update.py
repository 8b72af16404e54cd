"""Updates of an index: what is embedded again, what is kept, what a killed or failed one leaves."""

from __future__ import annotations

import errno
import json
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import genembed.index
from genembed import ConfigurationError, Embedder, FixedSteps, GenembedWarning, InputError, load
from genembed.index import Changes, Index, Passage, fingerprint, passages_hash, read_passages
from genembed.index.plan import plan_update
from test_cli import Run, run
from test_index import close_folder

__all__ = ["run"]  # the fixture

RULE = FixedSteps(2)


def passage(text: str, line: int = 1, path: str = "a.md", **metadata: Any) -> Passage:
    return Passage(text, f"{path}:{line}", text, path, path.rpartition(".")[2], metadata)


BEFORE = [passage("a stitch in time", 1), passage("business trips", 3), passage("fasting glucose", 1, "b.md")]


@pytest.fixture(scope="module")
def bert(folder_of: Callable[[str], Path]) -> Embedder:
    return load(folder_of("bert"))


@pytest.fixture
def index(bert: Embedder, tmp_path: Path) -> Index:
    return Index.build(tmp_path / "x", bert, BEFORE, halt=RULE)


@pytest.fixture
def embedded(bert: Embedder, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return the texts that are embedded from here on."""
    texts: list[str] = []
    refine = bert.refine

    def noting(given: Sequence[str], **options: Any) -> Any:
        texts.extend(given)
        return refine(given, **options)

    monkeypatch.setattr(bert, "refine", noting)
    return texts


def references(index: Index) -> dict[str, str]:
    return {hit.reference: hit.text for hit in index.search(np.ones(32, np.float32), k=100)}


def change(*, embedded: int = 0, copied: int = 0, moved: int = 0, removed: int = 0, unchanged: int = 0) -> Changes:
    return Changes(embedded=embedded, copied=copied, moved=moved, removed=removed, unchanged=unchanged)


def test_only_new_texts_are_embedded_and_nothing_is_removed_unless_that_is_said(index: Index, bert: Embedder, embedded: list[str]) -> None:
    done = index.update(bert, [BEFORE[0], passage("the language of models", 5)], halt=RULE)
    assert done == change(embedded=1, unchanged=1)
    assert embedded == ["the language of models"]
    assert references(index) == {p.reference: p.text for p in [*BEFORE, passage("the language of models", 5)]}
    assert len(index) == len(Index.open(index.folder)) == 4


def test_an_updated_index_is_the_one_that_would_have_been_built(index: Index, bert: Embedder, tmp_path: Path) -> None:
    after = [passage("the language of models", 1), passage("a stitch in time", 3), BEFORE[2]]
    index.update(bert, after, prune=["a.md", "b.md"], halt=RULE)
    built = Index.build(tmp_path / "y", bert, after, halt=RULE)
    query = bert.encode("language")
    assert {(hit.reference, hit.text, round(hit.score, 4)) for hit in Index.open(index.folder).search(query)} == {
        (hit.reference, hit.text, round(hit.score, 4)) for hit in built.search(query)
    }
    assert [hit.reference for hit in index.search_lexical("models")] == ["a.md:1"]
    assert (index.description.steps, index.description.rows) == (built.description.steps, built.description.rows)


def test_a_passage_that_moved_keeps_its_vector_and_one_text_at_two_places_is_two_rows(
    index: Index, bert: Embedder, embedded: list[str]
) -> None:
    moved = [passage("a stitch in time", 7), passage("business trips", 3), passage("business trips", 1, "c.md")]
    assert index.update(bert, moved, halt=RULE) == change(moved=1, copied=1, unchanged=1)
    assert embedded == []
    assert set(references(index)) == {"a.md:7", "a.md:3", "b.md:1", "c.md:1"}
    scores = {hit.reference: hit.score for hit in index.search(bert.encode("business trips", halt=RULE))}
    np.testing.assert_allclose([scores["a.md:3"], scores["c.md:1"]], 1.0, atol=1e-5)


def test_an_update_without_news_writes_nothing(index: Index, bert: Embedder) -> None:
    def files() -> dict[Path, int]:
        found = (path for path in index.folder.rglob("*") if path.is_file())
        return {path: path.stat().st_mtime_ns for path in found if path.name != "changing.lock"}  # some versions of filelock leave it

    before = files()
    assert index.update(bert, BEFORE, prune=["a.md", "b.md"], halt=RULE) == change(unchanged=3)
    assert files() == before


def test_prune_removes_only_what_lies_below_the_named_paths(bert: Embedder, tmp_path: Path) -> None:
    rows = [passage(text, path=path) for text, path in zip("abcde", ["n/a.md", "n/sub/b.md", "nn/c.md", "../n/d.md", ""], strict=True)]
    index = Index.build(tmp_path / "x", bert, rows, halt=RULE)
    assert index.update(bert, [], prune=["n"], halt=RULE) == change(removed=2)
    assert set(references(index).values()) == {"c", "d", "e"}
    assert index.update(bert, [], prune=["."], halt=RULE) == change(removed=1)
    assert set(references(index).values()) == {"d", "e"}


def test_texts_of_stdin_are_pruned_by_its_sign_alone() -> None:
    stored = {"content_hash": ["x"], "path": ["stdin"], "reference": ["stdin:1"], "summary": ["x"], "kind": ["txt"], "_rowid": [4]}
    assert plan_update(stored, [], metadata=[], prune=["."]).gone == []
    assert plan_update(stored, [], metadata=[], prune=["-"]).gone == [4]


def test_metadata_that_is_not_read_again_stays_and_what_is_read_replaces_it(bert: Embedder, tmp_path: Path) -> None:
    rows = [passage("old", 1, "a.jsonl", year=2018), passage("new", 2, "a.jsonl", year=2021)]
    index = Index.build(tmp_path / "x", bert, rows, halt=RULE)
    assert index.description.metadata == {"year": "int64"}
    bare = [passage("old", 5, "a.jsonl"), passage("new", 2, "a.jsonl")]
    assert index.update(bert, bare, halt=RULE) == change(moved=1, unchanged=1)
    years = {hit.reference: hit.metadata for hit in index.search(np.ones(32, np.float32))}
    assert years == {"a.jsonl:5": {"year": 2018}, "a.jsonl:2": {"year": 2021}}
    assert index.update(bert, [passage("new", 2, "a.jsonl", year=2022)], halt=RULE) == change(moved=1)
    assert [hit.text for hit in index.search(np.ones(32, np.float32), where="year > 2021")] == ["new"]


def test_deleted_texts_are_gone_from_every_search(index: Index) -> None:
    assert index.delete("path = 'a.md' AND text LIKE '%trips'") == 1
    again = Index.open(index.folder)
    for opened in (index, again):
        assert set(references(opened)) == {"a.md:1", "b.md:1"}
        assert opened.search_lexical("trips") == []
        assert len(opened) == 2
    assert again.description.passages == passages_hash([BEFORE[0], BEFORE[2]])
    assert index.delete("path = 'nowhere'") == 0
    with pytest.raises(ConfigurationError, match=r"filter 'nope = 1': .*No field named nope.*; write it as a condition of SQL"):
        index.delete("nope = 1")


def test_an_update_that_is_killed_before_its_last_instant_leaves_the_old_index(
    index: Index, bert: Embedder, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, query = index.description, bert.encode("trips")
    hits = index.search(query)

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(genembed.index, "write_description", killed)
        for change_it in (lambda: index.update(bert, [passage("x", 9)], prune=["a.md"], halt=RULE), lambda: index.delete("true")):
            with pytest.raises(KeyboardInterrupt):
                change_it()
    again = Index.open(index.folder)
    assert again.description == old
    assert again.search(query) == hits
    assert [hit.reference for hit in again.search_lexical("trips")] == ["a.md:3"]
    assert again.update(bert, [passage("x", 9)], halt=RULE) == change(embedded=1)
    assert len(references(Index.open(index.folder))) == 4


def test_an_update_of_a_bad_text_changes_nothing(index: Index, bert: Embedder) -> None:
    with pytest.raises(InputError, match=r"a\.md:9: row 0: .* lone surrogate"):
        index.update(bert, [passage("\ud800", 9)], prune=["a.md"], halt=RULE)
    assert len(references(Index.open(index.folder))) == 3


def test_an_update_by_another_model_or_another_rule_is_refused(index: Index, bert: Embedder, folder_of: Callable[[str], Path]) -> None:
    with pytest.raises(ConfigurationError, match="made by the model"):
        index.update(load(folder_of("qwen2")), BEFORE, halt=RULE)
    with pytest.raises(ConfigurationError, match=r"refined under FixedSteps\(steps=2\), and FixedSteps\(steps=3\) gives others"):
        index.update(bert, BEFORE, halt=FixedSteps(3))


def test_an_update_embeds_under_the_instruction_of_the_others(bert: Embedder, tmp_path: Path) -> None:
    index = Index.build(tmp_path / "x", bert, BEFORE, instruction="Classify", halt=RULE)
    index.update(bert, [passage("the language of models", 5)], halt=RULE)
    same = bert.encode("the language of models", instruction="Classify", halt=RULE)
    assert index.search(same, k=1)[0].score == pytest.approx(1.0, abs=1e-5)


def test_two_who_change_the_same_index_do_not_undo_each_other(index: Index, bert: Embedder) -> None:
    other = Index.open(index.folder)
    other.delete("path = 'b.md'")
    for change_it in (lambda: index.update(bert, [passage("x", 9)], halt=RULE), lambda: index.delete("true")):
        with pytest.raises(ConfigurationError, match="somebody else has changed the index"):
            change_it()
    assert set(references(Index.open(index.folder))) == {"a.md:1", "a.md:3"}


def test_an_index_that_is_being_changed_is_not_changed_by_somebody_else(index: Index, bert: Embedder) -> None:
    other = Index.open(index.folder)
    with genembed.index.tables.alone(index.folder):
        for change_it in (lambda: other.update(bert, [passage("x", 9)], halt=RULE), lambda: other.delete("true")):
            with pytest.raises(ConfigurationError, match="somebody else is changing the index; nothing was done"):
                change_it()
        assert len(other.search(bert.encode("trips"))) == 3
    assert other.delete("path = 'b.md'") == 1


def test_an_index_that_is_being_changed_is_not_replaced_and_one_that_is_being_replaced_is_not_changed(
    index: Index, bert: Embedder, monkeypatch: pytest.MonkeyPatch
) -> None:
    other, refused = Index.open(index.folder), []
    with genembed.index.tables.alone(index.folder):
        with pytest.raises(ConfigurationError, match="somebody else is changing the index; nothing was done"):
            Index.build(index.folder, bert, BEFORE[:1], halt=RULE, overwrite=True)
        assert [path.name for path in index.folder.parent.iterdir()] == ["x"]
    write = genembed.index.description.write_description

    def trying(*arguments: Any) -> None:
        for change_it in (lambda: other.update(bert, [passage("x", 9)], halt=RULE), lambda: other.delete("true")):
            with pytest.raises(ConfigurationError, match="somebody else is changing the index") as error:
                change_it()
            refused.append(error)
        write(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(genembed.index, "write_description", trying)
        new = Index.build(index.folder, bert, BEFORE[:1], halt=RULE, overwrite=True)
    assert len(refused) == 2
    with pytest.raises(ConfigurationError, match="somebody else has changed the index meanwhile"):
        other.delete("true")
    assert new.update(bert, [passage("x", 9)], halt=RULE) == change(embedded=1)


def test_an_update_writes_nothing_into_an_index_that_was_made_anew_meanwhile(
    index: Index, bert: Embedder, monkeypatch: pytest.MonkeyPatch
) -> None:
    refine, versions = bert.refine, list[int]()

    def replacing(given: Sequence[str], **options: Any) -> Any:
        with monkeypatch.context() as patch:
            patch.setattr(bert, "refine", refine)
            shutil.rmtree(index.folder)  # by hand, past every lock
            versions.append(Index.build(index.folder, bert, BEFORE[:1], halt=RULE)._table.version)
        return refine(given, **options)

    monkeypatch.setattr(bert, "refine", replacing)
    with pytest.raises(ConfigurationError, match="somebody else has changed the index meanwhile"):
        index.update(bert, [passage("x", 9)], prune=["a.md"], halt=RULE)
    assert [genembed.index.tables.open_table(index.folder, None).version] == versions
    assert set(references(Index.open(index.folder))) == {"a.md:1"}


_WRITER = """
import itertools, sys
from genembed import FixedSteps, load
from genembed.index import Index, Passage

model, folder, first = sys.argv[1:]
embedder, index = load(model), Index.open(folder)
for number in itertools.count(int(first)):
    index.update(embedder, [Passage(f"text {number}", f"w.md:{number}", "", "w.md", "md", {})], halt=FixedSteps(2))
    print(number, flush=True)
"""


@pytest.mark.slow
def test_what_a_killed_writer_has_said_is_done_is_there_and_nothing_half_done(
    index: Index, bert: Embedder, folder_of: Callable[[str], Path]
) -> None:
    said, rng = -1, random.Random(0)
    for _ in range(4):
        command = [sys.executable, "-c", _WRITER, str(folder_of("bert")), str(index.folder), str(said + 1)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as writer:
            assert writer.stdout is not None
            for _ in range(3):
                said = int(writer.stdout.readline())
            time.sleep(rng.random() / 5)
            writer.kill()
            said = max([said, *map(int, writer.stdout.read().split())])
        kept = Index.open(index.folder)
        written = {name for name in references(kept) if name.startswith("w.md")}
        # The one it was at may have been finished without being said.
        assert written in ({f"w.md:{n}" for n in range(said + 1)}, {f"w.md:{n}" for n in range(said + 2)})
        assert kept.search(bert.encode(f"text {said}", halt=RULE), k=1)[0].reference == f"w.md:{said}"
        said = len(written) - 1
    assert Index.open(index.folder).update(bert, [passage("x", 9)], halt=RULE) == change(embedded=1)


def test_an_index_of_before_hashes_were_kept_still_answers_and_asks_to_be_built_again(index: Index, bert: Embedder) -> None:
    table = genembed.index.tables.writable_table(index.folder, None)
    table.drop_columns(["content_hash", "path", "kind"])
    file = index.folder / "genembed-index.json"
    known = json.loads(file.read_text())
    file.write_text(json.dumps({name: value for name, value in known.items() if name not in ("version", "metadata", "approximation")}))
    old = Index.open(index.folder)
    assert references(old) == {p.reference: p.text for p in BEFORE}
    assert [hit.path for hit in old.search_lexical("trips")] == [""]
    for change_it in (lambda: old.update(bert, BEFORE, halt=RULE), lambda: old.delete("true")):
        with pytest.raises(ConfigurationError, match="made before indexes could be changed; build it again"):
            change_it()


def test_columns_that_the_index_does_not_have_are_refused(bert: Embedder, tmp_path: Path) -> None:
    index = Index.build(tmp_path / "x", bert, [passage("a", year=1)], halt=RULE)
    with pytest.raises(ConfigurationError, match=r"no column venue; it keeps those it was built with \(year\)"):
        index.update(bert, [passage("b", 2, venue="x")], halt=RULE)
    with pytest.raises(InputError, match=r"column 'year' of the metadata does not hold values of one type \(int64\)"):
        index.update(bert, [passage("b", 2, year="x")], halt=RULE)
    with pytest.raises(InputError, match=r"column 'year' of the metadata"):
        Index.build(tmp_path / "y", bert, [passage("a", year=1), passage("b", year="x")], halt=RULE)


def test_what_cannot_be_read_now_is_not_pruned(bert: Embedder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    notes = tmp_path / "notes"
    for name in ("encoding.md", "syntax.py", "denied.md", "gone.md", "fine.md", "sub/below.md", "sub/deep/er.md", "subway/gone.md"):
        (notes / name).parent.mkdir(parents=True, exist_ok=True)
        (notes / name).write_text(f'def f():\n    "{name}"\n' if name.endswith(".py") else f"{name}\n")
    index = Index.build(tmp_path / "x", bert, list(read_passages([notes])), halt=RULE)
    (notes / "encoding.md").write_bytes(b"caf\xe9")
    (notes / "syntax.py").write_text("def f(:")
    (notes / "gone.md").unlink()
    (notes / "subway" / "gone.md").unlink()
    close_folder(monkeypatch, notes / "sub")
    read = Path.read_bytes

    def denying(path: Path) -> bytes:
        if path.name == "denied.md":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", denying)
    unread: list[str] = []
    with pytest.warns(GenembedWarning, match=r"3 of 4 files below|1 folders below"):
        passages = list(read_passages([notes], unread=unread))
    with pytest.warns(GenembedWarning, match="5 passages stay and are not pruned, as their files or folders could not be read now; make"):
        assert index.update(bert, passages, prune=[notes], unread=unread, halt=RULE) == change(removed=2, unchanged=1)
    left = {Path(hit.path).relative_to(notes).as_posix() for hit in index.search(np.ones(32, np.float32), k=100)}
    assert left == {"encoding.md", "syntax.py", "denied.md", "fine.md", "sub/below.md", "sub/deep/er.md"}


def test_the_command_does_not_prune_what_it_could_not_read(
    folder_of: Callable[[str], Path], tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("notes").mkdir()
    for name in "abc":
        Path("notes", f"{name}.md").write_text(f"{name}.\n")
    assert run("index", "notes", "-o", "x", "-m", folder_of("bert")).code == 0
    Path("notes", "a.md").write_bytes(b"\xe9")
    Path("notes", "b.md").unlink()
    done = run("index", "notes", "-o", "x", "--update", "--prune")
    assert "1 removed, 1 as they were; 2 now" in done.out
    assert "1 passages stay and are not pruned" in done.err
    assert set(references(Index.open("x"))) == {"notes/a.md:1", "notes/c.md:1"}


def test_files_that_change_on_disk_are_followed(bert: Embedder, tmp_path: Path, embedded: list[str]) -> None:
    notes = tmp_path / "notes"
    notes.mkdir()
    (notes / "a.md").write_text("One.\n")
    (notes / "b.md").write_text("Two.\n")
    index = Index.build(tmp_path / "x", bert, list(read_passages([notes])), halt=RULE)
    shutil.move(notes / "b.md", notes / "c.md")
    (notes / "a.md").write_text("\n\nOne.\n")
    (notes / "d.md").write_text("Three.\n")
    embedded.clear()
    done = index.update(bert, list(read_passages([notes])), prune=[notes], halt=RULE)
    assert done == change(embedded=1, copied=1, moved=1, removed=1)
    assert embedded == ["Three."]
    assert references(index) == {f"{notes}/a.md:3": "One.", f"{notes}/c.md:1": "Two.", f"{notes}/d.md:1": "Three."}
    assert index.description.fingerprint == fingerprint(bert)

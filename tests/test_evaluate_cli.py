"""`genembed evaluate`: what it prints and keeps, and that a mistake ends in one line."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from genembed import cli

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    def call(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            cli.main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        # On a busy machine a progress bar may have come and gone; each of its states begins with a carriage return.
        return int(stopped.value.code or 0), captured.out, captured.err.rpartition("\r")[2]

    return call


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    path = tmp_path / "pairs.jsonl"
    rows = [("a wing", "a plane", 4.0), ("a trip", "glucose", 0.5), ("a claim", "the claim", 5.0), ("stable", "language", 1.0)]
    lines = [{"sentence1": first, "sentence2": second, "score": score, "split": "test"} for first, second, score in rows]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture
def model(folder_of: Callable[[str], Path]) -> Path:
    return folder_of("bert")


def test_a_set_is_scored_kept_and_compared(run: Run, model: Path, pairs: Path, tmp_path: Path) -> None:
    def scored(steps: int) -> Any:
        code, out, err = run("evaluate", model, "--local", pairs, "--bare", "--steps", steps, "-o", tmp_path / "runs", "--json")
        assert code == 0, err
        return json.loads(out)

    first, second = scored(1), scored(2)
    [score] = first["scores"]
    assert (score["task"], score["kind"], score["mean_steps"], score["stored"]) == ("pairs", "STS", 1.0, False)
    assert first["means"] == {"STS": score["score"], "all": score["score"]}
    assert json.loads((Path(first["results"]) / "pairs.json").read_text())["scores"]["test"][0]["main_score"] == score["score"]
    assert scored(1)["scores"][0]["stored"]
    code, out, _ = run("evaluate", "--compare", first["results"], second["results"], "--json")
    [difference] = json.loads(out)["differences"]
    assert (code, difference["items"], difference["first"]) == (0, 4, pytest.approx(score["score"], abs=1e-6))
    code, out, _ = run("evaluate", "--compare", first["results"], second["results"])
    assert (code, "pairs" in out, "95 %, paired" in out) == (0, True, True)


def test_the_table_has_scores_steps_and_where_the_results_are(run: Run, model: Path, pairs: Path, tmp_path: Path) -> None:
    (tmp_path / "again.jsonl").write_bytes(pairs.read_bytes())
    code, out, err = run(
        "evaluate", model, "--local", pairs, "--local", tmp_path / "again.jsonl", "--bare", "--steps", 1, "-o", tmp_path / "r"
    )
    assert (code, err) == (0, "")
    lines = [line.split() for line in out.splitlines() if line.strip()]
    assert lines[0] == ["task", "type", "score", "%", "mean", "k*", "texts", "s"]
    assert [line[:3] for line in lines[2:4]] == [["pairs", "STS", "cosine_spearman"], ["again", "STS", "cosine_spearman"]]
    assert lines[2][4:6] == ["1.00", "8"]
    assert lines[2][3] == lines[3][3] == lines[-2][-1]
    assert lines[-1][0] == "results:"


def test_aspects_end_in_their_harmonic_mean(run: Run, model: Path, tmp_path: Path) -> None:
    file = tmp_path / "tweets.jsonl"
    file.write_text("".join(json.dumps({"text": f"text {n}", "label": "ab"[n % 2], "stance": "xyz"[n % 3]}) + "\n" for n in range(30)))
    options = ["--aspect", "label=Say the topic.", "--aspect", "stance=Say the stance.", "--steps", 1, "-o", tmp_path / "runs", "--json"]
    code, out, err = run("evaluate", model, "--local", file, *options)
    assert code == 0, err
    first, second = (score["score"] for score in json.loads(out)["scores"])
    assert json.loads(out)["harmonic_mean"] == pytest.approx(2 * first * second / (first + second))


def test_a_language_model_expands_the_texts_of_a_model_of_a_peer_and_of_aspects(
    run: Run, model: Path, folder_of: Callable[[str], Path], pairs: Path, tmp_path: Path
) -> None:
    expand = ["--expand-with", folder_of("qwen2"), "--expand-tokens", 2, "-o", tmp_path / "runs", "--json"]

    def scored(*arguments: object) -> tuple[Any, dict[str, Any]]:
        code, out, err = run("evaluate", *arguments, *expand)
        assert code == 0, err
        found = json.loads(out)
        return found, json.loads((Path(found["results"]) / "work.jsonl").read_text()) if "results" in found else {}

    told = ["--local", pairs, "--instruction", "Say it.", "--steps", 1]
    first, work = scored(model, *told)
    assert (work["texts"], work["generated_texts"], work["reused_texts"]) == (8, 8, 0)
    assert 8 <= work["generated_tokens"] <= 16
    [file] = (tmp_path / "runs" / "expansions").iterdir()
    assert len(file.read_text().splitlines()) == 8
    assert scored(model, *told)[0]["scores"][0]["stored"]
    # The language model is told the same; beside --bare the embedder is told nothing.
    bare, work = scored(model, *told, "--bare")
    assert (work["generated_texts"], work["reused_texts"], bare["results"] == first["results"]) == (0, 8, False)
    rows = {"corpus": ["a wing", "a plane"], "queries": ["wing"]}
    (tmp_path / "set").mkdir()
    for name, texts in rows.items():
        lines = [json.dumps({"_id": f"{name}{number}", "text": text}) + "\n" for number, text in enumerate(texts)]
        (tmp_path / "set" / f"{name}.jsonl").write_text("".join(lines))
    (tmp_path / "set" / "qrels.tsv").write_text("query-id\tcorpus-id\tscore\nqueries0\tcorpus0\t1\n")
    peer, work = scored("--peer", "bm25", "--local", tmp_path / "set", "--instruction", "Say it.")
    assert ("genembed__bm25" in peer["results"], work["generated_texts"], work["reused_texts"]) == (True, 1, 2)
    (tmp_path / "tweets.jsonl").write_text(
        "".join(json.dumps({"text": f"text {n}", "label": "ab"[n % 2], "stance": "xyz"[n % 3]}) + "\n" for n in range(12))
    )
    aspects = ["--aspect", "label=Say the topic.", "--aspect", "stance=Say the stance.", "--steps", 1]
    assert 0 <= scored(model, "--local", tmp_path / "tweets.jsonl", *aspects)[0]["harmonic_mean"] <= 1
    assert len(file.read_text().splitlines()) == 9 + 2 * 12


MISTAKES: list[tuple[str, list[str]]] = [
    ("MODEL", ["there is nothing to evaluate; give --benchmark, --task or --local"]),
    ("--local PAIRS", ["one model is evaluated: give MODEL"]),
    ("MODEL --peer bm25 --local PAIRS", ["one model is evaluated"]),
    ("MODEL --local PAIRS", ["pairs: the paper's tables have no instruction for this task", "--bare"]),
    ("MODEL --local PAIRS --bare --instruction Say", ["--instruction 'Say' and --bare"]),
    ("MODEL --local PAIRS --task STS12", ["--task and --local both say what is evaluated"]),
    ("MODEL --task STS99", ["--task STS99: mteb"]),
    ("MODEL --task STS12 --split dev", ["--split is for sets on disk"]),
    ("MODEL --local PAIRS --local PAIRS --bare", ["two sets are called 'pairs'"]),
    ("MODEL --local absent --bare", ["absent: no such file or folder"]),
    ("MODEL --local PAIRS --kind clustering --bare", ["pairs.jsonl, line 1: clustering needs a string as text, not null"]),
    ("MODEL --local PAIRS --bare -o PAIRS", ["is a file; results are kept in a folder"]),
    ("MODEL --local PAIRS --aspect a=b --aspect c=d --bare", ["--aspect brings its own instructions"]),
    ("MODEL --local PAIRS --aspect a=b", ["one aspect is an ordinary clustering"]),
    ("MODEL --local PAIRS --bare --steps 1 --threshold 0.9", ["--steps 1 and --threshold 0.9 both say when to stop"]),
    ("--peer bm25 --steps 3 --local PAIRS", ["--peer bm25: brings its own prompts and does not refine"]),
    ("--peer bm25 --local PAIRS", ["pairs: BM25 has no vectors"]),
    ("--peer word2vec --local PAIRS", ["--peer word2vec: choose one of"]),
    ("MODEL --local PAIRS --bare --expand-tokens 9", ["--expand-tokens 9 has no effect without --expand-with"]),
    ("MODEL --local PAIRS --bare --expand-with LM --expand-tokens 0", ["--expand-tokens 0: at least one token is needed"]),
    ("MODEL --local PAIRS --bare --expand-with LM", ["pairs: the paper's tables have no instruction for this task", "--expand-with needs"]),
    ("MODEL --local PAIRS --bare --expand-with absent", ["--expand-with 'absent' is neither a folder, nor a hub id"]),
    ("MODEL --local PAIRS --bare --expand-with MODEL", ["is an encoder (bert), which cannot write"]),
    ("--peer bm25 --steps 3 --local PAIRS --expand-with LM", ["--peer bm25: brings its own prompts and does not refine"]),
    ("--compare a b --expand-with LM", ["--compare reads two runs that are there"]),
    ("MODEL --compare a b", ["--compare reads two runs that are there"]),
    ("--compare a b", ["a: holds no scores of single items"]),
]


@pytest.mark.parametrize(("line", "fragments"), MISTAKES, ids=[line for line, _ in MISTAKES])
def test_a_mistake_ends_in_one_line_and_exit_code_2(
    run: Run,
    model: Path,
    folder_of: Callable[[str], Path],
    pairs: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    line: str,
    fragments: Sequence[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    files = {"MODEL": model, "PAIRS": pairs, "LM": folder_of("qwen2")}
    code, out, err = run("evaluate", *(files.get(word, word) for word in line.split()))
    assert (code, out) == (2, "")
    assert err.count("\n") == 1, err
    assert [fragment for fragment in fragments if fragment not in err] == [], err
    assert [path.name for path in tmp_path.iterdir()] == ["pairs.jsonl"]

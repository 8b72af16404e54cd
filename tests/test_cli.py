"""The command line: what it prints, and that every mistake of a user ends in one line and exit code 2."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pyarrow import parquet

import doubles
import genembed
from genembed import ConvergeStop, FixedSteps, NonFiniteError, OutOfMemoryError, cli
from genembed.cli.embedding import _adapter_parameters
from genembed.docstrings import docstrings
from genembed.engine import Engine
from genembed.index import demo

HALT = ConvergeStop(threshold=0.95, max_steps=6)
VERBS = (
    "demo",
    "embed",
    "index",
    "search",
    "serve",
    "info",
    "mine",
    "train",
    "calibrate",
    "analyse",
    "evaluate",
    "tokens",
    "cost",
    "convert",
)


@dataclass
class Outcome:
    """What a command left behind."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        assert self.code == 0, self.err
        return json.loads(self.out)


Run = Callable[..., Outcome]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    def call(*arguments: object) -> Outcome:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            cli.main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        # On a busy machine a progress bar may have come and gone; each of its states begins with a carriage return.
        return Outcome(int(stopped.value.code or 0), captured.out, captured.err.rpartition("\r")[2])

    return call


@pytest.fixture(scope="module")
def model(folder_of: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The encoder double with a halting rule: it embeds any text, the empty one too."""
    folder = shutil.copytree(folder_of("bert"), tmp_path_factory.mktemp("cli") / "bert")
    settings = json.loads((folder / "genembed.json").read_text())
    settings["halt"] = {"rule": "ConvergeStop", "threshold": HALT.threshold, "max_steps": HALT.max_steps}
    (folder / "genembed.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("texts") / "texts.txt"
    path.write_text("business trips\nfasting glucose\nthe language of models\n")
    return path


@pytest.fixture(scope="module")
def searchable(model: Path, texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("searchable") / "index"
    with pytest.raises(SystemExit) as stopped:
        cli.main(["index", str(texts), "-o", str(folder), "-m", str(model)])
    assert stopped.value.code == 0
    return folder


def refused(outcome: Outcome, *fragments: str) -> None:
    """Assert that a command ended in exit code 2 and one line on stderr with these parts."""
    assert (outcome.code, outcome.out) == (2, ""), outcome
    assert outcome.err.startswith("genembed: ")
    assert outcome.err.count("\n") == 1
    for fragment in fragments:
        assert fragment in outcome.err


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=False)


def test_help_takes_less_than_half_a_second_and_needs_no_torch() -> None:
    seconds = []
    for _ in range(3):
        begin = time.perf_counter()
        shown = python("-c", "from genembed.cli import main; main(['--help'])")
        seconds.append(time.perf_counter() - begin)
    assert (shown.returncode, shown.stderr) == (0, "")
    listed = shown.stdout.partition("Commands:\n")[2].splitlines()
    assert tuple(line.split()[0] for line in listed) == VERBS
    assert min(seconds) < 0.5
    light = python(
        "-c", "import sys, genembed.cli; print([name for name in ('torch', 'transformers', 'numpy', 'rich') if name in sys.modules])"
    )
    assert light.stdout == "[]\n"


def test_every_command_has_help_and_no_command_shows_it_too(run: Run) -> None:
    for verb in VERBS:
        outcome = run(verb, "--help")
        assert (outcome.code, outcome.err) == (0, "")
        assert f"Usage: genembed {verb} " in outcome.out
        assert ("--json" in outcome.out) == (verb != "serve"), "a server prints no result"
    assert run().out == run("--help").out


def test_version_is_the_package_version(run: Run) -> None:
    assert run("--version").out == f"genembed {genembed.__version__}\n"


def test_without_typer_the_message_has_the_command_that_installs_it() -> None:
    shown = python("-c", "import sys; sys.modules['typer'] = None; import genembed.cli")
    assert (shown.returncode, shown.stdout) == (2, "")
    assert shown.stderr == "genembed: typer is not installed: this needs the extra 'cli'. Install it with: pip install 'genembed[cli]'\n"


def test_embed_writes_what_the_library_returns(run: Run, model: Path, texts: Path, tmp_path: Path) -> None:
    expected = genembed.load(model).refine(texts.read_text().splitlines())
    outcome = run("embed", texts, "-o", tmp_path / "v.npy", "-m", model)
    assert (outcome.code, outcome.err) == (0, "")
    assert outcome.out.startswith(f"{tmp_path / 'v.npy'}: 3 vectors of 32 dimensions, {expected.steps.mean():.2f} steps on average, ")
    np.testing.assert_allclose(np.load(tmp_path / "v.npy"), expected.vectors, atol=1e-6)
    assert run("embed", texts, "-o", tmp_path / "v.parquet", "-m", model).code == 0
    table = parquet.read_table(tmp_path / "v.parquet").to_pydict()
    np.testing.assert_array_equal(np.array(table["vector"], np.float32), np.load(tmp_path / "v.npy"))
    assert (table["id"], table["steps"]) == (["0", "1", "2"], expected.steps.tolist())


def test_embed_writes_json_lines_to_stdout(run: Run, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b'{"text": "business trips", "key": "b"}\n')))
    outcome = run("embed", "-", "-o", "-", "-m", model, "--id-column", "key", "--steps", 2)
    row = outcome.json
    assert (row["id"], row["steps"], row["truncated"], outcome.err) == ("b", 2, False, "")
    np.testing.assert_allclose(row["vector"], genembed.load(model).encode("business trips", steps=2), atol=1e-6)


@pytest.mark.parametrize(
    ("options", "halt"),
    [
        ([], HALT),
        (["--steps", 4], FixedSteps(4)),
        (["--threshold", 0.5], ConvergeStop(threshold=0.5, max_steps=6)),
        (["--threshold", 2], ConvergeStop(threshold=2.0, max_steps=6)),
    ],
)
def test_steps_and_threshold_choose_the_halting_rule(
    run: Run, model: Path, texts: Path, tmp_path: Path, options: list[object], halt: FixedSteps | ConvergeStop
) -> None:
    summary = run("embed", texts, "-o", tmp_path / "v.npy", "-m", model, "--json", *options).json
    expected = genembed.load(model).refine(texts.read_text().splitlines(), halt=halt)
    assert (summary["halt"], summary["mean_steps"]) == (repr(halt), expected.steps.mean())
    assert (summary["texts"], summary["dimensions"], summary["truncated"]) == (3, 32, 0)


def test_the_instruction_reaches_the_model(run: Run, model: Path, texts: Path, tmp_path: Path) -> None:
    assert run("embed", texts, "-o", tmp_path / "v.npy", "-m", model, "--instruction", "Classify", "--dtype", "float64").code == 0
    expected = genembed.load(model, dtype="float64").encode(texts.read_text().splitlines(), instruction="Classify")
    np.testing.assert_array_equal(np.load(tmp_path / "v.npy"), expected)


def test_parallel_passes_reach_the_model_and_do_not_ask_for_another_index(run: Run, model: Path, texts: Path, tmp_path: Path) -> None:
    lines = texts.read_text().splitlines()
    assert run("embed", texts, "-o", tmp_path / "v.npy", "-m", model, "--parallel-passes", 1).code == 0
    found, exact = np.load(tmp_path / "v.npy"), genembed.load(model).encode(lines)
    np.testing.assert_array_equal(found, genembed.load(model, parallel_passes=1).encode(lines))
    assert np.abs(found - exact).max() > 1e-5
    assert run("index", texts, "-o", tmp_path / "x", "-m", model).code == 0
    found, exact = (
        run("search", tmp_path / "x", lines[1], "--parallel-passes", 6, "--json").json,
        run("search", tmp_path / "x", lines[1], "--json").json,
    )
    assert [hit["text"] for hit in found["hits"]] == [hit["text"] for hit in exact["hits"]]


@pytest.mark.parametrize("name", ["t.txt", "t.jsonl", "t.csv"])
def test_an_empty_file_gives_an_empty_array_of_the_right_width(run: Run, model: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"")
    assert run("embed", tmp_path / name, "-o", tmp_path / "v.npy", "-m", model).code == 0
    assert np.load(tmp_path / "v.npy").shape == (0, 32)


def test_odd_texts_are_embedded_and_long_ones_are_announced_as_cut(run: Run, model: Path, tmp_path: Path) -> None:
    odd = ["", " \t ", "a\0b", "\u202e\ufeff\U0010ffff", "word " * 200_000, "x" * 1_000_000]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in odd))
    outcome = run("embed", tmp_path / "t.jsonl", "-o", tmp_path / "v.parquet", "-m", model)
    assert outcome.code == 0
    assert "6 vectors of 32 dimensions" in outcome.out
    assert ", 2 texts cut at 64 tokens, " in outcome.out
    table = parquet.read_table(tmp_path / "v.parquet").to_pydict()
    np.testing.assert_allclose(np.linalg.norm(table["vector"], axis=1), 1.0, atol=1e-5)
    assert table["truncated"] == [False] * 4 + [True] * 2
    refused(
        run("embed", tmp_path / "t.jsonl", "-o", tmp_path / "w.npy", "-m", model, "--truncate", "error"),
        "t.jsonl, line 5: row 4: ",
        "64 tokens",
    )
    assert not (tmp_path / "w.npy").exists()


@pytest.mark.parametrize(
    ("text", "family", "fragments"),
    [('"\\ud800"', "bert", ["row 1: ", "lone surrogate"]), ('""', "qwen2", ["row 1: ", "has no tokens"])],
)
def test_a_text_that_cannot_be_embedded_is_refused_with_its_row(
    run: Run, folder_of: Callable[[str], Path], tmp_path: Path, text: str, family: str, fragments: Sequence[str]
) -> None:
    (tmp_path / "t.jsonl").write_text(f'{{"text": "fine"}}\n{{"text": {text}}}\n')
    refused(run("embed", tmp_path / "t.jsonl", "-o", tmp_path / "v.npy", "-m", folder_of(family)), "t.jsonl, line 2: row 1: ", *fragments)
    assert [path.name for path in tmp_path.iterdir()] == ["t.jsonl"]


@pytest.mark.parametrize("kind", [NonFiniteError, OutOfMemoryError])
def test_a_text_that_fails_in_the_engine_is_named_by_its_line(
    run: Run, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: type[NonFiniteError] | type[OutOfMemoryError]
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise kind("row 1: it does not work.", row=1)

    (tmp_path / "t.jsonl").write_text('{"text": "a"}\n\n{"text": "b"}\n')
    monkeypatch.setattr(Engine, "run", fail)
    refused(run("embed", tmp_path / "t.jsonl", "-o", tmp_path / "v.npy", "-m", model), "t.jsonl, line 3: row 1: it does not work.")
    refused(run("index", tmp_path / "t.jsonl", "-o", tmp_path / "x", "-m", model), "t.jsonl:3: row 1: it does not work.")
    assert [path.name for path in tmp_path.iterdir()] == ["t.jsonl"]


MISTAKES: list[tuple[str, list[str]]] = [
    ("embed TEXTS -o v.npy --steps 3 --threshold 0.9", ["--steps 3 and --threshold 0.9 both say when to stop"]),
    ("embed TEXTS -o v.npy -m MODEL --steps -1", ["steps=-1", "at least 0"]),
    ("embed TEXTS -o v.npy -m MODEL --threshold -2", ["threshold=-2.0", "a cosine above -1"]),
    ("embed TEXTS -o v.npy -m MODEL --steps many", ["'--steps'", "--steps many; see: genembed --help"]),
    ("embed TEXTS -o v.npy --truncate left", ["'--truncate'", "left"]),
    ("embed TEXTS -o v.npy -m MODEL --dtype int8", ["dtype='int8'", "float32"]),
    ("embed TEXTS -o v.npy -m MODEL --parallel-passes -2", ["parallel_passes=-2: a whole number is needed"]),
    ("tokens MODEL text --parallel-passes 2", ["--parallel-passes 2 has no effect here"]),
    ("embed TEXTS -o v.npy -m MODEL --device abacus", ["device='abacus'"]),
    ("embed TEXTS -o v.npy -m MODEL --preset best", ["preset='best' is unknown", "gircse"]),
    ("embed TEXTS -o v.npy -m MODEL --adapter MODEL", ["not an adapter folder"]),
    ("embed TEXTS -o v.npy -m /nowhere", ["'/nowhere' is neither a folder, nor a hub id", "mini"]),
    ("embed TEXTS -o v.npy -m owner/name --offline", ["owner/name", "not found in the local cache"]),
    ("embed TEXTS -o v.npy --text-column body", ["--text-column body: text lines have no columns"]),
    ("embed TEXTS -o v.npy --id-column key", ["--id-column key: a .npy file holds no ids"]),
    ("embed TEXTS -o v.npy --format xml", ["format 'xml' is unknown"]),
    ("embed TEXTS -o - --json", ["--json describes a written file"]),
    ("embed TEXTS -o v.bin", ["output type '.bin' is unknown"]),
    ("embed TEXTS -o .", ["is a folder"]),
    ("embed TEXTS -o absent/v.npy", ["cannot be written"]),
    ("embed TEXTS", ["'-o'"]),
    ("embed absent.txt -o v.npy", ["absent.txt: no such file"]),
    ("embed . -o v.npy", ["is a folder; name a file"]),
    ("embed bad.jsonl -o v.npy", ["bad.jsonl, line 1: invalid JSON"]),
    ("embed MODEL/genembed.json -o v.npy --format jsonl", ["no column 'text'", "max_length"]),
    ("index absent -o new", ["absent: no such file"]),
    ("index . -o new", ["no text, web page or source code in this folder"]),
    ("index TEXTS -o INDEX", ["there is an index already", "--overwrite"]),
    ("index TEXTS -o TEXTS", ["is a file; an index is a folder"]),
    ("index TEXTS -o MODEL --overwrite", ["other things in it"]),
    ("search MODEL query", ["there is no index", "genembed index"]),
    ("search INDEX query -k 0", ["k=0"]),
    ("search INDEX query -m OTHER", ["made by the model", "--overwrite"]),
    ("search INDEX", ["Missing argument", "genembed --help"]),
    ("info /nowhere", ["'/nowhere' is neither a folder"]),
    ("demo --rows 0 -m MODEL", ["rows=0"]),
    ("demo --rows 3 -m MODEL --index INDEX", ["holds another index (3 texts", "delete it or choose another folder"]),
    ("publish", ["publish"]),
    ("--nonsense", ["--nonsense"]),
]


@pytest.mark.parametrize(("line", "fragments"), MISTAKES, ids=[line for line, _ in MISTAKES])
def test_a_mistake_ends_in_one_line_and_exit_code_2(
    run: Run,
    model: Path,
    texts: Path,
    searchable: Path,
    folder_of: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    line: str,
    fragments: Sequence[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo, "standard_library", lambda **_: [])
    Path("bad.jsonl").write_text("{")
    places = {"MODEL": model, "TEXTS": texts, "INDEX": searchable, "OTHER": folder_of("qwen2")}
    for name, place in places.items():
        line = line.replace(name, str(place))
    refused(run(*line.split()), *fragments)
    assert [path.name for path in tmp_path.iterdir()] == ["bad.jsonl"]


def test_a_fault_of_ours_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch, texts: Path) -> None:
    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(genembed, "load", broken)
    with pytest.raises(ZeroDivisionError):
        cli.main(["embed", str(texts), "-o", "-"])


def test_an_interrupted_run_exits_with_130_and_leaves_nothing(
    run: Run, monkeypatch: pytest.MonkeyPatch, texts: Path, tmp_path: Path
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(genembed, "load", interrupted)
    outcome = run("embed", texts, "-o", tmp_path / "v.npy")
    assert (outcome.code, outcome.out, list(tmp_path.iterdir())) == (130, "", [])


def test_search_uses_the_model_and_reports_the_steps_of_the_query(run: Run, searchable: Path, model: Path) -> None:
    embedder = genembed.load(model)
    expected = embedder.refine(["the language of models"])
    found = run("search", searchable, "the language of models", "-k", 2, "--json").json
    assert (found["query"], found["steps"]) == ("the language of models", expected.steps[0])
    assert found["hits"][0]["text"] == "the language of models"
    assert found["hits"][0]["score"] == pytest.approx(1.0, abs=1e-5)
    assert len(found["hits"]) == 2
    outcome = run("search", searchable, "the language of models", "-k", 1, "--steps", 3)
    assert outcome.out.splitlines()[0].endswith("texts.txt:3")
    assert outcome.out.splitlines()[1].strip() == "the language of models"
    assert outcome.err.startswith("1 of 3 passages, 3 steps, ")


def test_search_loads_the_model_as_the_index_was_built_with_it(
    run: Run, folder_of: Callable[[str], Path], texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = shutil.copytree(folder_of("qwen2"), tmp_path / "base")
    (base / "genembed.json").unlink()
    doubles.save_adapter(base, tmp_path / "adapter")
    monkeypatch.chdir(tmp_path)
    options = ["-m", "base", "--adapter", "adapter", "--preset", "laser"]
    assert run("index", texts, "-o", "x", *options).code == 0
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    found = run("search", "../x", "fasting glucose", "--json").json["hits"]
    assert (found[0]["text"], found[0]["score"]) == ("fasting glucose", pytest.approx(1.0, abs=1e-5))
    base.rename(tmp_path / "moved")
    assert run("search", "../x", "fasting glucose", "-m", "../moved", "--json").json["hits"] == found
    refused(run("search", "../x", "fasting glucose", "-m", "../moved", "--preset", "gircse"), "made by the model", "--overwrite")
    refused(run("search", "../x", "fasting glucose", "-m", "../moved", "--adapter", "../moved"), "not an adapter folder")


def test_index_reports_what_it_built(run: Run, model: Path, texts: Path, tmp_path: Path) -> None:
    built = run("index", texts, "-o", tmp_path / "x", "-m", model, "--steps", 2, "--instruction", "Find", "--json").json
    assert (built["rows"], built["dimensions"], built["steps"], built["halt"], built["instruction"]) == (
        3,
        32,
        2.0,
        "FixedSteps(steps=2)",
        "Find",
    )
    replaced = run("index", texts, "-o", tmp_path / "x", "-m", model, "--overwrite")
    assert replaced.out.startswith(f"{tmp_path / 'x'}: 3 passages of 32 dimensions, ")


def test_info_shows_the_prompt_the_steps_and_the_halting_rule(run: Run, model: Path) -> None:
    facts = run("info", model, "--json", "--instruction", "Find it.").json
    embedder = genembed.load(model)
    assert facts["prompt"] == embedder.first_prompt("TEXT") == "<s>TEXT</s>"
    assert facts["prompt_with_instruction"] == "<s>Instruct: Find it.\nQuery:TEXT</s>"
    assert (facts["halt"], facts["dimensions"], facts["attention"], facts["packing"]) == (repr(HALT), 32, "prefix", True)
    assert facts["parameters"] == sum(weight.numel() for weight in embedder.backbone.model.parameters())
    shown = run("info", model).out
    assert f"halt                    {HALT}\n" in shown
    assert "prompt with instruction '<s>Instruct: Find similar texts.\\nQuery:TEXT</s>'\n" in shown


def test_info_counts_the_parameters_of_the_adapter(tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    save_file({"a": np.zeros((2, 3), np.float32), "b": np.zeros(4, np.float32)}, tmp_path / "adapter_model.safetensors")
    assert _adapter_parameters(tmp_path) == 10
    assert _adapter_parameters(None) == 0


@pytest.fixture
def small_demo(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Let the demo find a small library and put its index into a cache of its own."""
    source = "".join(f'def name_{word}(): """Return the {word}.\n\nMore."""\n' for word in ("one", "two", "three", "four", "five", "six"))
    monkeypatch.setattr(demo, "standard_library", lambda **_: list(docstrings(source, "numbers")))
    monkeypatch.setattr(demo, "_COMPARED_QUERIES", 4)
    monkeypatch.setattr(demo, "_REPEATS", 2)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "genembed"


def test_the_demo_measures_what_it_shows_and_uses_its_index_again(run: Run, model: Path, small_demo: Path) -> None:
    first = run("demo", "--rows", 5, "-m", model, "--json").json
    assert (first["rows"], first["reused"], len(first["answers"])) == (5, False, len(demo.QUERIES))
    assert [path.name for path in small_demo.iterdir()] == [Path(first["folder"]).name]
    compared = first["comparison"]
    assert (compared["every_step"]["rule"], compared["halting"]["rule"]) == (repr(FixedSteps(HALT.max_steps)), repr(HALT))
    assert compared["every_step"]["iterations"] == 4 * HALT.max_steps
    assert compared["halting"]["iterations"] == 4 * compared["halting"]["mean_steps"] <= 4 * HALT.max_steps
    assert 0 <= compared["agreement"] <= 1
    second = run("demo", "--rows", 5, "-m", model)
    assert (second.code, second.err) == (0, "")
    assert "on an earlier run; reused now" in second.out
    assert max(map(len, second.out.splitlines())) <= 100 or str(small_demo) in second.out
    for query, hit in [(answer["query"], answer["hits"][0]) for answer in first["answers"]]:
        assert query in second.out
        assert f"  {hit['score']:.3f}  {hit['reference']}" in second.out


def test_the_comparison_of_the_demo_shows_how_far_it_is(
    model: Path, small_demo: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bar = demo.tqdm
    monkeypatch.setattr(demo, "tqdm", lambda items, **options: bar(items, **options | {"delay": 0, "mininterval": 0}))
    demo.run(genembed.load(model), rows=3, folder=None, quiet=True)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "comparing: 100%" in captured.err
    assert "4/4" in captured.err


def test_a_smaller_demo_keeps_functions_and_classes_and_methods_of_all_modules() -> None:
    source = "def f(): 'F.'\nclass C:\n    'C.'\n" + "".join(f"    def m{number}(self): 'M.'\n" for number in range(8))
    documented = list(docstrings(source, "m"))
    assert [item.name for item in demo._chosen(documented, 6)] == ["m.f", "m.C", "m.C.m0", "m.C.m2", "m.C.m4", "m.C.m6"]
    assert [item.name for item in demo._chosen(documented, 1)] == ["m.f"]
    assert len(demo._chosen(documented, 99)) == 10


def test_the_demo_says_when_a_model_has_no_halting_to_compare(run: Run, folder_of: Callable[[str], Path], small_demo: Path) -> None:
    outcome = run("demo", "--rows", 3, "-m", folder_of("bert"))
    assert "This model does FixedSteps(steps=20) for every text" in outcome.out
    assert len(list(small_demo.iterdir())) == 1

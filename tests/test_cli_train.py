"""`genembed train`: which recipe, what is changed in it, and a run from a file of pairs to a model."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from genembed import ConfigurationError, ConvergeStop, FixedSteps, ModelSettings, cli, load
from genembed.cli.overrides import overridden
from genembed.cli.recipe_files import chosen_recipe, data_file
from genembed.train.objective import Objective
from genembed.train.pairs import DataFile
from genembed.train.recipe import Evaluation, Lora, Recipe
from genembed.train.recipes import RECIPES
from genembed.train.run import recipe_json
from test_cli import Run, refused, run

__all__ = ["run"]  # the fixture


PLAIN = Recipe(model="m", files=(DataFile(path="pairs.jsonl"),), updates=10)
EVERYTHING = Recipe(
    model="m",
    settings=ModelSettings(halt=ConvergeStop(threshold=0.9), max_length=9),
    files=(DataFile(path="a.jsonl", weight=2.0), DataFile(path="b.jsonl", max_score=5)),
    updates=10,
    evaluation=Evaluation(every=10),
    served=ModelSettings(query_instruction="Find"),
)


# Fields by name


def leaves(value: Any, path: tuple[str, ...] = ()) -> dict[str, Any]:
    """Return every field that is no dataclass itself, by its dotted name."""
    if not is_dataclass(value):
        return {".".join(path): value}
    return {name: leaf for field in fields(value) for name, leaf in leaves(getattr(value, field.name), (*path, field.name)).items()}


def as_json(value: Any) -> str:
    return json.dumps(value, default=asdict)


@pytest.mark.parametrize("recipe", [PLAIN, EVERYTHING], ids=["plain", "everything"])
def test_setting_every_field_to_what_it_is_changes_nothing(recipe: Recipe) -> None:
    assignments = [f"{name}={as_json(value)}" for name, value in leaves(recipe).items()]
    assert len(assignments) > 40
    assert overridden(recipe, assignments) == recipe
    assert overridden(recipe, []) == recipe


@given(
    temperature=st.floats(0.001, 10),
    rank=st.integers(1, 10**6),
    share=st.floats(0.01, 0.99),
    steps=st.lists(st.integers(1, 99), min_size=1),
)
def test_what_is_set_is_there_and_nothing_else_has_changed(temperature: float, rank: int, share: float, steps: list[int]) -> None:
    wanted = {"objective.temperature": temperature, "lora.rank": rank, "evaluation.share": share, "evaluation.steps": tuple(steps)}
    changed = overridden(EVERYTHING, [f"{name}={json.dumps(value)}" for name, value in wanted.items()])
    assert leaves(changed) == leaves(EVERYTHING) | wanted


def test_the_order_of_independent_changes_does_not_matter() -> None:
    """Guards against checking each change by itself: K from 8 to 9 is empty as long as one of them is 5."""
    changes = ["min_steps=8", "max_steps=9", "objective.stepwise=false", "objective.regulariser=0"]
    forth, back = overridden(PLAIN, changes), overridden(PLAIN, changes[::-1])
    assert forth == back
    assert (forth.min_steps, forth.max_steps, forth.objective) == (8, 9, Objective(stepwise=False, regulariser=0.0))


@pytest.mark.parametrize(
    ("assignments", "changed"),
    [
        (["model=Qwen/Qwen2.5-0.5B"], {"model": "Qwen/Qwen2.5-0.5B"}),
        (['model="7"'], {"model": "7"}),
        (["model=a=b"], {"model": "a=b"}),
        (["lora=null"], {"lora": None}),
        (["learning_rate=1"], {"learning_rate": 1.0}),
        (["learning_rate=1e-4"], {"learning_rate": 1e-4}),
        (["length_limits=[64, 128]", 'lora.targets=["q_proj"]'], {"length_limits": (64, 128), "lora": Lora(targets=("q_proj",))}),
        (["length_limits=[]", "lora.targets=.*proj"], {"length_limits": (), "lora": Lora(targets=".*proj")}),
        (["dtype=bfloat16", "gather=false"], {"dtype": "bfloat16", "gather": False}),
        (["evaluation={}"], {"evaluation": Evaluation()}),
        (["evaluation={}", "evaluation.every=70"], {"evaluation": Evaluation(every=70)}),
        (['evaluation={"every": 70, "steps": [1]}'], {"evaluation": Evaluation(every=70, steps=(1,))}),
        (["settings=laser"], {"settings": "laser"}),
        (['settings={"halt": {"steps": 3}}'], {"settings": ModelSettings(halt=FixedSteps(3))}),
        (['settings={"halt": {"threshold": 0.5}}'], {"settings": ModelSettings(halt=ConvergeStop(threshold=0.5))}),
        (["settings={}", "settings.pooling.pool_prompt_state=true"], {"settings.pooling.pool_prompt_state": True}),
        (
            ['settings={"special_tokens": [["<s>"], []]}', "settings.max_length=3"],
            {"settings": ModelSettings(special_tokens=(("<s>",), ()), max_length=3)},
        ),
        (['files=[{"path": "x", "weight": 3}]'], {"files": (DataFile(path="x", weight=3.0),)}),
    ],
)
def test_values_become_what_their_field_holds(assignments: Sequence[str], changed: Mapping[str, Any]) -> None:
    made = overridden(PLAIN, assignments)
    for name, value in changed.items():
        found: Any = made
        for part in name.split("."):
            found = getattr(found, part)
        assert (found, type(found)) == (value, type(value))


@pytest.mark.parametrize(
    ("assignments", "message"),
    [
        (["updates"], "--set updates: a value is missing; write it as FIELD=VALUE."),
        (["updates=many"], '--set updates=many: a whole number is needed, not "many".'),
        (["updates=1.5"], "a whole number is needed, not 1.5"),
        (["updates=true"], "a whole number is needed, not true"),
        (["updates="], 'a whole number is needed, not "".'),
        (["updates=null"], "a whole number is needed, not null"),
        (["updates=[1]"], "a whole number is needed, not [1]"),
        (["updates=0"], "updates=0: must be at least 1."),
        (["learning_rate=fast"], 'a number is needed, not "fast"'),
        (["learning_rate=NaN"], 'a number is needed, not "NaN"'),
        (["learning_rate=1e999"], "a number is needed, not Infinity"),
        (["learning_rate=1" + 400 * "0"], "a number is needed, not 1000"),
        (["learning_rate=" + 5000 * "1"], 'a number is needed, not "1111'),
        (["model=7"], "a string is needed, not 7"),
        (["model=null"], "a string is needed, not null"),
        (["teacher=[]"], "a string or null is needed, not []"),
        (["gather=1"], "true or false is needed, not 1"),
        (["dtype=int8"], 'one of float32, bfloat16 is needed, not "int8"'),
        (["lora=8"], "an object of rank, alpha, dropout, targets or null is needed, not 8"),
        (["length_limits=64"], "a list in brackets, each a whole number is needed, not 64"),
        (["length_limits=[64, 1.5]"], "a whole number is needed, not 1.5"),
        (["length_limits=" + 5000 * "["], 'a list in brackets, each a whole number is needed, not "[['),
        (["lora.targets=null"], "a list in brackets, each a string or a string is needed, not null"),
        (["settings={}", "settings.special_tokens=[[]]"], "a list of 2 in brackets"),
        (["rank=8"], "--set rank=8: Recipe has no field 'rank'; known: model, settings, files, "),
        (["lora.temperature=8"], "Lora has no field 'temperature'; known: rank, alpha, dropout, targets."),
        ([".=8"], "Recipe has no field ''"),
        (["lora.rank.x=8"], "rank is 64, which has no fields."),
        (["model.x=8"], 'model is "m", which has no fields.'),
        (["files.0.weight=8"], "files is ["),
        (['evaluation={"often": 1}'], "Evaluation has no field 'often'; known: every, share"),
        (['evaluation={"every": "x"}'], """evaluation={"every": "x"}: every: a whole number is needed, not "x"."""),
        (['files=[{"weight": 2}]'], "path must be given"),
        (["evaluation={}", "evaluation={}"], "evaluation was set before and would be lost"),
        (["lora.rank=1", "lora.rank=2"], "lora.rank was set before and would be lost"),
        (["lora.rank=1", "lora=null"], "lora.rank was set before and would be lost"),
        (
            ["evaluation=null", "evaluation.every=5"],
            """--set evaluation.every=5: evaluation is null, which has no fields. Set it as a whole: --set 'evaluation={"every": 5}',""",
        ),
        (["settings.halt.steps=2"], """Set it as a whole: --set 'settings={"halt": {"steps": 2}}'"""),
        (["teacher.x=2"], "teacher is null, which has no fields."),
    ],
    ids=lambda value: value[0][:40] if isinstance(value, list) else "",
)
def test_a_change_that_makes_no_sense_is_refused(assignments: Sequence[str], message: str) -> None:
    with pytest.raises(ConfigurationError) as refusal:
        overridden(PLAIN, assignments)
    assert message in str(refusal.value)
    assert ("Set it as a whole" in message) == ("Set it as a whole" in str(refusal.value))


# Recipes by name and by file

HEAD = """
from __future__ import annotations
from dataclasses import dataclass
from genembed.train.pairs import DataFile
from genembed.train.recipe import Recipe
def _made(files, updates) -> Recipe:
    return Recipe(model="m", files=files or (DataFile(path="own.jsonl"),), updates=updates)
"""
ONE = "def one(*files: DataFile) -> Recipe:\n    return _made(files, 1)\n"
TWO = "def two() -> Recipe:\n    return _made((), 2)\n"
THREE = "def recipe(*files):\n    return _made(files, 3)\n"


@pytest.mark.parametrize(
    ("content", "function", "updates"),
    [
        (ONE, "", 1),
        (ONE + THREE, "", 3),
        (ONE + TWO, ":two", 2),
        (ONE + TWO + THREE, ":one", 1),
        ("from genembed.train.recipes import paper_qwen05b\n" + TWO, "", 2),
        ("class Maker:\n    def __call__(self):\n        return _made((), 4)\nfour = Maker()\n", ":four", 4),
        (TWO.replace("Recipe:", "'genembed.train.recipe.Recipe':"), "", 2),
        (f"@dataclass\nclass Size:\n    updates: int\n{TWO.replace('2)', 'Size(5).updates)')}", "", 5),
    ],
    ids=["the only one", "recipe", "by name", "by name among others", "an imported one", "an object", "a string", "a dataclass"],
)
def test_a_file_gives_the_recipe_that_is_meant(tmp_path: Path, content: str, function: str, updates: int) -> None:
    (tmp_path / "my.py").write_text(HEAD + content)
    made = chosen_recipe(f"{tmp_path / 'my.py'}{function}", [])
    assert (made.updates, made.files) == (updates, (DataFile(path="own.jsonl"),))


def test_a_files_recipe_takes_the_data(tmp_path: Path) -> None:
    (tmp_path / "my.py").write_text(HEAD + ONE)
    files = (DataFile(path="a"), DataFile(path="b", weight=2.0))
    assert chosen_recipe(f"{tmp_path / 'my.py'}", files).files == files


def test_a_file_may_build_on_the_file_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "neighbour_of_mine.py").write_text(HEAD + TWO)
    (tmp_path / "my.py").write_text(f"{HEAD}import neighbour_of_mine\ndef mine() -> Recipe:\n    return neighbour_of_mine.two()\n")
    assert chosen_recipe(str(tmp_path / "my.py"), []).updates == 2


@pytest.mark.parametrize(
    ("content", "function", "files", "message"),
    [
        (ONE + TWO, "", 0, "my.py does not say which recipe; use {path}:NAME with one of one, two."),
        ("", "", 0, "my.py does not say which recipe; use {path}:NAME with def recipe(*files: DataFile) -> Recipe"),
        (ONE, ":many", 0, "my.py has no function 'many'; use {path}:NAME with one of one."),
        ("HEAD = 1\n", ":HEAD", 0, "my.py has no function 'HEAD'"),
        (TWO, "", 2, "my.py:two does not take 2 files (too many positional arguments); leave --data out."),
        ("def f(files) -> Recipe: pass", "", 0, "my.py:f needs arguments (missing a required argument: 'files'); give it files of"),
        ("def f() -> Recipe: pass", "", 0, "my.py:f returned None; a recipe function returns a genembed.train.recipe.Recipe."),
        ("def f() -> Recipe:\n    return 1 / 0", "", 0, "my.py, line 9: ZeroDivisionError: division by zero"),
        ("def f() -> Recipe:\n    return Recipe(model='m', files=(), updates=1)", "", 0, "files: name at least one file of pairs."),
        ("\n1 = 2\n", "", 0, "my.py, line 9: SyntaxError: cannot assign to literal"),
        ("import absent_module", "", 0, "my.py, line 8: ModuleNotFoundError: No module named 'absent_module'"),
        ("import json\njson.loads('{')", "", 0, "my.py, line 9: JSONDecodeError: Expecting property name"),
        ("Recipe(model='m', files=(), updates=1)", "", 0, "files: name at least one file of pairs."),
    ],
)
def test_a_file_without_a_usable_recipe_is_refused(tmp_path: Path, content: str, function: str, files: int, message: str) -> None:
    path = tmp_path / "my.py"
    path.write_text(f"{HEAD}{content}")
    with pytest.raises(ConfigurationError) as refusal:
        chosen_recipe(f"{path}{function}", [DataFile(path="x")] * files)
    assert message.replace("{path}", str(path)) in str(refusal.value)


def test_a_named_recipe_needs_data_and_a_name_that_is_known(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="recipe 'paper-qwen05b' brings no training pairs; name files of them: --data pairs"):
        chosen_recipe("paper-qwen05b", [])
    with pytest.raises(ConfigurationError, match="recipe 'paper' is unknown; choose one of paper-qwen05b, "):
        chosen_recipe("paper", [])
    with pytest.raises(ConfigurationError, match=r"absent\.py: no such file; a recipe is one of ours by name, or a function of a file"):
        chosen_recipe(f"{tmp_path}/absent.py:f", [])


def test_a_weight_follows_the_path_of_the_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a=2").write_text("")
    for text, path, weight in [
        ("a.jsonl", "a.jsonl", 1.0),
        ("a.jsonl=2", "a.jsonl", 2.0),
        ("kind=1/a.jsonl", "kind=1/a.jsonl", 1.0),
        ("kind=1/a.jsonl=0.5", "kind=1/a.jsonl", 0.5),
        ("hf:owner/name:train=3", "hf:owner/name:train", 3.0),
        ("a=2", "a=2", 1.0),
        ("a=2=3", "a=2", 3.0),
    ]:
        assert data_file(text) == DataFile(path=path, weight=weight)
    for text, message in [
        ("b=2=much", "--data b=2=much: the weight 'much' is not a number, and there is no file of this name."),
        ("b=0", "--data b=0: weight=0.0: a number above 0 is needed"),
        ("b=inf", "weight=inf"),
        ("b=", "the weight '' is not a number"),
        ("=2", "--data =2: path='': the path of a file is needed"),
    ]:
        with pytest.raises(ConfigurationError) as refusal:
            data_file(text)
        assert message in str(refusal.value)


# The command


@pytest.mark.parametrize("name", RECIPES)
def test_a_dry_run_prints_each_of_our_recipes_as_it_would_be_run(run: Run, tmp_path: Path, name: str) -> None:
    shown = run("train", "-r", name, "--data", "a.jsonl=2", "-o", tmp_path / "x", "-m", "mini", "--set", "updates=7", "--dry-run")
    assert shown.json == recipe_json(replace(RECIPES[name](DataFile(path="a.jsonl", weight=2.0)), model="mini", updates=7))
    assert list(tmp_path.iterdir()) == []


def test_weights_are_cut_into_parts_by_an_option_of_its_own(run: Run, tmp_path: Path) -> None:
    shown = run("train", "-r", "paper-qwen05b", "--data", "a.jsonl", "-o", tmp_path / "x", "--fsdp", "--set", "lora=null", "--dry-run")
    assert (shown.json["fsdp"], shown.json["lora"]) == (True, None)


MISTAKES: list[tuple[str, list[str]]] = [
    ("train -r paper-qwen05b --data PAIRS -o x --fsdp", ["fsdp=True with lora=", "--set lora=null"]),
    ("train -r paper-qwen05b --data PAIRS -o x --fsdp --set lora=null", ["fsdp=True with one process", "torchrun --nproc-per-node"]),
    ("train -o x --data PAIRS", ["'--recipe'"]),
    ("train -r FILE", ["'--output'"]),
    ("train -r FILE -o x --updates 5", ["--updates"]),
    ("train -r paper-qwen05b -o x", ["recipe 'paper-qwen05b' brings no training pairs", "--data"]),
    ("train -r best -o x --data PAIRS", ["recipe 'best' is unknown", "paper-qwen05b"]),
    ("train -r absent.py -o x", ["absent.py: no such file"]),
    ("train -r FILE:other -o x", ["has no function 'other'", "recipe.py:NAME with one of tiny."]),
    ("train -r FILE -o x --data PAIRS=0", ["weight=0.0"]),
    ("train -r FILE -o x --set updates=many", ["--set updates=many: a whole number is needed"]),
    ("train -r FILE -o x --set rank=8", ["no field 'rank'", "lora"]),
    ("train -r FILE -o x --set updates=0", ["updates=0: must be at least 1."]),
    ("train -r FILE -o x -m MODEL --set model=mini", ["--set model=mini: model was set before"]),
    ("train -r FILE -o x --format jsonl", ["--format jsonl: says how --exclude files are read, and there are none."]),
    ("train -r FILE -o x --text-column body", ["--text-column body: says how --exclude files are read"]),
    ("train -r FILE -o x --exclude absent.txt", ["absent.txt: no such file"]),
    ("train -r FILE -o x --exclude PAIRS", ["no column 'text'; there are: query, pos. Name one with --text-column."]),
    ("train -r FILE -o x --merge --set lora=null", ["--merge has no effect with lora=None"]),
    ('train -r FILE -o x --merge --set settings={"adapter_positions":"generated"}', ["--merge: the adapter works on generated positions"]),
    ("train -r FILE -o x --data absent.jsonl", ["absent.jsonl: no such file"]),
    ("train -r FILE -o x -m absent", ["'absent' is neither a folder, nor a hub id"]),
    ("train -r FILE -o x --merge -m absent --set settings=null", ["'absent' is neither a folder, nor a hub id"]),
]


def tiny(model: Path, pairs: Path) -> str:
    """Return a file with a recipe for a model that trains in a second."""
    return f"""
from genembed.train.objective import Objective
from genembed.train.pairs import DataFile
from genembed.train.recipe import Lora, Recipe

def tiny(*files: DataFile) -> Recipe:
    return Recipe(
        model={str(model)!r},
        settings="gircse",
        files=files or (DataFile(path={str(pairs)!r}),),
        queries=2,
        min_steps=1,
        max_steps=2,
        lora=Lora(rank=2, alpha=4, targets=("q_proj", "v_proj")),
        learning_rate=0.1,
        updates=2,
        log_every=1,
    )
"""


@dataclass
class Place:
    """What a training run needs."""

    model: Path
    pairs: Path
    recipe: Path


@pytest.fixture(scope="module")
def place(folder_of: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Place:
    folder = tmp_path_factory.mktemp("train")
    rows = [{"query": f"question {number}", "pos": [f"the answer is {number}"]} for number in range(24)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "recipe.py").write_text(tiny(folder_of("qwen2"), folder / "pairs.jsonl"))
    return Place(folder_of("qwen2"), folder / "pairs.jsonl", folder / "recipe.py")


@pytest.mark.parametrize(("line", "fragments"), MISTAKES, ids=[line for line, _ in MISTAKES])
def test_a_mistake_ends_in_one_line_and_exit_code_2(
    run: Run, place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str, fragments: Sequence[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, path in {"MODEL": place.model, "PAIRS": place.pairs, "FILE": place.recipe}.items():
        line = line.replace(name, str(path))
    refused(run(*line.split()), *fragments)


HUB_OUT_OF_REACH = (
    "not found in the local cache, and the hub cannot be reached; check the network (and HF_HUB_OFFLINE), or pass a local folder."
)


@pytest.mark.parametrize("merge", [[], ["--merge", "--set", "settings=null"]])
def test_a_hub_id_that_is_not_there_ends_in_one_sentence(
    run: Run, place: Place, tmp_path: Path, merge: Sequence[str], monkeypatch: pytest.MonkeyPatch, refused_connections: list[str]
) -> None:
    outcome = run("train", "-r", place.recipe, "-o", tmp_path / "x", "-m", "owner/name", *merge)
    assert (outcome.code, outcome.err) == (2, f"genembed: owner/name: {HUB_OUT_OF_REACH}\n")
    refused_connections.clear()


@pytest.mark.parametrize("package", ["accelerate", "matplotlib"])
def test_without_the_extra_the_message_has_the_command_that_installs_it(
    run: Run, place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    refused(run("train", "-r", place.recipe, "-o", tmp_path / "x"), f"{package} is not installed", "pip install 'genembed[train]'")


def test_a_run_leaves_a_model_that_loads_and_says_how_good_it_is(run: Run, place: Place, tmp_path: Path) -> None:
    evaluation = 'evaluation={"every": 1, "share": 0.4, "steps": [1, 2]}'
    outcome = run("train", "-r", place.recipe, "-o", tmp_path / "x", "--set", evaluation, "--merge", "--json")
    summary = outcome.json
    assert (summary["output"], summary["merged"], summary["updates"]) == (str(tmp_path / "x"), str(tmp_path / "x" / "merged"), 2)
    with (tmp_path / "x" / "history.csv").open(newline="") as file:
        last = list(csv.DictReader(file))[-1]
    assert summary["scored_update"] == 2 == int(last["step"])
    assert summary["scores"] == {name: float(last[f"eval_{name}"]) for name in ("mean_k1", "mean_k2", "pairs_k2")}
    trained, merged, before = (load(path, dtype="float64") for path in (tmp_path / "x", tmp_path / "x" / "merged", place.model))
    texts = ["question 1", "the answer is 1"]
    assert merged.source.adapter is None
    np.testing.assert_allclose(merged.encode(texts, steps=2), trained.encode(texts, steps=2), atol=1e-5)
    assert np.abs(trained.encode(texts, steps=2) - before.encode(texts, steps=2)).max() > 0.01


def test_a_run_without_held_out_pairs_says_where_the_model_is_and_goes_on_where_it_stopped(run: Run, place: Place, tmp_path: Path) -> None:
    first = run("train", "-r", place.recipe, "-o", tmp_path / "x", "--set", "save_every=1")
    assert (first.code, first.out.count("\n")) == (0, 1)
    assert first.out.startswith(f"{tmp_path / 'x'}: {place.model} trained for 2 updates, ")
    refused(run("train", "-r", place.recipe, "-o", tmp_path / "x"), "x holds a run (checkpoint-2)", "--resume")
    assert run("train", "-r", place.recipe, "-o", tmp_path / "x", "--resume", "--set", "updates=3", "--json").json["updates"] == 3


def test_a_run_that_keeps_the_best_reports_the_best(run: Run, place: Place, tmp_path: Path) -> None:
    patient = 'evaluation={"every": 1, "share": 0.4, "steps": [1], "patience": 2}'
    settings = ["--set", patient, "--set", "learning_rate=0.000001", "--set", "updates=9"]
    outcome = run("train", "-r", place.recipe, "-o", tmp_path / "x", *settings)
    assert f": {place.model} trained for 3 updates, " in outcome.out
    assert "held-out pairs at update 1: mean_k1 " in outcome.out


def test_excluded_texts_are_not_trained_on(run: Run, place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.txt").write_text("".join(f"Question {number}\n\n" for number in range(12)))
    (tmp_path / "b.txt").write_text("".join(f"the answer is {number}.\n" for number in range(12, 24)))
    assert run("train", "-r", place.recipe, "-o", tmp_path / "x", "--exclude", tmp_path / "a.txt").code == 0
    files = [argument for name in ("a.txt", "b.txt") for argument in ("--exclude", tmp_path / name)]
    assert f"genembed: {place.pairs}: no pair to train on" in stopped(capsys, "train", "-r", place.recipe, "-o", tmp_path / "y", *files)


def test_a_strict_run_stops_at_the_first_bad_row(run: Run, place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text(place.pairs.read_text() + '{"query": "alone", "pos": []}\n')
    assert run("train", "-r", place.recipe, "-o", tmp_path / "x", "--data", bad).code == 0
    shown = stopped(capsys, "train", "-r", place.recipe, "-o", tmp_path / "y", "--data", bad, "--strict")
    assert f"genembed: {bad}:25: no positive" in shown


def stopped(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """Run a command that fails while it works, with its bar on the screen, and return all that it wrote to stderr."""
    with pytest.raises(SystemExit) as end:
        cli.main([str(argument) for argument in arguments])
    assert end.value.code == 2
    return capsys.readouterr().err

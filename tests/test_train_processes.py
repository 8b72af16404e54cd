"""Training in several processes: what it learns is what one process learns, however the run is split, cut into parts or gone on with."""

from __future__ import annotations

import csv
import json
import math
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import doubles
import genembed
from genembed import ConfigurationError
from genembed.errors import DataError
from genembed.tokens import PromptTokenizer
from genembed.train.collate import PairCollator
from genembed.train.launch import check_launch, continued
from genembed.train.objective import Objective, Part, Teacher
from genembed.train.pairs import DataFile, Pair
from genembed.train.recipe import Evaluation, Lora, Recipe
from genembed.train.run import recipe_json
from genembed.train.sharding import shard
from processes import in_processes, queries_seen

WORDS = tuple("refine vector claim glucose business trip language model text step stable query document patient".split())  # noqa: SIM905

EVERYTHING = Objective(
    temperature=0.1, regulariser=1.0, false_negative_margin=0.1, distillation=0.3, self_distillation=0.2, self_distillation_step=1
)


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """All weights, with all that can differ between processes: some pairs lack a negative, some batches are cut, chunks end unevenly."""
    rng, root = random.Random(0), tmp_path_factory.mktemp("data")
    with (root / "pairs.jsonl").open("w") as file:
        for number in range(60):
            words = rng.sample(WORDS, 4)
            negatives = [[], [" ".join(rng.sample(WORDS, 4))], [" ".join(words[::-1]) + "!"]][number % 3]
            file.write(json.dumps({"query": " ".join(words), "pos": [" ".join(words[::-1])], "neg": negatives}) + "\n")
    return Recipe(
        model=str(doubles.saved("qwen2", root)),
        files=(DataFile(path=str(root / "pairs.jsonl")),),
        objective=EVERYTHING,
        teacher=str(doubles.saved("llama", root)),
        teacher_settings="causal-eos",  # random models amplify rounding at every step
        queries=8,
        query_tokens=64,
        passage_tokens=64,
        batch_tokens=120,
        min_steps=2,
        max_steps=3,
        lora=None,
        chunk=3,
        learning_rate=1e-3,
        updates=6,
        save_every=2,
        keep=3,
        log_every=1,
        evaluation=Evaluation(every=3, share=0.2, steps=(1, 3), patience=9),
    )


def among(recipe: Recipe, processes: int, *, sharded: bool) -> Recipe:
    """Return the recipe with the same batch for several processes."""
    return replace(recipe, queries=recipe.queries // processes, fsdp=sharded)


def column(folder: Path, name: str) -> list[float]:
    with (folder / "history.csv").open() as file:
        return [float(row[name]) for row in csv.DictReader(file) if row.get(name)]


def assert_same_run(found: Path, expected: Path, weights: str, *, updates: int = 6) -> None:
    """Refinement amplifies the order of float32 sums, and updates add to it: step losses differed by 1.3e-4, gradient norms by 1.2e-3."""
    assert len(column(found, "loss")) == updates
    for name in ("loss", "step_losses_first", "step_losses_last", "regulariser", "distillation", "self_distillation"):
        np.testing.assert_allclose(column(found, name), column(expected, name), rtol=5e-4, atol=2e-5, err_msg=name)
    np.testing.assert_allclose(column(found, "grad_norm"), column(expected, "grad_norm"), rtol=5e-3)
    np.testing.assert_allclose(column(found, "eval_mean_k3"), column(expected, "eval_mean_k3"), rtol=1e-3)
    first, second = (load_file(folder / weights) for folder in (found, expected))
    assert first.keys() == second.keys()
    for name, weight in first.items():
        torch.testing.assert_close(weight, second[name], rtol=0, atol=2e-4)  # Adam divides by small numbers; it moved them by 3e-3


@pytest.mark.slow
def test_weights_in_parts_over_two_processes_learn_as_one_process_does(full: Recipe, tmp_path: Path) -> None:
    """Table and head are used between the layers' passes, and every layer is called several times before its gradient comes."""
    recipe = replace(full, updates=2, accumulation=2, evaluation=replace(full.evaluation, every=2), checkpoint_layers=True)
    in_processes(1, {"one": {"recipe": recipe}}, tmp_path)
    in_processes(2, {"two": {"recipe": among(recipe, 2, sharded=True)}}, tmp_path)
    assert_same_run(tmp_path / "two", tmp_path / "one", "model.safetensors", updates=2)
    vectors = [genembed.load(tmp_path / name).encode(["glucose", "trip"], steps=1) for name in ("one", "two")]
    np.testing.assert_allclose(*vectors, atol=1e-3)


# The full matrix


@pytest.fixture(scope="module")
def recipes(full: Recipe) -> dict[str, Recipe]:
    return {"lora": replace(full, lora=Lora(rank=4, alpha=8), learning_rate=3e-3), "full": full}


WEIGHTS = {"lora": "adapter_model.safetensors", "full": "model.safetensors"}


@pytest.fixture(scope="module")
def runs(recipes: dict[str, Recipe], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both recipes in 1, 2 and 4 processes."""
    folder = tmp_path_factory.mktemp("runs")
    for number in (1, 2, 4):
        sharded = {name: number > 1 and name == "full" for name in recipes}
        in_processes(
            number,
            {f"{name}-{number}": {"recipe": among(recipe, number, sharded=sharded[name])} for name, recipe in recipes.items()},
            folder,
        )
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("number", [2, 4])
@pytest.mark.parametrize("name", ["lora", "full"])
def test_several_processes_learn_as_one_does(runs: Path, name: str, number: int) -> None:
    """With the regulariser, both distillations, the mask of false negatives, GradCache, uneven negatives and uneven shares of a batch."""
    assert_same_run(runs / f"{name}-{number}", runs / f"{name}-1", WEIGHTS[name])


@pytest.mark.slow
@pytest.mark.parametrize("number", [2, 4])
def test_no_pair_of_a_batch_is_seen_twice_and_none_is_dropped(runs: Path, number: int) -> None:
    alone, shared = queries_seen(runs, "full-1"), queries_seen(runs, f"full-{number}")
    assert len(alone) == 6
    for batch, (queries,) in alone.items():
        assert len(shared[batch]) == number
        assert sorted(query for share in shared[batch] for query in share) == sorted(queries)
    assert any(len({len(share) for share in shares}) > 1 for shares in shared.values()), "no batch was shared unevenly"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lora", "full"])
def test_a_run_goes_on_with_another_number_of_processes(runs: Path, recipes: dict[str, Recipe], tmp_path: Path, name: str) -> None:
    """From two to four to one, each time from a checkpoint in the middle; the recipe is the one that the run was started with."""
    shutil.copytree(runs / f"{name}-2", tmp_path / "run")
    recipe = among(recipes[name], 2, sharded=name == "full")
    for number, killed_after in ((4, 2), (1, 4)):
        for later in range(killed_after + 2, 7, 2):
            shutil.rmtree(tmp_path / "run" / f"checkpoint-{later}")
        in_processes(number, {"run": {"recipe": replace(recipe, fsdp=recipe.fsdp and number > 1), "resume": True}}, tmp_path)
        written = json.loads((tmp_path / "run" / "recipe.json").read_text())
        assert (written["queries"], written["processes"]) == (4, 2)
    assert set(queries_seen(tmp_path, "run")) == {2, 3, 4, 5}
    assert_same_run(tmp_path / "run", runs / f"{name}-1", WEIGHTS[name])


@pytest.mark.slow
@pytest.mark.skipif(not torch.backends.cpu.get_cpu_capability().startswith("AVX512"), reason="this processor has no fast bfloat16")
def test_parts_are_gathered_in_bfloat16_and_kept_in_float32(full: Recipe, tmp_path: Path) -> None:
    half = replace(full, dtype="bfloat16", updates=2, evaluation=None)
    in_processes(1, {"one": {"recipe": half}}, tmp_path)
    in_processes(2, {"two": {"recipe": among(half, 2, sharded=True)}}, tmp_path)
    np.testing.assert_allclose(*(column(tmp_path / name, "loss") for name in ("two", "one")), rtol=2e-2)
    assert {weight.dtype for weight in load_file(tmp_path / "two" / "model.safetensors").values()} == {torch.float32}


_LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "genembed.cli", "train"]


def launched(recipe: Recipe, folder: Path, *more: str) -> subprocess.CompletedProcess[str]:
    """Run the command as a user does, in two processes."""
    file = folder / "recipe.py"
    file.write_text(
        f"from genembed.train.pairs import DataFile\nfrom genembed.train.recipe import Recipe\n\n\ndef run(*files):\n"
        f"    return Recipe(model={recipe.model!r}, files=files or (DataFile(path={recipe.files[0].path!r}),), queries=4, min_steps=2,\n"
        f"                  max_steps=2, query_tokens=64, passage_tokens=64, updates=2, log_every=1)\n"
    )
    return subprocess.run(
        [*_LAUNCH, "-r", f"{file}:run", "-o", str(folder / "run"), *more],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(genembed.__file__).parents[1])},
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )


@pytest.mark.slow
def test_the_first_process_alone_reports_and_shows_a_bar(full: Recipe, tmp_path: Path) -> None:
    done = launched(full, tmp_path, "--json")
    assert done.returncode == 0, done.stderr[-4000:]
    assert json.loads(done.stdout)["updates"] == 2
    assert done.stderr.count("2/2") == 1


@pytest.mark.slow
def test_a_run_that_fails_ends_all_processes_with_its_message(full: Recipe, tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text('{"x": 1}\n')
    done = launched(full, tmp_path, "--data", str(tmp_path / "bad.jsonl"))
    assert done.returncode != 0
    assert "bad.jsonl" in done.stderr


# What a launcher may not ask for


def test_parts_of_weights_are_for_training_all_of_them(full: Recipe) -> None:
    with pytest.raises(ConfigurationError, match=r"fsdp=True with lora=Lora\(rank=4.*leave fsdp out \(DDP\).*--set lora=null"):
        replace(full, fsdp=True, lora=Lora(rank=4))


def test_one_process_has_nobody_to_share_its_weights_with(full: Recipe) -> None:
    with pytest.raises(ConfigurationError, match=r"fsdp=True with one process.*torchrun --nproc-per-node"):
        check_launch(replace(full, fsdp=True), 1)
    check_launch(replace(full, fsdp=True), 2)


@pytest.mark.parametrize("variable", ["ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"])
def test_accelerates_own_sharding_is_refused(full: Recipe, monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    monkeypatch.setenv(variable, "true")
    with pytest.raises(ConfigurationError, match=r"accelerate launch was told to use .*genembed train --fsdp"):
        check_launch(full, 2)


def test_accelerates_precision_must_be_the_recipes(full: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would change the arithmetic without a word."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    with pytest.raises(ConfigurationError, match=r"mixed_precision=bf16, and the recipe dtype='float32'"):
        check_launch(full, 2)
    check_launch(replace(full, dtype="bfloat16"), 2)


def test_a_model_without_layers_cannot_be_cut() -> None:
    with pytest.raises(ConfigurationError, match=r"no layers to be gathered one at a time"):
        shard(torch.nn.Linear(2, 2), "cpu", bfloat16=False)


@pytest.mark.parametrize(
    ("queries", "processes", "expected"),
    [(4, 2, 4), (4, 4, 2), (4, 1, 8), (8, 1, 8), (2, 4, 2)],
    ids=["the same", "more", "fewer", "said by the user, one", "said by the user, four"],
)
def test_the_batch_of_all_processes_stays_what_it_was(full: Recipe, queries: int, processes: int, expected: int) -> None:
    before = {**recipe_json(replace(full, queries=4)), "processes": 2}
    assert continued(replace(full, queries=queries), before, processes).queries == expected


@pytest.mark.parametrize(
    ("changes", "processes", "message"),
    [
        ({}, 3, r"batches of 8 pairs, 4 in each of 2 processes, which 3 processes cannot share equally; go on with one of 1, 2, 4, 8\."),
        ({"queries": 3}, 4, r"4 in each of 2 processes; queries=3 in 4 would be 12\. Leave queries as it was"),
        ({"gather": False}, 4, r"each contrasted by itself \(gather=False\): 4 processes would learn something else"),
    ],
)
def test_a_batch_that_cannot_be_shared_is_refused_with_the_numbers(
    full: Recipe, changes: dict[str, object], processes: int, message: str
) -> None:
    before = {**recipe_json(replace(full, queries=4)), "processes": 2}
    with pytest.raises(ConfigurationError, match=message):
        continued(replace(full, **{"queries": 4, **changes}), before, processes)


# Shares of a batch


def pairs(number: int) -> list[Pair]:
    return [
        Pair(query=f"query {n} " * (n + 1), positives=(f"p{n}",), negatives=(), instruction=None, source="f", symmetric=False, score=None)
        for n in range(number)
    ]


@pytest.fixture(scope="module")
def collator(full: Recipe) -> Callable[..., PairCollator]:
    settings = doubles.settings_of("qwen2")
    return lambda **changes: PairCollator(replace(full, **changes), PromptTokenizer(doubles.tokenizer(), settings), settings)


@pytest.mark.parametrize("processes", [1, 2, 3, 4])
def test_a_batch_is_cut_alike_whatever_the_number_of_processes(collator: Callable[..., PairCollator], processes: int) -> None:
    """Guards against a cut to a multiple of the processes, by which a run that goes on with others would learn from other pairs."""
    shares = [collator(batch_tokens=400)(0, pairs(12), slice(process, None, processes)).queries for process in range(processes)]
    assert sum(map(len, shares)) == 7
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_batches_side_by_side_are_of_one_size(collator: Callable[..., PairCollator]) -> None:
    assert [len(collator(batch_tokens=400, gather=False)(0, pairs(12), slice(p, None, 3)).queries) for p in range(3)] == [2, 2, 2]


def test_no_process_is_left_without_a_pair(collator: Callable[..., PairCollator]) -> None:
    unreadable = [replace(pair, instruction="very long " * 200) for pair in pairs(4)[:2]] + pairs(4)[2:]
    with pytest.raises(DataError, match=r"f: no batch can be made, as 2 of its pairs cannot be read"):
        collator()(0, unreadable, slice(0, None, 4))


@pytest.mark.parametrize("shares", [(3, 3), (4, 2), (1, 5), (1, 2, 3)])
def test_uneven_shares_of_a_batch_have_its_loss_as_their_mean(shares: Sequence[int]) -> None:
    """In every term: those that are means over the queries are weighted, the regulariser is taken of the weighted step losses."""
    torch.manual_seed(0)
    count = sum(shares)
    z, taught = (torch.nn.functional.normalize(torch.randn(2, count, *shape, dtype=torch.float64), dim=-1) for shape in ((4, 5), (5,)))
    objective = replace(EVERYTHING, regulariser=0.7)
    whole = objective(z[0], z[1], positives=torch.arange(count), teacher=Teacher(taught[0], taught[1]))
    places = torch.arange(count).split(list(shares))

    def value(own: torch.Tensor, joined: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, torch.Tensor]:
        part = Part(len(own) * len(shares) / count, joined)
        found = objective(z[0][own], z[1], positives=own, teacher=Teacher(taught[0][own], taught[1]), part=part)
        return {"total": found.total, **found.parts}

    steps = torch.stack([value(own, lambda losses: losses)["step_losses"] for own in places]).mean(0)
    values = [value(own, lambda _losses: steps) for own in places]
    for name, expected in {"total": whole.total, **whole.parts}.items():
        torch.testing.assert_close(torch.stack([own[name] for own in values]).mean(0), expected, rtol=1e-12, atol=1e-12)
    assert not math.isclose(float(whole.parts["regulariser"]), 0.0)

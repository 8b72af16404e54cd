"""What is measured and kept while a model is trained, and which recipes are refused."""

from __future__ import annotations

import errno
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import TrainerControl, TrainerState

import doubles
from genembed import ConfigurationError
from genembed.errors import NonFiniteError, TrainingError
from genembed.settings import GIRCSE
from genembed.tokens import PromptTokenizer, TokenIds
from genembed.train.callbacks import KeepBest, OwnIntervals, ProgressBar
from genembed.train.collate import PairCollator
from genembed.train.heldout import HeldOut
from genembed.train.model import TrainableEmbedder, build
from genembed.train.objective import Objective
from genembed.train.pairs import DataFile, Pair
from genembed.train.recipe import Evaluation, Lora, Recipe
from genembed.train.recipes import RECIPES
from genembed.train.trajectories import Trajectories

RECIPE = Recipe(model="m", files=(DataFile(path="pairs.jsonl"),), updates=10, log_every=1)


def pair(query: str, positive: str, *negatives: str, score: float | None = None, instruction: str | None = None) -> Pair:
    return Pair(
        query=query, positives=(positive,), negatives=negatives, instruction=instruction, source="file", symmetric=False, score=score
    )


def held_out(*pairs: Pair, steps: tuple[int, ...] = (1,)) -> HeldOut:
    settings = doubles.settings_of("qwen2")
    collator = PairCollator(RECIPE, PromptTokenizer(doubles.tokenizer(), settings), settings)
    return HeldOut({"file": list(pairs)}, collator, Evaluation(steps=steps))


_WRITTEN: dict[str, list[Any]] = {}


@pytest.fixture
def known() -> dict[str, list[Any]]:
    """Let every text have the vector that is written down here, or one for each step; the other dimensions are 0."""
    _WRITTEN.clear()
    return _WRITTEN


def measured(quality: HeldOut) -> dict[str, float]:
    def refine(prompts: Sequence[TokenIds], steps: int) -> Trajectories:
        vectors = torch.zeros(len(prompts), steps, doubles.HIDDEN)
        for row, ids in enumerate(prompts):
            text = str(doubles.tokenizer().decode(ids, skip_special_tokens=True)).strip()
            own = torch.tensor(_WRITTEN[text], dtype=torch.float32)
            vectors[row, :, : own.shape[-1]] = own
        return Trajectories(vectors, vectors[:, 0])

    return quality.measure(refine)


# Held-out quality


def test_a_wrong_text_that_several_pairs_have_counts_once(known: dict[str, list[Any]]) -> None:
    known |= {"a": [1, 0], "b": [0, 1], "near": [1, 0.1], "right": [1, 0.5], "own": [0, 1]}
    pairs = (pair("a", "right", "near"), pair("b", "own", "near"))
    assert measured(held_out(*pairs))["file_k1"] == pytest.approx(100 * (1 / math.log2(3) + 1) / 2)


def test_a_positive_that_two_queries_share_is_no_wrong_answer(known: dict[str, list[Any]]) -> None:
    known |= {"a": [1, 0], "b": [1, 0], "c": [0, 1], "shared": [1, 0], "own": [0, 1]}
    assert measured(held_out(pair("a", "shared"), pair("b", "shared"), pair("c", "own"))) == {"mean_k1": 100, "file_k1": 100}
    known["alike"] = [1, 0]  # another text at the same place is a wrong answer: a and b find theirs second
    second = 100 / math.log2(3)
    assert measured(held_out(pair("a", "shared", "alike"), pair("b", "shared")))["mean_k1"] == pytest.approx(second)


def test_a_negative_that_repeats_the_positive_is_left_out(known: dict[str, list[Any]]) -> None:
    known |= {"a": [1, 0], "b": [0, 1], "first": [1, 0], "second": [0, 1]}
    assert measured(held_out(pair("a", "first", "first", "second"), pair("b", "second", "first")))["mean_k1"] == 100


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("score", [None, 0.5])
@pytest.mark.parametrize("text", ["a", "first"])
def test_vectors_that_are_not_finite_are_no_quality(known: dict[str, list[Any]], bad: float, score: float | None, text: str) -> None:
    known |= {"a": [1, 0], "b": [0, 1], "first": [1, 0], "second": [0, 1]}
    known[text] = [[1, 0], [bad, 0]]  # at the second step alone
    quality = held_out(pair("a", "first", score=score), pair("b", "second", score=score), steps=(1, 2))
    with pytest.raises(NonFiniteError, match=r"^file: 1 of 4 held-out vectors at K=2 are not finite.*smaller learning rate"):
        measured(quality)


def test_held_out_queries_carry_their_instructions() -> None:
    pairs = [pair(f"a{number}", "first", instruction="Find it") for number in range(2)]
    prompt = held_out(*pairs).tasks["file"].queries[0]
    assert "Find it" in doubles.tokenizer().decode(prompt)


def test_a_model_without_a_vector_at_k_0_is_refused_where_its_folder_says_so(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Guards against an evaluation of zero vectors: they tie with everything, and every score is 0."""
    base = doubles.saved("qwen2", tmp_path_factory.getbasetemp() / "models")
    with pytest.raises(ConfigurationError, match=r"steps=\(0, 1\): the model pools generated states alone"):
        build(replace(RECIPE, model=str(base), evaluation=Evaluation(every=1, steps=(0, 1))), lambda _tokenizer: [])


# What is kept


@pytest.fixture
def model(tmp_path_factory: pytest.TempPathFactory) -> TrainableEmbedder:
    base = doubles.saved("qwen2", tmp_path_factory.getbasetemp() / "models")
    return build(replace(RECIPE, model=str(base), lora=Lora(rank=2, alpha=2)), lambda _tokenizer: [])


def keeper(model: TrainableEmbedder, folder: Path, *, patience: int = 0) -> KeepBest:
    return KeepBest(model, replace(RECIPE, evaluation=Evaluation(patience=patience)), folder, "mean_k5")


def evaluated(best: KeepBest, *scores: float, first: bool = True) -> TrainerControl:
    """Report these scores at the updates 1, 2, ... of one process, the last one just now."""
    history = [{"step": step, "eval_mean_k5": score} for step, score in enumerate(scores, start=1)]
    state = SimpleNamespace(is_world_process_zero=first, log_history=history, global_step=len(scores))
    control = TrainerControl()
    best.on_evaluate(None, state, control)
    return control


def test_the_best_weights_are_kept_until_there_are_better_ones(model: TrainableEmbedder, tmp_path: Path) -> None:
    best = keeper(model, tmp_path)
    for scores, kept in [((1.0,), 1), ((1.0, 1.0), 1), ((1.0, 1.0, 2.0), 3), ((1.0, 1.0, 2.0, 0.0), 3)]:
        evaluated(best, *scores)
        assert f'"step": {kept}' in (tmp_path / "best" / "score.json").read_text()
    assert [path.name for path in tmp_path.iterdir()] == ["best"]


@pytest.mark.parametrize("moment", ["moved aside", "renamed"])
def test_a_run_that_is_killed_while_it_keeps_the_best_still_has_one(
    model: TrainableEmbedder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    """The old folder was deleted before the new one had its name."""
    evaluated(keeper(model, tmp_path), 1.0)
    rename = Path.rename

    def killed(path: Path, target: Path) -> Path:
        moved = rename(path, target)
        if (target.name == "best") == (moment == "renamed"):
            raise KeyboardInterrupt
        return moved

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", killed)
        with pytest.raises(KeyboardInterrupt):
            evaluated(keeper(model, tmp_path), 1.0, 2.0)
    keeper(model, tmp_path).on_train_begin(None, SimpleNamespace(is_world_process_zero=True), None)
    assert f'"step": {1 if moment == "moved aside" else 2}' in (tmp_path / "best" / "score.json").read_text()
    assert (tmp_path / "best" / "adapter_model.safetensors").is_file()
    assert not (tmp_path / ".genembed-old-best").exists()


def test_the_best_weights_stay_when_the_disk_is_full(model: TrainableEmbedder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    evaluated(keeper(model, tmp_path), 1.0)

    def full(*_arguments: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(TrainableEmbedder, "save", full)
    with pytest.raises(TrainingError, match=r"best could not be written: the disk is full"):
        evaluated(keeper(model, tmp_path), 1.0, 2.0)
    assert '"step": 1' in (tmp_path / "best" / "score.json").read_text()
    assert [path.name for path in tmp_path.iterdir()] == ["best"]


# What is shown


def test_a_bar_is_closed_once(capsys: pytest.CaptureFixture[str]) -> None:
    bar = ProgressBar()
    bar.close()  # before it is shown
    bar.on_train_begin(None, SimpleNamespace(is_world_process_zero=True, max_steps=3, global_step=0), None)
    shown = bar.bar
    assert shown is not None
    bar.close()
    assert shown.disable  # tqdm's mark of a closed bar
    lines = capsys.readouterr().err.count("\n")
    bar.on_train_end(None, None, None)
    assert (lines, capsys.readouterr().err) == (1, "")


def test_a_resumed_run_has_the_intervals_of_its_own_recipe() -> None:
    state = TrainerState(max_steps=100, save_steps=50, logging_steps=10, eval_steps=50)
    OwnIntervals().on_train_begin(SimpleNamespace(save_steps=20, logging_steps=5, eval_steps=None), state, None)
    assert (state.save_steps, state.logging_steps, state.eval_steps) == (20, 5, 50)


# Recipes

ONE_PASS = {"min_steps": 0, "max_steps": 0}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"log_every": 10, "evaluation": Evaluation(every=15)},
            r"evaluation.every=15 with log_every=10: .*make evaluation.every a multiple of log_every",
        ),
        ({"min_steps": 0}, r"min_steps=0, max_steps=5: .*use min_steps=1, or max_steps=0"),
        ({"teacher": "mini"}, r"teacher='mini': .*objective.distillation or objective.false_negative_margin, or use teacher=None"),
        (
            {"objective": Objective(self_distillation=0.1, self_distillation_step=5)},
            r"max_steps=5: no step comes after objective.self_distillation_step=5.*use a larger max_steps",
        ),
        ({"warmup_ratio": 1.0}, r"warmup_ratio=1.0: .*\[0, 1\)"),
        ({"warmup_ratio": -0.1}, r"warmup_ratio=-0.1"),
        ({"warmup_ratio": math.nan}, r"warmup_ratio=nan"),
        ({"max_gradient_norm": 0.0}, r"max_gradient_norm=0.0: .*must be above 0"),
        ({"max_gradient_norm": math.nan}, r"max_gradient_norm=nan"),
        ({"learning_rate": -1e-5}, r"learning_rate=-1e-05: must not be negative"),
        ({"head_learning_rate": math.nan}, r"head_learning_rate=nan"),
        ({"weight_decay": math.inf}, r"weight_decay=inf"),
        ({"length_limits": (64, 0)}, r"length_limits=\(64, 0\): .*at least 1, or none: \(\)"),
        ({**ONE_PASS, "evaluation": Evaluation(steps=(0, 1))}, r"steps=\(0, 1\) with max_steps=0: .*use steps=\(0,\)"),
        *(
            (
                {"settings": settings, "evaluation": Evaluation(steps=(0, 1))},
                r"steps=\(0, 1\): .*no vector at K=0 to be measured; leave 0 out",
            )
            for settings in ("gircse", GIRCSE)
        ),
        ({"settings": "gircsee"}, r"preset='gircsee' is unknown"),
    ],
)
def test_a_recipe_that_cannot_work_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        replace(RECIPE, **changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"save_every": 25, "log_every": 10, "evaluation": Evaluation(every=20)},
        {"settings": "laser", "evaluation": Evaluation(every=1, steps=(0, 1))},
        {"teacher": "mini", "objective": Objective(distillation=0.1)},
        {"teacher": "mini", "objective": Objective(false_negative_margin=0.0)},
        {"objective": Objective(self_distillation=0.1, self_distillation_step=4)},
        {"learning_rate": 0.0, "warmup_ratio": 0.0, "max_gradient_norm": math.inf, "length_limits": (1,)},
        {**ONE_PASS, "evaluation": Evaluation(steps=(0,))},
    ],
)
def test_a_recipe_at_the_edge_of_what_works_is_accepted(changes: dict[str, Any]) -> None:
    made = replace(RECIPE, **changes)
    assert {name: getattr(made, name) for name in changes} == changes


@pytest.mark.parametrize("name", RECIPES)
def test_the_papers_recipes_pass_the_checks(name: str) -> None:
    assert RECIPES[name](DataFile(path="a.jsonl")).max_steps == 5

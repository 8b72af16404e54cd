"""A training run: it learns, can be killed and resumed, and leaves a folder that `genembed.load` reads."""

from __future__ import annotations

import csv
import errno
import gc
import json
import os
import random
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import doubles
import genembed
from genembed import ConfigurationError, FixedSteps, Pooling
from genembed.errors import NonFiniteError, TrainingError
from genembed.train import pairs as pairs_of_files
from genembed.train import run as running
from genembed.train.batches import BatchStream
from genembed.train.model import build
from genembed.train.objective import Objective
from genembed.train.overlap import TextFilter
from genembed.train.pairs import DataFile
from genembed.train.recipe import Evaluation, Lora, Recipe
from genembed.train.run import train
from genembed.train.trainer import StepwiseTrainer

WORDS = tuple("refine vector claim glucose business trip language model text step stable query document patient".split())  # noqa: SIM905


@pytest.fixture
def pairs(tmp_path: Path) -> DataFile:
    """Pairs that a model can learn: the positive repeats the query's words in another order."""
    rng, path = random.Random(0), tmp_path / "pairs.jsonl"
    with path.open("w") as file:
        for _ in range(60):
            words = rng.sample(WORDS, 4)
            negative = " ".join(rng.sample(WORDS, 4))
            row = {"query": " ".join(words), "pos": [" ".join(words[::-1])], "neg": [negative], "prompt": "Find", "type": "asymmetric"}
            file.write(json.dumps(row) + "\n")
    return DataFile(path=str(path))


@pytest.fixture
def recipe(pairs: DataFile, tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    return Recipe(
        model=str(doubles.saved("qwen2", tmp_path_factory.getbasetemp() / "models")),
        files=(pairs,),
        objective=Objective(temperature=0.1),
        queries=4,
        min_steps=2,
        max_steps=3,
        lora=Lora(rank=4, alpha=8),
        learning_rate=3e-3,
        updates=6,
        save_every=3,
        log_every=1,
        instruction_share=0.5,
    )


def history(folder: Path) -> list[dict[str, str]]:
    with (folder / "history.csv").open() as file:
        return list(csv.DictReader(file))


def losses(folder: Path) -> list[float]:
    return [float(row["loss"]) for row in history(folder) if row.get("loss")]


def parts(folder: Path) -> list[tuple[float, ...]]:
    """Return the parts of the loss of every log line."""
    names = ("step_losses_first", "step_losses_last", "regulariser")
    return [tuple(float(row[name]) for name in names) for row in history(folder) if row.get("loss")]


def test_a_run_that_is_done_has_closed_its_files(recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reader left open is finalised when the interpreter ends, with errors of modules that are gone by then."""
    states, read_rows = Counter[str](), pairs_of_files.read_rows

    def watched(*arguments: Any) -> Iterator[Any]:
        states["opened"] += 1
        try:
            yield from read_rows(*arguments)
        finally:
            states["closed"] += 1

    monkeypatch.setattr(pairs_of_files, "read_rows", watched)
    monkeypatch.setattr(running, "BatchStream", partial(BatchStream, shuffle_buffer=4))  # not at the end of the file when training is
    gc.disable()  # the collector might close what nobody else does
    try:
        train(replace(recipe, updates=2, save_every=2), tmp_path / "run")
    finally:
        gc.enable()
    assert states["opened"] == states["closed"] > 0


def test_a_run_learns_and_leaves_a_folder_that_load_reads(recipe: Recipe, tmp_path: Path) -> None:
    model = train(replace(recipe, updates=120, save_every=120), tmp_path / "run")
    found = losses(tmp_path / "run")
    assert np.mean(found[-20:]) < 0.75 * np.mean(found[:20])  # measured: 0.55
    loaded = genembed.load(tmp_path / "run")
    texts = ["refine vector claim", "business trip"]
    with torch.no_grad():
        expected = model(model.tokenizer(texts).ids, 3).vectors[:, -1].numpy()
    np.testing.assert_allclose(loaded.encode(texts, steps=3), expected, atol=1e-5)
    assert {path.name for path in (tmp_path / "run").iterdir()} >= {
        "adapter_model.safetensors",
        "genembed.json",
        "recipe.json",
        "curves.png",
    }


@pytest.mark.parametrize("log_every", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_run_that_was_killed_goes_on_with_the_same_losses(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, log_every: int
) -> None:
    """Also where its checkpoint, that of update 3, lies between two log lines."""
    recipe = replace(recipe, log_every=log_every)
    train(recipe, tmp_path / "whole")
    compute, calls = StepwiseTrainer.compute_loss, []

    def killed(self: StepwiseTrainer, *arguments: Any, **options: Any) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 5:  # after the checkpoint of update 3, in the middle of update 5
            raise KeyboardInterrupt
        return compute(self, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(StepwiseTrainer, "compute_loss", killed)
        with pytest.raises(KeyboardInterrupt):
            train(recipe, tmp_path / "broken")
    train(recipe, tmp_path / "broken", resume=True)
    assert losses(tmp_path / "broken") == losses(tmp_path / "whole")
    assert parts(tmp_path / "broken") == parts(tmp_path / "whole")
    assert len(losses(tmp_path / "whole")) == 6 // log_every
    first, second = (genembed.load(tmp_path / name).encode(["glucose patient"]) for name in ("whole", "broken"))
    np.testing.assert_array_equal(first, second)


def test_a_checkpoint_is_complete_or_absent_when_the_disk_is_full(recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save, count = StepwiseTrainer._save_optimizer_and_scheduler, []

    def full(self: StepwiseTrainer, output_dir: str) -> None:
        count.append(1)
        if len(count) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        save(self, output_dir)

    with monkeypatch.context() as patch:
        patch.setattr(StepwiseTrainer, "_save_optimizer_and_scheduler", full)
        with pytest.raises(TrainingError, match=r"checkpoint-6 could not be written: the disk is full.*--resume"):
            train(recipe, tmp_path / "run")
    assert [path.name for path in (tmp_path / "run").glob("*checkpoint*")] == ["checkpoint-3"]
    train(recipe, tmp_path / "run", resume=True)
    assert len(losses(tmp_path / "run")) == 6


def test_what_a_killed_run_left_half_written_is_ignored(recipe: Recipe, tmp_path: Path) -> None:
    half = tmp_path / "run" / ".incomplete" / "checkpoint-3"
    half.mkdir(parents=True)
    (half / "adapter_model.safetensors").write_bytes(b"half")
    train(recipe, tmp_path / "run", resume=True)
    assert not half.exists()
    assert len(losses(tmp_path / "run")) == 6


def test_a_checkpoint_that_a_killed_run_had_moved_aside_is_gone_on_from(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards against a run that starts over: its newest checkpoint had another name at the moment of the kill."""
    train(replace(recipe, keep=1), tmp_path / "run")
    (tmp_path / "run" / "checkpoint-6").rename(tmp_path / "run" / ".genembed-old-checkpoint-6")
    compute, numbers = StepwiseTrainer.compute_loss, []

    def watched(self: StepwiseTrainer, model: Any, inputs: Any, *arguments: Any, **options: Any) -> torch.Tensor:
        numbers.append(inputs["batch"].number)
        return compute(self, model, inputs, *arguments, **options)

    monkeypatch.setattr(StepwiseTrainer, "compute_loss", watched)
    train(replace(recipe, keep=1, updates=8), tmp_path / "run", resume=True)
    assert numbers == [6, 7]


def test_a_folder_with_a_run_is_not_overwritten(recipe: Recipe, tmp_path: Path) -> None:
    train(recipe, tmp_path / "run")
    with pytest.raises(ConfigurationError, match=r"holds a run \(checkpoint-6\).*--resume"):
        train(recipe, tmp_path / "run")
    with pytest.raises(ConfigurationError, match=r"started with another learning_rate"):
        train(replace(recipe, learning_rate=1e-3), tmp_path / "run", resume=True)


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_batch(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    objective = StepwiseTrainer._objective

    def broken(self: StepwiseTrainer, vectors: torch.Tensor, *rest: Any) -> Any:
        return objective(self, vectors * (torch.nan if self.state.global_step == 2 else 1.0), *rest)

    monkeypatch.setattr(StepwiseTrainer, "_objective", broken)
    with pytest.raises(NonFiniteError, match=r"loss of batch 2 is nan; its texts are in .*bad_batch.json"):
        train(recipe, tmp_path / "run")
    kept = json.loads((tmp_path / "run" / "bad_batch.json").read_text())
    assert [(batch["batch"], len(batch["pairs"])) for batch in kept["batches"]] == [(2, 4)]


def test_a_gradient_that_is_not_finite_stops_the_run_before_it_spoils_the_weights(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards against a finite loss with an infinite gradient: the next checkpoint would hold NaN and push the good one out."""
    compute = StepwiseTrainer.compute_loss

    def broken(self: StepwiseTrainer, *arguments: Any, **options: Any) -> torch.Tensor:
        loss = compute(self, *arguments, **options)
        if self.state.global_step == 5:
            loss.register_hook(lambda gradient: gradient * torch.inf)
        return loss

    monkeypatch.setattr(StepwiseTrainer, "compute_loss", broken)
    with pytest.raises(NonFiniteError, match=r"gradient norm of batch 5"):
        train(replace(recipe, keep=1), tmp_path / "run")
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-3"]


def test_a_pair_whose_instruction_leaves_no_room_is_left_out(recipe: Recipe, pairs: DataFile, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in Path(pairs.path).read_text().splitlines()]
    rows[7]["prompt"] = "very long " * 200
    Path(pairs.path).write_text("\n".join(json.dumps(row) for row in rows))
    train(replace(recipe, query_tokens=64, instruction_share=1.0, updates=30, save_every=30), tmp_path / "run")
    assert len(losses(tmp_path / "run")) == 30


def test_pairs_that_a_batch_had_no_room_for_are_counted_and_reported(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    sizes, compute = [], StepwiseTrainer.compute_loss

    def watched(self: StepwiseTrainer, model: Any, inputs: Any, *arguments: Any, **options: Any) -> torch.Tensor:
        sizes.append(len(inputs["batch"].queries))
        return compute(self, model, inputs, *arguments, **options)

    monkeypatch.setattr(StepwiseTrainer, "compute_loss", watched)
    train(replace(recipe, batch_tokens=60), tmp_path / "run")
    assert 0 < sum(sizes) < 24
    assert f"batch_tokens=60 left no room in their batch: {{'pairs': {24 - sum(sizes)}}}" in caplog.text


@pytest.mark.slow
def test_pairs_that_share_texts_with_too_many_others_are_reported(
    recipe: Recipe, pairs: DataFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [json.loads(line) for line in Path(pairs.path).read_text().splitlines()]
    Path(pairs.path).write_text("".join(json.dumps({**row, "pos": ["the same"]} if n % 2 else row) + "\n" for n, row in enumerate(rows)))
    monkeypatch.setattr(running, "BatchStream", partial(BatchStream, shuffle_buffer=2))
    train(replace(recipe, updates=10), tmp_path / "run")
    assert re.search(r"share texts with too many others: \{'pairs': [1-9]\d*\}", caplog.text)


def test_a_run_goes_on_with_the_texts_it_excluded_alone(recipe: Recipe, tmp_path: Path) -> None:
    train(recipe, tmp_path / "run", exclude=TextFilter.from_texts(["something else"]))
    with pytest.raises(ConfigurationError, match=r"started with another excluded"):
        train(recipe, tmp_path / "run", resume=True)


_FULL = """
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
from test_train_run import small_run
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[4]), int(sys.argv[4])))
small_run(*sys.argv[1:4])
"""


def small_run(model: str, pairs: str, output: str) -> None:
    run = Recipe(model=model, files=(DataFile(path=pairs),), queries=4, lora=Lora(rank=4), updates=2, save_every=1, log_every=1)
    train(run, Path(output))


@pytest.mark.slow
def test_a_file_that_cannot_grow_is_reported_as_a_full_disk(recipe: Recipe, pairs: DataFile, tmp_path: Path) -> None:
    """Writers of tensors do not raise OSError: the message must come all the same, and nothing half written stay."""
    arguments = [sys.executable, "-c", _FULL, recipe.model, pairs.path, str(tmp_path / "run"), "40000"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(arguments, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert "TrainingError" in done.stderr
    assert "the disk is full" in done.stderr
    assert not list((tmp_path / "run").glob("*checkpoint*"))


@pytest.mark.slow
@pytest.mark.skipif(not torch.backends.cpu.get_cpu_capability().startswith("AVX512"), reason="this processor has no fast bfloat16")
def test_a_run_in_bfloat16_learns_as_one_in_float32_and_keeps_its_weights_in_float32(recipe: Recipe, tmp_path: Path) -> None:
    half, whole = tmp_path / "half", tmp_path / "whole"
    train(replace(recipe, dtype="bfloat16"), half)
    train(recipe, whole)
    np.testing.assert_allclose(losses(half), losses(whole), rtol=0.2)  # refinement amplifies the rounding
    assert losses(half) != losses(whole)
    weights = load_file(half / "adapter_model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.float32}


@pytest.mark.slow
def test_gradcache_gives_the_losses_of_the_whole_batch(recipe: Recipe, tmp_path: Path) -> None:
    train(recipe, tmp_path / "whole")
    train(replace(recipe, chunk=3), tmp_path / "chunks")
    np.testing.assert_allclose(losses(tmp_path / "chunks"), losses(tmp_path / "whole"), rtol=2e-4)


@pytest.mark.slow
def test_checkpointed_layers_give_the_same_losses(recipe: Recipe, tmp_path: Path) -> None:
    train(recipe, tmp_path / "plain")
    train(replace(recipe, checkpoint_layers=True), tmp_path / "layers")
    np.testing.assert_allclose(losses(tmp_path / "layers"), losses(tmp_path / "plain"), rtol=1e-5)


@pytest.mark.slow
def test_a_logged_loss_is_the_mean_of_all_batches_since_the_line_before(recipe: Recipe, tmp_path: Path) -> None:
    train(replace(recipe, learning_rate=0.0), tmp_path / "every")
    train(replace(recipe, learning_rate=0.0, updates=5, log_every=2, save_every=5), tmp_path / "two")
    expected = np.array(losses(tmp_path / "every")).reshape(3, 2).mean(1)
    np.testing.assert_allclose(losses(tmp_path / "two"), expected[:2], rtol=1e-6)
    train(replace(recipe, learning_rate=0.0, log_every=2), tmp_path / "two", resume=True)
    np.testing.assert_allclose(losses(tmp_path / "two"), expected, rtol=1e-6)
    np.testing.assert_allclose(parts(tmp_path / "two"), np.array(parts(tmp_path / "every")).reshape(3, 2, 3).mean(1), rtol=1e-5, atol=1e-7)


@pytest.mark.slow
def test_accumulated_batches_make_one_update(recipe: Recipe, tmp_path: Path) -> None:
    train(replace(recipe, accumulation=2, updates=3), tmp_path / "run")
    train(replace(recipe, learning_rate=0.0), tmp_path / "single")
    single = losses(tmp_path / "single")
    train(replace(recipe, learning_rate=0.0, accumulation=2, updates=3), tmp_path / "double")
    np.testing.assert_allclose(losses(tmp_path / "double"), [np.mean(single[i : i + 2]) for i in (0, 2, 4)], rtol=1e-4)
    assert len(losses(tmp_path / "run")) == 3
    of_single = np.array(parts(tmp_path / "single"))
    np.testing.assert_allclose(parts(tmp_path / "double"), of_single.reshape(3, 2, 3).mean(1), rtol=1e-5, atol=1e-7)


def test_quality_on_held_out_pairs_is_measured_at_every_k_and_the_best_is_kept(recipe: Recipe, tmp_path: Path) -> None:
    evaluation = Evaluation(every=2, share=0.2, steps=(1, 3, 5), patience=2)
    train(replace(recipe, updates=40, save_every=40, evaluation=evaluation), tmp_path / "run")
    rows = [row for row in history(tmp_path / "run") if row.get("eval_mean_k5")]
    scores = {int(row["step"]): float(row["eval_mean_k5"]) for row in rows}
    best = json.loads((tmp_path / "run" / "best" / "score.json").read_text())
    assert best["eval_mean_k5"] == pytest.approx(max(scores.values()))
    assert all(0 <= float(row[f"eval_mean_k{k}"]) <= 100 for row in rows for k in (1, 3, 5))
    np.testing.assert_array_equal(*(genembed.load(tmp_path / "run" / part).encode(["trip"]) for part in (".", "best")))


@pytest.mark.slow
def test_scored_pairs_are_ranked(recipe: Recipe, tmp_path: Path) -> None:
    rng, path = random.Random(1), tmp_path / "scored.jsonl"
    with path.open("w") as file:
        for _ in range(40):
            words, shared = rng.sample(WORDS, 8), rng.randint(0, 4)
            second = words[:shared] + words[4 : 8 - shared]
            file.write(json.dumps({"sentence1": " ".join(words[:4]), "sentence2": " ".join(second[::-1]), "score": shared}) + "\n")
    run = replace(
        recipe,
        files=(DataFile(path=str(path), max_score=4.0),),
        updates=30,
        save_every=30,
        queries=8,
        evaluation=Evaluation(every=10, share=0.3, steps=(1, 3)),
    )
    train(run, tmp_path / "run")
    found = losses(tmp_path / "run")
    assert np.mean(found[-5:]) < 0.8 * np.mean(found[:5])


def test_excluded_texts_are_never_trained_on(recipe: Recipe, pairs: DataFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [json.loads(line) for line in Path(pairs.path).read_text().splitlines()]
    exclude, seen = TextFilter.from_texts([row["query"].upper() for row in rows[:40]]), set()
    compute = StepwiseTrainer.compute_loss

    def watched(self: StepwiseTrainer, model: Any, inputs: Any, *arguments: Any, **options: Any) -> torch.Tensor:
        seen.update(inputs["batch"].texts)
        return compute(self, model, inputs, *arguments, **options)

    monkeypatch.setattr(StepwiseTrainer, "compute_loss", watched)
    train(recipe, tmp_path / "run", exclude=exclude)
    assert seen
    assert seen.isdisjoint(row["query"] for row in rows[:40])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        (genembed.ModelSettings(pooling=Pooling(kind="last"), halt=FixedSteps(0)), 0),
        (genembed.ModelSettings(pooling=Pooling(kind="mean"), attention="bidirectional", halt=FixedSteps(0)), 0),
        (genembed.ModelSettings(pooling=Pooling(kind="generated", pool_prompt_state=True)), 2),
        (genembed.ModelSettings(attention="prefix"), 2),
        (genembed.ModelSettings(tokens="hard"), 2),
    ],
    ids=["causal-eos", "bidirectional-avg", "laser", "prefix", "hard-tokens"],
)
def test_baselines_are_settings(settings: genembed.ModelSettings, steps: int, recipe: Recipe, tmp_path: Path) -> None:
    train(replace(recipe, settings=settings, min_steps=steps, max_steps=steps), tmp_path / "run")
    assert np.isfinite(losses(tmp_path / "run")).all()
    loaded, base = genembed.load(tmp_path / "run"), genembed.load(recipe.model, preset=settings)
    assert loaded.settings == settings
    assert not np.allclose(loaded.encode(["glucose"], steps=steps), base.encode(["glucose"], steps=steps), atol=1e-3)


def test_all_weights_can_be_trained(recipe: Recipe, tmp_path: Path) -> None:
    train(replace(recipe, lora=None, learning_rate=1e-3), tmp_path / "run")
    assert (tmp_path / "run" / "model.safetensors").is_file()
    before, after = (genembed.load(path).encode(["glucose"]) for path in (recipe.model, tmp_path / "run"))
    assert not np.allclose(before, after, atol=1e-3)


def test_an_encoder_gets_a_head_and_is_distilled_from_its_own_start(
    recipe: Recipe, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    base = tmp_path / "base"
    made = doubles.model("bert")
    made.bert.save_pretrained(base)  # type: ignore[union-attr]
    doubles.tokenizer().save_pretrained(base)
    run = replace(
        recipe,
        model=str(base),
        settings=replace(doubles.PREFIX, adapter_positions="generated"),
        lora=Lora(rank=4, alpha=8, targets=r"bert\.encoder\..*(query|value|dense)"),
        objective=Objective(temperature=0.05, distillation=1.0, false_negative_margin=0.0),
        fit_head=40,
        query_tokens=64,
        passage_tokens=64,
    )
    train(run, tmp_path / "run")
    loaded, plain = genembed.load(tmp_path / "run"), genembed.load(base, preset=replace(doubles.PREFIX, halt=FixedSteps(0)))
    np.testing.assert_allclose(loaded.encode(["glucose"], steps=0), plain.encode(["glucose"]), atol=1e-6)
    assert not np.allclose(loaded.encode(["glucose"], steps=3), plain.encode(["glucose"]), atol=1e-3)


def test_a_teacher_that_moves_is_refused(recipe: Recipe, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"a teacher that stands still"):
        train(replace(recipe, objective=Objective(distillation=1.0)), tmp_path / "run")
    train(replace(recipe, objective=Objective(distillation=1.0), teacher=recipe.model), tmp_path / "taught")


def test_positions_that_a_model_does_not_have_are_refused_before_the_run(recipe: Recipe, tmp_path: Path) -> None:
    base = doubles.saved("gpt2", tmp_path)
    with pytest.raises(ConfigurationError, match=r"passage_tokens=2048 and 3 steps need 2051 positions.*has 128"):
        train(replace(recipe, model=str(base)), tmp_path / "run")


def test_an_adapter_is_not_trained_once_more(recipe: Recipe, tmp_path: Path) -> None:
    train(recipe, tmp_path / "run")
    with pytest.raises(ConfigurationError, match=r"is an adapter already; train from its base model"):
        build(replace(recipe, model=str(tmp_path / "run")), lambda _tokenizer: [])


_SCRIPT = """
import json, sys
from pathlib import Path
from genembed.train.gather import leave_group
from genembed.train.heldout import HeldOut
from genembed.train.objective import Objective
from genembed.train.pairs import DataFile
from genembed.train.recipe import Evaluation, Lora, Recipe
from genembed.train.run import train

model, pairs, output, queries = sys.argv[1:]
measure = HeldOut.measure

def counted(*arguments):
    with Path(output, "measured").open("a") as file:
        file.write("x")
    return measure(*arguments)

HeldOut.measure = counted
train(
    Recipe(
        model=model, files=(DataFile(path=pairs),), objective=Objective(temperature=0.1), queries=int(queries),
        min_steps=2, max_steps=3, lora=Lora(rank=4, alpha=8), learning_rate=3e-3, updates=4, save_every=4, log_every=1,
        evaluation=Evaluation(every=2, share=0.2, steps=(1, 3)),
    ),
    Path(output),
)
leave_group()
"""


def answered_twice(number: int, row: dict[str, Any]) -> dict[str, Any]:
    """Right answers that stand among the negatives must be known on both sides of the gathering."""
    return {**row, "neg": [f"{row['pos'][0]}!"]} if number % 2 else row


def without_negatives(number: int, row: dict[str, Any]) -> dict[str, Any]:
    """Where only some pairs have a hard negative, the processes bring different numbers of candidates."""
    return row if number % 3 else {**row, "neg": []}


def scored(number: int, row: dict[str, Any]) -> dict[str, Any]:
    """Scored pairs are ranked among all of the joined batch."""
    return {"sentence1": row["query"], "sentence2": row["pos"][0], "score": number % 5}


@pytest.mark.slow
@pytest.mark.parametrize("kind", [answered_twice, without_negatives, scored])
def test_two_processes_learn_as_one_with_the_joined_batch(
    kind: Callable[[int, dict[str, Any]], dict[str, Any]], recipe: Recipe, pairs: DataFile, tmp_path: Path
) -> None:
    """Losses, the parts that are logged of them, and the quality that the first process measures for both."""
    script = tmp_path / "run.py"
    script.write_text(_SCRIPT)
    rows = [json.loads(line) for line in Path(pairs.path).read_text().splitlines()]
    Path(pairs.path).write_text("".join(json.dumps(kind(number, row)) + "\n" for number, row in enumerate(rows)))
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=0", "--rdzv_backend=c10d"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "RDZV_ENDPOINT": "localhost:0"}
    for command, name, queries in (([*launch, "--rdzv_endpoint=localhost:0"], "two", "2"), ([sys.executable], "one", "4")):
        arguments = [*command, str(script), recipe.model, pairs.path, str(tmp_path / name), queries]
        done = subprocess.run(arguments, env=environment, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stderr[-12000:]
    np.testing.assert_allclose(losses(tmp_path / "two"), losses(tmp_path / "one"), rtol=1e-4)
    np.testing.assert_allclose(parts(tmp_path / "two"), parts(tmp_path / "one"), rtol=1e-4)
    for run in ("two", "one"):
        assert (tmp_path / run / "measured").read_text() == "xx"
    quality = ([float(row["eval_mean_k3"]) for row in history(tmp_path / run) if row.get("eval_mean_k3")] for run in ("two", "one"))
    np.testing.assert_allclose(*quality, rtol=1e-3)
    first, second = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("two", "one"))
    for name, weight in first.items():
        torch.testing.assert_close(weight, second[name], rtol=0, atol=1e-4)  # Adam divides by small numbers

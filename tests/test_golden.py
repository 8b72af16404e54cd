"""The released GIRCSE code's trajectories, halting steps, losses and gradients on tiny random models."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from genembed import Budget, ConvergeStop, FixedSteps, load
from genembed.engine import Engine
from genembed.refine import refine
from genembed.tokens import TokenBatch
from genembed.train.losses import refinement_regulariser, stepwise_contrastive

MODELS = ("qwen2", "llama", "mistral")


@pytest.fixture(scope="module", params=MODELS)
def golden(request: pytest.FixtureRequest, shared: Path) -> SimpleNamespace:
    folder = shared / "golden" / request.param
    if not folder.is_dir():
        pytest.skip(f"no golden trajectories of {request.param}")
    return SimpleNamespace(
        folder=folder,
        embedder=load(folder, preset="gircse", dtype="float64"),
        json=json.loads((folder / "expected.json").read_text(encoding="utf-8")),
        arrays=load_file(folder / "expected.safetensors"),
    )


def test_token_ids_are_those_of_the_released_code(golden: SimpleNamespace) -> None:
    ids = golden.embedder.tokenizer(golden.json["prompts"]).ids
    assert [row.tolist() for row in ids] == golden.json["token_ids"]


def test_one_text_at_a_time_gives_the_released_trajectory_and_stability(golden: SimpleNamespace) -> None:
    for row, prompt in enumerate(golden.json["prompts"]):
        refined = golden.embedder.refine([prompt], halt=FixedSteps(20), keep_trajectory=True)
        np.testing.assert_allclose(refined.trajectory[0], golden.arrays["trajectory"][row], atol=1e-5)
        np.testing.assert_allclose(refined.stability[0], golden.arrays["stability"][row], atol=1e-5)


@pytest.mark.parametrize(
    ("order", "budget"),
    [
        (range(8), Budget()),
        (range(7, -1, -1), Budget(max_rows=3, prefill_tokens=40)),
        ((4, 2, 6, 0, 7, 1, 5, 3), Budget(max_rows=2, length_ratio=1.0)),
        ((5, 3, 1, 7, 0, 2, 4, 6), Budget(batch_tokens=300, length_ratio=50.0)),
        ((7, 6, 5), Budget(length_ratio=50.0, min_prefix=1)),  # the templated prompts: they share the instruction
    ],
)
def test_any_batch_gives_the_released_trajectory(golden: SimpleNamespace, order: Sequence[int], budget: Budget) -> None:
    embedder = golden.embedder
    engine = Engine(embedder.backbone, budget)
    ids = embedder.tokenizer([golden.json["prompts"][row] for row in order]).ids
    seen = []
    for refined in engine.run(ids, FixedSteps(20), keep_trajectory=True):
        for place, trajectory in zip(refined.index, refined.trajectory, strict=True):
            np.testing.assert_allclose(trajectory, golden.arrays["trajectory"][order[place]], atol=1e-4)
            seen.append(int(place))
    assert sorted(seen) == list(range(len(order)))


def test_the_last_step_of_the_whole_batch_is_the_released_batched_embedding(golden: SimpleNamespace) -> None:
    vectors = golden.embedder.encode(golden.json["prompts"], steps=golden.json["steps"])
    np.testing.assert_allclose(vectors, golden.arrays["batched"], atol=1e-4)


def test_every_threshold_halts_where_the_paper_says(golden: SimpleNamespace) -> None:
    for name, expected in golden.json["halting_steps"].items():
        values = dict(part.split("=") for part in name.split(","))
        rule = ConvergeStop(float(values["threshold"]), patience=int(values["patience"]), min_steps=int(values["min_steps"]), max_steps=20)
        assert golden.embedder.refine(golden.json["prompts"], halt=rule).steps.tolist() == expected, name


def test_the_instruction_gives_what_the_templated_prompt_gives(golden: SimpleNamespace) -> None:
    refined = golden.embedder.refine(golden.json["texts"][4:], instruction=golden.json["instruction"], steps=20, keep_trajectory=True)
    np.testing.assert_allclose(refined.trajectory, golden.arrays["trajectory"][4:], atol=1e-4)
    assert golden.embedder.first_prompt(golden.json["texts"][6], instruction=golden.json["instruction"]) == golden.json["prompts"][6]


@pytest.mark.parametrize("cached", [True, False])
def test_training_gives_the_released_losses_and_gradients(golden: SimpleNamespace, cached: bool) -> None:
    expected, embedder = golden.json["training"], load(golden.folder, preset="gircse", dtype="float64")
    model = embedder.backbone.model.requires_grad_(True)

    def trajectories(rows: Sequence[int]) -> torch.Tensor:
        batch = TokenBatch.pad(embedder.tokenizer([golden.json["prompts"][row] for row in rows]).ids)
        return refine(embedder.backbone, batch, steps=expected["steps"], cached=cached)

    losses = stepwise_contrastive(
        trajectories(expected["queries"]),
        trajectories(expected["passages"]),
        temperature=expected["temperature"],
        positives=torch.tensor(expected["positive_of_query"]),
    )
    regulariser = refinement_regulariser(losses)
    total = losses.mean() + regulariser
    total.backward()

    np.testing.assert_allclose(losses.tolist(), expected["step_losses"], rtol=1e-6)
    assert regulariser.item() == pytest.approx(expected["regulariser"], rel=1e-6, abs=1e-12)
    assert total.item() == pytest.approx(expected["total_mean"], rel=1e-6)
    norms = {name: weight.grad.norm().item() for name, weight in model.named_parameters() if weight.grad is not None}
    assert norms == pytest.approx(expected["grad_norm"], rel=1e-6)

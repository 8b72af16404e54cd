"""The objective and its losses: values written out by hand, and what holds for any batch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from genembed import ConfigurationError
from genembed.train.losses import (
    false_negatives,
    known_answers,
    refinement_regulariser,
    similarity_distillation,
    stepwise_contrastive,
    stepwise_ranking,
)
from genembed.train.objective import Objective, Teacher

WIDTH = 6
SEEDS = st.integers(0, 10_000)
OFF = {"regulariser": 0.0, "distillation": 0.0, "self_distillation": 0.0}
EVERYTHING = Objective(
    temperature=0.1,
    reduction="sum",
    regulariser=0.7,
    false_negative_margin=0.05,
    distillation=2.0,
    distillation_temperature=0.3,
    self_distillation=0.5,
    self_distillation_step=2,
)


def random(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def batch(seed: int = 0, queries: int = 4, candidates: int = 7, steps: int = 3) -> tuple[Tensor, Tensor, Tensor, Teacher]:
    """Return queries, candidates, positives and a teacher's embeddings, which are wider than the student's."""
    positives = torch.randperm(candidates, generator=torch.Generator().manual_seed(seed))[:queries]
    teacher = Teacher(random(seed + 2, queries, WIDTH + 3), random(seed + 3, candidates, WIDTH + 3))
    return random(seed, queries, steps, WIDTH), random(seed + 1, candidates, steps, WIDTH), positives, teacher


def total(objective: Objective, seed: int = 0, steps: int = 3) -> float:
    q, c, positives, teacher = batch(seed, steps=steps)
    return objective(q, c, positives=positives, teacher=teacher if objective.needs_teacher else None).total.item()


# What follows is written with NumPy, one number at a time, from the equations.


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / math.sqrt(float(a @ a) * float(b @ b)))


def contrast(q: np.ndarray, c: np.ndarray, positives: Sequence[int], tau: float, ignored: set[tuple[int, int]] = frozenset()) -> float:
    """Equation 7 at one step."""
    losses = []
    for i, query in enumerate(q):
        weights = {j: math.exp(cosine(query, candidate) / tau) for j, candidate in enumerate(c) if (i, j) not in ignored}
        losses.append(-math.log(weights[positives[i]] / sum(weights.values())))
    return float(np.mean(losses))


def ranking(q: np.ndarray, c: np.ndarray, scores: Sequence[float], tau: float) -> float:
    """CoSENT at one step."""
    cosines = [cosine(a, b) for a, b in zip(q, c, strict=True)]
    pairs = [(i, j) for i in range(len(q)) for j in range(len(q)) if scores[i] > scores[j]]
    return math.log(1 + sum(math.exp((cosines[j] - cosines[i]) / tau) for i, j in pairs))


def divergence(teacher: tuple[np.ndarray, np.ndarray], student: tuple[np.ndarray, np.ndarray], tau: float) -> float:
    """Mean over queries of KL(teacher || student) at one step."""
    values = []
    for i in range(len(student[0])):
        p, r = (np.array([math.exp(cosine(q[i], candidate) / tau) for candidate in c]) for q, c in (teacher, student))
        p, r = p / p.sum(), r / r.sum()
        values.append(float((p * np.log(p / r)).sum()))
    return float(np.mean(values))


def penalty(losses: Sequence[float]) -> float:
    """Equation 8, with the released code's floor."""
    logs = [math.log(loss + 1e-8) for loss in losses]
    return float(np.mean([max(after - before, 0.0) for before, after in pairwise(logs)])) if len(logs) > 1 else 0.0


# The losses.


@given(seed=SEEDS, pairs=st.integers(1, 6), steps=st.integers(1, 3), scores=st.lists(st.integers(0, 3), min_size=6, max_size=6))
def test_the_ranking_loss_of_every_step_is_cosent(seed: int, pairs: int, steps: int, scores: list[int]) -> None:
    """Few different scores, so that ties occur."""
    q, c = random(seed, pairs, steps, WIDTH), random(seed + 1, pairs, steps, WIDTH)
    losses = stepwise_ranking(q, c, scores=torch.tensor(scores[:pairs], dtype=torch.float64), temperature=0.1)
    expected = [ranking(q[:, k].numpy(), c[:, k].numpy(), scores[:pairs], 0.1) for k in range(steps)]
    np.testing.assert_allclose(losses.tolist(), expected, rtol=1e-12, atol=1e-12)


def test_equal_scores_give_no_ranking_loss_and_no_gradient() -> None:
    q = random(0, 4, 2, WIDTH).requires_grad_(True)
    losses = stepwise_ranking(q, random(1, 4, 2, WIDTH), scores=torch.full((4,), 0.5), temperature=0.02)
    losses.sum().backward()
    assert losses.tolist() == [0.0, 0.0]
    assert q.grad.tolist() == torch.zeros_like(q).tolist()


@given(seed=SEEDS, scale=st.floats(0.01, 100.0), shift=st.floats(-5.0, 5.0))
def test_the_ranking_loss_knows_the_order_of_scores_alone(seed: int, scale: float, shift: float) -> None:
    q, c, scores = random(seed, 5, 2, WIDTH), random(seed + 1, 5, 2, WIDTH), torch.tensor([0.1, 0.9, 0.5, 0.5, 0.2])
    order = torch.randperm(5, generator=torch.Generator().manual_seed(seed))
    losses = stepwise_ranking(q, c, scores=scores, temperature=0.1)
    moved = stepwise_ranking(q[order], c[order], scores=scores[order] * scale + shift, temperature=0.1)
    torch.testing.assert_close(moved, losses, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("width", [WIDTH, WIDTH + 5])
def test_distillation_is_the_divergence_from_the_teacher_at_every_step(width: int) -> None:
    q, c, tq, tc = random(0, 3, 2, WIDTH), random(1, 5, 2, WIDTH), random(2, 3, width), random(3, 5, width)
    losses = similarity_distillation(q, c, tq, tc, temperature=0.2)
    expected = [divergence((tq.numpy(), tc.numpy()), (q[:, k].numpy(), c[:, k].numpy()), 0.2) for k in range(2)]
    np.testing.assert_allclose(losses.tolist(), expected, rtol=1e-12)


def test_a_candidate_ignored_in_distillation_does_not_count_in_values_and_gradients() -> None:
    q, c, tq, tc = random(0, 3, 2, WIDTH), random(1, 5, 2, WIDTH), random(2, 3, 8), random(3, 5, 8)
    ignore = torch.zeros(3, 5, dtype=torch.bool)
    ignore[:, 4] = True
    masked_q, fewer_q = q.clone().requires_grad_(True), q.clone().requires_grad_(True)
    masked = similarity_distillation(masked_q, c, tq, tc, temperature=0.02, ignore=ignore)
    fewer = similarity_distillation(fewer_q, c[:4], tq, tc[:4], temperature=0.02)
    masked.sum().backward()
    fewer.sum().backward()
    torch.testing.assert_close(masked, fewer, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(masked_q.grad, fewer_q.grad, rtol=1e-12, atol=1e-12)


@given(seed=SEEDS)
def test_distillation_is_never_negative_and_zero_from_oneself(seed: int) -> None:
    q, c = random(seed, 3, 1, WIDTH), random(seed + 1, 4, 1, WIDTH)
    teacher = random(seed + 2, 3, WIDTH), random(seed + 3, 4, WIDTH)
    assert similarity_distillation(q, c, *teacher, temperature=0.1).item() >= 0
    assert similarity_distillation(q, c, 2 * q[:, 0], 3 * c[:, 0], temperature=0.1).item() == pytest.approx(0, abs=1e-14)


def test_no_gradient_reaches_the_teacher() -> None:
    tq, tc = random(2, 3, 8).requires_grad_(True), random(3, 5, 8).requires_grad_(True)
    q = random(0, 3, 2, WIDTH).requires_grad_(True)
    similarity_distillation(q, random(1, 5, 2, WIDTH), tq, tc, temperature=0.1).sum().backward()
    assert q.grad.abs().sum() > 0
    assert (tq.grad, tc.grad) == (None, None)


@given(seed=SEEDS, margin=st.floats(-0.5, 0.5))
def test_false_negatives_are_as_similar_as_the_positive_less_the_margin(seed: int, margin: float) -> None:
    q, c, positives = random(seed, 4, WIDTH), random(seed + 1, 6, WIDTH), torch.tensor([1, 0, 1, 5])
    marked = false_negatives(q, c, positives, margin=margin)
    for i, own in enumerate(positives.tolist()):
        bar = cosine(q[i].numpy(), c[own].numpy()) - margin
        expected = [j != own and cosine(q[i].numpy(), c[j].numpy()) >= bar for j in range(6)]
        assert marked[i].tolist() == expected


def test_a_second_copy_of_the_positive_is_a_false_negative_and_the_positive_is_not() -> None:
    c = random(1, 4, WIDTH)
    c[3] = c[0]
    marked = false_negatives(random(0, 2, WIDTH), c, torch.tensor([0, 3]), margin=1e-9)
    assert marked[0, [0, 3]].tolist() == [False, True]
    assert marked[1, [0, 3]].tolist() == [True, False]


KEYS = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=6, max_size=6)


@given(queries=KEYS, candidates=KEYS, number=st.integers(1, 6))
def test_known_answers_are_copies_of_the_positive_and_positives_of_the_same_query(
    queries: list[tuple[int, int]], candidates: list[tuple[int, int]], number: int
) -> None:
    """Candidate j is the positive of query j, and those beyond the queries are negatives."""

    def same(first: tuple[int, int], second: tuple[int, int]) -> bool:
        return first[0] == second[0] or first[1] == second[1]

    answered = [*queries[:number], *[(-1, -1)] * (6 - number)]
    found = known_answers(*map(torch.tensor, (queries[:number], candidates, answered)), torch.arange(number))
    for i in range(number):
        for j in range(6):
            other_positive = j < number and same(queries[i], queries[j])
            assert found[i, j] == (i != j and (other_positive or same(candidates[i], candidates[j])))


def test_a_candidate_that_is_known_to_be_right_counts_neither_in_the_value_nor_in_the_gradient() -> None:
    q, c, positives, teacher = batch()
    others = [column for column in range(7) if column not in positives.tolist()]
    ignore = torch.zeros(4, 7, dtype=torch.bool)
    ignore[:, others[0]] = True
    kept = [column for column in range(7) if column != others[0]]
    where = torch.tensor([kept.index(int(column)) for column in positives])
    for objective, taught in ((Objective(), None), (Objective(false_negative_margin=0.05), teacher)):
        c = c.detach().requires_grad_(True)
        value = objective(q, c, positives=positives, ignore=ignore, teacher=taught).total
        less = None if taught is None else Teacher(taught.queries, taught.candidates[kept])
        torch.testing.assert_close(value, objective(q, c[kept], positives=where, teacher=less).total)
        assert torch.autograd.grad(value, c)[0][others[0]].abs().max() == 0
    with pytest.raises(ConfigurationError, match="ignore has no effect on scored pairs"):
        Objective()(q, q, scores=torch.zeros(4, dtype=q.dtype), ignore=ignore[:, :4])


def test_bfloat16_embeddings_are_ranked_and_distilled_in_float32() -> None:
    """In bfloat16 a similarity divided by 0.02 moves in steps of 0.25."""
    q, c, tq, tc = (random(seed, 4, 2, WIDTH).bfloat16() for seed in range(4))
    scores = torch.tensor([0.1, 0.9, 0.5, 0.2])
    for got, wide in (
        (
            stepwise_ranking(q, c, scores=scores, temperature=0.02),
            stepwise_ranking(q.double(), c.double(), scores=scores, temperature=0.02),
        ),
        (
            similarity_distillation(q, c, tq[:, 0], tc[:, 0], temperature=0.02),
            similarity_distillation(q.double(), c.double(), tq[:, 0].double(), tc[:, 0].double(), temperature=0.02),
        ),
    ):
        assert got.dtype == torch.float32
        torch.testing.assert_close(got.double(), wide, rtol=1e-4, atol=1e-4)


def test_autocast_does_not_lower_the_precision_of_any_loss() -> None:
    """Under autocast a matrix product is taken in bfloat16 although its factors are float32."""
    q, c, teacher, scores = random(0, 4, 2, WIDTH).float(), random(1, 4, 2, WIDTH).float(), random(2, 4, WIDTH).float(), torch.arange(4.0)

    def losses() -> list[Tensor]:
        return [
            stepwise_contrastive(q, c, temperature=0.02, positives=torch.arange(4)),
            stepwise_ranking(q, c, temperature=0.02, scores=scores),
            similarity_distillation(q, c, teacher, teacher, temperature=0.02),
        ]

    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = losses()
    for got, expected in zip(cast, losses(), strict=True):
        assert got.tolist() == expected.tolist()


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan")])
def test_a_temperature_that_is_not_positive_is_refused(temperature: float) -> None:
    q, c = random(0, 3, 2, WIDTH), random(1, 3, 2, WIDTH)
    with pytest.raises(ConfigurationError, match=r"must be positive, for example 0\.02"):
        stepwise_ranking(q, c, scores=torch.arange(3.0), temperature=temperature)
    with pytest.raises(ConfigurationError, match=r"must be positive, for example 0\.02"):
        similarity_distillation(q, c, q[:, 0], c[:, 0], temperature=temperature)


# The objective.


@given(seed=SEEDS, steps=st.integers(1, 4))
def test_the_objective_is_the_sum_of_its_equations(seed: int, steps: int) -> None:
    q, c, positives, teacher = batch(seed, steps=steps)
    value = EVERYTHING(q, c, positives=positives, teacher=teacher)

    qs, cs = [q[:, k].numpy() for k in range(steps)], [c[:, k].numpy() for k in range(steps)]
    tq, tc, own = teacher.queries.numpy(), teacher.candidates.numpy(), positives.tolist()
    ignored = {(i, j) for i in range(4) for j in range(7) if j != own[i] and cosine(tq[i], tc[j]) >= cosine(tq[i], tc[own[i]]) - 0.05}
    losses = [contrast(qs[k], cs[k], own, 0.1, ignored) for k in range(steps)]
    distance = sum(divergence((tq, tc), (qs[k], cs[k]), 0.3) for k in range(steps))
    early = divergence((qs[-1], cs[-1]), (qs[1], cs[1]), 0.3) if steps > 2 else 0.0

    np.testing.assert_allclose(value.parts["step_losses"].tolist(), losses, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(value.parts["regulariser"].item(), penalty(losses), rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(value.parts["distillation"].item(), distance, rtol=1e-10)
    np.testing.assert_allclose(value.parts["self_distillation"].item(), early, rtol=1e-10)
    expected = sum(losses) + 0.7 * penalty(losses) + 2.0 * distance + 0.5 * early
    assert value.total.item() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(
    ("row", "settings", "steps"),
    [
        ("none", {"stepwise": False, "regulariser": 0.0}, 1),
        ("Gen", {"stepwise": False, "regulariser": 0.0}, 4),
        ("Gen + SL", {"regulariser": 0.0}, 4),
        ("Gen + SL + IR", {}, 4),
    ],
)
def test_the_rows_of_table_3_are_settings(row: str, settings: dict[str, float | bool], steps: int) -> None:
    q, c, positives, _teacher = batch(steps=steps)
    losses = [contrast(q[:, k].numpy(), c[:, k].numpy(), positives.tolist(), 0.02) for k in range(steps)]
    expected = {
        "none": losses[0],
        "Gen": losses[-1],
        "Gen + SL": np.mean(losses),
        "Gen + SL + IR": np.mean(losses) + penalty(losses),
    }
    assert penalty(losses) > 0 or steps == 1
    assert Objective(**settings)(q, c, positives=positives).total.item() == pytest.approx(expected[row], rel=1e-10)


def test_generation_without_stepwise_loss_trains_the_last_step_alone_and_reports_every_step() -> None:
    q, c, positives, teacher = batch(steps=4)
    q.requires_grad_(True)
    value = Objective(stepwise=False, regulariser=0.0, distillation=1.0)(q, c, positives=positives, teacher=teacher)
    value.total.backward()
    assert [bool(q.grad[:, k].any()) for k in range(4)] == [False, False, False, True]
    assert value.parts["step_losses"].shape == (4,)


def test_one_step_is_the_same_under_every_setting_of_table_3() -> None:
    values = [
        total(objective, steps=1) for objective in (Objective(), Objective(regulariser=0.0), Objective(stepwise=False, regulariser=0.0))
    ]
    assert values[0] == values[1] == values[2]


def test_the_papers_sum_is_the_mean_times_the_steps() -> None:
    both = Objective(regulariser=0.0, distillation=3.0)
    assert total(replace(both, reduction="sum"), steps=3) == pytest.approx(3 * total(both, steps=3), rel=1e-12)


@pytest.mark.parametrize("name", OFF)
def test_a_part_whose_weight_is_0_is_0_and_every_other_weight_counts_in_proportion(name: str) -> None:
    q, c, positives, teacher = batch()
    values = []
    for weight in (0.0, 1.0, 2.0):
        step = {"self_distillation_step": 2} if name == "self_distillation" and weight else {}
        objective = Objective(temperature=0.1, **{**OFF, name: weight}, **step)
        values.append(objective(q, c, positives=positives, teacher=teacher if objective.needs_teacher else None))
    assert values[0].parts[name].item() == 0.0
    assert values[1].parts[name].item() == values[2].parts[name].item() > 0
    part = values[1].parts[name].item()
    assert [value.total.item() - values[0].total.item() for value in values] == pytest.approx([0, part, 2 * part], rel=1e-9)
    assert set(values[1].parts) == {"step_losses", *OFF}


def test_parts_carry_no_gradient_and_the_total_does() -> None:
    q, c, positives, teacher = batch()
    value = EVERYTHING(q.requires_grad_(True), c, positives=positives, teacher=teacher)
    assert value.total.requires_grad
    assert not any(part.requires_grad for part in value.parts.values())


@given(seed=SEEDS, dimensions=st.lists(st.integers(2, WIDTH), min_size=1, max_size=3, unique=True))
def test_matryoshka_is_the_mean_of_the_objective_on_truncated_inputs(seed: int, dimensions: list[int]) -> None:
    q, c, positives, teacher = batch(seed)
    value = replace(EVERYTHING, dimensions=tuple(dimensions))(q, c, positives=positives, teacher=teacher)
    alone = [EVERYTHING(q[..., :width], c[..., :width], positives=positives, teacher=teacher) for width in dimensions]
    assert value.total.item() == pytest.approx(np.mean([one.total.item() for one in alone]), rel=1e-12)
    for name, part in value.parts.items():
        torch.testing.assert_close(part, torch.stack([one.parts[name] for one in alone]).mean(0), rtol=1e-12, atol=1e-12)


def test_the_full_width_alone_is_what_no_dimensions_mean() -> None:
    assert total(replace(EVERYTHING, dimensions=(WIDTH,))) == total(EVERYTHING)


def test_self_distillation_teaches_the_early_step_and_leaves_the_last_alone() -> None:
    q, c, positives, _teacher = batch(steps=7)
    gradients = []
    for weight in (0.0, 1.0):
        inputs = [x.clone().requires_grad_(True) for x in (q, c)]
        Objective(self_distillation=weight)(*inputs, positives=positives).total.backward()
        gradients.append([x.grad for x in inputs])
    for without, with_ in zip(*gradients, strict=True):
        changed = [not torch.equal(without[:, k], with_[:, k]) for k in range(7)]
        assert changed == [False, False, False, False, True, False, False]


@pytest.mark.parametrize(("steps", "nothing"), [(1, True), (5, True), (6, False)])
def test_a_trajectory_that_ends_at_the_early_step_has_nothing_to_distil(steps: int, nothing: bool) -> None:
    q, c, positives, _teacher = batch(steps=steps)
    value = Objective(self_distillation=1.0)(q, c, positives=positives)
    assert (value.parts["self_distillation"].item() == 0.0) == nothing
    assert (value.total.item() == total(Objective(), steps=steps)) == nothing


def test_scored_pairs_are_ranked() -> None:
    q, c, scores = random(0, 4, 3, WIDTH), random(1, 4, 3, WIDTH), torch.tensor([0.2, 1.0, 0.4, 0.4])
    value = Objective(temperature=0.1)(q, c, scores=scores)
    losses = [ranking(q[:, k].numpy(), c[:, k].numpy(), scores.tolist(), 0.1) for k in range(3)]
    np.testing.assert_allclose(value.parts["step_losses"].tolist(), losses, rtol=1e-12)
    assert value.total.item() == pytest.approx(np.mean(losses) + penalty(losses), rel=1e-10)


@given(seed=SEEDS)
def test_neither_the_order_of_queries_nor_that_of_candidates_matters(seed: int) -> None:
    q, c, positives, teacher = batch(seed)
    generator = torch.Generator().manual_seed(seed + 9)
    rows, columns = torch.randperm(4, generator=generator), torch.randperm(7, generator=generator)
    moved = EVERYTHING(
        q[rows],
        c[columns],
        positives=columns.argsort()[positives[rows]],
        teacher=Teacher(teacher.queries[rows], teacher.candidates[columns]),
    )
    value = EVERYTHING(q, c, positives=positives, teacher=teacher)
    torch.testing.assert_close(moved.total, value.total, rtol=1e-10, atol=1e-10)
    for name, part in value.parts.items():
        torch.testing.assert_close(moved.parts[name], part, rtol=1e-10, atol=1e-10)


@given(seed=SEEDS, scale=st.floats(0.1, 10.0))
def test_lengths_do_not_matter(seed: int, scale: float) -> None:
    q, c, positives, teacher = batch(seed)
    value = EVERYTHING(q, c, positives=positives, teacher=teacher).total
    scaled = EVERYTHING(q * scale, c / scale, positives=positives, teacher=Teacher(teacher.queries * scale, teacher.candidates)).total
    torch.testing.assert_close(scaled, value, rtol=1e-9, atol=1e-9)


def test_the_losses_of_the_objective_are_those_of_the_losses_module() -> None:
    """The golden test holds these two functions to the released code."""
    q, c, positives, _teacher = batch()
    losses = stepwise_contrastive(q, c, temperature=0.02, positives=positives)
    value = Objective()(q, c, positives=positives)
    assert value.parts["step_losses"].tolist() == losses.tolist()
    assert value.total.item() == (losses.mean() + refinement_regulariser(losses)).item()


def test_an_objective_is_a_value() -> None:
    assert Objective(distillation=1.0) == Objective(distillation=1.0) != Objective()
    assert len({Objective(dimensions=(2, 4)), Objective(dimensions=(2, 4))}) == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"reduction": "max"}, "reduction='max': choose sum or mean"),
        ({"temperature": 0.0}, r"temperature=0\.0: must be positive"),
        ({"temperature": math.inf}, "temperature=inf: must be positive"),
        ({"distillation": 1.0, "distillation_temperature": -1.0}, r"distillation_temperature=-1\.0: must be positive, or None"),
        ({"regulariser": -1.0}, r"regulariser=-1\.0: a weight of at least 0"),
        ({"distillation": math.nan}, "distillation=nan: a weight of at least 0"),
        ({"self_distillation": math.inf}, "self_distillation=inf: a weight of at least 0"),
        ({"false_negative_margin": 2.0}, r"false_negative_margin=2\.0: two cosines differ by less than 2"),
        ({"false_negative_margin": math.nan}, "false_negative_margin=nan"),
        ({"dimensions": (0,)}, "different integers of at least 1"),
        ({"dimensions": (4, 2, 4)}, "different integers of at least 1"),
        ({"dimensions": (True,)}, "different integers of at least 1"),
        ({"self_distillation": 1.0, "self_distillation_step": 0}, "self_distillation_step=0: an integer of at least 1"),
        ({"stepwise": False}, r"give regulariser=0\.0 with it"),
        ({"stepwise": False, "regulariser": 0.0, "reduction": "sum"}, "reduction='sum' has no effect with stepwise=False"),
        ({"distillation_temperature": 0.1}, r"distillation_temperature=0\.1 has no effect without"),
        ({"self_distillation_step": 3}, "self_distillation_step=3 has no effect without self_distillation"),
    ],
)
def test_settings_without_a_meaning_or_an_effect_are_refused(untyped_caller: None, settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        Objective(**settings)


@pytest.mark.parametrize("margin_or_distillation", [{"false_negative_margin": 0.0}, {"distillation": 1.0}])
def test_an_objective_that_needs_a_teacher_is_refused_without_one(margin_or_distillation: dict[str, float]) -> None:
    q, c, positives, _teacher = batch()
    objective = Objective(**margin_or_distillation)
    assert objective.needs_teacher
    with pytest.raises(ConfigurationError, match=r"pass teacher=Teacher\(queries, candidates\)"):
        objective(q, c, positives=positives)


def test_a_teacher_that_nobody_asks_is_refused() -> None:
    q, c, positives, teacher = batch()
    assert not Objective(self_distillation=1.0).needs_teacher
    with pytest.raises(ConfigurationError, match="teacher has no effect"):
        Objective()(q, c, positives=positives, teacher=teacher)


def test_a_batch_has_either_positives_or_scores() -> None:
    q, c = random(0, 4, 2, WIDTH), random(1, 4, 2, WIDTH)
    with pytest.raises(ConfigurationError, match="either positives, for the contrastive loss, or scores"):
        Objective()(q, c)
    with pytest.raises(ConfigurationError, match="either positives, for the contrastive loss, or scores"):
        Objective()(q, c, positives=torch.arange(4), scores=torch.arange(4.0))


def test_a_false_negative_margin_is_refused_for_scored_pairs() -> None:
    q, c, _positives, teacher = batch(candidates=4)
    with pytest.raises(ConfigurationError, match=r"false_negative_margin=0\.0 has no effect on scored pairs"):
        Objective(false_negative_margin=0.0)(q, c, scores=torch.arange(4.0), teacher=teacher)


@pytest.mark.parametrize("rows", [1, 3])
def test_each_score_needs_its_own_two_texts(untyped_caller: None, rows: int) -> None:
    """One candidate, or one score, would be spread over all queries without a word."""
    q, c, scores = random(0, 4, 2, WIDTH), random(1, 4, 2, WIDTH), torch.arange(4.0)
    for broken in ((q[:rows], c, scores), (q, c[:rows], scores), (q, c, scores[:rows])):
        with pytest.raises(ConfigurationError, match="each score needs its own two texts"):
            Objective()(broken[0], broken[1], scores=broken[2])


def test_a_teacher_of_another_batch_is_refused() -> None:
    """One teacher query would be spread over all queries without a word."""
    q, c, positives, teacher = batch()
    for broken in (Teacher(teacher.queries[:1], teacher.candidates), Teacher(teacher.queries, teacher.candidates[:3])):
        with pytest.raises(ConfigurationError, match="the batch 4 and 7: give it the same texts"):
            Objective(distillation=1.0)(q, c, positives=positives, teacher=broken)


@pytest.mark.parametrize(("steps", "width"), [(1, WIDTH), (3, WIDTH - 1)])
def test_queries_and_candidates_of_different_steps_or_widths_are_refused(untyped_caller: None, steps: int, width: int) -> None:
    """A single step of the candidates would be compared with every step of the queries without a word."""
    q, c, positives, _teacher = batch()
    with pytest.raises(ConfigurationError, match="both must agree"):
        Objective()(q, c[:, :steps, :width], positives=positives)


def test_more_dimensions_than_the_embeddings_have_are_refused() -> None:
    q, c, positives, _teacher = batch()
    with pytest.raises(ConfigurationError, match=f"the embeddings have {WIDTH} dimensions only"):
        Objective(dimensions=(2, WIDTH + 1))(q, c, positives=positives)

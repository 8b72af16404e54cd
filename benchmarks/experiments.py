"""The experiments of docs/reproduction.md as data: what is trained, from which seed, and how it is measured."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from genembed import FixedSteps, ModelSettings, Pooling
from genembed.cli.recipe_files import chosen_recipe
from genembed.train.objective import Objective
from genembed.train.pairs import DataFile
from genembed.train.recipe import Recipe

ROOT = Path(__file__).parents[1]
RUNS = Path("runs/reproduction")
"""Where models are trained, from the root of the repository."""

SEEDS = (0, 1, 2)
STEPS_TRAINED, STEPS_MEASURED = 5, 20
"""K of the paper's training, and the largest one it measures."""
SIZES = {"": 1.0, "-half": 0.5, "-quarter": 0.25}
"""Ending of an experiment's name, and its share of the updates: the same pairs are never seen twice, so it is the share of the data."""
TEMPERATURES = (2, 3, 4, 6, 8)
PARTS = ("temperature", "ablation", "scaling", "options")
LARGE_BATCH = 2
"""How many times the pairs of a batch, under GradCache."""
GATHER, PROCESSES = "gather", 2
"""The option that trains in several processes, from one seed: it is to give what one process gives with the same pairs."""
EVERYWHERE = "gircse-everywhere"
"""GIRCSE over the encoder with the adapter on the prompt too, as the one-pass models have it."""
ON_AVERAGE, MERGED = "gircse-on-average", "merged"
"""GIRCSE over the encoder as the one-pass baseline has fine-tuned it, in a folder of this name: what generation adds to fine-tuning."""
SLOW, FLAT = "gircse-slow", "gircse-flat"
"""GIRCSE over the encoder with a third of the learning rate, and with a soft token of temperature 4."""
NARROW = 64
"""Leading dimensions that are measured beside the whole vector, and trained by the Matryoshka option."""

_GENERATING = FixedSteps(STEPS_MEASURED)


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """One model, trained or not, and how it is measured."""

    backbone: str
    name: str
    seed: int = 0
    parts: tuple[str, ...]
    """Parts of the report that need it."""
    recipe: Recipe | None = None
    """None: a model that is there already is measured."""
    model: str | None = None
    """Its folder, where there is no recipe."""
    read: ModelSettings | None
    """How it is read when it is measured; None: it is the bag of token embeddings."""
    development: bool = False
    """Whether the development sets are measured, for a choice."""
    processes: int = 1
    """Processes that train together."""
    seconds: float
    """Estimate, on one thread that has a core of its own."""

    @property
    def key(self) -> str:
        """Name of the result file."""
        return f"{self.backbone}-{self.name}-seed{self.seed}"


@dataclass(frozen=True, kw_only=True)
class Family:
    """What the experiments of one backbone are made of."""

    name: str
    gircse: Recipe
    """At the full number of updates; all other settings of it are varied."""
    baselines: dict[str, Recipe]
    """One-pass models; the first one is the row `none` of the ablation."""
    generating: dict[str, ModelSettings]
    """How each baseline is read when it is made to generate anyway."""
    untrained: tuple[Experiment, ...]
    """Measured beside the trained ones."""
    options: dict[str, Recipe]
    """What is measured beside GIRCSE, at half the updates."""
    variants: tuple[tuple[str, Recipe], ...]
    """Other ways to train GIRCSE, at the full number of updates, each with its seed; a model that another experiment has to make has
    its key in the path, and the folder `MERGED`."""
    update_seconds: tuple[float, float]
    """Of a one-pass model, and of each step of GIRCSE beside its first pass."""
    frozen_prompt: float = 1.0
    """What a first pass without gradients costs, as a share of one with them."""
    measure_seconds: float
    """Of all sets at every K."""
    start_seconds: float
    """Until the first update."""


def matrix() -> list[Experiment]:
    """Return all experiments, what others wait for first, then part by part and one seed after the other."""
    decoder, mini = _recipe("decoder", "gircse"), _recipe("mini", "mini")
    found = [one for family in (_decoder(decoder, mini), _mini(mini, decoder.files)) for one in _experiments(family)]
    first = {part: place for place, part in enumerate(PARTS)}
    return sorted(found, key=lambda one: (first[one.parts[0]], one.backbone, one.seed))


def _recipe(file: str, name: str) -> Recipe:
    return chosen_recipe(f"{ROOT / 'recipes' / file}.py:{name}", [])


def _settings(recipe: Recipe) -> ModelSettings:
    assert isinstance(recipe.settings, ModelSettings)
    return recipe.settings


def _decoder(gircse: Recipe, mini: Recipe) -> Family:
    """Take the recipes of the decoder as they are."""
    own = replace(_settings(gircse), halt=_GENERATING)
    after_end = replace(own, pooling=Pooling(pool_prompt_state=True))
    both_ways = replace(own, attention="prefix", pooling=Pooling(kind="mean"))
    start = Path(_recipe("decoder", "eos").model)
    measured = partial(Experiment, backbone="decoder", parts=("ablation",), seconds=30.0)
    return Family(
        name="decoder",
        gircse=gircse,
        baselines={"causal-eos": _recipe("decoder", "causal_eos"), "bidirectional-avg": _recipe("decoder", "bidirectional_avg")},
        generating={"causal-eos": after_end, "bidirectional-avg": both_ways},
        untrained=(
            measured(name="bag", model=str(start.parent / "bag"), read=None),
            measured(name="untrained", model=str(start), read=after_end),
            measured(name="eos-stage", model=gircse.model, read=after_end),
        ),
        options=_options(_at(gircse, SIZES["-half"], 0), teacher=mini.model, reading=replace(_prefix(mini), halt=FixedSteps(0))),
        variants=(),
        update_seconds=(0.55, 0.1),
        measure_seconds=25.0,
        start_seconds=15.0,
    )


def _prefix(mini: Recipe) -> ModelSettings:
    """Return how the encoder is read, with one adapter for all positions; a prompt sees all of itself, and generation can follow."""
    return replace(_settings(mini), max_length=128, pooling=Pooling(kind="mean", prompt_weight=5.0), adapter_positions="all")


def _mini(long: Recipe, files: tuple[DataFile, ...]) -> Family:
    """Shorten the recipe of `mini`, train it on the decoder's pairs, and leave in the objective what the paper has."""
    average = replace(_prefix(long), halt=_GENERATING)
    settings = replace(average, adapter_positions="generated")
    gircse = replace(
        long,
        settings=settings,
        files=files,
        objective=Objective(temperature=long.objective.temperature),
        batch_tokens=0,
        query_tokens=48,
        passage_tokens=48,
        length_limits=(),
        instruction_share=0.0,
        min_steps=STEPS_TRAINED,
        max_steps=STEPS_TRAINED,
        draw_steps="uniform",
        updates=120,
        evaluation=None,
        save_every=40,
        log_every=5,
        served=None,
        fit_head=1_000,
    )
    one_pass = replace(gircse, objective=_last_step(gircse.objective), min_steps=0, max_steps=0)
    last = replace(average, pooling=Pooling(pool_prompt_state=True))
    untrained = replace(gircse, updates=1, learning_rate=0.0, head_learning_rate=0.0, log_every=1, save_every=1)
    return Family(
        name="mini",
        gircse=gircse,
        baselines={
            "bidirectional-avg": replace(one_pass, settings=replace(average, halt=FixedSteps(0))),
            "last-token": replace(one_pass, settings=replace(average, halt=FixedSteps(0), pooling=Pooling(kind="last"))),
        },
        generating={"bidirectional-avg": average, "last-token": last},
        untrained=(Experiment(backbone="mini", name="untrained", parts=("ablation",), recipe=untrained, read=settings, seconds=120.0),),
        options={},
        variants=(
            (EVERYWHERE, replace(gircse, settings=average)),
            (SLOW, replace(gircse, learning_rate=gircse.learning_rate / 3)),
            (FLAT, replace(gircse, settings=replace(settings, temperature=4.0))),
            *((ON_AVERAGE, replace(gircse, model=str(RUNS / f"mini-bidirectional-avg-seed{seed}" / MERGED), seed=seed)) for seed in SEEDS),
        ),
        update_seconds=(1.5, 0.12),
        frozen_prompt=0.4,
        measure_seconds=60.0,
        start_seconds=40.0,
    )


def _options(half: Recipe, *, teacher: str, reading: ModelSettings) -> dict[str, Recipe]:
    """Return GIRCSE with each option of the training alone."""
    own, taught = half.objective, replace(half.objective, distillation=0.3)
    masked, narrow = replace(own, false_negative_margin=0.0), replace(own, dimensions=(NARROW, 256))
    long = replace(half, min_steps=STEPS_MEASURED, max_steps=STEPS_MEASURED)
    towards_last = replace(own, self_distillation=0.3, self_distillation_step=STEPS_TRAINED)
    return {
        "gradcache": replace(half, queries=LARGE_BATCH * half.queries, chunk=half.queries),
        "mask": replace(half, objective=masked, teacher=teacher, teacher_settings=reading),
        "matryoshka": replace(half, objective=narrow),
        "distillation": replace(half, objective=taught, teacher=teacher, teacher_settings=reading),
        "steps-20": long,
        "self-distillation": replace(long, objective=towards_last),
        GATHER: replace(half, queries=half.queries // PROCESSES),
    }


def _experiments(family: Family) -> Iterator[Experiment]:
    yield from family.untrained
    if family.name == "decoder":
        yield from _temperatures(family)
    for seed in SEEDS:
        for ending, share in SIZES.items():
            yield from _sized(family, ending, share, seed)
        yield from _rows(family, seed)
        for name, recipe in family.options.items():
            if name != GATHER:
                yield _trained(family, name, replace(recipe, seed=seed), ("options",))
            elif seed == SEEDS[0]:
                yield replace(_trained(family, name, recipe, ("options",)), processes=PROCESSES)


def _temperatures(family: Family) -> Iterator[Experiment]:
    """Yield the choice of the soft token's temperature, at half the updates."""
    recipe = _at(family.gircse, SIZES["-half"], SEEDS[0])
    for temperature in TEMPERATURES:
        settings = replace(_settings(recipe), temperature=float(temperature))
        one = _trained(family, f"temperature-{temperature}", replace(recipe, settings=settings), ("temperature",))
        yield replace(one, development=True)


def _sized(family: Family, ending: str, share: float, seed: int) -> Iterator[Experiment]:
    """Yield GIRCSE and its baselines at one size of data; only the full baselines are made to generate."""
    parts = ("scaling",) if ending else ("ablation", "scaling")
    own_parts = (*parts, "options") if ending == "-half" and family.options else parts
    yield _trained(family, f"gircse{ending}", _at(family.gircse, share, seed), own_parts)
    for name, recipe in family.baselines.items():
        read = _settings(recipe) if ending else family.generating[name]
        own = replace(recipe, fit_head=0, head_tokens=0) if ending else recipe  # a head is there to generate with
        yield _trained(family, f"{name}{ending}", _at(own, share, seed), parts, read=read)


def _rows(family: Family, seed: int) -> Iterator[Experiment]:
    """Yield the rows of the paper's table 3 that are neither the baseline nor the whole method, and what varies it."""
    full = replace(family.gircse, seed=seed)
    yield _trained(family, "gen", replace(full, objective=_last_step(full.objective)), ("ablation",))
    yield _trained(family, "gen-sl", replace(full, objective=replace(full.objective, regulariser=0.0)), ("ablation",))
    for name, recipe in family.variants:
        if recipe.seed == seed:
            yield _trained(family, name, recipe, ("ablation",))


def _trained(family: Family, name: str, recipe: Recipe, parts: tuple[str, ...], *, read: ModelSettings | None = None) -> Experiment:
    read = _settings(recipe) if read is None else read
    one_pass, step = family.update_seconds
    each = family.frozen_prompt * one_pass + step * recipe.max_steps if recipe.max_steps else one_pass
    batch = recipe.queries / family.gircse.queries * (1.3 if recipe.chunk else 1.0)
    measuring = family.measure_seconds if read.halt.max_steps else family.measure_seconds / 3
    return Experiment(
        backbone=family.name,
        name=name,
        seed=recipe.seed,
        parts=parts,
        recipe=recipe,
        read=read,
        seconds=family.start_seconds + each * batch * recipe.updates + measuring,
    )


def _at(recipe: Recipe, share: float, seed: int) -> Recipe:
    """Return a recipe at a share of its updates."""
    return replace(recipe, updates=round(share * recipe.updates), seed=seed)


def _last_step(objective: Objective) -> Objective:
    return replace(objective, stepwise=False, regulariser=0.0)

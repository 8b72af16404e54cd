"""One text under the magnifying glass: what a model says at each step, how far its vector moves, what it finds, what that costs."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
from pydantic import BaseModel, ConfigDict, Field

from genembed.cost import Cost, Shape
from genembed.embedder import Embedder
from genembed.errors import ConfigurationError, NonFiniteError
from genembed.halting import ConvergeStop, FixedSteps, Progress
from genembed.refine import step
from genembed.rows import CachedRows
from genembed.serve.failures import Failure, failure_of
from genembed.serve.threads import PassingThreads
from genembed.spoken import Spoken, likeliest, new_tokens
from genembed.tokens import TokenBatch, Tokenised

if TYPE_CHECKING:
    from genembed.index import Hit, Index

_PAGE = Path(__file__).parent / "page"
PAGE_FILES = {
    "/": (_PAGE / "index.html", "text/html"),
    "/static/style.css": (_PAGE / "style.css", "text/css"),
    "/static/script.js": (_PAGE / "script.js", "text/javascript"),
    "/static/icon.svg": (_PAGE / "icon.svg", "image/svg+xml"),
}
"""The page's routes, each with its file and media type. They hold nothing of the models, so they are served without a key."""

PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
"""What a browser may do with them: nothing is loaded from elsewhere, and no other page shows this one in a frame."""


@dataclass(frozen=True, kw_only=True)
class Step:
    """A text after `step` refinement steps; step 0 is the prompt alone."""

    step: int
    spoken: list[Spoken]
    """Likeliest tokens of the soft token that was read in this step; none at step 0."""
    stability: float | None
    """s_k, the cosine with the embedding before; None before step 2, where equation 2 of ConvergeStop defines none."""
    hits: list[Hit] | None
    """Nearest passages; None without an index, and where there is no embedding yet."""
    operations: int | None
    """Of the prompt and all steps so far; None where a configuration does not tell."""


@dataclass(frozen=True, kw_only=True)
class Exploration:
    """A text, step by step, at full length; the halting rule is only watched."""

    steps: list[Step]
    phases: list[tuple[int, int, list[str]]]
    """First and last step of each phase, and the tokens that are new in it (GIRCSE, table 4)."""
    halt: str
    """The model's halting rule."""
    threshold: float | None
    """Cosine from which the rule counts a step as stable; None if it counts steps alone."""
    halted: int | None
    """Step at which the rule would have stopped; None if that is after the last one here."""
    tokens: int
    """Prompt tokens read."""
    truncated: bool
    """Whether the text lost its end to the model's length limit."""


@torch.inference_mode()
def explore(
    embedder: Embedder, text: str, instruction: str | None, steps: int, top: int, index: Index | None = None, hits: int = 3
) -> Exploration:
    """Refine one text by the reference loop, and write down everything that can be seen of it.

    Steps are exact, also those of a model that is loaded to refine all of them in parallel passes.

    Args:
        embedder: The model.
        text: One text.
        instruction: Put before it by the model's template; None reads it bare.
        steps: Refinement steps, at least 0.
        top: Likeliest tokens to name of each soft token.
        index: Where to look for the nearest passages after each step; made by the same model.
        hits: How many of them.

    Raises:
        ConfigurationError: If the model cannot do so many steps, or a number is too small.
        InputError: If the text cannot be embedded.
        NonFiniteError: If an embedding came out non-finite.
    """
    if top < 1 or hits < 1:
        raise ConfigurationError(f"top={top}, hits={hits}: both must be at least 1.")
    embedder.backbone.check_halt(FixedSteps(steps))
    tokenised = embedder.tokenizer([text], instruction)
    operations = _operations(embedder, int(tokenised.tokens[0]), steps)
    rule, found, halted = embedder.settings.halt, list[Step](), None
    for spoken, cosine, progress in _refined(embedder, tokenised, steps, top):
        k = len(found)
        if halted is None and bool(rule(progress)):
            halted = k
        nearest = None if index is None or not progress.weight else index.search(progress.embedding[0].float().cpu().numpy(), k=hits)
        found.append(Step(step=k, spoken=spoken, stability=cosine, hits=nearest, operations=operations[k]))
    return Exploration(
        steps=found,
        phases=new_tokens([one.spoken for one in found[1:]]),
        halt=repr(rule),
        threshold=rule.threshold if isinstance(rule, ConvergeStop) else None,
        halted=halted,
        tokens=int(tokenised.tokens[0]),
        truncated=bool(tokenised.truncated[0]),
    )


def _refined(embedder: Embedder, tokenised: Tokenised, steps: int, top: int) -> Iterator[tuple[list[Spoken], float | None, Progress]]:
    """Yield for k = 0 .. K what was said, s_k, and the progress."""
    backbone = embedder.backbone
    batch = TokenBatch.pad(tokenised.ids, side=backbone.settings.padding_side, device=backbone.device)
    rows = CachedRows(backbone, batch)
    progress = backbone.settings.pooling.start(batch.index, rows.last_hidden, rows.mean_hidden, window=embedder.settings.halt.window)
    yield [], None, progress
    for k in range(1, steps + 1):
        spoken = likeliest(embedder, rows.last_hidden, top=top)
        progress, cosine = step(backbone, rows, progress)
        if not bool(progress.embedding.isfinite().all()):
            raise NonFiniteError(f"the embedding is not finite after {k} steps; check the model's weights.")
        yield spoken, float(cosine[0]) if k > 1 else None, progress


def _operations(embedder: Embedder, tokens: int, steps: int) -> list[int | None]:
    """Return the operations up to each step."""
    try:
        shape = Shape.of(embedder.source.base, causal=embedder.backbone.causal, spoken=len(embedder.backbone.spoken))
    except ConfigurationError:  # a mixture of experts: all else can still be shown
        return [None] * (steps + 1)
    return [Cost(shape=shape, tokens=tokens, steps=k).cached for k in range(steps + 1)]


_STEPS = 20
_WAITING = 8
"""Explorations that may be asked for at a time."""


class ExploreRequest(BaseModel):
    """POST /explore."""

    model_config = ConfigDict(extra="forbid", strict=True)

    text: str
    instruction: str | None = None
    model: str | None = None
    """The server's first model if None."""
    steps: Annotated[int, Field(ge=0)] | None = None
    """As many as the server allows if None, at most 20."""
    top: Annotated[int, Field(ge=1, le=20)] = 5
    hits: Annotated[int, Field(ge=1, le=20)] = 3


class Explorer:
    """Explores texts for the page, one at a time, each in a thread of its own.

    Args:
        models: The models that can be asked, by name; the first one is the server's own.
        index: Documents to look at, made by one of the models.
        max_steps: The most steps a text may ask for.

    Raises:
        ConfigurationError: If none of the models made the index.
    """

    def __init__(self, models: Mapping[str, Embedder], index: Index | None, *, max_steps: int) -> None:
        self.models = {name: _apart(embedder) for name, embedder in models.items()}
        self.max_steps = max_steps
        self._index = index
        self._searching = None if index is None else _maker(models, index)
        self._threads: PassingThreads[Exploration] = PassingThreads("genembed-explorer")

    def choices(self) -> dict[str, Any]:
        """Return what the page can ask for."""
        models = [
            {
                "name": name,
                "dimensions": embedder.get_embedding_dimension(),
                "halt": repr(embedder.settings.halt),
                "steps": min(embedder.settings.halt.max_steps, self.max_steps),
                "query_instruction": embedder.settings.query_instruction,
            }
            for name, embedder in self.models.items()
        ]
        index = None if self._index is None else {"passages": len(self._index), "model": self._searching}
        return {"models": models, "index": index, "max_steps": self.max_steps}

    async def answer(self, wanted: ExploreRequest) -> dict[str, Any]:
        """Explore one text, after those that were asked for before.

        Raises:
            Failure: If the request cannot be served.
        """
        name = next(iter(self.models)) if wanted.model is None else wanted.model
        if name not in self.models:
            served = ", ".join(map(repr, self.models))
            raise Failure(404, f"model {name!r:.80} is not served here, but {served}.", code="model_not_found", param="model")
        steps = min(_STEPS, self.max_steps) if wanted.steps is None else wanted.steps
        if steps > self.max_steps:
            raise Failure(400, f"steps={steps}: this server does at most {self.max_steps}.", code="invalid_value", param="steps")
        index = self._index if name == self._searching else None
        arguments = (self.models[name], wanted.text, wanted.instruction, steps, wanted.top, index, wanted.hits)
        if self._threads.under_way >= _WAITING:
            raise Failure(429, f"{_WAITING} explorations wait already.", code="rate_limit_exceeded", retry_after=1)
        try:
            done = await asyncio.wrap_future(self._threads.submit(lambda: explore(*arguments)))
        except Exception as error:
            raise failure_of(error) from error
        return {"model": name, "instruction": wanted.instruction, **_json(done)}

    def close(self) -> None:
        """Take nothing new."""
        self._threads.close()


def _apart(embedder: Embedder) -> Embedder:
    """Return the same model with a tokenizer of its own: tokenizers are not for several threads, weights are."""
    own = copy.copy(embedder)
    own.tokenizer = copy.deepcopy(embedder.tokenizer)
    return own


def _maker(models: Mapping[str, Embedder], index: Index) -> str:
    """Return the name of the model that made an index; if it is none of them, raise what is wrong with the first."""
    refused = list[ConfigurationError]()
    for name, embedder in models.items():
        try:
            index.check(embedder)
        except ConfigurationError as error:
            refused.append(error)
        else:
            return name
    raise refused[0]


def _json(done: Exploration) -> dict[str, Any]:
    """Return an exploration as JSON; of a passage what is shown for it, not its text, which may be long and is found at every step."""
    value = asdict(done)
    for one in value["steps"]:
        one["spoken"] = [word._asdict() for word in one["spoken"]]
        if one["hits"] is not None:
            one["hits"] = [{name: hit[name] for name in ("score", "reference", "summary")} for hit in one["hits"]]
    return value

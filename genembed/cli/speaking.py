"""What a model says to itself: `genembed tokens`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from genembed.cli.options import Json, LoadOptions, command
from genembed.cli.output import print_result
from genembed.errors import ConfigurationError

if TYPE_CHECKING:
    import genembed
    from genembed.spoken import Spoken


@command
def tokens(
    model: Annotated[str, typer.Argument(help="Built-in model (mini), model folder, or hub id.")],
    text: Annotated[str, typer.Argument(help="The text that is read.")],
    *,
    instruction: Annotated[str | None, typer.Option(help="What the embedding is for; other words are said under another one.")] = None,
    steps: Annotated[int, typer.Option(help="Soft tokens to show.")] = 20,
    top: Annotated[int, typer.Option(help="Likeliest tokens of each.")] = 5,
    before: Annotated[bool, typer.Option("--before", help="Also what the base model says without its adapter.")] = False,
    as_json: Json = False,
    loading: LoadOptions,
) -> None:
    """Show the likeliest tokens of every soft token, and which are new in steps 1-5, 6-10 and 11-20."""
    from genembed.spoken import spoken_tokens

    if loading.parallel_passes is not None:
        raise ConfigurationError(f"--parallel-passes {loading.parallel_passes} has no effect here: what is shown is each exact step.")
    embedder = loading.load(model)
    said = {"trained": spoken_tokens(embedder, text, instruction=instruction, steps=steps, top=top)}
    if before:
        said["before training"] = spoken_tokens(_base_of(embedder, loading), text, instruction=instruction, steps=steps, top=top)
    value: dict[str, Any] = {"model": model, "text": text, "instruction": instruction}
    value |= {name.replace(" ", "_"): [[list(word) for word in best] for best in steps_said] for name, steps_said in said.items()}
    blocks = [_block(spoken, name if before else None) for name, spoken in said.items()]
    print_result(value, "\n\n".join(blocks), as_json=as_json)


def _base_of(embedder: genembed.Embedder, loading: LoadOptions) -> genembed.Embedder:
    """Load the base model under the same settings, without the adapter."""
    source = embedder.source
    if source.adapter is None or source.head is not None:
        reason = "has no adapter" if source.adapter is None else "speaks through a head that its base model does not have"
        raise ConfigurationError(f"--before: {source.name} {reason}, so there is nothing that it said before training.")
    return LoadOptions(device=loading.device, dtype=loading.dtype, offline=loading.offline).load(str(source.base), preset=source.settings)


def _block(said: list[list[Spoken]], title: str | None) -> str:
    from genembed.spoken import new_tokens

    lines = [] if title is None else [title]
    for k, best in enumerate(said, start=1):
        lines.append(f"{k:>4}  " + "  ".join(f"{word.token.strip() or repr(word.token)} {word.probability:.2f}" for word in best))
    for first, last, fresh in new_tokens(said):
        lines.append(f"new in steps {first}-{last}: {', '.join(token.strip() or repr(token) for token in fresh) or 'none'}")
    return "\n".join(lines)

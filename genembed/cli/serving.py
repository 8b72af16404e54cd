"""Vectors over HTTP: `genembed serve`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from genembed.cli.options import LoadOptions, command
from genembed.errors import ConfigurationError

if TYPE_CHECKING:
    from genembed.embedder import Embedder
    from genembed.index import Index
    from genembed.serve.limits import Limits


@dataclass(frozen=True, kw_only=True)
class LimitOptions:
    """How much the server takes on."""

    max_batch_tokens: Annotated[int, typer.Option(help="Positions of all texts under way, prompt and generated.")] = 20_480
    max_queue_tokens: Annotated[int, typer.Option(help="Prompt tokens that may wait; more are refused with 429.")] = 262_144
    max_concurrent_requests: Annotated[int, typer.Option(help="Requests that may be open; more are refused with 429.")] = 512
    max_client_batch: Annotated[int, typer.Option(help="Texts in one request.")] = 2_048
    max_request_bytes: Annotated[int, typer.Option(help="Length of a request's body.")] = 16 << 20
    max_steps: Annotated[int, typer.Option(help="Refinement steps that a text may ask for.")] = 20

    def limits(self) -> Limits:
        """Return them as the server takes them."""
        from genembed.serve.limits import Limits

        return Limits(
            batch_tokens=self.max_batch_tokens,
            queue_tokens=self.max_queue_tokens,
            concurrent_requests=self.max_concurrent_requests,
            client_batch=self.max_client_batch,
            request_bytes=self.max_request_bytes,
            steps=self.max_steps,
        )


@command
def serve(
    model: Annotated[str, typer.Argument(help="Built-in model (mini), model folder, or hub id.")],
    *,
    host: Annotated[str, typer.Option(help="Address to listen on; anything else than this machine's own is open to others.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65_535, help="0 takes a free one.")] = 8080,
    api_key_file: Annotated[Path | None, typer.Option(help="File with a key that clients must send as Authorization: Bearer KEY.")] = None,
    served_model_name: Annotated[str | None, typer.Option(help="What clients call the model; its name or folder if not given.")] = None,
    grace: Annotated[float, typer.Option(min=0, help="Seconds in which accepted texts may be finished on SIGTERM.")] = 30.0,
    also: Annotated[
        list[str] | None,
        typer.Option(metavar="MODEL", help="A further model that the page at / compares with the first, without its --adapter."),
    ] = None,
    index: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Index, made by one of the models, whose nearest passages the page shows.")
    ] = None,
    limiting: LimitOptions,
    loading: LoadOptions,
) -> None:
    """Serve embeddings over HTTP, as OpenAI, Cohere and text-embeddings-inference do: many clients, one batch.

    The page at / shows what a model says to itself at each step, and what it finds.
    """
    from genembed.serve.run import run
    from genembed.serve.threads import PassingThreads

    key, name = None if api_key_file is None else _key(api_key_file), served_model_name or model
    further = also or []
    _check_names([name, *further])
    opened = None if index is None else _open(index)
    # Loading computes: the thread that does it must not be one that stays.
    loads: PassingThreads[dict[str, Embedder]] = PassingThreads("genembed-loader")
    models = loads.submit(
        lambda: {name: loading.load(model), **{other: replace(loading, adapter=None).load(other) for other in further}}
    ).result()
    run(
        models.pop(name),
        name=name,
        host=host,
        port=port,
        api_key=key,
        limits=limiting.limits(),
        grace=grace,
        announce=lambda url: typer.echo(f"{name}: {url} (POST /v1/embeddings)", err=True),
        also=models,
        index=opened,
    )


def _check_names(names: list[str]) -> None:
    twice = next((name for place, name in enumerate(names) if name in names[:place]), None)
    if twice is not None:
        raise ConfigurationError(f"--also {twice}: that model is served already; name each once, or give the first another name.")


def _open(folder: Path) -> Index:
    from genembed.index import Index

    return Index.open(folder)


_KEY_BYTES = 4_096


def _key(path: Path) -> str:
    with path.open("rb") as file:
        key = file.read(_KEY_BYTES + 1).decode("ascii", "replace").strip()
    if not 0 < len(key) <= _KEY_BYTES or not (key.isascii() and key.isprintable()) or " " in key:
        raise ConfigurationError(f"--api-key-file {path}: one line of printable ASCII without spaces is needed.")
    return key

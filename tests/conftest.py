"""Fixtures of every test: shape checks on, network off, a fixed seed, and the doubles."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

from jaxtyping import install_import_hook

# Before the first import of the package: every annotated shape and type is checked while the tests run.
_HOOK = install_import_hook("genembed", "beartype.beartype")

import pytest
import torch
from hypothesis import HealthCheck, settings

import doubles
from genembed import Embedder, ModelSettings, load

os.environ["TOKENIZERS_PARALLELISM"] = "false"

settings.register_profile(
    "genembed",
    deadline=None,  # the machine may be busy; the suite's time is bounded by the number of examples
    derandomize=True,
    database=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("genembed")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def refused_connections(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Refuse every connection and every name look-up, and fail a test that tried one without saying so.

    A test that means to try clears the list.
    """
    attempts: list[str] = []

    def refuse(*arguments: object, **_: object) -> None:
        attempts.append(repr(arguments[-1:]))
        raise ConnectionRefusedError("the tests have no network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket.socket, "connect_ex", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    yield attempts
    assert attempts == [], "the test touched the network"


@pytest.fixture(scope="session")
def shared() -> Path:
    """Folder of reference data that lies beside the repository, not in it."""
    folder = Path(__file__).resolve().parents[2] / "shared"
    if not folder.is_dir():
        pytest.skip(f"the reference data is not there: {folder.name}/ beside the repository")
    return folder


@pytest.fixture(scope="session")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return the folder of a tiny random model of a family, saved once a session; tests must not change it."""
    root = tmp_path_factory.mktemp("models")
    return lambda family: doubles.saved(family, root)


@pytest.fixture(scope="session")
def embedder_of(folder_of: Callable[[str], Path]) -> Callable[..., Embedder]:
    """Return a float64 embedder of a family, loaded once a session for each preset."""
    known: dict[tuple[str, str | ModelSettings | None], Embedder] = {}

    def embedder(family: str, preset: str | ModelSettings | None = None) -> Embedder:
        key = (family, preset)
        if key not in known:
            known[key] = load(folder_of(family), preset=preset, dtype="float64")
        return known[key]

    return embedder

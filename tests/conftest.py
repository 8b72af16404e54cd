"""Fixtures of every test: shape checks on, network off, a fixed seed, and the doubles."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from jaxtyping import config, install_import_hook

# Before the first import of the package: every annotated shape and type is checked while the tests run.
_PACKAGE = Path(__file__).resolve().parents[1] / "genembed"
_CHECKED = [
    ".".join(file.relative_to(_PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")
    for file in sorted(_PACKAGE.rglob("*.py"))
    if file.stem != "__init__"
]
_HOOK = install_import_hook(_CHECKED, "beartype.beartype")

import pytest
import torch
from hypothesis import HealthCheck, settings

import doubles
from genembed import Embedder, ModelSettings, load

os.environ["TOKENIZERS_PARALLELISM"] = "false"
# The models are tiny: threads only wait for one another, and on busy cores a suite of a minute takes ten.
torch.set_num_threads(1)

settings.register_profile(
    "genembed",
    deadline=None,  # the machine may be busy; the suite's time is bounded by the number of examples
    derandomize=True,
    database=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("genembed")


BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def benchmarks() -> Iterator[Path]:
    """Make the scripts of `benchmarks/` importable for a file of tests; they come with the repository, not with the package."""
    if not BENCHMARKS.is_dir():
        pytest.skip("the benchmarks are not here: they come with the repository, not with the package")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        yield BENCHMARKS


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def untyped_caller() -> Iterator[None]:
    """Switch the type checks off, for a caller who passes what no type checker would let through."""
    config.update("jaxtyping_disable", True)
    yield
    config.update("jaxtyping_disable", False)


@pytest.fixture(scope="session", autouse=True)
def _no_network() -> Iterator[list[str]]:
    """Refuse every connection and every name look-up but those to this machine itself, from before the first model is loaded."""
    attempts: list[str] = []

    def guarded(call: Callable[..., Any], place: int) -> Callable[..., Any]:
        def own_machine_only(*arguments: Any, **options: Any) -> Any:
            address = arguments[place]
            host = address[0] if isinstance(address, tuple) else address
            if host not in ("127.0.0.1", "::1"):
                attempts.append(repr(arguments))
                raise ConnectionRefusedError("the tests have no network")
            return call(*arguments, **options)

        return own_machine_only

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", guarded(socket.socket.connect, 1))
        patch.setattr(socket.socket, "connect_ex", guarded(socket.socket.connect_ex, 1))
        patch.setattr(socket, "getaddrinfo", guarded(socket.getaddrinfo, 0))
        yield attempts


@pytest.fixture(autouse=True)
def refused_connections(_no_network: list[str]) -> Iterator[list[str]]:
    """Return the refused connections of this test, and fail it if it leaves one there: a test that means to try clears the list."""
    yield _no_network
    attempts, _no_network[:] = list(_no_network), []
    assert attempts == [], "the test, or a fixture made for it, touched the network"


@pytest.fixture(scope="module", autouse=True)
def _shared_models_stay_as_they_were() -> Iterator[None]:
    """Blame the file whose tests change a shared model in place; else the order of the files would decide which tests pass."""
    yield
    assert [family for family in doubles.FAMILIES if not doubles.is_unchanged(family)] == []


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

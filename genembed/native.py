"""Steps of few rows in C: built by the machine's own compiler when they are first wanted, kept for later, loaded into this process.

A step of few rows spends its time between hundreds of small operations, and attention of one query a row between thousands of tiny
products; `genembed/c` does both without leaving the processor (docs/LOG.md has the figures). Without a C compiler, or on another
system than Linux, PyTorch's operations do the same work.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from ctypes import POINTER, Structure, c_double, c_int64, c_void_p
from functools import cache
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from genembed.errors import GenembedError

SOURCES = Path(__file__).parent / "c"
MOST_DIM = 512
"""Largest size of an attention head; `MOST_DIM` of model.h."""
_DTYPES = {torch.float32: (), torch.bfloat16: ("-DBFLOAT16",), torch.float64: ("-DDOUBLE",)}
# Sums may be taken in another order, as vectors need; that numbers may be infinite or NaN stays true.
_FLAGS = "-std=gnu11 -O3 -march=native -fopenmp -fassociative-math -fno-signed-zeros -fno-trapping-math -fno-math-errno -fPIC -shared"
_COMPILE_SECONDS = 120


class NativeError(GenembedError):
    """The steps in C cannot be used here; the message has the reason."""


class Linear(Structure):
    """A linear layer; fields and order are those of model.h, as in all structures here."""

    _fields_ = (("weight", c_void_p), ("bias", c_void_p), ("outputs", c_int64), ("inputs", c_int64))


class Norm(Structure):
    """A norm of a row."""

    _fields_ = (("weight", c_void_p), ("bias", c_void_p), ("epsilon", c_double), ("kind", c_int64))


class Layer(Structure):
    """One layer of a transformer."""

    _fields_ = (
        *((name, Norm) for name in ("before_attention", "before_feed_forward", "of_queries", "of_keys")),
        *((name, Linear) for name in ("query", "key", "value", "output", "gate", "up", "down")),
        ("activation", c_int64),
        ("window", c_int64),
    )


class Head(Structure):
    """From a state to the next input."""

    _fields_ = (
        ("dense", Linear),
        ("vocabulary", Linear),
        ("norm", Norm),
        ("table", c_void_p),
        *((name, c_double) for name in ("temperature", "scale", "softcap", "embedding_scale")),
        ("activation", c_int64),
    )


class Model(Structure):
    """All that a step reads of a model."""

    _fields_ = (
        *((name, c_int64) for name in ("hidden", "widest", "heads", "kv_heads", "head_dim", "num_layers", "after_norm")),
        ("attention_scale", c_double),
        ("layers", POINTER(Layer)),
        ("final_norm", Norm),
        ("head", Head),
        *((name, c_void_p) for name in ("cosines", "sines", "positions", "token_type")),
    )


class Pool(Structure):
    """Keys and values of one layer."""

    _fields_ = tuple((name, c_void_p) for name in ("keys", "values", "prefix_keys", "prefix_values"))


class Rows(Structure):
    """The rows of a step."""

    _fields_ = (
        *((name, c_int64) for name in ("count", "prefix", "tokens")),
        ("lengths", c_void_p),
        ("pools", POINTER(Pool)),
    )


class Attention:
    """Attention of one new position per row, over no more positions than each row has.

    Args:
        library: The steps in C.
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        self.library = library

    def __call__(
        self,
        rows: Rows,
        layer: int,
        query: Float[Tensor, "heads rows head_dim"],
        key: Float[Tensor, "kv_heads rows head_dim"],
        value: Float[Tensor, "kv_heads rows head_dim"],
        scale: float,
        window: int | None,
        softcap: float | None,
    ) -> Float[Tensor, "rows heads head_dim"]:
        """Put new keys and values into the pool, and attend to all that each row sees then."""
        scaled, key, value = (
            query.transpose(0, 1).contiguous() * scale,
            key.transpose(0, 1).contiguous(),
            value.transpose(0, 1).contiguous(),
        )
        result = torch.empty_like(scaled)
        self.library.attend(
            rows, rows.pools[layer], *(part.data_ptr() for part in (scaled, key, value, result)),
            query.shape[0], key.shape[1], query.shape[-1], window or 0, softcap or 0.0, torch.get_num_threads(),
        )  # fmt: skip
        return result


def attends(key_dim: int, value_dim: int) -> bool:
    """Whether attention in C can do heads of these sizes; it keeps a query on the stack, and reads values as long as keys."""
    return key_dim == value_dim <= MOST_DIM


def pools(tensors: Sequence[tuple[Tensor | None, ...]]) -> ctypes.Array[Pool]:
    """Describe the pool of each layer: keys, values, and those of the shared prefix or None; they must outlive what is returned."""
    described = [Pool(*(None if tensor is None else tensor.data_ptr() for tensor in own)) for own in tensors]
    return (Pool * len(described))(*described)


@cache
def library(dtype: torch.dtype) -> ctypes.CDLL:
    """Return the steps in C for tensors of `dtype`, built now unless they were before.

    Raises:
        NativeError: If there is no compiler, it fails, or the dtype or the system is none of those it is made for.
    """
    if sys.platform != "linux":
        raise NativeError(f"steps in C are built on Linux alone, and this is {sys.platform}.")
    if dtype not in _DTYPES:
        raise NativeError(f"dtype={dtype}: steps in C are made for float32, bfloat16 and float64.")
    loaded = ctypes.CDLL(str(_built(_DTYPES[dtype])))
    loaded.step.argtypes = (POINTER(Model), POINTER(Rows), c_void_p, c_void_p, c_int64)
    loaded.space_of_step.argtypes = (POINTER(Model), c_int64, c_int64)
    loaded.attend.argtypes = (POINTER(Rows), POINTER(Pool), *(c_void_p,) * 4, *(c_int64,) * 4, c_double, c_int64)
    loaded.step.restype = loaded.attend.restype = None
    loaded.space_of_step.restype = loaded.most_rows.restype = c_int64
    return loaded


def _built(defines: tuple[str, ...]) -> Path:
    """Return the shared library, from the cache or from the compiler."""
    compiler = shlex.split(os.environ.get("CC") or "cc")
    if shutil.which(compiler[0]) is None:
        raise NativeError(f"no C compiler: {compiler[0]!r} is not on the PATH; install one (Debian: apt install gcc), or set CC.")
    command = [*compiler, *_FLAGS.split(), *defines]
    version = _run([*compiler, "--version"])
    sources = sorted(SOURCES.iterdir())
    parts = ["\0".join(command), version, _processor(), *(source.read_text(encoding="utf-8") for source in sources)]
    name = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]
    target = _cache_folder() / f"step-{name}.so"
    if not target.exists():
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            fresh = Path(folder) / target.name
            _run([*command, "-o", str(fresh), str(SOURCES / "step.c"), "-lm"])
            fresh.replace(target)  # whoever else builds it now makes the same
    return target


def _run(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_COMPILE_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NativeError(f"{command[0]} did not work: {error}") from error
    if done.returncode:
        raise NativeError(f"{command[0]} could not build genembed's steps in C: {' '.join(done.stderr.split())[:500]}")
    return done.stdout


def _processor() -> str:
    """Tell processors apart for which `-march=native` may build different code: a home may be shared by several machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        raise NativeError(f"the kind of processor is unknown: {error}") from error
    return platform.machine() + "".join(
        sorted({line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))})
    )


def _cache_folder() -> Path:
    """Return the folder of built libraries: ours, and nobody else can write there, for what lies in it is run."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "genembed"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = folder.lstat()
    except OSError as error:
        raise NativeError(f"{folder}: cannot be made: {error}; set XDG_CACHE_HOME to a folder of yours.") from error
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o022:
        raise NativeError(f"{folder}: belongs to somebody else, or others can write there; libraries are not loaded from it.")
    return folder

"""The fused soft token: computed in Triton's interpreter, compiled for a GPU that need not be there, and chosen where it pays."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from genembed import cuda
from genembed.cuda import Tiling, fuses, tiling
from genembed.errors import GenembedWarning
from genembed.soft_token import Scores, soft_token

HOPPER = 232_448
"""Bytes of shared memory a program may have on an H100 or H200."""

FEW = 16
"""Bytes a thread may keep out of its registers: two or three addresses, with some versions of Triton, and no part of the average."""

TRITON = tuple(map(int, version("triton").split(".")[:2])) if find_spec("triton") else (0, 0)

needs_triton = pytest.mark.skipif(TRITON == (0, 0), reason="Triton is not installed (it is for Linux alone): pip install 'genembed[gpu]'")


@needs_triton
@pytest.mark.slow
@pytest.mark.skipif(TRITON < (3, 7), reason="before Triton 3.7 a loop in the interpreter fails with NumPy 2.4")
def test_the_kernels_are_right_in_tritons_interpreter() -> None:
    """In a process of its own: the interpreter is chosen when Triton is first imported, and other tests' libraries import it too."""
    file = Path(__file__).with_name("interpreted_soft_token.py")
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", str(file)],
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        cwd=file.parents[1],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert re.search(r"\d+ passed", run.stdout)


@needs_triton
@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION:UserWarning")
@pytest.mark.parametrize(
    ("length", "tied", "scores"),
    [(384, True, Scores()), (896, True, Scores()), (2048, True, Scores()), (896, False, Scores(scale=0.5, softcap=30.0))],
)
def test_the_kernel_compiles_for_hopper_as_its_tiling_says(
    length: int, tied: bool, scores: Scores, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The average stays in registers, tiles come by asynchronous copies, and a tied table is copied once."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    cut = tiling(length, tables=1 if tied else 2, element_bytes=2, shared_bytes=HOPPER)
    assert cut is not None
    compiled = compile_split_kernel(cut, length, tied=tied, scores=scores)
    assert compiled.metadata.shared <= cut.shared_bytes(length, tables=1 if tied else 2, element_bytes=2)
    copies = compiled.asm["ttgir"].count("ttg.async_copy_global_to_local")
    assert copies == (1 if tied else 2) * cut.stages  # before the loop all stages but one, in the loop one
    assert stack_bytes(compiled.asm["cubin"], tmp_path) <= FEW


@needs_triton
@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION:UserWarning")
def test_the_merge_of_the_splits_compiles_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from genembed.triton_soft_token import merge_kernel

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    pointers = dict.fromkeys(("maxima", "normalisers", "averages", "average", "log_normaliser"), "*fp32")
    compiled = compile_for_hopper(merge_kernel, pointers, {"length": 896, "columns": 64, "splits": 132, "padded": 256}, num_warps=4)
    assert stack_bytes(compiled.asm["cubin"], tmp_path) <= FEW


def compile_split_kernel(cut: Tiling, length: int, *, tied: bool, scores: Scores) -> Any:
    import triton.language as tl

    from genembed.triton_soft_token import split_kernel

    pointers = dict.fromkeys(("hidden", "weight", "embeddings"), "*bf16")
    pointers |= dict.fromkeys(("maxima", "normalisers", "averages"), "*fp32")
    constants = {
        "bias": None,
        "length": length,
        "chunks": cut.warps,
        "chunk": cut.padded(length) // cut.warps,
        "block": cut.rows,
        "entries": cut.entries,
        "splits": cut.splits,
        "stages": cut.stages,
        "tied": tied,
        "temperature": 1.0,
        "scale": scores.scale,
        "softcap": scores.softcap,
        "wide": tl.float32,
    }
    return compile_for_hopper(split_kernel, pointers, constants, num_warps=cut.warps)


def compile_for_hopper(kernel: Any, pointers: dict[str, str], constants: dict[str, Any], *, num_warps: int) -> Any:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = kernel.arg_names
    source = ASTSource(
        kernel,
        {name: pointers.get(name, "constexpr" if name in constants else "i32") for name in names},
        {(names.index(name),): value for name, value in constants.items()},
        {(names.index(name),): [["tt.divisibility", 16]] for name in pointers},
    )
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": num_warps})


def stack_bytes(program: bytes, folder: Path) -> int:
    """Return what a thread keeps in memory because its registers are full."""
    from triton import knobs

    file = folder / "kernel.cubin"
    file.write_bytes(program)
    usage = subprocess.run([knobs.nvidia.cuobjdump.path, "-res-usage", str(file)], capture_output=True, text=True, check=True).stdout
    return int(re.search(r"STACK:(\d+)", usage)[1])  # type: ignore[index]


@pytest.mark.parametrize(
    ("length", "tables", "entries"),
    [
        (384, 1, 32),
        (896, 1, 32),
        (896, 2, 16),
        (2048, 1, 16),
        (1536, 2, None),  # two tables of tiles do not fit, and plain products read two tables once each as well
        (3584, 1, None),  # the average does not fit
    ],
)
def test_the_work_is_cut_by_what_fits_into_a_multiprocessor(length: int, tables: int, entries: int | None) -> None:
    cut = tiling(length, tables=tables, element_bytes=2, shared_bytes=HOPPER)
    assert (cut and cut.entries) == entries


def test_a_smaller_multiprocessor_gets_a_smaller_tile_or_none() -> None:
    """An A100 has 163 KiB, a consumer's card 99."""
    assert tiling(896, tables=1, element_bytes=2, shared_bytes=163 << 10) == Tiling(entries=16)
    assert tiling(1536, tables=1, element_bytes=2, shared_bytes=99 << 10) is None


def test_the_kernel_is_for_few_rows_of_half_precision_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "_has_triton", lambda: True)
    monkeypatch.setattr(cuda, "shared_memory", lambda device: HOPPER)
    weight = torch.zeros(8, 128, dtype=torch.bfloat16)
    assert not fuses(torch.zeros(1, 128, dtype=torch.bfloat16), weight, weight)  # on a CPU
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    monkeypatch.setattr(cuda, "works", lambda *_: True)
    for rows, dtype, table in (
        (0, torch.bfloat16, weight),
        (33, torch.bfloat16, weight),
        (1, torch.float32, weight),
        (1, torch.float16, weight),
        (1, torch.bfloat16, weight.T.contiguous().T),
    ):
        assert not fuses(torch.zeros(rows, 128, dtype=dtype), weight, table)
    for rows in (1, 32):
        assert fuses(torch.zeros(rows, 128, dtype=torch.bfloat16), weight, weight)
    monkeypatch.setattr(cuda, "_has_triton", lambda: False)
    assert not fuses(torch.zeros(1, 128, dtype=torch.bfloat16), weight, weight)


@pytest.fixture
def _untried() -> Iterator[None]:
    cuda.works.cache_clear()
    yield
    cuda.works.cache_clear()


@pytest.mark.usefixtures("_untried")
def test_a_kernel_that_cannot_be_launched_is_left_out_with_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against a compiler's error in the middle of somebody's work, and against a fallback that nobody hears of."""

    def broken(*_: object) -> None:
        raise RuntimeError("no such instruction")

    monkeypatch.setattr(cuda, "fused_soft_token", broken)
    with pytest.warns(GenembedWarning, match=r"does not work on cpu and is left out \(RuntimeError: no such instruction\)"):
        assert not cuda.works(torch.device("cpu"), torch.bfloat16)


@pytest.mark.usefixtures("_untried")
@pytest.mark.parametrize("factor", [1.0, 1.5])
def test_a_kernel_is_trusted_if_it_gives_what_the_plain_products_give(factor: float, monkeypatch: pytest.MonkeyPatch) -> None:
    def computed(
        hidden: torch.Tensor, weight: torch.Tensor, _: None, table: torch.Tensor, temperature: float, scores: Scores
    ) -> tuple[torch.Tensor, torch.Tensor]:
        logits = scores(hidden.float() @ weight.float().T)
        return factor * soft_token(logits, table.float(), temperature=temperature), logits

    monkeypatch.setattr(cuda, "fused_soft_token", computed)
    with nullcontext() if factor == 1.0 else pytest.warns(GenembedWarning, match="differs from the plain products by 0"):
        assert cuda.works(torch.device("cpu"), torch.bfloat16) is (factor == 1.0)

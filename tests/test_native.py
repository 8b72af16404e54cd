"""Steps in C: used where they can be, equal to the modules' steps, refused with a reason elsewhere. That they are right is law 1, too."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import doubles
from genembed import Budget, ConfigurationError, FixedSteps, NonFiniteError, native
from genembed.backbone import Backbone
from genembed.engine import Engine
from genembed.errors import GenembedWarning
from genembed.native_step import NativeRows, Plan
from genembed.packed import PackedRows, _Group
from genembed.settings import HARD_TOKENS

KNOWN = ["qwen2", "qwen3", "llama", "mistral", "mistral-window", "bert"]
PROMPTS = doubles.prompts([9, 3, 12, 5, 9, 1, 7])


@pytest.fixture(autouse=True)
def built() -> None:
    """Leave the file out where nothing can be built, and say why."""
    try:
        native.library(torch.float64)
    except native.NativeError as error:
        pytest.skip(str(error))


def vectors(backbone: Backbone, prompts: Any = PROMPTS, *, steps: int = 4, **budget: Any) -> np.ndarray:
    found = np.zeros((len(prompts), backbone.hidden_size), dtype=np.float32)
    for done in Engine(backbone, Budget(**budget)).run(prompts, FixedSteps(steps)):
        found[done.index] = done.vectors
    return found


def in_dtype(family: str, dtype: torch.dtype) -> Backbone:
    return doubles.cast(doubles.backbone(family), dtype)


def test_python_and_c_agree_on_every_structure() -> None:
    sizes = (ctypes.c_int64 * 7)()
    native.library(torch.float32).sizes(sizes)
    structures = (native.Linear, native.Norm, native.Layer, native.Head, native.Model, native.Pool, native.Rows)
    assert list(sizes) == [ctypes.sizeof(structure) for structure in structures]


@pytest.mark.parametrize("family", KNOWN)
def test_few_rows_take_whole_steps_in_c_and_many_do_not(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = doubles.backbone(family)
    most = int(native.library(torch.float64).most_rows())
    by_modules: list[int] = []
    append = PackedRows.append

    def spy(self: PackedRows, embeddings: torch.Tensor) -> None:
        by_modules.append(len(self))
        append(self, embeddings)

    engine = Engine(backbone)
    assert engine.done_in_c == "steps of few rows, attention of all"
    monkeypatch.setattr(PackedRows, "append", spy)
    for count in (1, most, most + 1):
        list(engine.run(doubles.prompts([5] * count), FixedSteps(2)))
    assert by_modules == [most + 1, most + 1]


@pytest.mark.parametrize("family", KNOWN)
def test_texts_longer_than_a_block_of_scores_give_the_modules_vectors(family: str) -> None:
    backbone = doubles.backbone(family)
    longest = 100 if family == "bert" else 300
    prompts = doubles.prompts([longest, 140 if longest > 140 else 90, 2], shared=11)
    np.testing.assert_allclose(vectors(backbone, prompts, native=True), vectors(backbone, prompts, native=False), atol=2e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", KNOWN)
def test_vectors_are_no_further_from_those_in_float64_than_the_modules_vectors(family: str, dtype: torch.dtype) -> None:
    backbone = in_dtype(family, dtype)
    exact = vectors(doubles.cast(backbone, torch.float64), steps=2)
    ours, modules = (np.abs(vectors(backbone, steps=2, native=way) - exact).max() for way in (True, False))
    assert 0 < ours < 3 * modules + 1e-6


@pytest.mark.parametrize("family", ["qwen2", "bert"])
def test_a_row_has_the_same_bits_alone_beside_others_and_with_any_number_of_threads(family: str) -> None:
    backbone = in_dtype(family, torch.float32)
    engine, threads = Engine(backbone, Budget(native=True)), torch.get_num_threads()
    assert isinstance(engine.kept, NativeRows)

    @torch.inference_mode()
    def states(count: int) -> torch.Tensor:
        rows = engine.kept.take(max_rows=5, max_tokens=20, prefix=None)
        rows.admit(doubles.prompts([8] * count))
        rows.last_hidden = torch.linspace(-1, 1, rows.last_hidden.numel()).reshape(rows.last_hidden.shape[::-1]).T[:count].contiguous()
        rows.last_hidden[0] = torch.linspace(-1, 1, backbone.hidden_size)
        for values in (rows._keys, rows._values):
            for layer in values:
                values[layer][:] = values[layer][:1]  # what is read, by products of other sizes, may differ in its last bits
        rows.generate()
        return rows.last_hidden[0]

    try:
        torch.set_num_threads(1)
        alone = states(1)
        for count, own in ((1, 2), (1, 3), (2, 1), (5, 1), (5, 2), (5, 5)):
            torch.set_num_threads(own)
            assert torch.equal(states(count), alone) or count > 1, f"{own} threads"
            torch.testing.assert_close(states(count), alone, rtol=0, atol=1e-5)
    finally:
        torch.set_num_threads(threads)


def test_a_row_that_is_not_finite_spoils_no_other_and_is_named() -> None:
    backbone = in_dtype("qwen2", torch.float32)
    engine = Engine(backbone, Budget(native=True))
    assert isinstance(engine.kept, NativeRows)
    with torch.inference_mode():
        rows = engine.kept.take(max_rows=3, max_tokens=20, prefix=None)
        rows.admit(PROMPTS[:3])
        rows.last_hidden[1] = torch.nan
        rows.generate()
        rows.generate()
    assert rows.last_hidden.isfinite().all(-1).tolist() == [True, False, True]
    broken = doubles.trainable(backbone)
    with torch.no_grad():
        broken.base.norm.weight[3] = torch.inf  # type: ignore[union-attr, index]
    with pytest.raises(NonFiniteError, match="row 0"):
        vectors(broken, PROMPTS[:1], native=True)


def test_weights_that_change_in_place_or_are_replaced_are_followed() -> None:
    backbone = doubles.trainable(doubles.backbone("llama"))
    backbone.model.requires_grad_(False)
    engine = Engine(backbone, Budget(native=True))

    def same_as_modules() -> np.ndarray:
        found = np.concatenate([done.vectors for done in engine.run(PROMPTS[:1], FixedSteps(3))])
        np.testing.assert_allclose(found, vectors(backbone, PROMPTS[:1], steps=3, native=False), atol=2e-7)
        return found

    before, layer = same_as_modules(), backbone.base.layers[1]  # type: ignore[union-attr, index]
    layer.mlp.up_proj.weight.mul_(1.5)
    changed = same_as_modules()
    layer.mlp.up_proj.weight = torch.nn.Parameter(layer.mlp.up_proj.weight * 0.5, requires_grad=False)
    replaced = same_as_modules()
    assert np.abs(before - changed).max() > 1e-3
    assert np.abs(changed - replaced).max() > 1e-3


def test_a_step_that_differs_from_the_modules_is_announced_and_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = Plan._shape

    def wrong(self: Plan, *arguments: Any, **options: Any) -> None:
        shape(self, *arguments, **options)
        self.model.attention_scale *= 1.5

    monkeypatch.setattr(Plan, "_shape", wrong)
    backbone = doubles.backbone("qwen2")
    with pytest.warns(GenembedWarning, match="a step in C differs from the modules' by"):
        found = vectors(backbone, native=True)
    np.testing.assert_allclose(found, vectors(backbone, native=False), atol=2e-7)


def with_adapter() -> Backbone:
    from peft import LoraConfig, get_peft_model

    backbone = doubles.trainable(doubles.backbone("qwen2"))
    get_peft_model(backbone.model, LoraConfig(target_modules=["q_proj"]))
    return backbone


UNKNOWN: dict[str, tuple[Callable[[], Backbone], str]] = {
    "architecture": (lambda: doubles.backbone("gemma2"), "Gemma2Model is no architecture that steps in C know"),
    "tokens": (lambda: doubles.backbone("qwen2", tokens=HARD_TOKENS.tokens), "speak soft tokens alone"),
    "layers": (with_adapter, "Linear is no plain linear layer"),
}


def test_an_adapter_is_known_as_long_as_it_is_in_the_weights() -> None:
    """A converted folder merges its adapter to encode, and had other last digits than the library."""
    from genembed.integrations.merging import MergedAdapter

    backbone = with_adapter()
    for name, weight in backbone.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.2)
    merged, engine = MergedAdapter(backbone.model), Engine(backbone)
    assert engine.done_in_c == "steps of few rows, attention of all"
    inside = np.concatenate([done.vectors for done in engine.run(PROMPTS[:1], FixedSteps(3))])
    np.testing.assert_allclose(inside, vectors(backbone, PROMPTS[:1], steps=3, native=False), atol=2e-7)
    merged.undo()
    assert engine.done_in_c.startswith("attention: Linear is no plain linear layer")
    beside = np.concatenate([done.vectors for done in engine.run(PROMPTS[:1], FixedSteps(3))])
    np.testing.assert_allclose(beside, inside, atol=2e-7)


@pytest.mark.parametrize("kind", list(UNKNOWN))
def test_what_steps_in_c_do_not_know_is_named_and_gets_its_attention_from_c(kind: str) -> None:
    made, reason = UNKNOWN[kind]
    backbone = made()
    assert re.match(rf"attention: .*{reason}", Engine(backbone).done_in_c)
    np.testing.assert_allclose(vectors(backbone, native=True), vectors(backbone, native=False), atol=2e-7)


def narrowed() -> Backbone:
    backbone = doubles.trainable(doubles.backbone("llama"))
    attention = backbone.base.layers[0].self_attn  # type: ignore[union-attr, index]
    attention.v_proj = torch.nn.Linear(doubles.HIDDEN, 8, dtype=torch.float64)
    return backbone


def test_layers_whose_sizes_do_not_fit_together_are_refused_before_c_reads_beside_them() -> None:
    with pytest.raises(native.NativeError, match=r"layers of sizes \[\(8, 16\)\] instead of one another"):
        Plan(narrowed())


def test_a_table_of_another_size_than_the_heads_is_refused() -> None:
    backbone = doubles.trainable(doubles.backbone("llama"))
    backbone.spoken = backbone.table[:-1].detach()
    with pytest.raises(native.NativeError, match=r"a table of shape \(319, 32\) under a head of shape \(320, 32\)"):
        Plan(backbone)


@pytest.mark.parametrize(("key_dim", "value_dim", "in_c"), [(8, 8, True), (512, 512, True), (8, 4, False), (520, 520, False)])
def test_heads_that_do_not_fit_on_the_stack_of_c_are_attended_to_by_torch(key_dim: int, value_dim: int, in_c: bool) -> None:
    """C wrote behind its buffer for heads of more than 512 dimensions, and read values as long as keys."""
    backbone = doubles.backbone("qwen2")
    attention = native.Attention(native.library(torch.float64))
    found = []
    for own in (attention, None):
        torch.manual_seed(0)
        rows = PackedRows(backbone, max_rows=1, max_tokens=8, attention=own)
        rows.admit(doubles.prompts([3]))
        rows._keys, rows._values, rows._pools = {}, {}, None
        rows._store(0, _Group(0, 0, 1, 3), torch.randn(1, 2, 3, key_dim).double(), torch.randn(1, 2, 3, value_dim).double())
        assert (rows.attention is not None) is (in_c and own is not None)
        rows._used += 1
        query, key, value = (torch.randn(heads, 1, size).double() for heads, size in ((4, key_dim), (2, key_dim), (2, value_dim)))
        found.append(rows._attend_step(0, query, key, value, 0.5, None, None))
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-12)


def test_asking_for_c_where_it_cannot_be_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = doubles.trainable(doubles.backbone("qwen2"))
    monkeypatch.setattr(Backbone, "device", torch.device("cuda"))
    with pytest.raises(ConfigurationError, match="native=True: on cuda"):
        Engine(backbone, Budget(native=True, pack_weights=False))


@pytest.mark.parametrize("family", ["qwen2", "gpt2"])
def test_a_position_behind_the_pool_is_refused_and_not_written(family: str) -> None:
    engine = Engine(doubles.backbone(family), Budget(native=True))
    assert isinstance(engine.kept, NativeRows)
    with torch.inference_mode():
        rows = engine.kept.take(max_rows=1, max_tokens=7, prefix=None)
        rows.admit(doubles.prompts([5]))
        rows.generate()
        rows.generate()
        with pytest.raises(IndexError):
            rows.generate()


@pytest.fixture
def nothing_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Give the test a cache of its own."""
    native.library.cache_clear()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    yield tmp_path / "genembed"
    native.library.cache_clear()


def test_a_library_is_built_once_for_the_user_alone(nothing_built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    native.library(torch.float32)
    built = list(nothing_built.iterdir())
    assert [file.suffix for file in built] == [".so"]
    assert nothing_built.stat().st_mode & 0o777 == 0o700
    native.library.cache_clear()
    run = native._run
    monkeypatch.setattr(native, "_run", lambda command: run(command) if "--version" in command else pytest.fail("built again"))
    native.library(torch.float32)
    assert list(nothing_built.iterdir()) == built


def test_without_a_compiler_everything_works_unless_it_was_asked_for(nothing_built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = doubles.backbone("qwen2")
    expected = vectors(backbone, native=False)
    monkeypatch.setenv("CC", "no-such-compiler -O1")
    np.testing.assert_array_equal(vectors(backbone), expected)
    assert Engine(backbone).done_in_c.startswith("nothing: no C compiler: 'no-such-compiler' is not on the PATH; install one")
    with pytest.raises(ConfigurationError, match="native=True: no C compiler"):
        Engine(backbone, Budget(native=True))


def test_what_the_compiler_says_is_passed_on(nothing_built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_FLAGS", native._FLAGS + " -include no-such-header.h")
    with pytest.raises(native.NativeError, match=r"could not build genembed's steps in C: .*no-such-header\.h"):
        native.library(torch.float32)
    assert list(nothing_built.iterdir()) == []


@pytest.mark.parametrize("kind", ["writable", "link", "file"])
def test_nothing_is_loaded_from_a_folder_that_others_could_have_filled(nothing_built: Path, kind: str) -> None:
    if kind == "writable":
        nothing_built.mkdir()
        nothing_built.chmod(0o777)
    elif kind == "link":
        (nothing_built.parent / "elsewhere").mkdir(mode=0o700)
        nothing_built.symlink_to(nothing_built.parent / "elsewhere")
    else:
        nothing_built.write_text("")
    with pytest.raises(native.NativeError, match=r"belongs to somebody else|cannot be made"):
        native.library(torch.float32)


def test_there_is_one_pool_of_threads_for_torch_and_for_steps_in_c() -> None:
    """Two OpenMP libraries would let two pools of threads wait for work on the same processors."""
    maps = Path("/proc/self/maps").read_text(encoding="utf-8")
    assert len(set(re.findall(r"\S*/libgomp\.so\.1\S*", maps))) == 1

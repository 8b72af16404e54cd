"""`genembed convert`, `genembed calibrate-ranges`, and the forms of `genembed embed`."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from pyarrow import parquet
from safetensors.torch import load_file, save_file

import doubles
import genembed
import test_cli
from genembed import Pooling
from genembed.cli.converting import SENTENCES
from test_cli import Run, refused

run = test_cli.run
"""The fixture."""

TEXTS = [f"{sentence} {place}" for place in range(8) for sentence in SENTENCES]


@pytest.fixture
def adapter(folder_of: Callable[[str], Path], tmp_path: Path) -> Path:
    folder = doubles.save_adapter(folder_of("qwen2"), tmp_path / "adapter")
    settings = doubles.settings_of("qwen2", pooling=Pooling(kind="mean"), halt=genembed.FixedSteps(2), max_length=128, matryoshka_dims=(8,))
    (folder / "genembed.json").write_text(json.dumps(settings.to_json()))
    return folder


@pytest.fixture
def calibrated(adapter: Path, tmp_path: Path, run: Run) -> Path:
    (tmp_path / "texts.txt").write_text("\n".join(TEXTS) + "\n")
    outcome = run("calibrate-ranges", adapter, tmp_path / "texts.txt", "--json").json
    assert outcome == {"written": str(adapter / "ranges.json"), "texts": len(TEXTS), "dimensions": [8, 32]}
    return adapter


def test_merged_weights_give_the_adapters_vectors_without_an_adapter(run: Run, adapter: Path, tmp_path: Path) -> None:
    value = run("convert", adapter, tmp_path / "out", "--to", "merged", "--json").json
    assert value["largest_difference"] < 1e-6
    assert not (tmp_path / "out" / "adapter_config.json").exists()
    merged, model = genembed.load(tmp_path / "out"), genembed.load(adapter)
    assert merged.settings == model.settings
    np.testing.assert_allclose(merged.encode(TEXTS), model.encode(TEXTS), atol=1e-6)
    base = genembed.load(model.source.base).encode(TEXTS, steps=1)
    assert np.abs(merged.encode(TEXTS, steps=1) - base).max() > 1e-2, "the adapter changes nothing, so nothing is tested"


@pytest.mark.parametrize(("dtype", "least"), [("bfloat16", 0.99), ("float16", 0.9999)])
def test_half_precision_is_written_and_its_cosine_is_printed(run: Run, adapter: Path, tmp_path: Path, dtype: str, least: float) -> None:
    outcome = run("convert", adapter, tmp_path / "out", "--to", "merged", "--dtype", dtype)
    assert outcome.code == 0, outcome.err
    assert "to the model in float32 on 6 sentences: cosine 0.99" in outcome.out
    weights = load_file(tmp_path / "out" / "model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {getattr(torch, dtype)}
    assert (genembed.load(tmp_path / "out").encode(TEXTS, steps=0) * genembed.load(adapter).encode(TEXTS, steps=0)).sum(-1).min() > least


def test_an_encoders_head_and_a_model_without_an_adapter_are_merged_too(
    run: Run,
    folder_of: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    assert run("convert", folder_of("bert"), tmp_path / "out", "--to", "merged", "--json").json["largest_difference"] < 1e-6
    assert (tmp_path / "out" / "soft_token_head.safetensors").is_file()


def test_what_cannot_be_merged_is_refused_and_leaves_nothing(
    run: Run,
    folder_of: Callable[[str], Path],
    adapter: Path,
    tmp_path: Path,
) -> None:
    out = tmp_path / "out"
    refused(run("convert", adapter, out, "--to", "merged", "--dtype", "int8"), "use bfloat16, or int8 graphs: --to onnx --dtype int8")
    settings = json.loads((adapter / "genembed.json").read_text())
    (adapter / "genembed.json").write_text(json.dumps({**settings, "adapter_positions": "generated"}))
    refused(run("convert", adapter, out, "--to", "merged"), "no weights in common; keep the adapter (save_pretrained)", "--to onnx")
    big = shutil.copytree(folder_of("qwen2"), tmp_path / "big")
    weights = load_file(big / "model.safetensors")
    weights["model.norm.weight"] = weights["model.norm.weight"].float() * 1e6
    save_file(weights, big / "model.safetensors", metadata={"format": "pt"})
    refused(run("convert", big, out, "--to", "merged", "--dtype", "float16"), "some weights are too large for it; choose bfloat16")
    refused(run("convert", folder_of("qwen2"), big, "--to", "merged"), "is there already and is not replaced")
    assert not out.exists()


def test_graphs_are_written_and_compared(run: Run, folder_of: Callable[[str], Path], tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed: pip install 'genembed[onnx]'")
    settings = json.loads((shutil.copytree(folder_of("bert"), tmp_path / "model") / "genembed.json").read_text())
    (tmp_path / "model" / "genembed.json").write_text(json.dumps({**settings, "halt": {"rule": "FixedSteps", "steps": 1}}))
    outcome = run("convert", tmp_path / "model", tmp_path / "out", "--to", "onnx")
    assert outcome.code == 0, outcome.err
    assert outcome.out.startswith(f"{tmp_path / 'out'}: onnx, float32, ")
    assert "cosine 1.000000 on average, 1.000000 at least" in outcome.out
    refused(
        run("convert", tmp_path / "model", tmp_path / "o", "--to", "onnx", "--dtype", "bfloat16"),
        "onnxruntime has no bfloat16 products for a CPU",
    )


def test_ranges_are_the_models_own_and_a_text_has_the_same_codes_alone(run: Run, calibrated: Path, tmp_path: Path) -> None:
    model = genembed.load(calibrated)
    vectors = model.encode(TEXTS)
    assert (model.ranges[32].minimum <= vectors.min(0) + 1e-6).all()
    codes = model.encode(TEXTS, precision="int8")
    assert codes.dtype == np.int8
    assert int(codes.max()) == 127
    assert int(codes.min()) == -128
    assert np.abs(model.encode(TEXTS[3], precision="int8").astype(int) - codes[3].astype(int)).max() <= 1  # rounding of a larger batch
    assert (model.form("int8").restore(codes) * vectors).sum(-1).min() > 0.999
    small = model.form("int8", 8)
    assert (small.restore(small(vectors)) * model.encode(TEXTS, truncate_dim=8)).sum(-1).min() > 0.999
    model.save_pretrained(tmp_path / "saved")
    np.testing.assert_array_equal(genembed.load(tmp_path / "saved").encode(TEXTS, precision="int8"), codes)


def test_ranges_are_written_into_a_folder_alone(run: Run, calibrated: Path, tmp_path: Path) -> None:
    refused(run("calibrate-ranges", "mini", tmp_path / "texts.txt"), "genembed.load('mini').save_pretrained('my-model')")
    refused(run("calibrate-ranges", calibrated, tmp_path / "texts.txt", "--id-column", "x"), "ranges know no ids")
    (tmp_path / "one.txt").write_text("one\n")
    refused(run("calibrate-ranges", calibrated, tmp_path / "one.txt"), "ranges of 1 vectors: some hundred texts are needed")


def test_embed_writes_the_form_that_is_asked_for(run: Run, calibrated: Path, tmp_path: Path) -> None:
    model = genembed.load(calibrated)
    forms = {"int8": np.int8, "uint8": np.uint8, "binary": np.int8, "ubinary": np.uint8, "float16": np.float16}
    for precision, dtype in forms.items():
        for suffix in ("npy", "parquet", "jsonl") if precision == "float16" else ("npy",):
            outcome = run("embed", tmp_path / "texts.txt", "-o", tmp_path / f"v.{suffix}", "-m", calibrated, "--precision", precision)
            assert outcome.code == 0, outcome.err
            assert f"{len(TEXTS)} vectors of 32 dimensions in {precision}, " in outcome.out
        codes = np.load(tmp_path / "v.npy")
        assert codes.dtype == dtype
        np.testing.assert_array_equal(codes, model.form(precision)(model.encode(TEXTS)))
    table = parquet.read_table(tmp_path / "v.parquet")
    assert str(table.schema.field("vector").type.value_type) == "halffloat"
    halves = model.encode(TEXTS, precision="float16")
    np.testing.assert_array_equal(np.array(table["vector"].to_pylist(), np.float16), halves)
    lines = [json.loads(line)["vector"] for line in (tmp_path / "v.jsonl").read_text().splitlines()]
    np.testing.assert_array_equal(np.array(lines, np.float16), halves)
    assert run("embed", tmp_path / "texts.txt", "-o", tmp_path / "c.npy", "-m", calibrated, "--dims", "8").code == 0
    np.testing.assert_allclose(np.load(tmp_path / "c.npy"), model.encode(TEXTS, truncate_dim=8), atol=1e-6)
    refused(
        run("embed", tmp_path / "texts.txt", "-o", tmp_path / "d.npy", "-m", calibrated, "--dims", "9"), "trained to give 8, 32 dimensions"
    )
    assert not (tmp_path / "d.npy").exists()


def test_a_file_of_ranges_that_cannot_be_read_is_named(run: Run, calibrated: Path) -> None:
    (calibrated / "ranges.json").write_text('{"format_version": 9}')
    refused(run("info", calibrated), "ranges.json: format_version 9 is not 1")

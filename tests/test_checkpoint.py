"""Model folders: every kind that loads, and every one that is refused with its name and the way out."""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from peft import PeftModel
from safetensors.torch import load_file, save_file

import doubles
from genembed import CheckpointError, ConfigurationError, Embedder, FixedSteps, GenembedError, ModelSettings, Pooling, load
from genembed.settings import CAUSAL_EOS, LASER
from genembed.source import sha256

TEXTS = ["What is a business trip?", "x"]
Folder = Callable[[str], Path]


@pytest.fixture
def folder(folder_of: Folder, tmp_path: Path) -> Path:
    """Return a model folder of our own that a test may spoil."""
    return Path(shutil.copytree(folder_of("qwen2"), tmp_path / "model"))


@pytest.fixture
def adapter(folder: Path, tmp_path: Path) -> Path:
    """Return an adapter folder as GIRCSE's are published, over `folder`."""
    return doubles.save_adapter(folder, tmp_path / "adapter")


def encode(*arguments: Any, **options: Any) -> np.ndarray:
    return load(*arguments, dtype="float64", **options).encode(TEXTS, halt=options.get("halt"))


def last_states(model: Any) -> np.ndarray:
    """Return what the causal-eos preset has to give, from a Transformers or PEFT model itself."""
    rows = []
    for text in TEXTS:
        ids = torch.tensor([[*doubles.tokenizer()(text, add_special_tokens=False)["input_ids"], doubles.tokenizer().eos_token_id]])
        state = model(input_ids=ids, output_hidden_states=True).hidden_states[-1][0, -1]
        rows.append(torch.nn.functional.normalize(state, dim=0).detach().numpy())
    return np.stack(rows)


# What loads


def test_our_own_folder_brings_its_settings(folder: Path) -> None:
    settings = dataclasses.replace(CAUSAL_EOS, max_length=7, query_instruction="Find it")
    (folder / "genembed.json").write_text(json.dumps(settings.to_json()))
    embedder = load(folder)
    assert embedder.settings == settings
    assert embedder.source.base == folder
    np.testing.assert_allclose(embedder.encode("x"), last_states(doubles.plain("qwen2"))[1], atol=1e-5)


def test_a_preset_overrides_the_folders_settings(folder: Path) -> None:
    assert load(folder, preset="laser").settings == LASER


def test_a_plain_language_model_needs_a_preset_and_nothing_else(folder: Path) -> None:
    (folder / "genembed.json").unlink()
    vectors = encode(folder, preset="causal-eos")
    np.testing.assert_allclose(vectors, last_states(doubles.plain("qwen2")), atol=doubles.FLOAT32_INSIDE)


def test_a_merged_folder_loads_under_the_laser_preset(folder: Path, adapter: Path, tmp_path: Path) -> None:
    merged = PeftModel.from_pretrained(transformers.AutoModelForCausalLM.from_pretrained(folder), str(adapter)).merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    doubles.tokenizer().save_pretrained(tmp_path / "merged")
    (folder / "genembed.json").unlink()
    expected = encode(adapter, preset="laser")
    np.testing.assert_allclose(encode(tmp_path / "merged", preset="laser"), expected, atol=doubles.FLOAT32_INSIDE)


def test_an_adapter_folder_finds_its_base_and_equals_peft(folder: Path, adapter: Path) -> None:
    unmerged = PeftModel.from_pretrained(transformers.AutoModelForCausalLM.from_pretrained(folder), str(adapter)).eval()
    vectors = encode(adapter, preset="causal-eos")
    np.testing.assert_allclose(vectors, last_states(unmerged), atol=doubles.FLOAT32_INSIDE)
    assert np.abs(vectors - encode(folder, preset="causal-eos")).max() > 0.05


def test_the_base_can_be_named_beside_the_adapter(folder: Path, tmp_path: Path) -> None:
    """Published adapters name the base by hub id, or by a path on their author's machine."""
    astray = doubles.save_adapter(folder, tmp_path / "astray", named="/nowhere/at/all")
    with pytest.raises(CheckpointError, match=r"its base model '/nowhere/at/all' cannot be found; use load\(base, adap"):
        load(astray, preset="gircse")
    named = doubles.save_adapter(folder, tmp_path / "named")
    np.testing.assert_array_equal(encode(folder, adapter=astray, preset="gircse"), encode(named, preset="gircse"))


def test_an_adapter_folders_settings_go_before_the_bases(folder: Path, adapter: Path) -> None:
    settings = dataclasses.replace(LASER, max_length=33)
    (adapter / "genembed.json").write_text(json.dumps(settings.to_json()))
    assert load(adapter).settings == settings
    assert load(folder, adapter=adapter).settings == settings


def test_the_tokenizer_is_the_adapters_where_it_has_one_and_else_the_bases(folder: Path, adapter: Path) -> None:
    assert load(adapter).source.tokenizer == adapter
    (adapter / "tokenizer.json").unlink()
    assert load(adapter).source.tokenizer == folder
    assert load(adapter).encode(TEXTS, steps=1).shape == (2, doubles.HIDDEN)


def test_an_adapter_on_generated_positions_leaves_the_prompts_embedding_untouched(folder: Path, adapter: Path) -> None:
    settings = ModelSettings(pooling=Pooling(pool_prompt_state=True), adapter_positions="generated", halt=FixedSteps(3))
    embedder, base = load(adapter, preset=settings, dtype="float64"), load(folder, preset=settings, dtype="float64")
    np.testing.assert_array_equal(embedder.encode(TEXTS, steps=0), base.encode(TEXTS, steps=0))
    assert np.abs(embedder.encode(TEXTS) - base.encode(TEXTS)).max() > 0.01


def test_an_adapter_on_generated_positions_reads_the_prompt_with_the_base_and_the_rest_with_the_adapter(
    folder: Path, adapter: Path
) -> None:
    settings = ModelSettings(pooling=Pooling(pool_prompt_state=True), adapter_positions="generated", halt=FixedSteps(2))
    base = transformers.AutoModelForCausalLM.from_pretrained(folder)
    adapted = PeftModel.from_pretrained(transformers.AutoModelForCausalLM.from_pretrained(folder), str(adapter)).eval()
    vectors = encode(adapter, preset=settings)
    table = base.get_input_embeddings().weight
    for text, vector in zip(TEXTS, vectors, strict=True):
        ids = torch.tensor([doubles.tokenizer()(text, add_special_tokens=False)["input_ids"]])
        cache, states = transformers.DynamicCache(), []
        output = base(input_ids=ids, past_key_values=cache, output_hidden_states=True)
        for _ in range(3):
            states.append(output.hidden_states[-1][0, -1])
            soft = torch.softmax(output.logits[:, -1], -1) @ table
            output = adapted(inputs_embeds=soft[:, None], past_key_values=cache, output_hidden_states=True)
        expected = torch.nn.functional.normalize(torch.stack(states).mean(0), dim=0).detach()
        np.testing.assert_allclose(vector, expected, atol=doubles.FLOAT32_INSIDE)


def test_an_encoder_brings_its_soft_token_head(folder_of: Folder) -> None:
    embedder = load(folder_of("bert"), dtype="float64")
    trained = dict(embedder.backbone.trained_head.named_parameters())
    assert sorted(trained) == sorted(load_file(folder_of("bert") / "soft_token_head.safetensors"))
    prompt = embedder.tokenizer(["x y"]).ids[0]
    np.testing.assert_allclose(embedder.encode("x y", steps=3), doubles.alone(doubles.backbone("bert"), prompt, 3)[3], atol=2e-7)


def test_a_sharded_folder_is_the_whole_one(folder: Path, tmp_path: Path) -> None:
    doubles.model("qwen2").save_pretrained(tmp_path / "sharded", max_shard_size="40KB")
    doubles.tokenizer().save_pretrained(tmp_path / "sharded")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    np.testing.assert_array_equal(encode(tmp_path / "sharded", preset="gircse"), encode(folder))


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", torch.float64])
def test_the_dtype_is_the_one_asked_for(folder: Path, dtype: Any) -> None:
    embedder = load(folder, dtype=dtype)
    assert embedder.backbone.dtype == (dtype if isinstance(dtype, torch.dtype) else getattr(torch, dtype))
    vector = embedder.encode("x y", steps=1)
    np.testing.assert_allclose(vector, load(folder, dtype="float64").encode("x y", steps=1), atol=0.05 if dtype == "bfloat16" else 1e-4)


def test_on_cpu_half_precision_weights_are_loaded_as_float32_unless_asked_for(folder: Path) -> None:
    copy.deepcopy(doubles.model("qwen2")).to(torch.bfloat16).save_pretrained(folder)
    assert load(folder).backbone.dtype == torch.float32


def test_loading_writes_nothing_to_the_terminal_and_wants_no_gradient(
    folder: Path, adapter: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    capfd.readouterr()
    embedder = load(adapter, preset="gircse")
    assert capfd.readouterr() == ("", "")
    assert not any(weight.requires_grad for weight in embedder.backbone.model.parameters())
    assert not embedder.backbone.model.training


# What is refused


def spoil(folder: Path, name: str, content: str | bytes) -> None:
    (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())


def drop_weight(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def reshape_weight(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"] = torch.ones(7, dtype=torch.float64)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def poison_weight(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"][3] = torch.nan
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def truncate(folder: Path) -> None:
    whole = (folder / "model.safetensors").read_bytes()
    spoil(folder, "model.safetensors", whole[: len(whole) // 2])


def point_outside(folder: Path) -> None:
    """Let the index of a sharded model name a file above the folder."""
    shutil.move(folder / "model.safetensors", folder.parent / "outside.safetensors")
    names = load_file(folder.parent / "outside.safetensors")
    spoil(
        folder, "model.safetensors.index.json", json.dumps({"metadata": {}, "weight_map": dict.fromkeys(names, "../outside.safetensors")})
    )


def link_out(name: str) -> Callable[[Path], None]:
    """Let a file of the folder be a link to one beside the folder."""

    def spoil_it(folder: Path) -> None:
        shutil.move(folder / name, folder.parent / name)
        (folder / name).symlink_to(folder.parent / name)

    return spoil_it


def link_to_a_secret(folder: Path) -> None:
    """Lay out what `save_pretrained` and `push_to_hub` would copy with the model."""
    (folder.parent / "credentials.json").write_text('{"key": "secret"}')
    (folder / "notes.json").symlink_to(folder.parent / "credentials.json")


def link_to_itself(folder: Path) -> None:
    (folder / "notes.json").symlink_to(folder / "notes.json")


def configure(**changes: object) -> Callable[[Path], None]:
    def spoil_it(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **changes}))

    return spoil_it


DEEP = "[" * 100_000 + "]" * 100_000

SPOILED: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (lambda folder: (folder / "config.json").unlink(), "no config.json, so this is not a model folder"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), r"no weights \(model\.safetensors is missing\)"),
    "a missing weight": (drop_weight, r"weights are missing and would be random: model\.layers\.1\.mlp\.up_proj\.weight"),
    "a wrong shape": (reshape_weight, "the weights do not load"),
    "weights that are not numbers": (poison_weight, "not finite|NaN"),
    "truncated weights": (truncate, "the weights do not load"),
    "an empty weight file": (lambda folder: spoil(folder, "model.safetensors", b""), "the weights do not load"),
    "a header that lies": (lambda folder: spoil(folder, "model.safetensors", b"\xff" * 8 + b"{}" * 40), "the weights do not load"),
    "an index that points outside": (point_outside, r"outside|\.\."),
    "corrupt settings": (lambda folder: spoil(folder, "genembed.json", "{"), r"genembed\.json: cannot be read as JSON"),
    "settings that are a list": (lambda folder: spoil(folder, "genembed.json", "[]"), r"genembed\.json: expected a JSON object, got list"),
    "deep settings": (lambda folder: spoil(folder, "genembed.json", DEEP), r"genembed\.json"),
    "settings in another encoding": (
        lambda folder: spoil(folder, "genembed.json", b"\xff\xfe{"),
        r"genembed\.json: cannot be read as JSON",
    ),
    "corrupt config": (lambda folder: spoil(folder, "config.json", "{"), r"config\.json"),
    "a config that is a list": (lambda folder: spoil(folder, "config.json", "[]"), r"config\.json"),
    "deep config": (lambda folder: spoil(folder, "config.json", DEEP), r"config\.json"),
    "an unknown architecture": (lambda folder: spoil(folder, "config.json", '{"model_type": "quantum"}'), r"config\.json is not one this"),
    "weights that are a link out": (link_out("model.safetensors"), "is a link to .*, no file of the model folder"),
    "settings that are a link out": (link_out("genembed.json"), "is a link to .*, no file of the model folder"),
    "a further file that is a link out": (link_to_a_secret, "notes.json: is a link to .*credentials.json, no file"),
    "a link to itself": (link_to_itself, "notes.json: is a link to"),
    "a number of five thousand digits": (
        lambda folder: spoil(folder, "genembed.json", '{"format_version": 1, "max_length": 1' + "0" * 5_000 + "}"),
        r"genembed\.json: cannot be read as JSON",
    ),
    "no heads": (configure(num_attention_heads=0), "integer division"),
    "a width that is text": (configure(hidden_size="32"), "expected int, got str"),
    "angles of an unknown kind": (configure(rope_parameters={"rope_type": "surprise", "rope_theta": 1e4}), "KeyError: 'surprise'"),
    "a billion layers": (configure(num_hidden_layers=10**9, layer_types=None), "says 1000000000 layers, but there are only 26 weights"),
    "fewer layers than weights": (
        configure(num_hidden_layers=1, layer_types=None),
        "leaves out 12 weights of layers, first model.layers.1",
    ),
    "no tokenizer": (lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer"),
    "corrupt tokenizer": (lambda folder: spoil(folder, "tokenizer.json", "{"), "tokenizer"),
    "corrupt tokenizer config": (lambda folder: spoil(folder, "tokenizer_config.json", "{"), "tokenizer"),
}


@pytest.mark.usefixtures("untyped_caller")
@pytest.mark.parametrize("name", list(SPOILED))
def test_a_folder_with_this_fault_is_refused_by_name(folder: Path, name: str) -> None:
    spoil_it, message = SPOILED[name]
    spoil_it(folder)
    with pytest.raises(CheckpointError, match=message) as caught:
        load(folder)
    assert str(folder) in str(caught.value)


def test_the_links_of_the_hubs_cache_are_followed_and_no_others(folder: Path, tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "models--o--n" / "snapshots" / "abc", tmp_path / "models--o--n" / "blobs"
    shutil.move(folder, snapshot)
    blobs.mkdir()
    for path in [*snapshot.iterdir()]:
        path.rename(blobs / path.name)
        path.symlink_to(blobs / path.name)
    assert load(snapshot).encode("x").shape == (doubles.HIDDEN,)
    link_to_a_secret(snapshot)
    with pytest.raises(CheckpointError, match=r"credentials\.json, no file"):
        load(snapshot)


def test_a_folder_without_settings_and_preset_is_refused_with_the_presets(folder: Path) -> None:
    (folder / "genembed.json").unlink()
    with pytest.raises(
        ConfigurationError, match=r"not known and not guessed.*preset='gircse' or 'laser'.*'causal-eos' or 'bidirectional-avg'"
    ):
        load(folder)


def test_an_unknown_preset_is_refused_with_the_known_ones(folder: Path) -> None:
    with pytest.raises(ConfigurationError, match="preset='girces' is unknown; choose one of gircse, laser"):
        load(folder, preset="girces")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth", "model.ckpt"])
def test_pickled_weights_are_refused_and_never_opened(folder: Path, tmp_path: Path, name: str) -> None:
    (folder / "model.safetensors").unlink()
    canary = tmp_path / "canary"
    (folder / name).write_bytes(pickle.dumps(Canary(canary)))
    with pytest.raises(
        CheckpointError, match=rf"only pickled weights \({name}\), which can run code when read; convert them to safetensors"
    ):
        load(folder)
    assert not canary.exists()


class Canary:
    """An object that creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("known", [True, False])
def test_code_in_a_model_folder_is_never_run(folder: Path, tmp_path: Path, known: bool) -> None:
    canary = tmp_path / "canary"
    spoil(folder, "evil.py", f"import pathlib\npathlib.Path({str(canary)!r}).touch()\nclass Evil: pass\n")
    auto_map = {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil", "AutoTokenizer": ["evil.Evil", "evil.Evil"]}
    for name in ("config.json", "tokenizer_config.json"):
        value = json.loads((folder / name).read_text()) | {"auto_map": auto_map}
        if name == "config.json" and not known:
            value["model_type"] = "evil"
        spoil(folder, name, json.dumps(value))
    if known:
        np.testing.assert_allclose(load(folder, dtype="float64").encode(TEXTS), encode(folder))
    else:
        with pytest.raises(CheckpointError, match=r"config\.json is not one this Transformers version knows"):
            load(folder)
    assert not canary.exists()


@pytest.mark.parametrize("name", ["nowhere", "./nowhere", "/nowhere/at/all", "a/b/c", "../x"])
def test_a_name_that_is_nothing_is_refused_with_what_it_could_be(name: str) -> None:
    with pytest.raises(CheckpointError, match=r"is neither a folder, nor a hub id \(owner/name\), nor a built-in model \(mini\)"):
        load(name)


def test_a_hub_id_offline_is_refused_without_touching_the_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(
        CheckpointError, match="owner/name: not found in the local cache; load it once without offline=True, or pass a local"
    ):
        load("owner/name", preset="gircse", offline=True)


def test_a_hub_id_without_a_network_is_refused_with_the_way_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused_connections: list[str]
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(CheckpointError, match="owner/name: not found in the local cache, and the hub cannot be reached; check the network"):
        load("owner/name", preset="gircse")
    assert refused_connections
    refused_connections.clear()


def test_an_adapter_for_another_base_is_refused(folder_of: Folder, adapter: Path) -> None:
    with pytest.raises(CheckpointError, match=r"adapter: does not fit the base model .*gpt2"):
        load(folder_of("gpt2"), adapter=adapter, preset="gircse")


def test_an_adapter_for_a_wider_base_is_refused(folder: Path, adapter: Path) -> None:
    weights = load_file(adapter / "adapter_model.safetensors")
    save_file({name: torch.cat([weight, weight], dim=-1) for name, weight in weights.items()}, adapter / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match=r"adapter: does not fit the base model .*was it trained over another one\?"):
        load(adapter, preset="gircse")


def test_an_adapter_for_a_deeper_base_is_refused(adapter: Path) -> None:
    """PEFT leaves out weights without a counterpart, and the layers they were meant for stay as they are."""
    weights = load_file(adapter / "adapter_model.safetensors")
    extra = {name.replace("layers.1.", "layers.2."): weight.clone() for name, weight in weights.items()}
    save_file(weights | extra, adapter / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match=r"adapter: does not fit the base model .*4 weights have no counterpart"):
        load(adapter, preset="gircse")


def pickle_adapter(adapter: Path) -> None:
    (adapter / "adapter_model.safetensors").unlink()
    spoil(adapter, "adapter_model.bin", pickle.dumps(Canary(adapter / "canary")))


def change_config(**changes: Any) -> Callable[[Path], None]:
    def change(adapter: Path) -> None:
        value = json.loads((adapter / "adapter_config.json").read_text())
        spoil(adapter, "adapter_config.json", json.dumps(value | changes))

    return change


SPOILED_ADAPTERS: dict[str, tuple[Callable[[Path], object], str]] = {
    "pickled": (pickle_adapter, r"no adapter_model\.safetensors; adapter_model\.bin is pickled and is not read"),
    "no weights": (lambda adapter: (adapter / "adapter_model.safetensors").unlink(), r"no adapter_model\.safetensors"),
    "truncated": (
        lambda adapter: spoil(adapter, "adapter_model.safetensors", b"\x10\0\0\0\0\0\0\0{"),
        "does not fit the base|does not load",
    ),
    "corrupt config": (lambda adapter: spoil(adapter, "adapter_config.json", "{"), r"adapter_config\.json: cannot be read as JSON"),
    "a base that is no name": (change_config(base_model_name_or_path={"a": 1}), r"no base_model_name_or_path.*It holds {'a': 1}"),
    "a base whose name is too long": (change_config(base_model_name_or_path="x" * 100_000), "cannot be found"),
    "no base": (change_config(base_model_name_or_path=None), r"no base_model_name_or_path; name the base.*: load\(base, adapter="),
    "no kind": (change_config(peft_type="TELEPATHY"), "adapter"),
    "another kind": (change_config(peft_type="PROMPT_TUNING", num_virtual_tokens=4), "adapter"),
    "a rank that is no number": (change_config(r="many"), "adapter"),
    "no targets": (change_config(target_modules=["nowhere"]), "does not fit the base model"),
}


@pytest.mark.usefixtures("untyped_caller")
@pytest.mark.parametrize("name", list(SPOILED_ADAPTERS))
def test_an_adapter_with_this_fault_is_refused_by_name(adapter: Path, name: str) -> None:
    spoil_it, message = SPOILED_ADAPTERS[name]
    spoil_it(adapter)
    with pytest.raises(CheckpointError, match=message) as caught:
        load(adapter, preset="gircse")
    assert str(adapter) in str(caught.value)
    assert not (adapter / "canary").exists()


def test_a_folder_that_is_no_adapter_is_refused_as_one(folder: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no adapter_config\.json, so this is not an adapter folder"):
        load(folder, adapter=folder)


@pytest.fixture
def encoder(folder_of: Folder, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder_of("bert"), tmp_path / "encoder"))


def test_an_encoder_without_a_trained_head_is_refused_when_it_should_generate(encoder: Path) -> None:
    (encoder / "soft_token_head.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"would be random: .*An encoder needs a trained soft_token_head\.safetensors to generate"):
        load(encoder)
    one_pass = doubles.settings_of("bert", halt=FixedSteps(0))
    assert load(encoder, preset=one_pass).encode(["x"]).shape == (1, doubles.HIDDEN)


def test_an_encoder_without_a_trained_head_is_refused_when_a_call_asks_for_steps(encoder: Path) -> None:
    """Its own settings may ask for none, and then the random head is not missed when it is loaded."""
    (encoder / "soft_token_head.safetensors").unlink()
    embedder = load(encoder, preset=doubles.settings_of("bert", halt=FixedSteps(0)))
    with pytest.raises(GenembedError, match="head"):
        embedder.encode(["x"], steps=3)


def test_an_encoder_is_not_read_causally(encoder: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"an encoder has to be read with attention='prefix' \(or 'bidirectional'\), not 'causal'"):
        load(encoder, preset="gircse")


def test_a_soft_token_head_of_another_model_is_refused(encoder: Path) -> None:
    save_file({"bias": torch.zeros(3), "dense.weight": torch.zeros(2, 2)}, encoder / "soft_token_head.safetensors")
    with pytest.raises(CheckpointError, match=r"soft_token_head\.safetensors: does not fit a model with 320 tokens of 32 dimensions"):
        load(encoder)


def test_a_truncated_soft_token_head_is_refused(encoder: Path) -> None:
    whole = (encoder / "soft_token_head.safetensors").read_bytes()
    spoil(encoder, "soft_token_head.safetensors", whole[:-10])
    with pytest.raises(CheckpointError, match=r"soft_token_head\.safetensors"):
        load(encoder)


def test_a_special_token_of_another_tokenizer_is_refused(folder: Path) -> None:
    with pytest.raises(CheckpointError, match=r"special token '\[CLS\]' is not in this tokenizer's vocabulary"):
        load(folder, preset=ModelSettings(special_tokens=(("[CLS]",), ())))


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(folder: Path) -> None:
    """Otherwise the first text with such a token ends in an index error without a row."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([f"<extra{number}>" for number in range(5)])
    tokenizer.save_pretrained(folder)
    with pytest.raises(CheckpointError, match="tokenizer"):
        load(folder)


@pytest.mark.parametrize("dtype", ["float33", "int8", "Tensor", ""])
def test_an_unknown_dtype_is_refused_with_the_known_ones(folder: Path, dtype: str) -> None:
    with pytest.raises(ConfigurationError, match="choose auto, float32, float64, bfloat16 or float16"):
        load(folder, dtype=dtype)


def test_an_unknown_device_is_refused(folder: Path) -> None:
    with pytest.raises(ConfigurationError, match="device='moon'"):
        load(folder, device="moon")


# A base model that is an installed package


@pytest.fixture
def packaged(folder: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Put the base model into a package, and return a maker of adapter folders that name it."""
    package = tmp_path / "site" / "a_base_model"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('a base package is found, not imported')")
    shutil.copytree(folder, package / "model")
    monkeypatch.syspath_prepend(tmp_path / "site")
    change_config(base_model_name_or_path="somebody/elsewhere")(adapter)

    def make(**base: str) -> Path:
        spoil(adapter, "genembed.json", json.dumps(ModelSettings().to_json() | {"base": base}))
        return adapter

    return make


def test_a_packaged_base_is_found_without_importing_or_downloading_it(packaged: Callable[..., Path], folder: Path) -> None:
    adapter = packaged(package="a_base_model", folder="model", sha256=sha256(folder / "model.safetensors"))
    np.testing.assert_array_equal(encode(adapter), encode(folder, adapter=adapter))


def test_a_packaged_base_with_another_sha256_is_refused(packaged: Callable[..., Path]) -> None:
    with pytest.raises(CheckpointError, match=r"model\.safetensors: sha256 is [0-9a-f]{64}, but .*was trained over 0000; reinstall"):
        load(packaged(package="a_base_model", folder="model", sha256="0000"))


@pytest.mark.parametrize("outside", ["..", "../..", "/etc", "model/../../x"])
def test_a_packaged_base_outside_its_package_is_refused(packaged: Callable[..., Path], outside: str) -> None:
    with pytest.raises(CheckpointError, match=r"lies outside the package a_base_model"):
        load(packaged(package="a_base_model", folder=outside))


def test_a_packaged_base_that_is_not_installed_says_so(
    packaged: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused_connections: list[str]
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    adapter = packaged(package="no_such_package", folder="model")
    with pytest.raises(CheckpointError, match="somebody/elsewhere"):
        load(adapter)
    refused_connections.clear()


def test_the_embedder_knows_its_source(folder: Path, adapter: Path) -> None:
    embedder: Embedder = load(adapter, preset="gircse")
    assert (embedder.source.base, embedder.source.adapter, embedder.source.name) == (folder, adapter, str(adapter))

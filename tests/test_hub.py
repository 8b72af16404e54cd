"""A saved model is the model; the hub gets it with a card that makes nothing up."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import numpy as np
import pytest
from huggingface_hub.errors import HfHubHTTPError

import doubles
import genembed
from genembed import ConfigurationError, Embedder
from genembed.card import model_card

TEXTS = ["business trips", "fasting glucose", "the language of models"]
RECIPE = {
    "model": "owner/base",
    "updates": 40,
    "learning_rate": 0.001,
    "lora": {"rank": 2, "alpha": 4, "dropout": 0.0, "targets": "q|v"},
    "files": [{"path": "/secret/place/pairs.jsonl", "weight": 2.0, "name": None}],
    "licences": {"pairs": "CC0 1.0"},
}
CALIBRATION = {
    "rule": {"rule": "ConvergeStop", "threshold": 0.99, "patience": 2, "min_steps": 1, "max_steps": 20},
    "reason": "the boldest rule whose loss is certified",
    "method": {"rule": "certified", "loss": "ndcg", "epsilon": 0.02, "delta": 0.1},
    "corpus": {"documents": 500, "sha256": "0"},
    "queries": 90,
    "caveats": ["It holds for queries like these."],
}


@pytest.fixture
def adapter(folder_of: Callable[[str], Path], tmp_path: Path) -> Path:
    """An adapter over the qwen2 double, as training writes it: settings and records in its folder."""
    folder = doubles.save_adapter(folder_of("qwen2"), tmp_path / "adapter")
    settings = doubles.settings_of("qwen2", max_length=64, matryoshka_dims=(8,))
    (folder / "genembed.json").write_text(json.dumps(settings.to_json()))
    (folder / "recipe.json").write_text(json.dumps(RECIPE))
    (folder / "calibration.json").write_text(json.dumps(CALIBRATION))
    (folder / "history.csv").write_text("step,loss,eval_mean_k0,eval_mean_k20\n20,1.5,50.0,51.0\n40,1.0,60.25,62.5\n60,0.9,,\n")
    return folder


class Api:
    """Stands in for huggingface_hub's client, and remembers what it was asked for."""

    calls: list[tuple[str, Any]]
    files: dict[str, str]

    def __init__(self, *, refuses: bool = False) -> None:
        self.calls, self.files, self.refuses = [], {}, refuses

    def __call__(self, token: str | None) -> Api:
        self.calls.append(("token", token))
        return self

    def create_repo(self, repo_id: str, *, private: bool, exist_ok: bool) -> None:
        if self.refuses:
            raise OSError("no such user")
        self.calls.append(("create_repo", (repo_id, private, exist_ok)))

    def upload_folder(self, *, repo_id: str, folder_path: Path, commit_message: str) -> SimpleNamespace:
        self.calls.append(("upload_folder", (repo_id, commit_message)))
        self.files = {path.name: path.read_text("utf-8", "replace") for path in folder_path.iterdir()}
        return SimpleNamespace(commit_url=f"https://hub/{repo_id}/commit/1")


@pytest.fixture
def api(monkeypatch: pytest.MonkeyPatch) -> Api:
    made = Api()
    monkeypatch.setattr(huggingface_hub, "HfApi", made)
    return made


@pytest.mark.parametrize("family", ["qwen2", "bert"])
def test_a_saved_model_gives_the_same_vectors_to_the_last_bit(family: str, folder_of: Callable[[str], Path], tmp_path: Path) -> None:
    model = genembed.load(folder_of(family))
    model.save_pretrained(tmp_path / "new" / "model")
    again = genembed.load(tmp_path / "new" / "model")
    assert again.settings == model.settings
    np.testing.assert_array_equal(again.encode(TEXTS, steps=2), model.encode(TEXTS, steps=2))


def test_a_saved_adapter_is_an_adapter_over_the_same_base(adapter: Path, tmp_path: Path) -> None:
    model = genembed.load(adapter)
    model.save_pretrained(tmp_path / "saved")
    names = {path.name for path in (tmp_path / "saved").iterdir()}
    assert names >= {"adapter_config.json", "adapter_model.safetensors", "genembed.json", "recipe.json", "calibration.json", "history.csv"}
    assert "model.safetensors" not in names
    assert json.loads((tmp_path / "saved" / "genembed.json").read_text())["base"].keys() == {"sha256"}
    np.testing.assert_array_equal(genembed.load(tmp_path / "saved").encode(TEXTS, steps=2), model.encode(TEXTS, steps=2))


def test_a_saved_adapter_names_the_base_and_the_settings_it_was_loaded_with(
    adapter: Path, folder_of: Callable[[str], Path], tmp_path: Path
) -> None:
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "/gone"}))
    model = genembed.load(folder_of("qwen2"), adapter=adapter, preset="laser")
    model.save_pretrained(tmp_path / "saved")
    again = genembed.load(tmp_path / "saved")
    assert again.settings == model.settings
    np.testing.assert_array_equal(again.encode(TEXTS), model.encode(TEXTS))


def test_what_is_in_the_way_stays_and_a_failed_save_leaves_nothing(
    folder_of: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = genembed.load(folder_of("qwen2"))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    with pytest.raises(ConfigurationError, match="full: is there already and is not replaced; choose another place, or delete it"):
        model.save_pretrained(tmp_path / "full")
    assert (tmp_path / "full" / "notes.txt").read_text() == "mine"

    def fails(*_: Any) -> None:
        raise OSError("the disk is full")

    monkeypatch.setattr("genembed.hub.write_settings", fails)
    with pytest.raises(OSError, match="the disk is full"):
        model.save_pretrained(tmp_path / "half")
    assert [path.name for path in tmp_path.iterdir()] == ["full"]


def test_the_hub_gets_the_folder_and_a_card(folder_of: Callable[[str], Path], api: Api) -> None:
    url = genembed.load(folder_of("qwen2")).push_to_hub("me/tiny", private=True, token="t", commit_message="First")
    assert url == "https://hub/me/tiny/commit/1"
    assert api.calls == [("token", "t"), ("create_repo", ("me/tiny", True, True)), ("upload_folder", ("me/tiny", "First"))]
    assert {"README.md", "genembed.json", "config.json", "model.safetensors", "tokenizer.json"} <= set(api.files)
    assert 'genembed.load("me/tiny")' in api.files["README.md"]


def test_an_adapter_over_a_folder_of_this_machine_does_not_go_to_the_hub(adapter: Path, api: Api) -> None:
    with pytest.raises(ConfigurationError, match=r"which nobody else could load: name the base by its hub id.*--to merged"):
        genembed.load(adapter).push_to_hub("me/tiny")
    assert api.calls == []


def test_what_the_hub_refuses_is_said_with_its_reason(folder_of: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    assert issubclass(HfHubHTTPError, OSError), "else it would go through as a traceback"
    monkeypatch.setattr(huggingface_hub, "HfApi", Api(refuses=True))
    with pytest.raises(ConfigurationError, match=r"me/tiny: the hub did not take the model.*hf auth login.*no such user"):
        genembed.load(folder_of("qwen2")).push_to_hub("me/tiny")


def test_the_card_says_what_the_records_say(adapter: Path) -> None:
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "owner/base"}))
    card = model_card(adapter, "me/tiny", licence="mit")
    front = card.split("---\n")[1].splitlines()
    assert {"library_name: genembed", "base_model: owner/base", "base_model_relation: adapter", "license: mit"} <= set(front)
    for line in (
        "| matryoshka_dims | 8 |",
        "| updates | 40 |",
        "| lora | rank 2, alpha 4, dropout 0.0, targets q\\|v |",
        "| pairs.jsonl | 2 | CC0 1.0 |",
        "Mean quality on held-out pairs of the training data after 40 updates, in percent:",
        "| 60.25 | 62.50 |",
        "| rule | rule ConvergeStop, threshold 0.99, patience 2, min_steps 1, max_steps 20 |",
        "| epsilon | 0.02 |",
        "- It holds for queries like these.",
    ):
        assert line in card.splitlines()
    assert "/secret/" not in card


def test_the_card_of_a_model_without_records_makes_nothing_up(folder_of: Callable[[str], Path]) -> None:
    card = model_card(folder_of("qwen2"), "me/tiny", licence=None)
    assert re.findall("^## (.*)$", card, flags=re.MULTILINE) == ["Use", "How it makes an embedding"]
    assert "license" not in card
    assert "base_model" not in card


def test_the_cards_code_runs(folder_of: Callable[[str], Path], capsys: pytest.CaptureFixture[str]) -> None:
    card = model_card(folder_of("bert"), str(folder_of("bert")), licence=None)
    exec(re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)[0], {})  # our own text
    assert capsys.readouterr().out.count(".") >= 2


def test_a_model_knows_its_forms_by_its_own_settings_and_ranges(adapter: Path) -> None:
    model: Embedder = genembed.load(adapter)
    assert model.encode(TEXTS, steps=1, truncate_dim=8).shape == (3, 8)
    assert model.encode(TEXTS[0], steps=1, precision="ubinary").shape == (4,)
    assert model.encode_query(TEXTS, steps=1, precision="float16", truncate_dim=32).dtype == np.float16
    with pytest.raises(ConfigurationError, match="truncate_dim=16: this model was trained to give 8, 32 dimensions"):
        model.encode(TEXTS, truncate_dim=16)


@pytest.mark.usefixtures("untyped_caller")
def test_products_of_codes_are_not_taken_for_cosines(adapter: Path) -> None:
    model = genembed.load(adapter)
    with pytest.raises(ConfigurationError, match="similarity of int8 codes: give vectors"):
        model.similarity(model.encode(TEXTS, steps=1, precision="binary"), model.encode(TEXTS, steps=1))

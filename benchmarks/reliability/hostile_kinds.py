"""Model folders of somebody who means harm, or whose disk does: each takes a sound folder and spoils it."""

from __future__ import annotations

import json
import pickle
import struct
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

WEIGHTS, CONFIG, SETTINGS, TOKENIZER = "model.safetensors", "config.json", "genembed.json", "tokenizer.json"
DEEP = "[" * 100_000 + "]" * 100_000
OUTSIDE = "outside"
"""A folder beside the model's, which nothing may reach."""


@dataclass(frozen=True)
class Kind:
    """One way to spoil a folder."""

    name: str
    spoil: Callable[..., object]
    """Takes the model's folder, and the canary's path."""


class Bomb:
    """Unpickled, it writes the canary."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.write_text, (self.canary, "dead")


def kinds() -> list[Kind]:
    """Return all of them."""
    return [*_pickles(), *_code(), *_outside(), *_headers(), *_indices(), *_numbers(), *_settings(), *_configs(), *_tokenizers(), *_junk()]


def _pickles() -> Iterator[Kind]:
    """Weights that run code when they are read, in every place where another program would read them."""
    for name in ("pytorch_model.bin", "model.pt", "model.pth", "model.ckpt", "consolidated.00.pth", "adapter_model.bin"):
        yield Kind(f"pickle alone: {name}", lambda folder, canary, name=name: (_unlink(folder, WEIGHTS), _pickle(folder / name, canary)))
    yield Kind("zip bomb as a checkpoint", lambda folder, _: (_unlink(folder, WEIGHTS), _zip_bomb(folder / "pytorch_model.bin")))
    yield Kind("a pickle named safetensors", lambda folder, canary: _pickle(folder / WEIGHTS, canary))
    yield Kind("a torch file named safetensors", lambda folder, canary: torch.save(Bomb(canary), folder / WEIGHTS))
    yield Kind("a pickled index", lambda folder, canary: _pickle(folder / f"{WEIGHTS}.index.json", canary))
    yield Kind("pickled settings", lambda folder, canary: _pickle(folder / SETTINGS, canary))
    yield Kind("a pickled tokenizer", lambda folder, canary: _pickle(folder / TOKENIZER, canary))
    yield Kind("a pickled head", lambda folder, canary: _pickle(folder / "soft_token_head.safetensors", canary))
    yield Kind("pickled ranges", lambda folder, canary: _pickle(folder / "ranges.json", canary))


def _code() -> Iterator[Kind]:
    """Folders that bring code, and configurations that name it."""
    for name, key in (("AutoConfig", "config"), ("AutoModelForCausalLM", "model"), ("AutoTokenizer", "tokenizer")):
        value = [f"code.{key}", None] if key == "tokenizer" else f"code.{key}"
        yield Kind(
            f"code named by auto_map: {name}", lambda folder, canary, name=name, value=value: _bring_code(folder, canary, name, value)
        )
    yield Kind("an architecture of its own", lambda folder, canary: (_module(folder, canary), _edit(folder, CONFIG, model_type="code")))
    yield Kind("a tokenizer class of its own", _tokenizer_code)


def _outside() -> Iterator[Kind]:
    """Folders that reach out of themselves."""
    for name in (WEIGHTS, CONFIG, SETTINGS, TOKENIZER, "tokenizer_config.json"):
        yield Kind(f"a link out: {name}", lambda folder, _, name=name: _link_out(folder, name))
    yield Kind("a link to itself", lambda folder, _: (_unlink(folder, WEIGHTS), (folder / WEIGHTS).symlink_to(folder / WEIGHTS)))
    yield Kind("a link to nothing", lambda folder, _: (_unlink(folder, WEIGHTS), (folder / WEIGHTS).symlink_to(folder / "gone")))
    yield Kind("a link to a device", lambda folder, _: (_unlink(folder, SETTINGS), (folder / SETTINGS).symlink_to("/dev/zero")))
    yield Kind("a further file that is a link out", lambda folder, _: _secret(folder))
    for name in (
        "../outside/w.safetensors",
        "/etc/passwd",
        "a/b.safetensors",
        "..",
        "",
        "w.safetensors\0",
        "C:\\w.safetensors",
        "gone.safetensors",
    ):
        yield Kind(f"an index that names {name!r}", lambda folder, _, name=name: _index(folder, name))


def _headers() -> Iterator[Kind]:
    """Weights whose header lies."""
    cases: dict[str, bytes] = {
        "empty": b"",
        "seven bytes": b"1234567",
        "a length beyond the file": struct.pack("<Q", 1 << 40) + b"{}",
        "the largest length": b"\xff" * 8 + b"{}",
        "a length of nothing": struct.pack("<Q", 0),
        "a header that is a list": _header(b"[]"),
        "a header that is no JSON": _header(b"{]"),
        "a header that is no UTF-8": _header(b"{\xff\xfe}"),
        "a deep header": _header(DEEP.encode()),
        "no weights": _header(b"{}"),
        "a huge shape": _tensor([1 << 40, 1 << 40], 0, 0),
        "a shape that overflows": _tensor([1 << 63, 2], 0, 8),
        "a negative shape": _tensor([-4], 0, 16),
        "a shape of fractions": _tensor([1.5], 0, 4),  # type: ignore[list-item]
        "offsets beyond the file": _tensor([1024], 0, 4096),
        "offsets backwards": _tensor([1], 8, 4),
        "negative offsets": _tensor([1], -4, 0),
        "an unknown number type": _header(b'{"w":{"dtype":"Q99","shape":[1],"data_offsets":[0,4]}}') + bytes(4),
        "a hole between weights": _header(b'{"w":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}') + bytes(8),
        "weights over one another": _header(
            b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"b":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
        )
        + bytes(4),
        "bytes after the end": _tensor([1], 0, 4) + bytes(64),
        "zeros": bytes(4096),
        "HTML of an error page": b"<!DOCTYPE html><title>404</title>",
        "a pointer of Git LFS": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
    }
    for name, content in cases.items():
        yield Kind(f"weights: {name}", lambda folder, _, content=content: (folder / WEIGHTS).write_bytes(content))
    yield Kind("weights: half of the file", lambda folder, _: _cut(folder, 0.5))
    yield Kind("weights: all but the last byte", lambda folder, _: _cut(folder, 1.0))
    yield Kind("weights: a folder", lambda folder, _: (_unlink(folder, WEIGHTS), (folder / WEIGHTS).mkdir()))


def _indices() -> Iterator[Kind]:
    """Sharded models whose index is not one."""
    for name, content in {
        "a list": "[]",
        "no JSON": "{",
        "deep": DEEP,
        "no map": "{}",
        "a map that is a list": '{"weight_map": []}',
        "numbers for files": '{"weight_map": {"w": 1}}',
        "nothing for a file": '{"weight_map": {"w": null}}',
    }.items():
        yield Kind(
            f"an index that is {name}",
            lambda folder, _, content=content: (
                (folder / WEIGHTS).rename(folder / "w.safetensors"),
                (folder / f"{WEIGHTS}.index.json").write_text(content),
            ),
        )


def _numbers() -> Iterator[Kind]:
    """Weights that are no numbers, or of other shapes than the configuration says."""
    for bad in (float("nan"), float("inf"), float("-inf")):
        for name in ("model.norm.weight", "model.layers.0.self_attn.q_proj.weight", "model.layers.1.mlp.down_proj.weight"):
            yield Kind(f"{bad} in {name}", lambda folder, _, bad=bad, name=name: _weight(folder, name, lambda one: one.fill_(bad)))
    yield Kind(
        "NaN in the table of tokens", lambda folder, _: _weight(folder, "model.embed_tokens.weight", lambda one: one.fill_(torch.nan))
    )
    yield Kind("numbers that overflow", lambda folder, _: _weight(folder, "model.norm.weight", lambda one: one.fill_(1e300)))
    yield Kind(
        "a missing layer", lambda folder, _: _weights(folder, lambda all_: [all_.pop(name) for name in [*all_] if ".layers.1." in name])
    )
    yield Kind("another shape", lambda folder, _: _weights(folder, lambda all_: all_.update({"model.norm.weight": torch.ones(7)})))
    yield Kind("no dimension", lambda folder, _: _weights(folder, lambda all_: all_.update({"model.norm.weight": torch.ones(())})))
    yield Kind("another rank", lambda folder, _: _weights(folder, lambda all_: all_.update({"model.norm.weight": torch.ones(32, 32)})))
    yield Kind("no rows", lambda folder, _: _weights(folder, lambda all_: all_.update({"model.embed_tokens.weight": torch.ones(0, 32)})))
    yield Kind(
        "a head of another model", lambda folder, _: save_file({"dense.weight": torch.ones(3, 3)}, folder / "soft_token_head.safetensors")
    )


def _settings() -> Iterator[Kind]:
    """Settings that mean nothing, or too much."""
    for name, content in {
        "no JSON": "{",
        "a list": "[]",
        "a text": '"x"',
        "deep": DEEP,
        "a huge number": '{"format_version": 1, "max_length": 1' + "0" * 5_000 + "}",
    }.items():
        yield Kind(f"settings: {name}", lambda folder, _, content=content: (folder / SETTINGS).write_text(content))
    yield Kind("settings: not UTF-8", lambda folder, _: (folder / SETTINGS).write_bytes(b"\xff\xfe{\0}\0"))
    changes: list[dict[str, Any]] = [
        {"format_version": 99},
        {"format_version": None},
        {"surprise": 1},
        {"max_length": -1},
        {"max_length": "512"},
        {"max_length": 1e400},
        {"max_length": True},
        {"max_length": [512]},
        {"temperature": 0},
        {"temperature": "hot"},
        {"temperature": None},
        {"temperature": {}},
        {"template": "no fields"},
        {"template": 7},
        {"template": "{text}{instruction}"},
        {"special_tokens": [["<nowhere>"], []]},
        {"special_tokens": [1, 2, 3]},
        {"special_tokens": "all"},
        {"attention": ["causal"]},
        {"attention": "sideways"},
        {"pooling": {"kind": "cls"}},
        {"pooling": {"surprise": 1}},
        {"pooling": []},
        {"pooling": {"kind": "mean", "prompt_weight": "x"}},
        {"halt": {"rule": "os.system"}},
        {"halt": {"rule": "FixedSteps", "steps": 1e9}},
        {"halt": {"rule": "FixedSteps", "steps": -1}},
        {"halt": {"rule": "ConvergeStop", "threshold": "x"}},
        {"halt": {"rule": "ConvergeStop"}},
        {"halt": 20},
        {"query_instruction": 5},
        {"parallel_passes": -1},
        {"parallel_passes": "2"},
        {"matryoshka_dims": "8"},
        {"matryoshka_dims": [[8]]},
        {"matryoshka_dims": [16, 8]},
        {"tokens": "hard", "temperature": 0.5},
        {"tokens": None},
        {"padding_side": "up"},
        {"adapter_positions": 1},
    ]
    for change in changes:
        yield Kind(f"settings: {change}"[:90], lambda folder, _, change=change: _edit(folder, SETTINGS, **change))


def _configs() -> Iterator[Kind]:
    """Configurations that are none, or that ask for more than there is."""
    for name, content in {"no JSON": "{", "a list": "[]", "deep": DEEP, "empty": "", "null": "null", "no type": "{}"}.items():
        yield Kind(f"config: {name}", lambda folder, _, content=content: (folder / CONFIG).write_text(content))
    changes: list[dict[str, Any]] = [
        {"model_type": "quantum"},
        {"model_type": ["qwen2"]},
        {"model_type": "../../qwen2"},
        {"model_type": "t5"},
        {"hidden_size": -1},
        {"hidden_size": "32"},
        {"hidden_size": 0},
        {"hidden_size": 1 << 40},
        {"vocab_size": 1 << 40},
        {"vocab_size": -5},
        {"intermediate_size": 1 << 40},
        {"num_hidden_layers": 1_000_000},
        {"num_hidden_layers": 1_000_000, "layer_types": None},
        {"num_hidden_layers": 1 << 40, "layer_types": None},
        {"text_config": {"num_hidden_layers": 1 << 40}},
        {"num_hidden_layers": 3, "layer_types": None},
        {"num_hidden_layers": 1, "layer_types": None},
        {"num_hidden_layers": -1},
        {"num_hidden_layers": "many"},
        {"num_attention_heads": 0},
        {"num_attention_heads": 1 << 40},
        {"num_key_value_heads": 3},
        {"max_position_embeddings": "long"},
        {"rope_parameters": {"rope_type": "surprise", "rope_theta": 1e4}},
        {"rope_parameters": {"rope_type": "default", "rope_theta": "x"}},
        {"hidden_act": "os.system"},
        {"rms_norm_eps": "small"},
        {"layer_types": ["surprise"] * 2},
        {"quantization_config": {"quant_method": "gptq", "bits": 4}},
    ]
    for change in changes:
        yield Kind(f"config: {change}"[:90], lambda folder, _, change=change: _edit(folder, CONFIG, **change))


def _tokenizers() -> Iterator[Kind]:
    """Tokenizers that are none, or of another model."""
    for name, content in {"no JSON": "{", "a list": "[]", "deep": DEEP, "empty": "", "no model": "{}"}.items():
        yield Kind(f"tokenizer: {name}", lambda folder, _, content=content: (folder / TOKENIZER).write_text(content))
    yield Kind("tokenizer: absent", lambda folder, _: _unlink(folder, TOKENIZER))
    yield Kind("tokenizer: a huge vocabulary", lambda folder, _: _huge_vocabulary(folder))
    yield Kind("tokenizer: its config no JSON", lambda folder, _: (folder / "tokenizer_config.json").write_text("{"))


def _junk() -> Iterator[Kind]:
    """Folders that are none."""
    yield Kind("no config", lambda folder, _: _unlink(folder, CONFIG))
    yield Kind("no weights", lambda folder, _: _unlink(folder, WEIGHTS))
    yield Kind("an adapter that names no base", lambda folder, _: (folder / "adapter_config.json").write_text("{}"))
    for named in ("../..", "/etc", 5, ["x"], {"a": 1}, "\0", "x" * 100_000):
        yield Kind(f"an adapter over {named!r:.20}", lambda folder, _, named=named: _adapter_over(folder, named))
    yield Kind("an adapter whose base is out of its package", _base_outside)
    for value in ("[]", "{", '{"format_version": 1}', '{"format_version": 1, "dimensions": {"x": {}}}', DEEP):
        yield Kind(f"ranges: {value[:40]}", lambda folder, _, value=value: (folder / "ranges.json").write_text(value))


def _unlink(folder: Path, name: str) -> Path:
    (folder / name).unlink()
    return folder


def _pickle(path: Path, canary: Path) -> int:
    return path.write_bytes(pickle.dumps(Bomb(canary)))


def _zip_bomb(path: Path) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(64 << 20))
    return path


def _module(folder: Path, canary: Path) -> int:
    return (folder / "code.py").write_text(f"import pathlib\npathlib.Path({str(canary)!r}).write_text('dead')\n")


def _bring_code(folder: Path, canary: Path, name: str, value: Any) -> None:
    _module(folder, canary)
    file = "tokenizer_config.json" if name == "AutoTokenizer" else CONFIG
    _edit(folder, file, auto_map={name: value}, **({} if name == "AutoTokenizer" else {"model_type": "code"}))
    if name == "AutoTokenizer":
        _edit(folder, file, tokenizer_class="Code")
        _unlink(folder, TOKENIZER)


def _tokenizer_code(folder: Path, canary: Path) -> None:
    _module(folder, canary)
    _edit(folder, "tokenizer_config.json", tokenizer_class="code.Tokenizer")
    _unlink(folder, TOKENIZER)


def _link_out(folder: Path, name: str) -> None:
    outside = folder.parent / OUTSIDE
    outside.mkdir(exist_ok=True)
    (folder / name).rename(outside / name)
    (folder / name).symlink_to(outside / name)


def _secret(folder: Path) -> None:
    """Lay out what `save_pretrained` and `push_to_hub` would copy with the model."""
    outside = folder.parent / OUTSIDE
    outside.mkdir(exist_ok=True)
    (outside / "credentials.json").write_text('{"key": "secret"}')
    (folder / "notes.json").symlink_to(outside / "credentials.json")


def _index(folder: Path, name: str) -> None:
    outside = folder.parent / OUTSIDE
    outside.mkdir(exist_ok=True)
    names = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).rename(outside / "w.safetensors")
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(names, name)}))


def _header(content: bytes) -> bytes:
    return struct.pack("<Q", len(content)) + content


def _tensor(shape: list[int], start: int, stop: int) -> bytes:
    header = json.dumps({"model.norm.weight": {"dtype": "F32", "shape": shape, "data_offsets": [start, stop]}}).encode()
    return _header(header) + bytes(4)


def _cut(folder: Path, share: float) -> None:
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[: min(int(len(content) * share), len(content) - 1)])


def _weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    weights = load_file(folder / WEIGHTS)
    change(weights)
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})


def _weight(folder: Path, name: str, change: Callable[[torch.Tensor], object]) -> None:
    _weights(folder, lambda weights: change(weights[name]))


def _edit(folder: Path, name: str, **changes: Any) -> int:
    path = folder / name
    value = json.loads(path.read_text()) if path.exists() else {}
    return path.write_text(json.dumps({**value, **changes}))


def _huge_vocabulary(folder: Path) -> None:
    value = json.loads((folder / TOKENIZER).read_text())
    value["model"]["vocab"].update({f"made-up-{number}": 1_000 + number for number in range(5_000)})
    (folder / TOKENIZER).write_text(json.dumps(value))


def _adapter_over(folder: Path, named: Any) -> None:
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": named}))


def _base_outside(folder: Path, canary: Path) -> None:
    _adapter_over(folder, "owner/base")
    _edit(folder, SETTINGS, base={"package": "genembed", "folder": "../.."})

"""What a reading of the code as an attacker found: folders, files and connections that cost more, or reach further, than they may."""

from __future__ import annotations

import json
import lzma
import os
import secrets
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pyarrow
import pytest
import torch
from pyarrow import parquet
from safetensors.torch import load_file

import doubles
from genembed import CheckpointError, ConfigurationError, GenembedError, InputError, files, load, records
from genembed.cli.output import printable
from genembed.cli.serving import _key
from genembed.errors import DataError
from genembed.files import read_texts, replacing
from genembed.halting import MOST_STEPS
from genembed.index.description import DESCRIPTION_FILE, read_description
from genembed.index.html import html_paragraphs
from genembed.index.metadata import rows_with_metadata
from genembed.index.passages import read_passages
from genembed.jobs.folder import JobFolder
from genembed.jobs.inputs import find_files
from genembed.jobs.plan import Plan, make_plan
from genembed.jobs.storage import read_object
from genembed.precision import ranges_from_json
from genembed.records import Columns
from genembed.serve.connection import HEAD_BYTES
from genembed.testsets import json_lines
from genembed.train.pairs import BadRows, DataFile, read_pairs
from serving import served

pytestmark = pytest.mark.usefixtures("untyped_caller")  # a file's values have any type


@pytest.fixture
def folder(folder_of: Callable[[str], Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder_of("qwen2"), tmp_path / "model"))


def edited(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


# Model folders


def test_no_index_of_weights_makes_a_pickle_be_opened(folder: Path) -> None:
    """Transformers opens whatever file an index names, with `use_safetensors=True` as without; a safetensors file beside it let it pass."""
    weights = load_file(folder / "model.safetensors")
    torch.save(weights, folder / "pytorch_model.bin")
    (folder / "model.safetensors").rename(folder / "other.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(weights, "pytorch_model.bin")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"names 'pytorch_model.bin', which is no safetensors file"):
        load(folder)


@pytest.mark.parametrize("name", ["model.safetensors", "more.safetensors", "x.safetensors.index.json", "genembed.json", "notes.txt"])
@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_what_is_no_plain_file_is_refused_before_it_is_waited_for(folder: Path, name: str, make: Callable[[Path], None]) -> None:
    (folder / name).unlink(missing_ok=True)
    make(folder / name)
    with pytest.raises(CheckpointError, match="is no plain file"):
        load(folder)


@pytest.mark.parametrize("name", ["history.csv", "README.md"])
def test_a_record_that_is_a_link_out_is_refused(folder: Path, tmp_path: Path, name: str) -> None:
    """Saved and uploaded, the curves of a training are copied along: a link would have put any file of the machine on the hub."""
    (tmp_path / "secret").write_text("a secret")
    (folder / name).symlink_to(tmp_path / "secret")
    with pytest.raises(CheckpointError, match="is a link to"):
        load(folder)


HUGE = 10**400
"""JSON has such numbers; no float has."""


@pytest.mark.parametrize(
    "changes",
    [
        {"halt": {"rule": "FixedSteps", "steps": MOST_STEPS + 1}},
        {"halt": {"rule": "FixedSteps", "steps": 10**30}},
        {"halt": {"rule": "ConvergeStop", "threshold": HUGE}},
        {"halt": {"rule": "ConvergeStop", "threshold": True}},
        {"halt": {"rule": "ConvergeStop", "threshold": 0.9, "patience": 10**9}},
        {"halt": {"rule": "ConvergeStop", "threshold": 0.9, "max_steps": 10**30}},
        {"temperature": HUGE},
        {"temperature": True},
        {"pooling": {"kind": "mean", "prompt_weight": HUGE}},
        {"pooling": {"kind": "mean", "prompt_weight": "x"}},
    ],
    ids=lambda changes: json.dumps(changes)[:60],
)
def test_settings_without_measure_are_refused_when_they_are_read(folder: Path, changes: dict[str, Any]) -> None:
    edited(folder / "genembed.json", **changes)
    with pytest.raises(ConfigurationError, match=r"is needed|must be"):
        load(folder)


@pytest.mark.parametrize("named", ["~nobody-of-this-name/model", "a\0b", "x" * 5_000, "~"])
def test_an_adapter_whose_base_is_no_place_is_refused(folder: Path, tmp_path: Path, named: str) -> None:
    adapter = doubles.save_adapter(folder, tmp_path / "adapter", named=named)
    with pytest.raises(CheckpointError):
        load(adapter, preset="gircse", offline=True)


@pytest.mark.parametrize(
    "base",
    [{"package": "__main__"}, {"package": "json", "folder": "a\0b"}, {"package": "json", "folder": "x" * 5_000}, {"package": "sys"}],
    ids=["__main__", "zero byte", "long", "sys"],
)
def test_a_base_package_that_is_no_place_is_refused(folder: Path, tmp_path: Path, base: dict[str, str]) -> None:
    """Of `sys` the folder would be the working directory."""
    adapter = doubles.save_adapter(folder, tmp_path / "adapter", named="nobody/nothing")
    (adapter / "genembed.json").write_text(json.dumps({"format_version": 1, "base": base}))
    with pytest.raises(CheckpointError, match=r"name no place|cannot be found"):
        load(adapter, offline=True)


SLOW = "(([a-z_.0-9])+)+!"
"""Takes years to not match the name of a layer."""


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"target_modules": SLOW}, "repeats a group"),
        ({"exclude_modules": SLOW}, "repeats a group"),
        ({"layers_to_transform": [0], "layers_pattern": [SLOW]}, "repeats a group"),
        ({"rank_pattern": {SLOW: 4}}, "repeats a group"),
        ({"alpha_pattern": {SLOW: 4}}, "repeats a group"),
        ({"target_modules": ".*" * 12 + "!"}, "repeats a group"),
        ({"target_modules": "((("}, "does not fit"),
        ({"lora_alpha": HUGE}, "does not fit"),
        ({"layer_replication": [[0, 10**7]]}, "repeats layers"),
        ({"peft_type": "IA3"}, "only LoRA"),
        ({"peft_type": None}, "only LoRA"),
    ],
    ids=lambda value: json.dumps(value)[:50] if isinstance(value, dict) else "",
)
def test_an_adapters_configuration_neither_hangs_nor_fails_otherwise(
    folder: Path, tmp_path: Path, changes: dict[str, Any], reason: str
) -> None:
    adapter = doubles.save_adapter(folder, tmp_path / "adapter")
    edited(adapter / "adapter_config.json", **changes)
    with pytest.raises(CheckpointError, match=reason):
        load(adapter, preset="gircse")


def test_an_adapter_of_another_kind_does_not_make_a_pickle_be_opened(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """PEFT's multitask prompt tuning reads the file that its configuration names."""
    adapter = doubles.save_adapter(folder, tmp_path / "adapter")
    named = json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"]
    torch.save({"prompt_embeddings": torch.zeros(4, 32)}, tmp_path / "pickle.pt")
    (adapter / "adapter_config.json").write_text(
        json.dumps(
            {
                **{"peft_type": "MULTITASK_PROMPT_TUNING", "task_type": "CAUSAL_LM", "num_virtual_tokens": 4, "num_tasks": 2},
                **{"prompt_tuning_init": "AVERAGE_SOURCE_TASKS", "prompt_tuning_init_state_dict_path": str(tmp_path / "pickle.pt")},
                "base_model_name_or_path": named,
            }
        )
    )
    opened: list[Any] = []
    monkeypatch.setattr(torch, "load", lambda *arguments, **_: opened.append(arguments))
    with pytest.raises(CheckpointError, match="only LoRA"):
        load(adapter, preset="gircse")
    assert opened == []


def test_patterns_of_published_adapters_are_read(folder: Path, tmp_path: Path) -> None:
    adapter = doubles.save_adapter(folder, tmp_path / "adapter")
    known = {name.rpartition(".")[2] for name in json.loads((adapter / "adapter_config.json").read_text())["target_modules"]}
    plain = load(adapter, preset="gircse").encode(["a claim"], steps=1)
    for pattern in (rf"model\.layers\.\d+\..*\.({'|'.join(known)})", rf"(?:.*?(?:layers|blocks).*?(?:{'|'.join(known)}).*?)"):
        edited(adapter / "adapter_config.json", target_modules=pattern)
        assert (load(adapter, preset="gircse").encode(["a claim"], steps=1) == plain).all()


# Files of texts, and those of jobs, indexes and sets


@pytest.mark.parametrize("suffix", ["txt", "jsonl", "csv"])
def test_a_row_without_an_end_is_refused_and_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str) -> None:
    monkeypatch.setattr(records, "ROW_BYTES", 200_000)
    monkeypatch.setattr(records, "_BLOCK", 1_000)
    path = tmp_path / f"rows.{suffix}"
    path.write_bytes(b'text\n"a"\n' + b"x" * 300_000)
    with path.open("rb") as file, pytest.raises(InputError, match=r"rows\..*, line 3: is longer than"):
        list(records.bounded_lines(file, path.name))
    with pytest.raises(InputError):
        list(read_texts(path))
    with pytest.raises(InputError, match="line 3: is longer than"):
        make_plan(find_files([str(path)], None), Columns("text", None), 10)


def test_lines_come_as_from_the_file_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "_BLOCK", 3)
    for content in (b"", b"\n", b"a", b"a\n", b"ab\ncd\n\n\nefghij\r\nk", b"\n" * 7):
        (tmp_path / "f").write_bytes(content)
        with (tmp_path / "f").open("rb") as one, (tmp_path / "f").open("rb") as other:
            assert list(records.bounded_lines(one, "f")) == list(other)


def test_a_quote_that_is_never_closed_does_not_swallow_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import csv

    before = csv.field_size_limit(10)
    monkeypatch.setattr(records, "ROW_BYTES", 200_000)
    (tmp_path / "rows.csv").write_text('text\n"' + "line\n" * 60_000)
    try:
        with pytest.raises(InputError, match="field larger than field limit"):
            list(read_texts(tmp_path / "rows.csv"))
    finally:
        csv.field_size_limit(before)


def test_one_file_of_csv_does_not_take_long_fields_from_another(tmp_path: Path) -> None:
    """The limit is one for the process: what ended first put it back while the other was being read."""
    for name in ("a", "b"):
        (tmp_path / f"{name}.csv").write_text('text\n"x"\n"' + "y" * 300_000 + '"\n')
    one, other = read_texts(tmp_path / "a.csv"), read_texts(tmp_path / "b.csv")
    next(one)
    next(other)
    assert [len(record.text) for record in one] == [300_000]
    one = read_texts(tmp_path / "a.csv")
    next(one)
    one.close()  # type: ignore[attr-defined]
    assert [len(record.text) for record in other] == [300_000]


@pytest.fixture
def odd_table(tmp_path: Path) -> Path:
    days = pyarrow.array([2**30], pyarrow.int32()).cast(pyarrow.date32())
    parquet.write_table(pyarrow.table({"text": ["x"], "query": ["x"], "pos": ["y"], "prompt": days, "day": days}), tmp_path / "t.parquet")
    return tmp_path / "t.parquet"


@pytest.mark.parametrize(
    "read",
    [
        lambda path: list(read_texts(path, id_column="day")),
        lambda path: make_plan(find_files([str(path)], None), Columns("text", "day"), 10),
        lambda path: list(rows_with_metadata(path, ["day"], file_format=None, text_column=None, id_column=None)),
        lambda path: list(read_pairs(DataFile(path=str(path)), BadRows())),
    ],
    ids=["texts", "job", "metadata", "pairs"],
)
def test_a_date_that_python_has_not_is_an_error_of_ours(odd_table: Path, read: Callable[[Path], object]) -> None:
    with pytest.raises((InputError, DataError), match="cannot be read as Parquet"):
        read(odd_table)


def test_damaged_compression_is_named(tmp_path: Path) -> None:
    content = bytearray(lzma.compress(secrets.token_bytes(20_000)))
    content[len(content) // 2] ^= 0xFF
    (tmp_path / "rows.txt.xz").write_bytes(content)
    with pytest.raises(GenembedError, match="cannot be read"):
        make_plan(find_files([str(tmp_path / "rows.txt.xz")], None), Columns("text", None), 10)


def test_a_number_of_thousands_of_digits_in_a_set_is_named(tmp_path: Path) -> None:
    (tmp_path / "corpus.jsonl").write_text('{"_id": ' + "1" * 5_000 + "}\n")
    with pytest.raises(DataError, match="line 1: not JSON"):
        list(json_lines(tmp_path / "corpus.jsonl"))


def test_ranges_that_no_float_holds_are_refused() -> None:
    with pytest.raises(CheckpointError, match="not ranges"):
        ranges_from_json({"format_version": 1, "dimensions": {"1": {"minimum": [0], "maximum": [HUGE]}}}, source="ranges.json")


def test_json_of_a_thousand_brackets_is_damage(tmp_path: Path) -> None:
    (tmp_path / DESCRIPTION_FILE).write_text('{"a":' * 100_000)
    with pytest.raises(CheckpointError, match="is damaged"):
        read_object(tmp_path / DESCRIPTION_FILE)
    with pytest.raises(CheckpointError, match="is damaged"):
        read_description(tmp_path)
    job = JobFolder(tmp_path / "job")
    job.make()
    for content in ('{"a":' * 100_000, "[1]", '{"number": "x"}'):
        job.rejects_file(0).write_text(content)
        with pytest.raises(CheckpointError, match="is damaged"):
            list(job.read_rejects(0))


def _plan(tmp_path: Path) -> dict[str, Any]:
    (tmp_path / "rows.jsonl").write_text('{"text": "x"}\n' * 5)
    made = make_plan(find_files([str(tmp_path / "rows.jsonl")], None), Columns("text", None), 2)
    value: dict[str, Any] = json.loads(json.dumps(made.to_json()))
    assert Plan.from_json(value) == made
    return value


@pytest.mark.parametrize(
    ("place", "wrong"),
    [
        (("files", 0, "file_format"), "exe"),
        (("files", 0, "url"), 5),
        (("hashes",), []),
        (("headers",), [[5]]),
        (("shard_rows",), "x"),
        (("shards", 1, "index"), 0),
        (("shards", 1, "rows"), 3),
        (("shards", 1, "first_row"), 0),
        (("shards", 0, "spans", 0, "file"), 1),
        (("shards", 0, "spans", 0, "file"), -1),
        (("shards", 0, "spans", 0, "start"), -1),
        (("shards", 0, "spans", 0, "stop"), "x"),
        (("columns", "text"), None),
    ],
)
def test_a_plan_that_does_not_hold_together_is_damaged(tmp_path: Path, place: tuple[Any, ...], wrong: Any) -> None:
    value = _plan(tmp_path)
    inner = value
    for step in place[:-1]:
        inner = inner[step]
    inner[place[-1]] = wrong
    with pytest.raises(CheckpointError, match="is damaged"):
        Plan.from_json(value)


def test_a_file_is_never_written_through_what_somebody_else_has_put_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a folder that others can write to, a link under the temporary name would lead the bytes into any file of the user's."""
    (tmp_path / "precious").write_text("kept")
    monkeypatch.setattr(secrets, "token_hex", lambda _: "known")
    for name in (f".out.npy.{os.getpid()}.tmp", f".out.npy.{os.getpid()}-known.tmp"):
        (tmp_path / name).symlink_to(tmp_path / "precious")
    with pytest.raises(ConfigurationError, match="cannot be written: File exists"), replacing(tmp_path / "out.npy") as file:
        file.write(b"overwritten")
    assert (tmp_path / "precious").read_text() == "kept"
    monkeypatch.undo()
    with replacing(tmp_path / "out.npy") as file:
        file.write(b"written")
    assert ((tmp_path / "out.npy").read_bytes(), (tmp_path / "precious").read_text()) == (b"written", "kept")
    assert files._beside(tmp_path / "x") != files._beside(tmp_path / "x")


def test_a_page_of_nested_elements_is_read_in_time_that_its_length_says() -> None:
    """Of 20,000 elements within one another, each text was looked up through all of those around it: 48 s."""
    begin = time.perf_counter()
    assert [text for _, text in html_paragraphs(b"<b>x " * 20_000, "page")] == [" ".join("x" * 20_000)]
    assert time.perf_counter() - begin < 20


def test_a_pipe_in_a_folder_of_texts_is_left_out(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.md")
    (tmp_path / "notes.md").write_text("a note")
    with pytest.warns(UserWarning, match="is no plain file"):
        assert [passage.text for passage in read_passages([tmp_path])] == ["a note"]


# The server, and the terminal


@pytest.fixture(scope="module")
def address(folder_of: Callable[[str], Path]) -> Iterator[tuple[str, int]]:
    with served(load(folder_of("qwen2"))) as (url, _):
        host, port = url.removeprefix("http://").split(":")
        yield host, int(port)


@pytest.mark.parametrize(
    ("begin", "more"),
    [
        (b"0\r\n", b"X: y\r\n" * 1_000),
        (b"0\r\nX: ", b"y" * 6_000),
        (b"5;x=", b"y" * 6_000),
        (b"3\r\nabc\r\n0\r\n", b"X: y\r\n" * 1_000),
    ],
    ids=["trailers", "a trailer", "a chunk's extension", "trailers after a body"],
)
@pytest.mark.parametrize("route", ["GET /health", "POST /embed"])
def test_what_stands_behind_a_body_does_not_grow_without_end(address: tuple[str, int], route: str, begin: bytes, more: bytes) -> None:
    """54 MB of trailers had become a gigabyte in the server, on one connection, behind a request that was answered long since."""
    head = f"{route} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n".encode()
    sent = 0
    with socket.create_connection(address, timeout=10) as connection, suppress(ConnectionError):
        connection.sendall(head + begin)
        while sent < 200 * HEAD_BYTES:
            connection.sendall(more)
            sent += len(more)
    assert sent < 200 * HEAD_BYTES, "the server went on reading"


def test_a_long_body_in_small_chunks_is_still_taken(address: tuple[str, int]) -> None:
    body = json.dumps({"inputs": ["a claim"], "padding": "x" * 5 * HEAD_BYTES}).encode()
    head = b"POST /embed HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n\r\n"
    with socket.create_connection(address, timeout=30) as connection:
        connection.sendall(head)
        for place in range(0, len(body), 1_000):
            part = body[place : place + 1_000]
            connection.sendall(b"%x\r\n%s\r\n" % (len(part), part))
        connection.sendall(b"0\r\nX-Trailer: y\r\n\r\n")
        assert connection.recv(100).startswith(b"HTTP/1.1 200")


def test_texts_of_others_give_no_orders_to_a_terminal() -> None:
    assert printable("a\x1b]52;c;cm0gLXJm\x07b\tc\nü 汉\u202e") == "a\\x1b]52;c;cm0gLXJm\\x07b\tc\nü 汉\\u202e"


@pytest.mark.parametrize("content", [b"", b"two words", b"bell\x07", b"\xff\xfe", "schlüssel".encode(), b"x" * 5_000])
def test_a_key_file_that_holds_no_key_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "key").write_bytes(content)
    with pytest.raises(ConfigurationError, match="one line of printable ASCII"):
        _key(tmp_path / "key")
    (tmp_path / "key").write_bytes(b"a-key\n")
    assert _key(tmp_path / "key") == "a-key"

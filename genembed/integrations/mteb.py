"""Entries for mteb's list of models: the published generative embedders and `mini`, and how mteb loads them.

The file stands alone, so that it can be sent upstream as it is (docs/integrations.md says how). A field is None where no public source
says it: revisions of the hub folders, days of release, and the dtype (so the memory) of weights that we have not seen. Sources: the
READMEs and licences of github.com/Roytsai27/GIRCSE and github.com/ignorejjj/LaSER, the cards of the LaSER models, arXiv 2509.24291 and
2603.01425; numbers of parameters follow from the configurations of the base models (a merged adapter adds none; a test counts them).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from jaxtyping import Float
from mteb.models.abs_encoder import AbsEncoder
from mteb.models.model_meta import ModelMeta, ScoringFunction
from mteb.types import PromptType

GIRCSE_CITATION = """@article{tsai2025let,
  title={Let LLMs Speak Embedding Languages: Generative Text Embeddings via Iterative Contrastive Refinement},
  author={Tsai, Yu-Che and Chen, Kuan-Yu and Li, Yuan-Chi and Chen, Yuan-Hao and Tsai, Ching-Yu and Lin, Shou-De},
  journal={arXiv preprint arXiv:2509.24291},
  year={2025}
}"""

LASER_CITATION = """@article{jin2026laser,
  title={LaSER: Internalizing Explicit Reasoning into Latent Space for Dense Retrieval},
  author={Jin, Jiajie and Zhang, Yanzhao and Li, Mingxin and Long, Dingkun and Xie, Pengjun and Zhu, Yutao and Dou, Zhicheng},
  journal={arXiv preprint arXiv:2603.01425},
  year={2026}
}"""


class GenembedModel(AbsEncoder):
    """Refines texts under mteb's own instructions; the documents of retrieval are read without one, as these models were trained."""

    mteb_model_meta: ModelMeta
    """Set by mteb when it loads an entry."""

    def __init__(
        self,
        model_name: str,
        revision: str | None = None,
        device: str | None = None,
        *,
        source: str | None = None,
        preset: str | None = None,
        max_length: int | None = None,
        **_: Any,
    ) -> None:
        """Load a model; mteb calls this.

        Args:
            model_name: Name of the entry.
            revision: Not used: the entries name none.
            device: Where it works; the accelerator if there is one, if None.
            source: What `genembed.load` takes, where that is not the entry's name.
            preset: How the model makes an embedding, where its folder does not say.
            max_length: Most tokens of a prompt, with a preset; the preset's own if None.
            **_: Options of other loaders, such as `embed_dim`.
        """
        import genembed
        from genembed.settings import preset_settings

        settings = None if preset is None else preset_settings(preset)
        if settings is not None and max_length is not None:
            settings = replace(settings, max_length=max_length)
        self.model = genembed.load(source or model_name, preset=settings, device=device or "auto")

    def encode(
        self,
        inputs: Iterable[Mapping[str, Any]],
        *,
        task_metadata: Any,
        hf_split: str,
        hf_subset: str,
        prompt_type: PromptType | None = None,
        **_: Any,
    ) -> Float[np.ndarray, "texts hidden"]:
        """Embed the texts of a task; mteb calls this.

        Args:
            inputs: Batches with a list of texts under `text`; the engine makes its own batches of them.
            task_metadata: Brings the instruction.
            hf_split: Not used.
            hf_subset: Not used.
            prompt_type: Queries and texts of tasks without sides take the instruction, documents take none.
            **_: Options of other encoders, such as `batch_size`.
        """
        is_document = prompt_type == PromptType.document
        instruction = None if is_document else self.get_instruction(task_metadata, prompt_type) or None
        texts = [text for batch in inputs for text in batch["text"]]
        vectors: np.ndarray = self.model.encode(texts, instruction=instruction, show_progress_bar=True)
        return vectors


def _gircse(name: str, base: str, parameters: int, table: int, hidden: int) -> ModelMeta:
    return ModelMeta(
        loader=GenembedModel,
        loader_kwargs={"preset": "gircse"},
        name=f"Roytsai27/{name}",
        revision=None,
        release_date=None,  # announced in February 2026, without a day
        languages=["eng-Latn"],
        n_parameters=parameters,
        n_embedding_parameters=table,
        memory_usage_mb=None,
        max_tokens=512,  # of the released evaluation
        embed_dim=hidden,
        license="mit",  # of the code and adapters' repository; the base has its own
        open_weights=True,
        public_training_code="https://github.com/Roytsai27/GIRCSE",
        public_training_data=None,
        framework=["PyTorch", "safetensors"],
        reference=f"https://huggingface.co/Roytsai27/{name}",
        similarity_fn_name=ScoringFunction.COSINE,
        use_instructions=True,
        training_datasets=None,  # a fifth of the mixture of Li et al. 2025; which sets, the paper does not list
        adapted_from=base,
        citation=GIRCSE_CITATION,
    )


def _laser(size: str, parameters: int, table: int, hidden: int) -> ModelMeta:
    return ModelMeta(
        loader=GenembedModel,
        loader_kwargs={"preset": "laser", "max_length": 8192},
        name=f"Alibaba-NLP/LaSER-Qwen3-{size}",
        revision=None,
        release_date=None,  # March 2026, without a day
        languages=["eng-Latn"],
        n_parameters=parameters,
        n_embedding_parameters=table,
        memory_usage_mb=None,
        max_tokens=8192,
        embed_dim=hidden,
        license="mit",
        open_weights=True,
        public_training_code="https://github.com/ignorejjj/LaSER",
        public_training_data="https://huggingface.co/datasets/jinjiajie/LaSER-Training",
        framework=["PyTorch", "Transformers", "safetensors"],
        reference=f"https://huggingface.co/Alibaba-NLP/LaSER-Qwen3-{size}",
        similarity_fn_name=ScoringFunction.COSINE,
        use_instructions=True,
        training_datasets=None,  # 81 thousand examples of ReasonEmb, which are synthetic; their sources are not listed
        adapted_from=f"Qwen/Qwen3-{size}",
        citation=LASER_CITATION,
    )


gircse_mistral_7b = _gircse("GIRCSE-Mistral7B", "mistralai/Mistral-7B-v0.1", 7_241_732_096, 131_072_000, 4096)
gircse_qwen_7b = _gircse("GIRCSE-QWEN7B", "Qwen/Qwen2.5-7B", 7_615_616_512, 544_997_376, 3584)
laser_qwen3_06b = _laser("0.6B", 596_049_920, 155_582_464, 1024)
laser_qwen3_4b = _laser("4B", 4_022_468_096, 388_956_160, 2560)
laser_qwen3_8b = _laser("8B", 8_190_735_360, 622_329_856, 4096)

mini = ModelMeta(
    loader=GenembedModel,
    loader_kwargs={"source": "mini"},
    name="genembed/mini",
    revision=None,
    release_date=None,  # comes with the package, not from the hub
    languages=["eng-Latn"],
    n_parameters=23_533_568,  # base, adapter, and the head of the soft token
    n_embedding_parameters=11_720_448,
    memory_usage_mb=90,
    max_tokens=256,
    embed_dim=384,
    license="apache-2.0",
    open_weights=True,
    public_training_code="https://github.com/genembed/genembed",
    public_training_data=None,  # public sets, listed in the model's card; the mixture itself is not published
    framework=["PyTorch", "safetensors"],
    reference="https://github.com/genembed/genembed",
    similarity_fn_name=ScoringFunction.COSINE,
    use_instructions=True,
    # What is said of the adapter; its base, all-MiniLM-L6-v2, was trained on more.
    training_datasets={
        *("FEVER", "FEVERHardNegatives.v2", "NanoFEVERRetrieval", "NQ", "NQHardNegatives", "NanoNQRetrieval"),
        *("STSBenchmark", "MedicalQARetrieval", "CovidQA"),
    },
    adapted_from="sentence-transformers/all-MiniLM-L6-v2",
    citation=GIRCSE_CITATION,
)

MODELS = (gircse_mistral_7b, gircse_qwen_7b, laser_qwen3_06b, laser_qwen3_4b, laser_qwen3_8b, mini)
"""All entries."""

"""Make what recipes/decoder.py starts from, outside the repository: a tokenizer, a bag of token embeddings, a decoder that equals it.

    python recipes/decoder_data.py --data ../shared/data --exclude runs/mini-data/exclude.txt --output runs/decoder

A transformer of this size that is trained for minutes from random weights stays far below a bag of token embeddings, so the bag is
trained first: contrast of pairs, and the similarities of all-MiniLM-L6-v2. The decoder starts where the bag ended. Its
first layer attends to every token by the weight the bag gives it and adds up the bag's vectors; the output of every other layer
starts at zero. The folder gets `bag/` (embeddings and tokenizer) and `start/` (a Qwen2 model).
"""

from __future__ import annotations

import argparse
import lzma
import os
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from decoder import TEACHER_SETTINGS, files, teacher
from jaxtyping import Float, Int
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from genembed import load
from genembed.errors import GenembedWarning
from genembed.files import read_texts
from genembed.train.batches import BatchStream
from genembed.train.losses import similarity_distillation, stepwise_contrastive
from genembed.train.overlap import TextFilter
from genembed.train.pairs import Pair

VOCAB, HIDDEN, LAYERS, HEADS, FEED_FORWARD = 8_192, 256, 4, 4, 512
END, BAG_FILE = "<|endoftext|>", "bag.safetensors"
EMBEDDING_SCALE = 0.1
"""Root mean square of a token embedding in the decoder. Its layers normalise what they read, so this only says how much of a state
is its own token, and how sharp its logits are."""
END_SCALE = 0.01
"""The same of the end-of-sequence token: it is to add nothing, and at 0 the gradient of its normalisation would be without bound."""

CHARACTERS = 3_000_000
"""Of each text file, for the tokenizer."""
UPDATES, PAIRS, TAUGHT, TOKENS = 800, 128, 4_096, 128
"""Of the bag: updates, pairs of a batch, texts that the teacher embeds, tokens read of a text."""
LEARNING_RATE, TEMPERATURE = 0.1, 0.05


def sample(data: Path) -> Iterator[str]:
    """Yield paragraphs from the beginning of every text file."""
    for path in sorted((data / "text").glob("*.txt.xz")):
        left = CHARACTERS
        with lzma.open(path, "rt", encoding="utf-8") as lines:
            for line in lines:
                left -= len(line)
                if left < 0:
                    break
                yield line


def new_tokenizer(texts: Iterator[str]) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer: it has tokens for any text, and one for its end."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCAB, special_tokens=[END], initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END)


class Bag(nn.Module):
    """The unit vector of a weighted sum of a text's token embeddings, each of root mean square 1.

        z = unit( sum_i exp(c . e_i / d) e_i )

    Args:
        embeddings: Table of one vector for each token, of any length.
        weighting: c, by which a token's vector, of length d, says how much it counts.
    """

    def __init__(self, embeddings: Float[Tensor, "vocab hidden"], weighting: Float[Tensor, "hidden"]) -> None:
        super().__init__()
        self.embeddings, self.weighting = nn.Parameter(embeddings), nn.Parameter(weighting)

    @property
    def normed(self) -> Float[Tensor, "vocab hidden"]:
        """The table as the decoder's first layer reads it."""
        return nn.functional.rms_norm(self.embeddings, self.embeddings.shape[1:], eps=1e-6)

    def forward(self, ids: Sequence[Int[np.ndarray, "tokens"]]) -> Float[Tensor, "texts hidden"]:
        """Embed texts, given as token ids; one without tokens is the zero vector."""
        table = self.normed
        flat = torch.from_numpy(np.concatenate(ids))
        starts = torch.from_numpy(np.cumsum([0, *map(len, ids[:-1])]))
        weights = torch.exp(table @ self.weighting / table.shape[1])[flat]
        sums = nn.functional.embedding_bag(flat, table, starts, mode="sum", per_sample_weights=weights)
        return nn.functional.normalize(sums, dim=-1)

    @classmethod
    def read(cls, folder: Path) -> Bag:
        """Read the weights that `write_bag` wrote."""
        state = load_file(folder / BAG_FILE)
        return cls(state["embeddings"], state["weighting"]).requires_grad_(False)


def token_ids(tokenizer: Any, texts: list[str]) -> list[Int[np.ndarray, "tokens"]]:
    """Tokenise texts for the bag."""
    return [np.asarray(ids[:TOKENS], dtype=np.int64) for ids in tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]]


def bag_vectors(folder: Path, texts: list[str]) -> Float[np.ndarray, "texts hidden"]:
    """Embed texts with the bag of a folder."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    with torch.no_grad():
        return np.asarray(Bag.read(folder)(token_ids(tokenizer, texts)).numpy())


def train_bag(tokenizer: Any, exclude: TextFilter, *, updates: int = UPDATES) -> Bag:
    """Train the bag: contrast of pairs (GIRCSE, eq. 7, one step), and a teacher's similarities among some of their texts."""
    stream = BatchStream(files(), batch_size=PAIRS, negatives=0, exclude=exclude, seed=0)
    with closing(iter(stream)) as batches:
        taught = [text for pairs in islice(batches, TAUGHT // (2 * PAIRS)) for pair in pairs for text in (pair.query, pair.positives[0])]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", GenembedWarning)  # some passages are longer than the teacher reads
            known = torch.from_numpy(load(teacher(), preset=TEACHER_SETTINGS).encode(taught))
        generator = torch.Generator().manual_seed(0)
        bag = Bag(torch.randn(VOCAB, HIDDEN, generator=generator), torch.zeros(HIDDEN))
        optimizer = torch.optim.Adam(bag.parameters())
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=updates, pct_start=0.1)
        ids = token_ids(tokenizer, taught)
        for pairs in islice(batches, updates):
            rows = torch.randperm(len(taught), generator=generator)[:PAIRS]
            loss = _contrast(bag, tokenizer, pairs) + _distance(bag([ids[row] for row in rows.tolist()]), known[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()
    return bag.requires_grad_(False)


def _contrast(bag: Bag, tokenizer: Any, pairs: list[Pair]) -> Tensor:
    queries = bag(token_ids(tokenizer, [pair.query for pair in pairs]))
    passages = bag(token_ids(tokenizer, [pair.positives[0] for pair in pairs]))
    return stepwise_contrastive(queries[:, None], passages[:, None], temperature=TEMPERATURE, positives=torch.arange(len(pairs)))[0]


def _distance(own: Float[Tensor, "texts hidden"], known: Float[Tensor, "texts width"]) -> Tensor:
    """Compare every text with all others, as the teacher does; its likeness to itself would outweigh them."""
    itself = torch.eye(len(own), dtype=torch.bool)
    return similarity_distillation(own[:, None], own[:, None], known, known, temperature=TEMPERATURE, ignore=itself)[0]


def decoder_of(bag: Bag, *, end: int) -> Qwen2ForCausalLM:
    """Make a decoder whose state at the end-of-sequence token is the bag's vector, up to its length.

    The first layer's scores are c . e_i / d for every query, out of a query bias and one key direction, in the slowest pair of the
    rotary embedding; its values are the normalised embeddings. The token at the end has a small embedding that adds almost nothing.

    Args:
        bag: Trained.
        end: Id of the end-of-sequence token.
    """
    vocab, hidden = bag.embeddings.shape
    config = Qwen2Config(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        max_position_embeddings=2_048,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=end,
    )
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(config)
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(EMBEDDING_SCALE * bag.normed)
        # Away from the weighting's direction, so that the token itself is hardly attended to.
        model.model.embed_tokens.weight[end] = -END_SCALE * hidden**0.5 * nn.functional.normalize(bag.weighting, dim=0)
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        _attend_as(bag, model.model.layers[0].self_attn)
    model.eval()
    return model


def _attend_as(bag: Bag, attention: Any) -> None:
    """Let a layer's attention be the bag's weighted sum."""
    hidden, size = bag.embeddings.shape[1], attention.head_dim
    for projection in (attention.q_proj, attention.k_proj):
        projection.weight.mul_(0.1)  # near the bag, and still different from head to head
        projection.bias.zero_()
    slow = torch.arange(HEADS) * size + size // 2 - 1
    attention.q_proj.weight[slow], attention.q_proj.bias[slow] = 0, size**0.5
    attention.k_proj.weight[slow] = bag.weighting / hidden
    attention.v_proj.weight.copy_(torch.eye(hidden))
    attention.v_proj.bias.zero_()
    attention.o_proj.weight.copy_(torch.eye(hidden))


def write_bag(bag: Bag, folder: Path) -> None:
    """Write the weights that `Bag.read` reads."""
    save_file({name: value.detach().contiguous() for name, value in bag.state_dict().items()}, folder / BAG_FILE)


def main() -> None:
    """Write the folders."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--exclude", type=Path, default=Path("runs/mini-data/exclude.txt"), help="texts to keep out of training")
    parser.add_argument("--output", type=Path, default=Path("runs/decoder"))
    arguments = parser.parse_args()
    os.environ.setdefault("GENEMBED_DATA", str(arguments.data))
    begin = time.perf_counter()
    tokenizer = new_tokenizer(sample(arguments.data))
    print(f"{time.perf_counter() - begin:6.1f} s  tokenizer of {len(tokenizer)} tokens", flush=True)
    exclude = TextFilter.from_texts(text.text for text in read_texts(arguments.exclude))
    bag = train_bag(tokenizer, exclude)
    print(f"{time.perf_counter() - begin:6.1f} s  bag", flush=True)
    model = decoder_of(bag, end=tokenizer.eos_token_id)
    for folder in (arguments.output / "bag", arguments.output / "start"):
        folder.mkdir(parents=True, exist_ok=True)
        tokenizer.save_pretrained(folder)
    write_bag(bag, arguments.output / "bag")
    model.save_pretrained(arguments.output / "start")
    print(f"{time.perf_counter() - begin:6.1f} s  {arguments.output / 'start'}: {model.num_parameters():,} weights", flush=True)


if __name__ == "__main__":
    main()

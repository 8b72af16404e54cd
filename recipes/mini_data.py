"""Prepare the training data of `mini` from the raw files, outside the repository.

    python recipes/mini_data.py --data ../shared/data --output runs/mini-data

Writes one file of pairs for each source that has to be made (scored pairs of STS-B's training split; intents of HWU64's
training split, where texts of one intent are positives of each other), and `exclude.txt`: every text of every evaluation set,
test and development splits alike, none of which may be trained on.
"""

from __future__ import annotations

import argparse
import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

REPRESENTATIVES = 8
"""Texts of an intent that stand for it: as all its rows share them, two of its rows never meet in one batch."""


def rows_of(path: Path) -> Iterator[dict[str, Any]]:
    """Read a .jsonl or .jsonl.gz file."""
    with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as lines:
        for line in lines:
            yield json.loads(line)


def write(path: Path, rows: Iterator[dict[str, Any]]) -> None:
    """Write a .jsonl file."""
    with path.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def scored(data: Path) -> Iterator[dict[str, Any]]:
    """Yield STS-B's training pairs with their scores of 0 to 5."""
    for row in rows_of(data / "sts" / "stsb.jsonl"):
        if row["split"] == "train":
            yield {name: row[name] for name in ("sentence1", "sentence2", "score")}


def intents(data: Path) -> Iterator[dict[str, Any]]:
    """Yield HWU64's training texts, with others of the same intent as positives."""
    by_label: dict[str, list[str]] = {}
    for row in rows_of(data / "classification" / "hwu64.jsonl"):
        if row["split"] == "train":
            by_label.setdefault(row["label"], []).append(row["text"])
    for texts in by_label.values():
        shared = texts[:REPRESENTATIVES]
        for text in texts[REPRESENTATIVES:]:
            yield {"query": text, "pos": shared, "neg": [], "prompt": "Identify the intent of the user", "type": "symmetric_sts"}


def evaluation_texts(data: Path) -> Iterator[str]:
    """Yield every text of the evaluation sets."""
    for folder in sorted((data / "retrieval").iterdir()):
        for path in sorted(folder.glob("*.jsonl*")):
            for row in rows_of(path):
                yield f"{row.get('title', '')} {row['text']}".strip()
                yield row["text"]
    for part in ("sts", "pairs", "classification", "clustering"):
        for path in sorted((data / part).glob("*.jsonl*")):
            for row in rows_of(path):
                # The training splits of STS-B and HWU64 are trained on; Banking77's is a development set.
                if path.name.split(".")[0] in ("stsb", "hwu64") and row.get("split") == "train":
                    continue
                yield from (row[name] for name in ("text", "sentence1", "sentence2") if name in row)


def main() -> None:
    """Write the files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--output", type=Path, default=Path("runs/mini-data"))
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    write(arguments.output / "stsb_train.jsonl", scored(arguments.data))
    write(arguments.output / "hwu64_train.jsonl", intents(arguments.data))
    texts = {" ".join(text.split()) for text in evaluation_texts(arguments.data)}
    (arguments.output / "exclude.txt").write_text("\n".join(sorted(texts - {""})) + "\n", encoding="utf-8")
    print(f"{arguments.output}: {len(texts)} texts to keep out of training")


if __name__ == "__main__":
    main()

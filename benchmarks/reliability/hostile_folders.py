"""Can a model folder run code, reach out of itself, hang or crash whoever loads it?

    python benchmarks/reliability/hostile_folders.py [--size 1000]

A sound folder is spoiled in every way of `hostile_kinds.py`, and then, up to `--size`, by bytes changed at random in a file drawn at
random. Each is loaded in a process of its own, which may take 2 GiB more than it has, and 60 seconds. Right: the folder is refused by one
of our errors and the canary is untouched; a folder with random bytes may also load, if its vectors are finite.
"""

from __future__ import annotations

import multiprocessing
import random
import resource
import shutil
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from campaign import Row, Tally, main, tiny_folder
from hostile_kinds import CONFIG, SETTINGS, TOKENIZER, WEIGHTS, kinds

import genembed
from genembed import GenembedError

SECONDS = 60.0
_MORE_BYTES = 2 << 30
_LOADED, _REFUSED = "loaded", "refused"
_SPOILED = (WEIGHTS, CONFIG, SETTINGS, TOKENIZER, "tokenizer_config.json")
_FORK = multiprocessing.get_context("fork")


def run(size: int, seed: int) -> Tally:
    """Try every kind once, or some of them where `size` is less, then random bytes."""
    torch.set_num_threads(1)  # a process with threads of its own could not be forked
    tally, rng = Tally(), random.Random(seed)
    known = kinds()
    known = rng.sample(known, min(size, len(known)))
    with tempfile.TemporaryDirectory() as place:
        sound = tiny_folder(Path(place) / "sound")
        genembed.load(sound).encode("a")  # whatever is imported late is imported before the processes part
        for number in range(size):
            root = Path(place) / str(number)
            folder, canary = Path(shutil.copytree(sound, root / "model")), root / "canary"
            if number < len(known):
                kind = known[number]
                kind.spoil(folder, canary)
                outcome = tried(folder)
                tally.check(outcome.startswith(_REFUSED) and not canary.exists(), kind.name, outcome)
            else:
                name = change_bytes(folder, rng)
                outcome = tried(folder)
                tally.check(outcome.startswith((_REFUSED, _LOADED)) and not canary.exists(), f"random bytes in {name}", outcome)
            shutil.rmtree(root)
    tally.figures["kinds"] = len(known)
    return tally


def change_bytes(folder: Path, rng: random.Random) -> str:
    """Change, remove or repeat some bytes of a file; return its name."""
    name = rng.choice(_SPOILED)
    content = bytearray((folder / name).read_bytes())
    reach = min(len(content), 4_096) if name == WEIGHTS else len(content)  # its header; a number that changes is a number
    for _ in range(rng.choice((1, 1, 2, 8))):
        start = rng.randrange(reach)
        stop = min(reach, start + rng.choice((1, 1, 4, 64)))
        content[start:stop] = rng.choice((rng.randbytes(stop - start), b"", bytes(content[start:stop]) * 2, b"\0", b"9" * 20))
    (folder / name).write_bytes(bytes(content))
    return name


def tried(folder: Path) -> str:
    """Load a folder in a process of its own; return what became of it, in a line."""
    receiver, sender = _FORK.Pipe(duplex=False)
    process = _FORK.Process(target=_load, args=(folder, sender.send), daemon=True)
    process.start()
    sender.close()
    try:
        outcome: str = receiver.recv() if receiver.poll(SECONDS) else "hangs"
    except EOFError:
        process.join()
        outcome = f"the process ended with {process.exitcode}"
    process.kill()
    process.join()
    receiver.close()
    return outcome


def _load(folder: Path, tell: Callable[[str], None]) -> None:
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + _MORE_BYTES, used + _MORE_BYTES))
    tell(outcome_of(folder))


def outcome_of(folder: Path) -> str:
    """Load a folder and use the model; return what became of it, in a line."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            vectors = genembed.load(folder, offline=True).encode(["What is a business trip?", "x"])
    except GenembedError as error:
        return f"{_REFUSED}: {error}"[:300]
    except BaseException as error:  # noqa: BLE001 - any other error is what is looked for
        return f"{type(error).__name__}: {error}"[:300]
    sound = bool(np.isfinite(vectors).all()) and bool((np.abs(np.linalg.norm(vectors, axis=-1) - 1) < 1e-3).all())
    return _LOADED if sound else "gives vectors that are none"


ROW = Row(
    name="hostile-folders",
    property="a hostile or damaged model folder is refused; no code of it runs, nothing hangs",
    size=1_000,
    unit="folders",
    run=run,
)

if __name__ == "__main__":
    main(ROW, __doc__)

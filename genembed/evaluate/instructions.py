"""What each task says to the model before a text."""

from __future__ import annotations

import difflib
import json
import re
from dataclasses import dataclass
from functools import cache
from importlib import resources

from genembed.errors import ConfigurationError

_VERSION = re.compile(r"\.v\d+$")


@dataclass(frozen=True)
class Instruction:
    """The instruction of a task by side; None reads the text bare."""

    query: str | None
    document: str | None

    def of(self, *, is_document: bool) -> str | None:
        """Return the instruction of one side; texts of a task without sides, such as STS, are queries."""
        return self.document if is_document else self.query


@dataclass(frozen=True, kw_only=True)
class Instructions:
    """Where the instructions of tasks come from: the paper's table, one text for all, or none at all.

    The table is that of GIRCSE (2025, tables 11 and 12), which has no instruction for the documents of retrieval.
    """

    text: str | None = None
    """Instruction of the queries of every task, instead of the table; documents are read bare."""
    bare: bool = False
    """Read every text bare."""

    def __post_init__(self) -> None:
        """Refuse two sources at once, and an instruction that says nothing."""
        if self.text is not None and self.bare:
            raise ConfigurationError(f"--instruction {self.text!r} and --bare both say what is put before a text; give one of them.")
        if self.text is not None and not self.text.strip():
            raise ConfigurationError(f"instruction {self.text!r} says nothing; to read texts without an instruction, say so: --bare.")

    @property
    def label(self) -> str:
        """Name of the source, as results are filed under it."""
        return "bare" if self.bare else "table" if self.text is None else self.text

    def of(self, task: str) -> Instruction:
        """Return the instruction of a task.

        A name is looked up as it is, then without regard to case, then without the version of the data set (`.v2`), which changes the
        data and not the task.

        Raises:
            ConfigurationError: If the table has none: an empty prompt in its place would be another experiment.
        """
        if self.bare:
            return Instruction(None, None)
        if self.text is not None:
            return Instruction(self.text, None)
        known = table()
        for name in (task.lower(), _VERSION.sub("", task.lower())):
            if name in known:
                return known[name]
        near = difflib.get_close_matches(task.lower(), known, n=2)
        nearest = f" (the nearest are: {', '.join(near)})" if near else ""
        raise ConfigurationError(
            f"{task}: the paper's tables have no instruction for this task{nearest}, and none is made up; "
            'give one, --instruction "...", or read the texts without one, --bare.'
        )


@cache
def table() -> dict[str, Instruction]:
    """Return the instructions of tables 11 and 12 by the name of the task in lower case."""
    values = json.loads(resources.files("genembed.evaluate").joinpath("instructions.json").read_text(encoding="utf-8"))
    return {name.lower(): _instruction(value) for name, value in values.items()}


def _instruction(value: str | dict[str, str]) -> Instruction:
    """Read one entry: a text for both sides, or a text for each side that has one."""
    return Instruction(value, value) if isinstance(value, str) else Instruction(value["query"], value.get("corpus"))

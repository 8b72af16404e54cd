"""What the sub-commands have in common: groups of options, and how a function becomes a sub-command."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, is_dataclass, replace
from functools import wraps
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_type_hints

import typer

import genembed
from genembed.cli.output import with_bar
from genembed.errors import ConfigurationError

if TYPE_CHECKING:
    from genembed.precision import OutputForm
    from genembed.train.overlap import TextFilter

Model = Annotated[str, typer.Option("--model", "-m", help="Built-in model (mini), model folder, or hub id.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


@dataclass(frozen=True, kw_only=True)
class LoadOptions:
    """How a model is loaded."""

    adapter: Annotated[str | None, typer.Option(help="LoRA adapter (folder or hub id) over the model.")] = None
    preset: Annotated[
        str | None, typer.Option(help="How the model makes an embedding, where its folder does not say: gircse, laser, causal-eos, ...")
    ] = None
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps.")] = "auto"
    dtype: Annotated[str, typer.Option(help="auto, float32, float64, bfloat16, float16.")] = "auto"
    offline: Annotated[bool, typer.Option("--offline", help="Never touch the network.")] = False
    parallel_passes: Annotated[
        int | None, typer.Option(help="Refine all steps at once in so many passes, approximately: faster for a text at a time.")
    ] = None

    def load(self, model: str, *, adapter: str | None = None, preset: str | genembed.ModelSettings | None = None) -> genembed.Embedder:
        """Load the model, with a note on a terminal, as the first import of Torch takes seconds.

        Args:
            model: Built-in name, folder or hub id.
            adapter: The adapter where no option names one.
            preset: The preset where no option names one.
        """
        note = f"Loading {model} ..." if sys.stderr.isatty() else ""
        typer.echo(note, err=True, nl=False)
        try:
            return genembed.load(
                model,
                adapter=adapter if self.adapter is None else self.adapter,
                preset=preset if self.preset is None else self.preset,
                device=self.device,
                dtype=self.dtype,
                offline=self.offline,
                parallel_passes=self.parallel_passes,
            )
        finally:
            typer.echo("\r" + " " * len(note) + "\r" if note else "", err=True, nl=False)


@dataclass(frozen=True, kw_only=True)
class RefineOptions:
    """How texts are refined."""

    instruction: Annotated[str | None, typer.Option(help="What the embedding is for; the model's template puts it before each text.")] = (
        None
    )
    steps: Annotated[int | None, typer.Option(help="Refine every text exactly this many times.")] = None
    threshold: Annotated[
        float | None, typer.Option(help="Halt a text when the cosine of its consecutive vectors stays at or above this.")
    ] = None
    halt: Annotated[str | None, typer.Option(help="File with a rule that genembed calibrate wrote; in a search also: rank.")] = None
    truncate: Annotated[Literal["right", "error"], typer.Option(help="Cut texts that are too long from the right, or refuse them.")] = (
        "right"
    )

    def __post_init__(self) -> None:
        """Refuse two halting rules at once."""
        given = [f"--{name} {getattr(self, name)}" for name in ("steps", "threshold", "halt") if getattr(self, name) is not None]
        if len(given) > 1:
            raise ConfigurationError(f"{' and '.join(given)} both say when to stop; give one of them.")

    def rule(self, settings: genembed.ModelSettings) -> genembed.FixedSteps | genembed.ConvergeStop:
        """Return the halting rule that is wanted; the model's own one without an option."""
        own = settings.halt
        if self.steps is not None:
            return genembed.FixedSteps(self.steps)
        if self.halt is not None:
            from genembed.calibrate.certificate import read_rule

            return read_rule(self.halt)
        if self.threshold is None:
            return own
        if not own.max_steps:
            raise ConfigurationError(f"--threshold {self.threshold} has no effect on a model that does {own}; give --steps instead.")
        if isinstance(own, genembed.ConvergeStop):
            return replace(own, threshold=self.threshold)
        return genembed.ConvergeStop(threshold=self.threshold, max_steps=own.max_steps)

    def refine(self, embedder: genembed.Embedder, texts: Sequence[str], *, instruction: str | None) -> genembed.Refinement:
        """Refine texts under these options; `instruction` is used where they have none."""
        return embedder.refine(
            texts,
            instruction=instruction if self.instruction is None else self.instruction,
            halt=self.rule(embedder.settings),
            truncate=self.truncate,
            show_progress_bar=True,
        )


@dataclass(frozen=True, kw_only=True)
class FormOptions:
    """The form vectors are written in."""

    precision: Annotated[
        Literal["float32", "float16", "int8", "uint8", "binary", "ubinary"],
        typer.Option(help="Numbers of the vectors; eight bits need the model's ranges (genembed calibrate-ranges)."),
    ] = "float32"
    dims: Annotated[int | None, typer.Option(help="Keep so many leading dimensions, of those the model was trained for.")] = None

    def form(self, embedder: genembed.Embedder) -> OutputForm:
        """Return the form, refused before any text is embedded if the model cannot give it."""
        return embedder.form(self.precision, self.dims)


@dataclass(frozen=True, kw_only=True)
class FileOptions:
    """How files of rows are read."""

    file_format: Annotated[
        str | None, typer.Option("--format", help="txt, jsonl, csv or parquet, where the file's name does not tell.")
    ] = None
    text_column: Annotated[str | None, typer.Option(help="Column of the text; 'text' if not given.")] = None
    id_column: Annotated[str | None, typer.Option(help="Column of the id; the number of the row, from 0, if not given.")] = None


@dataclass(frozen=True, kw_only=True)
class ExcludeOptions:
    """Texts that must not be trained on."""

    exclude: Annotated[
        list[Path] | None, typer.Option("--exclude", metavar="FILE", help="Texts of test sets, which are kept out of the training.")
    ] = None
    file_format: Annotated[
        str | None, typer.Option("--format", help="Of the --exclude files: txt, jsonl, csv or parquet, where their names do not tell.")
    ] = None
    text_column: Annotated[str | None, typer.Option(help="Column of the text in the --exclude files; 'text' if not given.")] = None

    def __post_init__(self) -> None:
        """Refuse options about files that are not there."""
        for option, value in (("--format", self.file_format), ("--text-column", self.text_column)):
            if value is not None and not self.exclude:
                raise ConfigurationError(f"{option} {value}: says how --exclude files are read, and there are none.")

    def read(self) -> TextFilter | None:
        """Return the filter that knows these texts."""
        from genembed.files import read_texts
        from genembed.train.overlap import TextFilter

        if not self.exclude:
            return None
        records = chain.from_iterable(read_texts(path, file_format=self.file_format, text_column=self.text_column) for path in self.exclude)
        return TextFilter.from_texts(record.text for record in with_bar(records, "reading") if record.text.strip())


def command(function: Callable[..., None]) -> Callable[..., None]:
    """Make a function what Typer takes for a sub-command; a parameter that is a class of options becomes all of its options."""
    hints = get_type_hints(function, include_extras=True)
    groups: dict[str, Any] = {name: hint for name, hint in hints.items() if is_dataclass(hint)}
    options = {name: get_type_hints(group, include_extras=True) for name, group in groups.items()}
    parameters: list[inspect.Parameter] = []
    for name, parameter in inspect.signature(function).parameters.items():
        if name not in groups:
            parameters.append(parameter.replace(annotation=hints[name]))
        for option, annotation in options.get(name, {}).items():
            default = getattr(groups[name], option)
            parameters.append(inspect.Parameter(option, parameter.kind, default=default, annotation=annotation))

    @wraps(function)
    def call(**values: Any) -> None:
        made = {name: group(**{option: values.pop(option) for option in options[name]}) for name, group in groups.items()}
        function(**values, **made)

    call.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    call.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return call

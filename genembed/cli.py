"""The command `genembed`: one sub-command for each verb. Imports inside the functions, so that `--help` waits for nothing."""

from __future__ import annotations

import inspect
import json
import os
import shlex
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, is_dataclass, replace
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_type_hints

import genembed
from genembed.errors import ConfigurationError, GenembedError, GenembedWarning, InputError, missing_extra

try:
    import typer
except ModuleNotFoundError:  # the console script imports this module before anything could catch an error
    sys.stderr.write(f"genembed: {missing_extra('cli', 'typer')}\n")
    raise SystemExit(2) from None

Item = TypeVar("Item")

app = typer.Typer(
    help="Generative text embeddings: a language model refines a text's vector step by step, and stops when it is stable.",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

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

    def load(self, model: str) -> genembed.Embedder:
        """Load the model, with a note on a terminal, as the first import of Torch takes seconds."""
        note = f"Loading {model} ..." if sys.stderr.isatty() else ""
        typer.echo(note, err=True, nl=False)
        try:
            return genembed.load(
                model, adapter=self.adapter, preset=self.preset, device=self.device, dtype=self.dtype, offline=self.offline
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
    truncate: Annotated[Literal["right", "error"], typer.Option(help="Cut texts that are too long from the right, or refuse them.")] = (
        "right"
    )

    def __post_init__(self) -> None:
        """Refuse two halting rules at once."""
        if self.steps is not None and self.threshold is not None:
            raise ConfigurationError(f"--steps {self.steps} and --threshold {self.threshold} both say when to stop; give one of them.")

    def rule(self, settings: genembed.ModelSettings) -> genembed.FixedSteps | genembed.ConvergeStop:
        """Return the halting rule that is wanted; the model's own one without an option."""
        own = settings.halt
        if self.steps is not None:
            return genembed.FixedSteps(self.steps)
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
class FileOptions:
    """How files of rows are read."""

    file_format: Annotated[
        str | None, typer.Option("--format", help="txt, jsonl, csv or parquet, where the file's name does not tell.")
    ] = None
    text_column: Annotated[str | None, typer.Option(help="Column of the text; 'text' if not given.")] = None
    id_column: Annotated[str | None, typer.Option(help="Column of the id; the number of the row, from 0, if not given.")] = None


def command(function: Callable[..., None]) -> Callable[..., None]:
    """Make a sub-command of a function; a parameter that is a class of options above becomes all of its options."""
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
    return app.command()(call)


@command
def demo(
    *,
    model: Model = "mini",
    rows: Annotated[int, typer.Option(help="Docstrings to index, at most.")] = 3000,
    index: Annotated[Path | None, typer.Option(help="Folder of the index; one in the user's cache if not given.")] = None,
    as_json: Json = False,
    loading: LoadOptions,
) -> None:
    """Search the standard library's docstrings; see what halting saves."""
    from genembed.index import demo as demonstration

    result = demonstration.run(loading.load(model), rows=rows, folder=index, quiet=as_json)
    if as_json:
        _print_json(asdict(result))


@command
def embed(
    source: Annotated[str, typer.Argument(metavar="INPUT", help="txt (one text a line), jsonl, csv or parquet file; - for stdin.")],
    *,
    output: Annotated[str, typer.Option("--output", "-o", help=".npy, .parquet or .jsonl file; - for JSON lines on stdout.")],
    model: Model = "mini",
    as_json: Json = False,
    loading: LoadOptions,
    refining: RefineOptions,
    reading: FileOptions,
) -> None:
    """Turn the texts of a file into vectors. Without an instruction each text is read bare."""
    from genembed.files import STANDARD_STREAM, VectorRows, read_texts, vector_file

    _check_output(output, as_json=as_json, id_column=reading.id_column)
    with vector_file(output) as write:
        records = list(_with_bar(read_texts(source, **asdict(reading)), "reading"))
        embedder = loading.load(model)
        begin = time.perf_counter()
        with _naming(source, records):
            done = refining.refine(embedder, [record.text for record in records], instruction=None)
        seconds = time.perf_counter() - begin
        write(VectorRows([record.id for record in records], done.vectors, done.steps, done.truncated))
    summary: dict[str, Any] = {
        "output": output,
        "texts": len(records),
        "dimensions": embedder.get_embedding_dimension(),
        "halt": repr(refining.rule(embedder.settings)),
        "mean_steps": float(done.steps.mean()) if records else 0.0,
        "truncated": int(done.truncated.sum()),
        "seconds": seconds,
    }
    cut = f"{summary['truncated']} texts cut at {embedder.settings.max_length} tokens, " if summary["truncated"] else ""
    line = "{output}: {texts} vectors of {dimensions} dimensions, {mean_steps:.2f} steps on average, {cut}{seconds:.1f} s"
    if output != STANDARD_STREAM:
        _print_result(summary, line.format(cut=cut, **summary), as_json=as_json)


@command
def index(
    paths: Annotated[list[str], typer.Argument(metavar="PATH...", help="Files of rows (txt, jsonl, csv, parquet), text files, folders.")],
    *,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the index.")],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the index that is there.")] = False,
    model: Model = "mini",
    as_json: Json = False,
    loading: LoadOptions,
    refining: RefineOptions,
    reading: FileOptions,
) -> None:
    """Embed files and folders into a searchable index.

    A file of rows gives one passage for each row. Folders are searched for .txt, .md and .rst files, which are cut at paragraphs,
    and for .py files, which give one passage for each documented public function, class or method.
    """
    from genembed.index import Index, check_target, read_passages

    check_target(output, overwrite=overwrite)
    passages = list(_with_bar(read_passages(paths, **asdict(reading)), "reading"))
    embedder = loading.load(model)
    built = Index.build(
        output,
        embedder,
        passages,
        instruction=refining.instruction,
        halt=refining.rule(embedder.settings),
        truncate=refining.truncate,
        overwrite=overwrite,
        show_progress_bar=True,
    )
    summary = {"output": str(output), **asdict(built.description)}
    line = "{output}: {rows} passages of {dimensions} dimensions, {steps:.2f} steps on average, {seconds:.1f} s".format(**summary)
    _print_result(summary, line, as_json=as_json)


@command
def search(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of an index.")],
    query: Annotated[str, typer.Argument(help="What to look for.")],
    *,
    k: Annotated[int, typer.Option("--hits", "-k", help="Hits to show.")] = 10,
    model: Annotated[str | None, typer.Option("--model", "-m", help="The model that made the index, if it has moved.")] = None,
    as_json: Json = False,
    loading: LoadOptions,
    refining: RefineOptions,
) -> None:
    """Find the passages of an index that are nearest to a query."""
    from genembed.index import Index

    found_in = Index.open(folder)
    embedder = loading.load(model or found_in.description.model)
    found_in.check(embedder)
    begin = time.perf_counter()
    done = refining.refine(embedder, [query], instruction=embedder.settings.query_instruction)
    hits = found_in.search(done.vectors[0], k=k)
    seconds, steps = time.perf_counter() - begin, int(done.steps[0])
    if as_json:
        _print_json({"query": query, "steps": steps, "seconds": seconds, "hits": [asdict(hit) for hit in hits]})
        return
    for hit in hits:
        typer.echo(f"{hit.score:6.3f}  {hit.reference}\n        {hit.summary}")
    typer.echo(f"{len(hits)} of {len(found_in)} passages, {steps} steps, {1000 * seconds:.0f} ms", err=True)


@command
def info(
    model: Annotated[str, typer.Argument(help="Built-in model (mini), model folder, or hub id.")] = "mini",
    *,
    instruction: Annotated[str, typer.Option(help="Instruction of the second prompt shown.")] = "Find similar texts.",
    as_json: Json = False,
    loading: LoadOptions,
) -> None:
    """Show what a model is, its exact prompt, its steps and halting rule."""
    facts = _facts(loading.load(model), instruction)
    _print_result(facts, "\n".join(f"{name.replace('_', ' '):<24}{_shown(value)}" for name, value in facts.items()), as_json=as_json)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit: 0 done, 2 for what the user can mend, 130 interrupted. A fault of ours keeps its traceback.

    Args:
        arguments: Command-line arguments; those of the process if None.
    """
    # Threads that spin while they wait make everything ten times slower as soon as another process wants their processor.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    sys.exit(_run(sys.argv[1:] if arguments is None else list(arguments)))


def _run(arguments: Sequence[str]) -> int:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("always", GenembedWarning)
            warnings.showwarning = _show_warning
            return typer.main.get_command(app).main(args=arguments or ["--help"], prog_name="genembed", standalone_mode=False) or 0
    except GenembedError as error:
        return _fail(str(error))
    except OSError as error:
        return _fail(f"{error.filename}: {error.strerror}." if error.filename and error.strerror else str(error))
    except Exception as error:
        if not hasattr(error, "format_message"):
            raise
        # A wrong option; the class of the error has moved between versions of typer.
        return _fail(f"{error.format_message()} Given: genembed {shlex.join(arguments)}; see: genembed --help")


def _fail(message: str) -> int:
    typer.echo(f"genembed: {' '.join(message.split())}", err=True)
    return 2


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    typer.echo(f"genembed: warning: {message}", err=True)


@app.callback(invoke_without_command=True)
def _genembed(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        typer.echo(f"genembed {genembed.__version__}")
        raise typer.Exit


@contextmanager
def _naming(source: str, records: Sequence[Any]) -> Iterator[None]:
    """Say which line of which file the row of an error is."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{source}{'' if error.row is None else f', line {records[error.row].line}'}: {error}") from error


def _with_bar(items: Iterable[Item], action: str) -> Iterator[Item]:
    from tqdm import tqdm

    yield from tqdm(items, desc=action, unit="text", delay=1, leave=False)


def _check_output(output: str, *, as_json: bool, id_column: str | None) -> None:
    """Refuse options that would have no effect on this output."""
    if id_column is not None and output.lower().endswith(".npy"):
        raise ConfigurationError(f"--id-column {id_column}: a .npy file holds no ids; write .parquet or .jsonl, or leave the option out.")
    if as_json and output == "-":
        raise ConfigurationError("--json describes a written file, but with -o - the vectors themselves go to stdout, as JSON lines.")


def _print_json(value: Mapping[str, Any]) -> None:
    typer.echo(json.dumps(value, ensure_ascii=False, default=repr))  # a halting rule prints as it is made


def _print_result(value: Mapping[str, Any], text: str, *, as_json: bool) -> None:
    if as_json:
        _print_json(value)
    else:
        typer.echo(text)


def _facts(embedder: genembed.Embedder, instruction: str) -> dict[str, Any]:
    """Return what a user may want to know about a model; texts in the prompts are the word TEXT."""
    settings, backbone, source = embedder.settings, embedder.backbone, embedder.source
    return {
        "model": source.name,
        "base": str(source.base),
        "adapter": None if source.adapter is None else str(source.adapter),
        "parameters": sum(weight.numel() for weight in backbone.model.parameters()),
        "adapter_parameters": _adapter_parameters(source.adapter),
        "head_parameters": sum(weight.numel() for weight in backbone.trained_head.parameters()) if backbone.trained_head else 0,
        "dimensions": embedder.get_embedding_dimension(),
        "dtype": str(backbone.dtype).removeprefix("torch."),
        "device": str(backbone.device),
        "packing": backbone.packable,
        **{field.name: getattr(settings, field.name) for field in fields(settings)},
        "prompt": embedder.first_prompt("TEXT"),
        "prompt_with_instruction": embedder.first_prompt("TEXT", instruction=instruction),
    }


def _adapter_parameters(adapter: Path | None) -> int:
    from math import prod

    from safetensors import safe_open

    if adapter is None:
        return 0
    with safe_open(adapter / "adapter_model.safetensors", framework="numpy") as file:
        return sum(prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118  (not a mapping)


def _shown(value: object) -> str:
    """Show a fact on one line: strings of several lines and with blanks at their ends in quotes."""
    if value is None or isinstance(value, bool):
        return {None: "none", True: "yes", False: "no"}[value]
    if isinstance(value, (int, float)):
        return f"{value:,}"
    if not isinstance(value, str):
        return repr(value)
    return repr(value) if value != value.strip() or not value.isprintable() else value

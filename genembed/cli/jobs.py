"""Whole corpora: `genembed job embed`, `run`, `status`, `verify` and `plan`."""

from __future__ import annotations

import signal
import time
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from genembed.cli.options import Json, RefineOptions, command
from genembed.cli.output import print_result
from genembed.errors import ConfigurationError, JobError

if TYPE_CHECKING:
    from genembed.jobs.model import ModelFactory
    from genembed.jobs.run import Corpus
    from genembed.jobs.status import Status

app = typer.Typer(
    help="Embed whole corpora into shards of vectors: killed jobs go on, no row is lost or written twice.",
    rich_markup_mode=None,
)


Folder = Annotated[Path, typer.Argument(metavar="OUT", help="Folder of the job.")]
Prometheus = Annotated[Path | None, typer.Option(help="Also write the figures to this file, for Prometheus' node exporter (.prom).")]


@dataclass(frozen=True, kw_only=True)
class CorpusOptions:
    """What is read, and how it is cut."""

    columns: Annotated[str, typer.Option(help="Columns of id and text, as in id,text; with one alone, rows are numbered from 0.")] = "text"
    file_format: Annotated[
        str | None, typer.Option("--format", help="Of all files, where their names do not tell: jsonl, csv, parquet, txt.")
    ] = None
    shard_rows: Annotated[int, typer.Option(help="Rows in one output file; what a killed worker has to do again.")] = 65_536

    def corpus(self, inputs: list[str]) -> Corpus:
        """Return the corpus of these inputs."""
        from genembed.jobs.run import Corpus

        names = [name.strip() for name in self.columns.split(",")]
        if len(names) > 2 or not all(names):
            raise ConfigurationError(f"--columns {self.columns}: give the text's column, or those of id and text, as in id,text.")
        return Corpus(
            inputs=inputs,
            text_column=names[-1],
            id_column=names[0] if len(names) == 2 else None,
            file_format=self.file_format,
            shard_rows=self.shard_rows,
        )


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """Which model embeds the corpus."""

    model: Annotated[str, typer.Option("--model", "-m", help="Built-in model (mini), model folder, or hub id.")] = "mini"
    adapter: Annotated[str | None, typer.Option(help="LoRA adapter (folder or hub id) over the model.")] = None
    preset: Annotated[str | None, typer.Option(help="How the model makes an embedding, where its folder does not say.")] = None
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps; with several workers, GPUs are taken in turn.")] = "auto"
    weights: Annotated[str, typer.Option(help="Number type of the weights: auto, float32, bfloat16, float16.")] = "auto"
    offline: Annotated[bool, typer.Option("--offline", help="Never touch the network for the model.")] = False


@dataclass(frozen=True, kw_only=True)
class OutputOptions:
    """What is written."""

    output: Annotated[Literal["parquet", "lance"], typer.Option(help="Parquet shards, or a Lance dataset made of them at the end.")] = (
        "parquet"
    )
    dtype: Annotated[Literal["float32", "float16", "int8"], typer.Option(help="Numbers of the vectors.")] = "float32"
    dims: Annotated[int | None, typer.Option(help="Leading dimensions that are kept, where the model was trained for it.")] = None
    max_rejects: Annotated[int, typer.Option(help="Rows that may fail before the job stops.")] = 1_000


@dataclass(frozen=True, kw_only=True)
class PoolOptions:
    """Who does it."""

    engine: Annotated[Literal["local", "ray"], typer.Option(help="Processes of this machine, or actors of a Ray cluster.")] = "local"
    workers: Annotated[int, typer.Option(help="Processes or actors, each with the model in its memory.")] = 1
    address: Annotated[str | None, typer.Option(help="Of a Ray cluster, or auto; without it one is started here.")] = None
    num_cpus: Annotated[float | None, typer.Option(help="Processors of a Ray actor.")] = None
    num_gpus: Annotated[float | None, typer.Option(help="GPUs of a Ray actor; may be a part of one.")] = None

    def __post_init__(self) -> None:
        """Refuse options that would have no effect."""
        if self.engine == "ray":
            return
        for name in ("address", "num_cpus", "num_gpus"):
            if getattr(self, name) is not None:
                raise ConfigurationError(f"--{name.replace('_', '-')} {getattr(self, name)}: is for --engine ray.")


@dataclass(frozen=True, kw_only=True)
class WatchOptions:
    """How it goes on, and what is told of it."""

    resume: Annotated[bool, typer.Option(help="Go on with the job that is in the folder; otherwise one that is there is refused.")] = True
    prometheus: Prometheus = None
    as_json: Json = False


@app.command("embed")
@command
def embed(
    inputs: Annotated[list[str], typer.Argument(metavar="INPUT...", help="Files, folders, patterns, or URLs such as s3://bucket/rows.")],
    *,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the job; the same one again goes on where it stopped.")],
    choosing: ModelOptions,
    refining: RefineOptions,
    reading: CorpusOptions,
    writing: OutputOptions,
    pool: PoolOptions,
    watching: WatchOptions,
) -> None:
    """Embed a corpus. The same command again goes on where it was stopped or killed."""
    _run_job(inputs, out, choosing, refining, reading, writing, pool, watching)


@app.command("run")
@command
def run(
    spec: Annotated[Path, typer.Argument(metavar="SPEC", help="TOML file with the options of `job embed`: inputs = [...], out = ...")],
    *,
    watching: WatchOptions,
) -> None:
    """Embed a corpus as a file says."""
    values = _read_spec(spec)
    inputs = values.pop("inputs", None)
    if not (isinstance(inputs, list) and inputs and all(isinstance(one, str) for one in inputs) and "out" in values):
        raise ConfigurationError(f'{spec}: needs inputs = ["rows.jsonl"] and out = "vectors".')
    arguments = [*inputs, *chain.from_iterable(_argument(name, value) for name, value in values.items())]
    try:
        given = typer.main.get_command(app).commands["embed"].make_context("embed", arguments)  # type: ignore[attr-defined]
    except Exception as error:
        if not hasattr(error, "format_message"):
            raise
        # A wrong option; the class of the error has moved between versions of typer.
        raise ConfigurationError(f"{spec}: {error.format_message()}") from error
    embed(**{**given.params, **asdict(watching)})


def _argument(name: str, value: object) -> list[str]:
    """Return an option as the command line has it; what is false is left out."""
    option = f"--{name.replace('_', '-')}"
    if isinstance(value, bool):
        return [option] if value else []
    return [option, str(value)]


def _read_spec(path: Path) -> dict[str, Any]:
    import tomllib

    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigurationError(f"{path}: cannot be read: {error.strerror or error}.") from error
    except ValueError as error:
        raise ConfigurationError(f"{path}: not TOML: {error}") from error
    return values


def _run_job(
    inputs: list[str],
    out: Path,
    choosing: ModelOptions,
    refining: RefineOptions,
    reading: CorpusOptions,
    writing: OutputOptions,
    pool: PoolOptions,
    watching: WatchOptions,
) -> None:
    from genembed.jobs.folder import Description, JobFolder
    from genembed.jobs.run import prepare, run_local
    from genembed.jobs.status import Progress

    begin = time.perf_counter()
    factory = _factory(choosing, refining, writing)
    folder = JobFolder(out)
    description = Description(identity=factory.identity(), origin=factory.origin(), max_rejects=writing.max_rejects, output=writing.output)
    signal.signal(signal.SIGTERM, _terminated)  # or workers would outlive a job that is asked to stop
    plan = prepare(folder, reading.corpus(inputs), description, resume=watching.resume, show_progress_bar=True)
    with Progress(folder, plan, prometheus=None if watching.prometheus is None else str(watching.prometheus)):
        if pool.engine == "ray":
            from genembed.jobs.cluster import run_on_ray

            options = {name: value for name, value in asdict(pool).items() if name != "engine"}
            manifest = run_on_ray(folder, plan, factory, **options)
        else:
            manifest = run_local(folder, factory, workers=pool.workers)
    summary = {name: manifest[name] for name in ("rows", "rejects", "truncated", "tokens", "mean_steps")}
    value = {"out": str(out), **summary, "shards": len(manifest["shards"]), "seconds": time.perf_counter() - begin}
    rejected = f", {value['rejects']} rows rejected: {folder.rejects}" if value["rejects"] else ""
    cut = f", {value['truncated']:,} texts cut at the model's length" if value["truncated"] else ""
    line = f"{out}: {value['rows']:,} rows in {value['shards']} shards, {value['mean_steps']:.2f} steps on average{cut}{rejected}, "
    print_result(value, line + f"{value['seconds']:.1f} s", as_json=watching.as_json)


def _terminated(*_: object) -> None:
    raise SystemExit(143)


def _factory(choosing: ModelOptions, refining: RefineOptions, writing: OutputOptions) -> ModelFactory:
    from genembed import source
    from genembed.jobs.model import ModelFactory

    chosen = any(value is not None for value in (refining.steps, refining.threshold, refining.halt))
    found = source.resolve(choosing.model, adapter=choosing.adapter, preset=choosing.preset, offline=choosing.offline)
    return ModelFactory(
        **asdict(choosing),
        instruction=refining.instruction,
        halt=refining.rule(found.settings) if chosen else None,
        truncate=refining.truncate,
        dtype=writing.dtype,
        dims=writing.dims,
    )


@app.command("status")
@command
def status(out: Folder, *, prometheus: Prometheus = None, as_json: Json = False) -> None:
    """Show how far a job is, whoever is working in it."""
    from genembed.jobs.folder import JobFolder
    from genembed.jobs.status import Watch

    folder = JobFolder(out)
    folder.read_description()
    now = Watch(folder).status()
    if prometheus is not None:
        from genembed.jobs.metrics import write_metrics

        write_metrics(str(prometheus), now)
    print_result({**asdict(now), "seconds_left": now.seconds_left}, "\n".join(_lines(now)), as_json=as_json)


def _lines(now: Status) -> list[str]:
    share = 100 * (now.done + now.in_work) / now.rows
    state = "complete" if now.complete else f"{now.workers} workers at it" if now.workers else "stopped; the same command goes on"
    lines = [
        f"state         {state}",
        f"rows          {now.done:,} safe, {now.in_work:,} in work, of {now.rows:,} ({share:.1f} %)",
        f"shards        {now.shards_done:,} of {now.shards:,}",
        f"rejects       {now.rejects:,}",
        f"truncated     {now.truncated:,}",
        f"mean steps    {now.mean_steps:.2f}",
    ]
    if now.rows_per_second:
        lines.append(f"rate          {now.rows_per_second:,.1f} rows/s, {now.tokens_per_second:,.0f} tokens/s")
    if now.seconds_left:
        lines.append(f"time left     {_duration(now.seconds_left)}")
    return lines


def _duration(seconds: float) -> str:
    hours, rest = divmod(round(seconds), 3600)
    return f"{hours:,} h {rest // 60:02d} min" if hours else f"{rest // 60} min {rest % 60:02d} s"


@app.command("verify")
@command
def verify(out: Folder) -> None:
    """Read every file of a job and compare it with what was written."""
    from genembed.jobs.folder import JobFolder
    from genembed.jobs.manifest import damage

    found = list(damage(JobFolder(out), show_progress_bar=True))
    if found:
        raise JobError(
            f"{out}: {'; '.join(found)}. Delete the receipts of these shards in {out / 'receipts'}, and {out / 'manifest.json'}, and "
            "the job's command makes them again."
        )
    typer.echo(f"{out}: every file is what was written.")


@app.command("plan")
@command
def plan(
    *,
    docs: Annotated[float, typer.Option(help="Documents, as in 1e9.")],
    tokens: Annotated[int, typer.Option(help="Tokens of a document.")] = 128,
    model: Annotated[str, typer.Option("--model", "-m", help="Model, or a folder with a config.json alone.")] = "mini",
    steps: Annotated[int, typer.Option(help="Refinement steps of a document.")] = 20,
    device: Annotated[str | None, typer.Option(help="h200, h100, a100, l40s or l4: the rate is counted from its data sheet.")] = None,
    efficiency: Annotated[float | None, typer.Option(help="Share of the device's peak that is assumed; 0.5 if not given.")] = None,
    rate: Annotated[float | None, typer.Option(help="Measured documents per second of one device, instead of a counted one.")] = None,
    devices: Annotated[int, typer.Option(help="Devices that work at the same time.")] = 1,
    price: Annotated[float | None, typer.Option(help="Of a device for an hour.")] = None,
    dtype: Annotated[Literal["float32", "float16", "int8"], typer.Option(help="Numbers of the vectors.")] = "float32",
    dims: Annotated[int | None, typer.Option(help="Dimensions of a vector; the model's if not given.")] = None,
    shard_rows: Annotated[int, typer.Option(help="Rows in one output file.")] = 65_536,
    as_json: Json = False,
) -> None:
    """Say what a job will take: hours, bytes, shards and money."""
    from genembed.cli.costing import model_shape
    from genembed.cost import Cost
    from genembed.jobs.forecast import EFFICIENCY, Forecast, counted_rate

    if (device is None) == (rate is None):
        raise ConfigurationError("give --device, and the rate is counted, or --rate with one that was measured.")
    if rate is not None and efficiency is not None:
        raise ConfigurationError(f"--efficiency {efficiency}: a measured --rate has its own.")
    shape = model_shape(model)
    assumed = EFFICIENCY if efficiency is None else efficiency
    counted = rate if device is None else counted_rate(Cost(shape=shape, tokens=tokens, steps=steps), device, efficiency=assumed)
    forecast = Forecast(
        documents=_whole(docs),
        dimensions=shape.hidden if dims is None else dims,
        value_bytes={"float32": 4, "float16": 2, "int8": 1}[dtype],
        shard_rows=shard_rows,
        documents_per_second=counted or 0.0,
        assumed=f"measured: {rate:,.1f} documents/s" if device is None else f"{assumed:.0%} of the peak of one {device}",
        devices=devices,
        price=price,
    )
    names = ("documents_per_second", "device_hours", "hours", "bytes", "shards", "cost")
    value = {**asdict(forecast), **{name: getattr(forecast, name) for name in names}}
    print_result(value, "\n".join(_forecast_lines(forecast)), as_json=as_json)


def _whole(docs: float) -> int:
    if docs < 1 or docs != int(docs):
        raise ConfigurationError(f"--docs {docs}: a number of documents is whole, and at least 1.")
    return int(docs)


def _forecast_lines(forecast: Any) -> list[str]:
    lines = [
        f"rate          {forecast.documents_per_second:,.0f} documents/s a device ({forecast.assumed})",
        f"device hours  {forecast.device_hours:,.1f}",
        f"time          {forecast.hours:,.1f} h on {forecast.devices} {'device' if forecast.devices == 1 else 'devices'}",
        f"output        {forecast.bytes / 1e9:,.1f} GB in {forecast.shards:,} shards",
    ]
    return lines if forecast.cost is None else [*lines, f"price         {forecast.cost:,.2f}"]

"""Texts by meaning: `genembed index`, `genembed search`, and `genembed demo`, which does both."""

from __future__ import annotations

import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from genembed.cli.options import FileOptions, Json, LoadOptions, Model, RefineOptions, command
from genembed.cli.output import print_json, print_result, printable, with_bar
from genembed.errors import ConfigurationError

if TYPE_CHECKING:
    import genembed
    from genembed.index import Hit, Index
    from genembed.index.known import KnownVectors
    from genembed.precision import OutputForm

_RANK = "rank"
"""Says for `--halt` that the index decides, and no file."""


@dataclass(frozen=True, kw_only=True)
class ChangeOptions:
    """What is done to an index that is there."""

    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the index that is there.")] = False
    update: Annotated[bool, typer.Option("--update", help="Add to the index that is there; only new texts are embedded.")] = False
    prune: Annotated[
        bool, typer.Option("--prune", help="With --update: remove passages of the named files and folders that are no longer in them.")
    ] = False
    delete: Annotated[
        str | None, typer.Option(metavar="FILTER", help="Instead of adding: remove the passages that meet a condition, as in --where.")
    ] = None

    def __post_init__(self) -> None:
        """Refuse options that contradict one another."""
        given = [f"--{name}" for name in ("overwrite", "update") if getattr(self, name)] + ["--delete"] * (self.delete is not None)
        if len(given) > 1:
            raise ConfigurationError(f"{' and '.join(given)} contradict each other; give one of them.")
        if self.prune and not self.update:
            raise ConfigurationError("--prune: says what an update does with old passages; give --update with it.")


@dataclass(frozen=True, kw_only=True)
class KeepOptions:
    """The form an index keeps its vectors in."""

    precision: Annotated[
        Literal["float32", "float16", "int8", "binary"] | None,
        typer.Option(
            help="Numbers that are kept of the vectors; float32 if not given. int8 needs the model's ranges (genembed calibrate-ranges)."
        ),
    ] = None
    dims: Annotated[int | None, typer.Option(help="Keep so many leading dimensions, of those the model was trained for.")] = None

    def form(self, embedder: genembed.Embedder | KnownVectors) -> OutputForm | None:
        """Return the form, refused before any text is embedded if the model cannot give it; None without an option."""
        return None if self == KeepOptions() else embedder.form(self.precision or "float32", self.dims)

    def check(self, index: Index) -> None:
        """Refuse another form than that of an index that is there."""
        kept = index.description.stored
        for name, given, own in (
            ("precision", self.precision, kept.precision),
            ("dims", self.dims, kept.dimensions or index.description.dimensions),
        ):
            if given not in (None, own):
                raise ConfigurationError(f"--{name} {given}: {index.folder} keeps {own}; leave it out, or build the index again.")


@dataclass(frozen=True, kw_only=True)
class FindOptions:
    """How an index is searched."""

    where: Annotated[
        str | None,
        typer.Option(metavar="FILTER", help="Search only passages that meet a condition of SQL: \"kind = 'md' AND year > 2020\"."),
    ] = None
    hybrid: Annotated[bool, typer.Option("--hybrid", help="Join the hits by meaning and by words (BM25), by their ranks.")] = False
    lexical: Annotated[bool, typer.Option("--lexical", help="Search by words alone (BM25); no model is loaded.")] = False
    exact: Annotated[bool, typer.Option("--exact", help="Compare every vector, also where there is an approximate index.")] = False
    patience: Annotated[
        int | None, typer.Option(help="With --halt rank: steps in a row that must not change the first ten hits; 2 if not given.")
    ] = None

    def __post_init__(self) -> None:
        """Refuse options that contradict one another."""
        if self.lexical and (self.hybrid or self.exact or self.patience is not None):
            raise ConfigurationError("--lexical: compares no vectors, so --hybrid, --exact and --patience say nothing; leave them out.")

    def find(self, index: Index, vector: Any, query: str, k: int) -> list[Hit]:
        """Search an index for a query, whose vector is needed unless only its words are."""
        if self.lexical:
            return index.search_lexical(query, k=k, where=self.where)
        if self.hybrid:
            return index.search_hybrid(vector, query, k=k, where=self.where, exact=self.exact)
        return index.search(vector, k=k, where=self.where, exact=self.exact)

    def rule(self, index: Index, refining: RefineOptions, settings: genembed.ModelSettings) -> genembed.HaltingRule:
        """Return the halting rule of the query; `--halt rank` searches the index after every step."""
        if refining.halt != _RANK:
            if self.patience is not None:
                raise ConfigurationError(f"--patience {self.patience}: belongs to --halt rank; give it with that.")
            return refining.rule(settings)
        from genembed.index.rank_stop import RankStop

        if not settings.halt.max_steps:
            raise ConfigurationError(f"--halt rank has no effect on a model that does {settings.halt}; leave it out.")
        return RankStop(
            index=index,
            patience=2 if self.patience is None else self.patience,
            max_steps=settings.halt.max_steps,
            where=self.where,
            exact=self.exact,
        )


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
        print_json(asdict(result))


@command
def index(
    paths: Annotated[
        list[str] | None,
        typer.Argument(metavar="PATH...", help="Files of rows (txt, jsonl, csv, parquet), - for stdin, text files, folders."),
    ] = None,
    *,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the index.")],
    model: Annotated[
        str | None,
        typer.Option("--model", "-m", help="Built-in model, model folder, or hub id; mini if not given, or what made the index."),
    ] = None,
    metadata: Annotated[
        list[str] | None, typer.Option(metavar="COLUMN", help="Column of files of rows to keep for --where; may be given several times.")
    ] = None,
    ann: Annotated[
        bool, typer.Option("--ann", help="Make an approximate index of the vectors too, for very many texts; its recall is measured.")
    ] = False,
    from_shards: Annotated[
        Path | None, typer.Option(metavar="JOB", help="Instead of embedding: take texts and vectors of a finished `genembed job`.")
    ] = None,
    as_json: Json = False,
    changing: ChangeOptions,
    keeping: KeepOptions,
    loading: LoadOptions,
    refining: RefineOptions,
    reading: FileOptions,
) -> None:
    """Embed files and folders into a searchable index, add to one, or remove from one.

    A file of rows gives one passage for each row. Folders are searched for text files and web pages, which are cut at paragraphs, for
    source code, which is cut between blocks, and for .py files, which give one passage for each documented public function, class or
    method.
    """
    from genembed.index import Index, check_target, read_passages

    os.environ.setdefault("LANCE_INCLUDE_VECTOR_CENTROIDS", "false")  # else LanceDB warns of statistics that nobody has asked for
    if changing.delete is not None:
        options = (keeping, loading, refining, reading) != (KeepOptions(), LoadOptions(), RefineOptions(), FileOptions())
        _delete(output, changing.delete, unused=bool(paths or model or metadata or ann or options), as_json=as_json)
        return
    if from_shards is not None:
        options = (loading, refining, reading) != (LoadOptions(), RefineOptions(), FileOptions())
        _merge(output, from_shards, changing, keeping, ann=ann, unused=bool(paths or model or metadata or options), as_json=as_json)
        return
    if not paths:
        raise ConfigurationError("there is nothing to index: name files or folders, or - for stdin.")
    if changing.update:
        _update(output, paths, model, metadata or [], changing, keeping, loading, refining, reading, ann=ann, as_json=as_json)
        return
    check_target(output, overwrite=changing.overwrite)
    passages = list(with_bar(read_passages(paths, **asdict(reading), metadata=metadata or []), "reading"))
    embedder = loading.load(model or "mini")
    built = Index.build(
        output,
        embedder,
        passages,
        instruction=refining.instruction,
        halt=refining.rule(embedder.settings),
        truncate=refining.truncate,
        ann=ann,
        form=keeping.form(embedder),
        overwrite=changing.overwrite,
        show_progress_bar=True,
    )
    made = built.description
    line = f"{output}: {_kept(built)}, {made.steps:.2f} steps on average, {made.seconds:.1f} s"
    print_result(_summary(output, built), line + _recall(built), as_json=as_json)


def _merge(output: Path, job: Path, changing: ChangeOptions, keeping: KeepOptions, *, ann: bool, unused: bool, as_json: bool) -> None:
    """Put the rows of a finished job into an index, new or there."""
    from genembed.cli.merging import read_shards
    from genembed.halting import rule_from_json
    from genembed.index import Index, check_target

    if unused or changing.prune:
        raise ConfigurationError(f"--from-shards {job}: nothing is read or embedded but the job's rows; leave paths and other options out.")
    if not changing.update:
        check_target(output, overwrite=changing.overwrite)
    passages, known, description = read_shards(job)
    rule, instruction = rule_from_json(description.origin["halt"]), description.identity["instruction"]
    if changing.update:
        merged = Index.open(output)
        keeping.check(merged)
        if merged.description.instruction != instruction:
            made = merged.description.instruction
            raise ConfigurationError(f"{job}: its texts were embedded under {instruction!r}, and those of {output} under {made!r}.")
        done = merged.update(known, passages, halt=rule, ann=ann)
        line = f"{done.embedded} passages added, {done.unchanged} there before, {len(merged)} now"
    else:
        form = keeping.form(known)
        merged = Index.build(output, known, passages, instruction=instruction, halt=rule, ann=ann, form=form, overwrite=changing.overwrite)
        line = _kept(merged)
    print_result(_summary(output, merged), f"{output}: {line}" + _recall(merged), as_json=as_json)


def _delete(output: Path, where: str, *, unused: bool, as_json: bool) -> None:
    from genembed.index import Index

    if unused:
        raise ConfigurationError(
            f"--delete {where}: removes passages, and neither reads nor embeds any; leave paths and other options out."
        )
    changed = Index.open(output)
    removed = changed.delete(where)
    summary = {"output": str(output), "removed": removed, "rows": len(changed)}
    print_result(summary, f"{output}: {removed} passages removed, {len(changed)} left", as_json=as_json)


def _update(
    output: Path,
    paths: list[str],
    model: str | None,
    metadata: list[str],
    changing: ChangeOptions,
    keeping: KeepOptions,
    loading: LoadOptions,
    refining: RefineOptions,
    reading: FileOptions,
    *,
    ann: bool,
    as_json: bool,
) -> None:
    from genembed.index import Index, read_passages

    changed = Index.open(output)
    keeping.check(changed)
    made = changed.description
    if metadata and set(metadata) != set(made.metadata):
        known = " ".join(made.metadata) or "none"
        raise ConfigurationError(f"--metadata {' '.join(metadata)}: {output} keeps other columns ({known}); name those, or build it again.")
    if refining.instruction is not None and refining.instruction != made.instruction:
        raise ConfigurationError(
            f"--instruction {refining.instruction!r}: the texts of {output} were embedded under {made.instruction!r}; leave it out."
        )
    unread: list[str] = []
    passages = list(with_bar(read_passages(paths, **asdict(reading), metadata=metadata, unread=unread), "reading"))
    embedder = loading.load(model or made.model, adapter=made.adapter, preset=made.model_settings)
    done = changed.update(
        embedder,
        passages,
        prune=paths if changing.prune else (),
        unread=unread,
        halt=refining.rule(embedder.settings),
        truncate=refining.truncate,
        ann=ann,
        show_progress_bar=True,
    )
    summary = {**asdict(done), **_summary(output, changed)}
    line = "{output}: {embedded} passages embedded, {copied} copied, {moved} moved, {removed} removed, {unchanged} as they were; {rows} now"
    print_result(summary, line.format(**summary) + _recall(changed), as_json=as_json)


def _summary(output: Path, index: Index) -> dict[str, Any]:
    """Return what `--json` says of an index: its description without the bounds of every dimension."""
    kept = index.description.stored
    form = {"precision": kept.precision, "dimensions": kept.dimensions or index.description.dimensions}
    return {"output": str(output), **asdict(index.description), "stored": form}


def _kept(index: Index) -> str:
    kept = index.description.stored
    numbers = "" if kept.precision == "float32" else f" in {kept.precision}"
    return f"{len(index)} passages of {kept.dimensions or index.description.dimensions} dimensions{numbers}"


def _recall(index: Index) -> str:
    made = index.description.approximation
    return "" if made is None else f"; approximate index {made.kind}, recall@{made.neighbours} {made.recall:.3f} of {made.queries} queries"


@command
def search(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of an index.")],
    query: Annotated[str, typer.Argument(help="What to look for.")],
    *,
    k: Annotated[int, typer.Option("--hits", "-k", help="Hits to show.")] = 10,
    finding: FindOptions,
    model: Annotated[
        str | None,
        typer.Option("--model", "-m", help="The model that made the index, if it has moved; how it was loaded, the index knows."),
    ] = None,
    as_json: Json = False,
    loading: LoadOptions,
    refining: RefineOptions,
) -> None:
    """Find the passages of an index that are nearest to a query.

    With --halt rank the index is searched after every step of the query, which stops when its first ten hits no longer change.
    """
    from genembed.index import Index

    found_in = Index.open(folder)
    if finding.lexical and (model, loading, refining) != (None, LoadOptions(), RefineOptions()):
        raise ConfigurationError("--lexical: loads no model, so options of a model and of its steps say nothing; leave them out.")
    vector, steps, begin = None, 0, time.perf_counter()
    if not finding.lexical:
        made = found_in.description
        embedder = loading.load(model or made.model, adapter=made.adapter, preset=made.model_settings)
        found_in.check(embedder)
        rule = finding.rule(found_in, refining, embedder.settings)
        instruction = embedder.settings.query_instruction if refining.instruction is None else refining.instruction
        begin = time.perf_counter()
        done = embedder.refine([query], instruction=instruction, halt=rule, truncate=refining.truncate, show_progress_bar=True)
        vector, steps = done.vectors[0], int(done.steps[0])
    hits = finding.find(found_in, vector, query, k)
    seconds = time.perf_counter() - begin
    if as_json:
        print_json({"query": query, "steps": steps, "seconds": seconds, "hits": [asdict(hit) for hit in hits]})
        return
    for hit in hits:
        typer.echo(printable(f"{hit.score:6.3f}  {hit.reference}\n        {hit.summary}"))
    typer.echo(f"{len(hits)} of {len(found_in)} passages, {steps} steps, {1000 * seconds:.0f} ms", err=True)

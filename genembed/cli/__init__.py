"""The command `genembed`: one sub-command for each verb. Imports inside the functions, so that `--help` waits for nothing."""

from __future__ import annotations

import os
import shlex
import sys
import warnings
from collections.abc import Sequence
from typing import Annotated, Any

import genembed
from genembed.errors import GenembedError, GenembedWarning, missing_extra

try:
    import typer
except ModuleNotFoundError:  # the console script imports this module before anything could catch an error
    sys.stderr.write(f"genembed: {missing_extra('cli', 'typer')}\n")
    raise SystemExit(2) from None

from genembed.cli.analysing import analyse
from genembed.cli.calibrating import calibrate
from genembed.cli.converting import calibrate_ranges, convert
from genembed.cli.costing import cost
from genembed.cli.embedding import embed, info
from genembed.cli.evaluating import evaluate
from genembed.cli.jobs import app as jobs
from genembed.cli.mining import mine
from genembed.cli.output import printable
from genembed.cli.searching import demo, index, search
from genembed.cli.serving import serve
from genembed.cli.speaking import tokens
from genembed.cli.training import train

app = typer.Typer(
    help="Generative text embeddings: a language model refines a text's vector step by step, and stops when it is stable.",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

for verb in (demo, embed, index, search, serve, info, mine, train, calibrate, calibrate_ranges, convert, analyse, evaluate, tokens, cost):
    app.command()(verb)
app.add_typer(jobs, name="job")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit: 0 done, 2 for what the user can mend, 130 interrupted. A fault of ours keeps its traceback.

    Args:
        arguments: Command-line arguments; those of the process if None.
    """
    given = sys.argv[1:] if arguments is None else list(arguments)
    if given[:1] != ["serve"]:
        # Threads that spin while they wait halve the speed as soon as another process wants their processor. A server has its
        # processors to itself, and there those that sleep double the time of a single text.
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    sys.exit(_run(given))


def _run(arguments: Sequence[str]) -> int:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("always", GenembedWarning)
            warnings.showwarning = _show_warning
            shown = [*arguments, "--help"] if list(arguments) in ([], ["job"]) else arguments
            return typer.main.get_command(app).main(args=shown, prog_name="genembed", standalone_mode=False) or 0
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
    typer.echo(f"genembed: {printable(' '.join(message.split()))}", err=True)
    return 2


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    typer.echo(f"genembed: warning: {printable(str(message))}", err=True)


@app.callback(invoke_without_command=True)
def _genembed(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        typer.echo(f"genembed {genembed.__version__}")
        raise typer.Exit

"""The command tree."""

import faulthandler
import os
import sys
from contextlib import suppress
from importlib.metadata import version
from typing import Annotated

import typer

from conveyor_client.cli import _bench, _generate, _models, _run, _sessions, _top, _watch

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",  # which fills paragraphs; the others keep the source's line ends
    pretty_exceptions_enable=False,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"conveyor {version('conveyor')}")
        raise typer.Exit


@app.callback()
def _options(
    show_version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    """Talks to a Conveyor server. CONVEYOR_TARGET and the like stand in for the options."""


app.command("generate")(_generate.generate)
app.command("run")(_run.run_rows)
app.add_typer(_models.app, name="models")
app.add_typer(_sessions.app, name="sessions")
app.command("watch")(_watch.watch)
app.command("top")(_top.top)
app.command("bench")(_bench.bench)


def main() -> None:
    """Runs the command line."""
    with suppress(OSError, AttributeError):  # there is no standard error stream
        _part_from_grpc()
    app()


def _part_from_grpc() -> None:
    """Keeps what gRPC writes to descriptor 2 by itself, of TLS above all, off the terminal."""
    if "GRPC_VERBOSITY" in os.environ or faulthandler.is_enabled():
        return  # somebody wants to see it
    ours = os.dup(sys.stderr.fileno())
    sys.stderr = os.fdopen(ours, "w", buffering=1, errors="backslashreplace")
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    os.close(nowhere)

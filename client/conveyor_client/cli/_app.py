"""The command tree."""

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
    """Talks to a Conveyor server. CONVEYOR_TARGET and CONVEYOR_TOKEN stand in for the options."""


app.command("generate")(_generate.generate)
app.command("run")(_run.run_rows)
app.add_typer(_models.app, name="models")
app.add_typer(_sessions.app, name="sessions")
app.command("watch")(_watch.watch)
app.command("top")(_top.top)
app.command("bench")(_bench.bench)


def main() -> None:
    """Runs the command line."""
    app()

"""``conveyor run``: rows of a CSV file through a model, predictions out as CSV."""

import csv
import sys
from collections.abc import AsyncGenerator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Annotated, TextIO

import numpy as np
import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from conveyor_client._client import Client
from conveyor_client._errors import ConveyorError
from conveyor_client._nouns import FloatArray, ModelInfo
from conveyor_client._rows import input_names
from conveyor_client._session import Session
from conveyor_client.cli._columns import Rows, find_columns
from conveyor_client.cli._common import (
    fail,
    say,
)
from conveyor_client.cli._connection import Connection, connecting
from conveyor_client.cli._memory import MemoryFile, memory_from
from conveyor_client.cli._source import RowsRefused, Source

_FILE_CHUNK_STEPS = 64


@connecting
def run_rows(
    connection: Connection,
    model: Annotated[str, typer.Argument(help="The model.")],
    source: Annotated[str, typer.Argument(metavar="FILE", help="CSV; - is the input.")] = "-",
    *,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Else stdout.")] = None,
    session: Annotated[
        str, typer.Option(help="Go on with this session, and leave it open for the next time.")
    ] = "",
    chunk: Annotated[
        int, typer.Option(min=0, help="Steps sent together; 0: 64 from a file, else 1.")
    ] = 0,
    memory: MemoryFile = None,
) -> None:
    """Runs rows through a model.

    The columns are exactly the model's inputs in order, or, if the first line names them, in any
    order and among others.
    """

    async def act() -> None:
        rows = memory_from(memory)
        chunk_steps = chunk or (1 if source == "-" else _FILE_CHUNK_STEPS)
        try:
            with ExitStack() as stack:
                lines = stack.enter_context(Source(source))
                out = _open_output(stack, output)
                async with connection.client() as client:
                    made = client.session(model, session_id=session or None, memory=rows)
                    await _run(client, made, lines, out, chunk_steps, stays=session != "")
        except RowsRefused as error:
            fail(str(error))

    connection.run(act)


def _open_output(stack: ExitStack, output: Path | None) -> TextIO:
    if output is None:
        return sys.stdout
    return stack.enter_context(output.open("w", newline="", encoding="utf-8"))


async def _run(
    client: Client, session: Session, lines: Source, out: TextIO, chunk_steps: int, *, stays: bool
) -> None:
    await session.open()
    try:
        await _stream(session, lines, out, chunk_steps)
    except BaseException:
        with suppress(ConveyorError):  # the error under way says more
            await (session.detach() if stays else session.close())
        raise
    if not stays:
        await session.close()
        return
    await session.open()  # raises why it was lost, if it was
    await session.detach()
    # What is there to go on with, not what should be.
    info = await client.get_session(session.session_id)
    say(f"session {info.session_id} is at step {info.applied_step}")


async def _stream(session: Session, lines: Source, out: TextIO, chunk_steps: int) -> None:
    model = session.model
    chunk_steps = min(chunk_steps, model.limits.chunk_steps_max or chunk_steps)
    header = _names(model)
    with _progress(out) as progress:
        task = progress.add_task(model.name, total=None)
        async for outputs in session.stream(_chunks(lines, model, chunk_steps)):
            _write_header(out, header)
            header = []
            _write(out, outputs)
            progress.update(task, advance=len(outputs))
        _write_header(out, header)
        progress.update(task, total=progress.tasks[0].completed)


def _progress(out: TextIO) -> Progress:
    """A bar where it is seen and does not get in the way of the rows."""
    return Progress(
        BarColumn(),
        TextColumn("{task.description}: {task.completed} rows"),
        TimeElapsedColumn(),
        console=Console(stderr=True),
        disable=not sys.stderr.isatty() or out.isatty(),
    )


def _write_header(out: TextIO, header: list[str]) -> None:
    if header:
        csv.writer(out, lineterminator="\n").writerow(header)
        out.flush()


def _write(out: TextIO, outputs: FloatArray) -> None:
    np.savetxt(out, outputs, fmt="%.9g", delimiter=",")  # nine digits hold a float32 exactly
    out.flush()


def _names(model: ModelInfo) -> list[str]:
    named = model.output.labels
    return list(named) or [f"output_{n}" for n in range(model.output.row_elements)]


async def _chunks(lines: Source, model: ModelInfo, chunk_steps: int) -> AsyncGenerator[Rows]:
    first = await lines.take(1)
    if not first:
        return
    columns = find_columns(first[0], model)
    pending = [] if columns.is_header else first
    if columns.is_header and not input_names(model):
        names = ", ".join(first[0].fields)
        say(f"{model.name} has no labels for its inputs: columns are taken in their order, {names}")
    while pending := pending + await lines.take(chunk_steps - len(pending)):
        yield columns.rows(pending)
        pending = []

"""``conveyor watch``: the gates of a session as they move, and pictures of them."""

import re
import sys
import time
from collections.abc import AsyncGenerator, Callable, Generator
from contextlib import (
    AsyncExitStack,
    asynccontextmanager,
    contextmanager,
    suppress,
)
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.console import Console
from rich.live import Live

from conveyor.install import install_command
from conveyor.os_errors import os_error_text
from conveyor_client._client import Client
from conveyor_client._errors import ConveyorError, InvalidInput, ModelNotFound, SessionNotFound
from conveyor_client._nouns import ModelInfo, TraceMode
from conveyor_client._session import Session
from conveyor_client.cli._common import (
    fail,
    say,
)
from conveyor_client.cli._connection import Connection, connecting
from conveyor_client.cli._feeding import Feed, FeedRefused, Lines, Pace, Text
from conveyor_client.cli._gates_lines import LEGEND, line_of
from conveyor_client.cli._gates_view import GatesView
from conveyor_client.cli._memory import MemoryFile, memory_from
from conveyor_client.cli._recording import Recording, Seen
from conveyor_client.cli._source import RowsRefused, Source

_LIVE_STEPS_PER_SECOND = 8.0
_PROMPTED_STEPS = 100
_REFRESH_SECONDS_MIN = 0.05


@dataclass(frozen=True, slots=True)
class _Inputs:
    """What was asked for to feed the session with."""

    csv: str
    text: str
    prompt: str
    temperature: float
    seed: int

    def feed(self, model: ModelInfo, stack: AsyncExitStack) -> Feed:
        """Opens it for a model."""
        if self.text:
            return Text(model, self.text)
        if self.prompt:
            return Text(
                model, self.prompt, goes_on=True, temperature=self.temperature, seed=self.seed
            )
        return Lines(model, stack.enter_context(Source(self.csv)))


@connecting
def watch(
    connection: Connection,
    name: Annotated[
        str, typer.Argument(metavar="MODEL|SESSION", help="A model, or the id of a session.")
    ],
    *,
    csv: Annotated[str, typer.Option(metavar="FILE", help="Feed rows; - is the input.")] = "-",
    text: Annotated[str, typer.Option(help="Feed this text, letter by letter.")] = "",
    prompt: Annotated[
        str, typer.Option(help="Feed this text, and then what the model makes of it.")
    ] = "",
    temperature: Annotated[
        float, typer.Option(min=0.0, help="With --prompt; 0: always the likeliest.")
    ] = 0.8,
    seed: Annotated[int, typer.Option(min=0, help="With --prompt.")] = 0,
    memory: MemoryFile = None,
    session: Annotated[
        bool, typer.Option("--session", help="It is a session's id, whatever models there are.")
    ] = False,
    steps: Annotated[
        int, typer.Option(min=0, help="At most so many; 0: all, with --prompt 100.")
    ] = 0,
    rate: Annotated[
        float | None,
        typer.Option(min=0.0, help="Steps a second; 0: no limit. 8 in a terminal, else 0."),
    ] = None,
    summary: Annotated[
        bool, typer.Option("--summary", help="Ask for statistics, not for every unit: cheap.")
    ] = False,
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="Write a page.")] = None,
    png: Annotated[Path | None, typer.Option(metavar="FILE", help="Write a picture.")] = None,
    grid: Annotated[
        str,
        typer.Option(
            metavar="LINESxCOLUMNS",
            help="The memory's rows are patches of an image: draw where it looks as one.",
        ),
    ] = "",
) -> None:
    """Draws the gates of a model as it reads.

    A model is watched in a session made for it, which ends with the command.

    **Watching a session means driving it.** A session has one owner, and its steps are the ones its
    owner sends. `watch SESSION` takes the session over from whoever holds it, feeds it the rows or
    the text given here, and leaves it open, moved on by these steps. To look without touching,
    watch a copy: `conveyor sessions fork SESSION --id COPY` and `conveyor watch COPY`.

    Without a terminal it prints a line for each step. `--html` and `--png` draw the newest steps,
    up to 4096, when the input ends or Ctrl-C ends the command; they need the extra `plot`.
    """
    if (text != "") + (prompt != "") + (csv != "-") > 1:
        fail("give only one of --csv, --text and --prompt")
    shape = _grid(grid)
    write = _pictures(html, png, shape)
    inputs = _Inputs(csv, text, prompt, temperature, seed)
    limit = steps or (_PROMPTED_STEPS if prompt else 0)
    console = Console(highlight=False)
    live = console.is_terminal and not console.is_dumb_terminal
    pace = Pace((_LIVE_STEPS_PER_SECOND if live else 0.0) if rate is None else rate)
    watched: list[_Watched] = []

    async def act() -> None:
        try:
            async with AsyncExitStack() as stack:
                client = await stack.enter_async_context(connection.client())
                opened = await stack.enter_async_context(_open(client, name, session, memory))
                await _check_grid(opened, shape)
                feed = inputs.feed(opened.model, stack)
                watched.append(_Watched(opened, Recording(opened.model)))
                show = stack.enter_context((_drawn if live else _printed)(watched[0], console))
                mode: TraceMode = "summary" if summary else "full"
                await _drive(watched[0], feed, pace, mode, limit, show)
        except (RowsRefused, FeedRefused) as error:
            fail(str(error))

    try:
        connection.run(act)
    finally:
        if watched and len(watched[0].recording):
            write(watched[0])


@dataclass(frozen=True, slots=True)
class _Watched:
    """A session and what it did."""

    session: Session
    recording: Recording

    @property
    def title(self) -> str:
        """What is drawn, in a line."""
        model = self.session.model
        return f"{model.name} {model.version}, session {self.session.session_id}"


@asynccontextmanager
async def _open(
    client: Client, name: str, is_session: bool, memory: Path | None
) -> AsyncGenerator[Session]:
    """Opens a session of the model, to be ended, or the session of that id, to be left open."""
    no_model = ""
    if not is_session:
        try:
            await client.model(name)
        except (ModelNotFound, InvalidInput) as error:  # the latter: no name of a model
            is_session, no_model = True, f": {error}"
    if not is_session:
        async with client.session(name, memory=memory_from(memory)) as session:
            yield session
        return
    if memory is not None:
        fail(f"--memory: session {name} has its memory since it was opened; leave the flag out")
    session = client.resume(name)
    try:
        await session.open()
    except SessionNotFound as error:
        if error.reason == "SESSION_NOT_FOUND":
            fail(f"no model and no session of yours is called {name}{no_model}")
        raise
    try:
        yield session
    except BaseException:
        with suppress(ConveyorError):  # the error under way says more
            await session.detach()
        raise
    await session.detach()
    say(f"session {name} is at step {session.applied_step}")


def _grid(text: str) -> tuple[int, int] | None:
    if not text:
        return None
    found = re.fullmatch(r"([1-9][0-9]{0,3})x([1-9][0-9]{0,3})", text)
    if found is None:
        fail(f"--grid {text}: expected lines and columns, such as 4x4")
    return int(found[1]), int(found[2])


async def _check_grid(session: Session, grid: tuple[int, int] | None) -> None:
    if grid is None:
        return
    rows = (await session.info()).memory_rows
    if grid[0] * grid[1] != rows:
        fail(f"--grid {grid[0]}x{grid[1]} is {grid[0] * grid[1]} cells; the memory has {rows} rows")


async def _drive(
    watched: _Watched,
    feed: Feed,
    pace: Pace,
    mode: TraceMode,
    limit: int,
    show: Callable[[], None],
) -> None:
    """Steps the session with what the feed gives, one step at a time."""
    output = None
    while not limit or watched.recording.seen < limit:
        row = await feed.next(output)
        if row is None:
            return
        await pace.wait()
        output, trace = await watched.session.step_with_trace(row, mode=mode)
        watched.recording.add(Seen(np.asarray(row), output, trace))
        show()


# --- showing -------------------------------------------------------------------------------------


@contextmanager
def _drawn(watched: _Watched, console: Console) -> Generator[Callable[[], None]]:
    """A view that is drawn anew with the steps, a bounded number of times in a second."""
    with Live(
        GatesView(watched.recording, watched.title), console=console, auto_refresh=False
    ) as live:
        drawn_at = 0.0

        def show() -> None:
            nonlocal drawn_at
            now = time.monotonic()
            if now - drawn_at >= _REFRESH_SECONDS_MIN:
                drawn_at = now
                live.refresh()

        yield show


@contextmanager
def _printed(watched: _Watched, console: Console) -> Generator[Callable[[], None]]:
    """A line for each step."""
    sys.stdout.write(f"# {watched.title}\n{LEGEND}\n")

    def show() -> None:
        sys.stdout.write(line_of(watched.recording) + "\n")
        sys.stdout.flush()

    yield show


def _pictures(
    html: Path | None, png: Path | None, grid: tuple[int, int] | None
) -> Callable[[_Watched], None]:
    """Makes what writes the pictures that were asked for; fails now if that cannot be."""
    if html is None and png is None:
        return lambda watched: None
    for file in filter(None, (html, png)):
        if not file.parent.is_dir():
            fail(f"cannot write {file}: there is no folder {file.parent}")
    try:
        from conveyor_client.cli import _gates_page, _gates_picture
    except ImportError as error:
        if (error.name or "").partition(".")[0] != "matplotlib":
            raise
        fail(f"pictures need matplotlib: {install_command('plot')}")

    def write(watched: _Watched) -> None:
        span = watched.recording.whole()
        try:
            if png is not None:
                png.write_bytes(_gates_picture.png(span, watched.title, grid))
                say(f"wrote {png}")
            if html is not None:
                html.write_text(_gates_page.page(span, watched.title, grid), encoding="utf-8")
                say(f"wrote {html}")
        except OSError as error:
            fail(os_error_text(error))

    return write

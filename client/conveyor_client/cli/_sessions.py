"""``conveyor sessions``: the caller's own sessions."""

import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from conveyor_client._errors import ConveyorError
from conveyor_client._nouns import SessionInfo
from conveyor_client.cli._common import (
    AsJson,
    complain,
    details_table,
    fail,
    list_table,
    print_json,
    remaining_text,
    say,
    show,
    size_text,
)
from conveyor_client.cli._connection import Connection, connecting

app = typer.Typer(help="Looks at your sessions and manages them.", no_args_is_help=True)

Id = Annotated[str, typer.Argument(metavar="SESSION", help="The session's id.")]


@app.command("list")
@connecting
def list_sessions(
    connection: Connection,
    model: Annotated[str, typer.Option(help="Only sessions of this model.")] = "",
    as_json: AsJson = False,
) -> None:
    """Lists your sessions."""

    async def act() -> None:
        async with connection.client() as client:
            sessions = [session async for session in client.sessions(model=model)]
        _show(sessions, as_json)

    connection.run(act)


@app.command("show")
@connecting
def show_session(
    connection: Connection,
    session: Id,
    as_json: AsJson = False,
) -> None:
    """Describes one session."""

    async def act() -> None:
        async with connection.client() as client:
            info = await client.get_session(session)
        if as_json:
            print_json(info)
        else:
            show(_details(info))

    connection.run(act)


@app.command("close")
@connecting
def close_sessions(
    connection: Connection,
    sessions: Annotated[list[str], typer.Argument(metavar="SESSION...")],
) -> None:
    """Ends sessions and frees their state; one that cannot be ended does not stop the others."""

    async def act() -> None:
        async with connection.client() as client:
            failed = False
            for session in sessions:
                try:
                    info = await client.close_session(session)
                except ConveyorError as error:
                    complain(f"{session}: {error.reason}: {error}")
                    failed = True
                else:
                    say(f"closed {info.session_id} at step {info.applied_step}")
        if failed:
            raise typer.Exit(1)

    connection.run(act)


@app.command("reset")
@connecting
def reset_session(
    connection: Connection,
    session: Id,
) -> None:
    """Sets a session back to its initial state and step 1."""

    async def act() -> None:
        async with connection.client() as client:
            info = await client.reset_session(session)
            say(f"reset {info.session_id}")

    connection.run(act)


@app.command("fork")
@connecting
def fork_session(
    connection: Connection,
    session: Id,
    count: Annotated[
        int | None, typer.Option(min=1, help="How many copies; else one, or one for each --id.")
    ] = None,
    new_ids: Annotated[
        list[str] | None, typer.Option("--id", help="The id of a copy; may be repeated.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Copies a session, carry and position."""

    async def act() -> None:
        async with connection.client() as client:
            _show(await client.fork_session(session, new_ids or count or 1), as_json)

    if count and new_ids and count != len(new_ids):
        fail(f"--count {count} does not fit {len(new_ids)} times --id; leave one of them out")
    connection.run(act)


@app.command("export")
@connecting
def export_session(
    connection: Connection,
    session: Id,
    file: Annotated[Path, typer.Argument(help="Where to; - is the standard output.")],
) -> None:
    """Writes a portable snapshot; the session lives on."""

    async def act() -> None:
        async with connection.client() as client:
            snapshot = await client.export_session(session)
        if str(file) == "-":
            sys.stdout.buffer.write(snapshot)
        else:
            file.write_bytes(snapshot)
        say(f"exported {session}: {size_text(len(snapshot))}")

    connection.run(act)


@app.command("import")
@connecting
def import_session(
    connection: Connection,
    file: Annotated[Path, typer.Argument(help="A snapshot; - is the standard input.")],
    new_id: Annotated[str, typer.Option("--id", help="The id; else the snapshot's own.")] = "",
    as_json: AsJson = False,
) -> None:
    """Makes a session from a snapshot."""

    async def act() -> None:
        snapshot = sys.stdin.buffer.read() if str(file) == "-" else file.read_bytes()
        async with connection.client() as client:
            made = await client.import_session(snapshot, session_id=new_id)
            _show([await made.info()], as_json)

    connection.run(act)


def _show(sessions: list[SessionInfo], as_json: bool) -> None:
    if as_json:
        print_json(sessions)
        return
    if not sessions:
        say("no sessions")
        return
    table = list_table(
        *("session", "model", "state", "tier", "step", "durable", "size", "expires"),
        whole=("model", "state", "tier", "step", "durable", "size", "expires"),
        folded=("session",),
    )
    now = datetime.now(UTC)
    for info in sessions:
        table.add_row(
            Text(info.session_id),
            f"{info.model} {info.version}",
            info.state,
            info.tier,
            str(info.applied_step),
            str(info.durable_step),
            size_text(info.state_bytes),
            remaining_text((info.expire_time - now).total_seconds()) if info.expire_time else "",
        )
    show(table)


def _details(info: SessionInfo) -> Table:
    rows: dict[str, str] = {}
    for name in info.__dataclass_fields__:
        value = getattr(info, name)
        if name == "labels":
            value = ", ".join(f"{key}={text}" for key, text in info.labels.items())
        elif isinstance(value, datetime):
            value = f"{value:%Y-%m-%d %H:%M:%S} UTC"
        elif value is None:
            value = "none"
        rows[name.replace("_", " ")] = str(value)
    return details_table(rows)

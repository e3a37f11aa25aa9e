"""What every command shares: how to connect, how to run, how to print, how to fail."""

import asyncio
import dataclasses
import json
import os
import sys
from collections.abc import Callable, Coroutine, Mapping, Sequence
from datetime import datetime
from typing import Annotated, Any, NoReturn

import typer
from rich import box
from rich.console import Console, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from conveyor.os_errors import os_error_text
from conveyor_client._errors import ConveyorError

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]

_FILE_WIDTH_COLUMNS = 160


def run(
    act: Callable[[], Coroutine[Any, Any, None]],
    explain: Callable[[ConveyorError], str] = lambda _: "",
) -> None:
    """Runs a command's coroutine; what goes wrong is one line and an exit status.

    Args:
        act: Makes the coroutine.
        explain: Says more of an error than its text, or nothing.
    """
    try:
        asyncio.run(act())
    except ConveyorError as error:
        fail(f"{error.reason}: {explain(error) or error}")
    except KeyboardInterrupt:
        raise typer.Exit(130) from None
    except BrokenPipeError:  # whoever read our output has seen enough
        sys.stderr.close()
        raise typer.Exit(0) from None
    except OSError as error:
        fail(os_error_text(error))


def fail(message: str) -> NoReturn:
    """Prints one line and ends the command with status 1."""
    complain(message)
    raise typer.Exit(1)


def complain(message: str) -> None:
    """Prints one line about what went wrong; the command goes on."""
    errors = Console(stderr=True, highlight=False, soft_wrap=True)
    errors.print(f"[red]error:[/red] {escape(message)}")


def say(message: str) -> None:
    """Prints a line for people, on the standard error stream."""
    Console(stderr=True, highlight=False, soft_wrap=True).print(escape(message))


def show(table: RenderableType) -> None:
    """Prints a table: as wide as COLUMNS or the terminal says, or wide enough for a file."""
    known = sys.stdout.isatty() or "COLUMNS" in os.environ
    Console(width=None if known else _FILE_WIDTH_COLUMNS, highlight=False).print(table)


def list_table(*names: str, whole: Sequence[str] = (), folded: Sequence[str] = ()) -> Table:
    """Makes an empty table with a header, narrow enough for 80 columns.

    Args:
        names: The columns.
        whole: Those that never wrap.
        folded: Those that wrap anywhere, so that ids are not cut; the rest wraps between words.

    Returns:
        The table.
    """
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True, show_edge=False)
    for name in names:
        fold = name in folded
        table.add_column(name, no_wrap=name in whole, overflow="fold", min_width=16 if fold else 1)
    return table


def details_table(rows: Mapping[str, str]) -> Table:
    """Makes a table of names and values; nothing in it is cut."""
    table = Table(box=box.SIMPLE, show_header=False, pad_edge=False, show_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows.items():
        table.add_row(name, Text(value))
    return table


def print_json(value: object) -> None:
    """Prints a value, dataclasses and times included, as JSON."""
    sys.stdout.write(json.dumps(value, default=_plain, indent=2, ensure_ascii=False) + "\n")


def _plain(value: object) -> object:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, datetime):
        return value.isoformat()
    return dict(value)  # type: ignore[call-overload]


def size_text(size_bytes: float) -> str:
    """Writes a number of bytes the way people read it."""
    for unit in ("B", "KiB", "MiB"):
        if size_bytes < 1024:
            return f"{size_bytes:.0f} {unit}" if unit == "B" else f"{size_bytes:.1f} {unit}"
        size_bytes /= 1024
    return f"{size_bytes:.1f} GiB"


def remaining_text(seconds: float) -> str:
    """Writes how long it is until something happens, in the unit that people would use."""
    if seconds < 1:
        return "now"
    for unit, unit_seconds in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * unit_seconds:
            return f"in {seconds / unit_seconds:.0f} {unit}"
    return f"in {seconds:.0f} s"

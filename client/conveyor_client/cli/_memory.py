"""What a session attends over, read from a file."""

import csv
import io
from pathlib import Path
from typing import Annotated

import numpy as np
import numpy.typing as npt
import typer

from conveyor.os_errors import os_error_text
from conveyor_client.cli._common import fail

MEMORY_FILE_BYTES_MAX = 256 * 1024 * 1024

MemoryFile = Annotated[
    Path | None,
    typer.Option(
        "--memory",
        metavar="FILE",
        help="What a model with attention looks at: .npy, or CSV of numbers, one line for a row.",
    ),
]


class MemoryRefused(Exception):
    """The file holds no memory; the message names it."""


def memory_from(file: Path | None) -> npt.NDArray[np.generic] | None:
    """Reads what the option names; a file that holds no memory ends the command."""
    if file is None:
        return None
    try:
        return read_memory(file)
    except MemoryRefused as error:
        fail(str(error))
    except OSError as error:
        fail(os_error_text(error))


def read_memory(file: Path) -> npt.NDArray[np.generic]:
    """Reads a memory. Whether it is of the right shape, client and server say.

    Args:
        file: An array of NumPy if the name ends in .npy, else CSV in UTF-8; a first line without
            numbers is a header.

    Returns:
        The array as it stands in the file.

    Raises:
        MemoryRefused: It holds nothing of the sort, or too much of it.
        OSError: It cannot be read.
    """
    size = file.stat().st_size
    if size > MEMORY_FILE_BYTES_MAX:
        raise MemoryRefused(
            f"{file}: {size:,} bytes; a memory file may have at most {MEMORY_FILE_BYTES_MAX:,}"
        )
    data = file.read_bytes()
    return _array(file, data) if file.suffix.lower() == ".npy" else _table(file, data)


def _array(file: Path, data: bytes) -> npt.NDArray[np.generic]:
    try:
        loaded = np.lib.format.read_array(io.BytesIO(data), allow_pickle=False)
    except (ValueError, EOFError, OSError, MemoryError) as error:
        raise MemoryRefused(f"{file}: not a whole .npy file of numbers") from error
    return np.asarray(loaded)


def _table(file: Path, data: bytes) -> npt.NDArray[np.generic]:
    try:
        reader = csv.reader(io.StringIO(data.decode("utf-8-sig")))
        lines = [(reader.line_num, fields) for fields in reader if fields]
    except (UnicodeDecodeError, csv.Error) as error:
        raise MemoryRefused(f"{file}: not CSV in UTF-8") from error
    rows: list[list[float]] = []
    for index, (number, fields) in enumerate(lines):
        try:
            rows.append([float(field) for field in fields])
        except ValueError as error:
            if index == 0 and not any(map(_is_number, fields)):
                continue
            wrong = next(field for field in fields if not _is_number(field))
            raise MemoryRefused(f"{file}: line {number}: {wrong!r} is not a number") from error
        if len(rows[-1]) != len(rows[0]):
            raise MemoryRefused(
                f"{file}: line {number}: {len(rows[-1])} numbers; expected {len(rows[0])}, as in"
                " the first row"
            )
    return np.array(rows, dtype=np.float64).reshape(len(rows), -1 if rows else 0)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True

"""Reading files that somebody else has written: regular ones only, of bounded size."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from pathlib import Path

from conveyor.os_errors import os_reason
from conveyor_models.errors import BundleFileError


def read_inside(
    folder: Path, name: str, bytes_max: int, missing: Callable[[], str] = lambda: "missing"
) -> bytes:
    """The content of a file of a folder, after checking that it is one and how large it is.

    Args:
        folder: where it has to be; links are followed while they stay inside.
        name: of the file, relative to the folder.
        bytes_max: what it may hold.
        missing: the sentence for a file that is not there.

    Raises:
        BundleFileError: it is missing, not a regular file, outside the folder, or too large.
    """
    path = folder / name
    try:
        real = path.resolve(strict=True)
        inside = real.is_relative_to(folder.resolve(strict=True))
    except (OSError, RuntimeError, ValueError) as error:  # a loop of links is a RuntimeError
        raise BundleFileError(missing(), path=path, key=name) from error
    if not inside:
        raise BundleFileError("is a link that leaves the bundle's folder", path=path, key=name)
    try:
        with open(real, "rb", opener=_open_at_once) as file:
            found = os.fstat(file.fileno())
            if not stat.S_ISREG(found.st_mode):
                raise BundleFileError("is not a regular file", path=path, key=name)
            if found.st_size > bytes_max:
                raise BundleFileError(
                    f"has {found.st_size} bytes, expected at most {bytes_max}",
                    path=path,
                    key=name,
                )
            data = file.read(found.st_size + 1)  # as much is set aside for it at once
    except OSError as error:
        raise BundleFileError(f"cannot be read: {os_reason(error)}", path=path, key=name) from error
    if len(data) != found.st_size:
        raise BundleFileError("changed while it was being read; try again", path=path, key=name)
    return data


def _open_at_once(path: str, flags: int) -> int:
    """Opens without waiting: a pipe would otherwise wait for somebody to write to it."""
    return os.open(path, flags | os.O_NONBLOCK)

"""Zip files that somebody else has written."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path, PurePosixPath

from conveyor_models.errors import ImportFileError


def checked_entries(path: Path, data: bytes, entries_max: int, bytes_max: int) -> zipfile.ZipFile:
    """Opens a zip whose entries are few, have plain names and come to no more than allowed.

    Args:
        path: of the file, for messages.
        data: its content.
        entries_max: entries it may have.
        bytes_max: what they may come to, unpacked.

    Raises:
        ImportFileError: it is not a zip, or not such a one.
    """
    try:
        archive = zipfile.ZipFile(io.BytesIO(data))
    except (zipfile.BadZipFile, ValueError, OSError, NotImplementedError) as error:
        raise ImportFileError(
            "is not a sound zip: it is cut off or damaged; is the download complete?", path=path
        ) from error
    entries = archive.infolist()
    total = sum(entry.file_size for entry in entries)
    names = [entry.filename for entry in entries]
    said: str | None = None
    if len(entries) > entries_max:
        said = f"{len(entries)} entries, expected at most {entries_max}"
    elif total > bytes_max:
        said = f"unpacks to {total} bytes, expected at most {bytes_max}"
    elif len(set(names)) != len(names):
        said = "has an entry twice"
    else:
        for name in names:
            parts = PurePosixPath(name).parts
            if name.startswith("/") or ".." in parts or "\\" in name or "\0" in name:
                said = f"entry {name[:80]!r} points outside"
    if said is not None:
        archive.close()
        raise ImportFileError(said, path=path)
    return archive


def unpacked(path: Path, archive: zipfile.ZipFile, name: str, bytes_max: int) -> bytes:
    """The content of one entry.

    Raises:
        ImportFileError: it is not there, damaged, or larger than allowed or announced.
    """
    try:
        entry = archive.getinfo(name)
    except KeyError as error:
        raise ImportFileError(f"has no {name}", path=path, key=name) from error
    if entry.file_size > bytes_max:
        raise ImportFileError(
            f"{name}: {entry.file_size} bytes, expected at most {bytes_max}", path=path, key=name
        )
    try:
        with archive.open(entry) as file:
            content = file.read(entry.file_size + 1)
    except Exception as error:  # zlib's, zipfile's, and RuntimeError where it is encrypted
        raise ImportFileError(
            f"{name} is damaged or encrypted; is the download complete?", path=path, key=name
        ) from error
    if len(content) != entry.file_size:
        raise ImportFileError(f"{name}: not of the size announced", path=path, key=name)
    return content

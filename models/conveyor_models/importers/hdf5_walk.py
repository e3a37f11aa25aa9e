"""Reads an HDF5 file from standard input as an importer would, in a process of its own.

HDF5's library is C: on a damaged file it may loop without end or crash, and take the process with
it. `check_hdf5` runs this file as a program, of which only the exit status counts.
"""

from __future__ import annotations

import importlib
import io
import resource
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, Final

CPU_SECONDS_MAX: Final = 3
"""And a second for each `_BYTES_PER_SECOND`; a sound file takes milliseconds."""
WALK_SECONDS_MAX: Final = 300.0
"""Of time that passes, on a machine that has much else to do."""
_BYTES_PER_SECOND: Final = 2**28
_MEMORY_BYTES: Final = 2**31
"""Address space beside four times the file."""
_DAMAGED: Final = 3


def hdf5_problem(data: bytes) -> str | None:
    """Why HDF5's library cannot be trusted with a file; None if it can."""
    if not sys.executable:  # Python is within another program, which has to see to it
        return None
    try:
        done = subprocess.run(  # noqa: S603 - nothing in it is the caller's
            [sys.executable, "-I", str(Path(__file__))],
            input=data,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            timeout=WALK_SECONDS_MAX,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return f"HDF5 takes more than {WALK_SECONDS_MAX:g} s over it: it is damaged"
    if done.returncode == -signal.SIGXCPU:
        return f"HDF5 takes more than {_cpu_seconds(len(data))} s over it: it is damaged"
    if done.returncode < 0:
        return f"HDF5 crashes over it (signal {-done.returncode}): it is damaged"
    return "it is damaged, or takes more memory than it has bytes" if done.returncode else None


def _cpu_seconds(size: int) -> int:
    return CPU_SECONDS_MAX + size // _BYTES_PER_SECOND


def _walk(data: bytes) -> None:
    h5py: Any = importlib.import_module("h5py")  # of the extra `importers`

    def look(_: str, found: Any) -> None:
        for name in found.attrs:
            try:
                found.attrs[name]
            except (OSError, TypeError, ValueError, KeyError, RuntimeError):
                continue  # refused where it is wanted
        if isinstance(found, h5py.Dataset):
            used = found.is_virtual, found.external, found.chunks, found.shape, found.dtype
            del used
            found.id.get_storage_size()

    with h5py.File(io.BytesIO(data), "r") as file:
        look("/", file)
        file.visititems(look)


def _main() -> int:
    data = sys.stdin.buffer.read()
    memory, seconds = _MEMORY_BYTES + 4 * len(data), _cpu_seconds(len(data))
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        _walk(data)
    except ImportError:
        return 0  # told by whoever imports it next
    except Exception:  # noqa: BLE001 - whatever HDF5 stumbles over, the file is at fault
        return _DAMAGED
    return 0


if __name__ == "__main__":
    sys.exit(_main())

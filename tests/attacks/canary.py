"""A file that must not be touched: the kernel tells who opens, reads or changes it."""

from __future__ import annotations

import ctypes
import os
import struct
from pathlib import Path
from typing import Final

_ACCESS, _MODIFY, _OPEN = 0x1, 0x2, 0x20
_NAMES: Final = {_ACCESS: "read", _MODIFY: "changed", _OPEN: "opened"}
_NONBLOCK: Final = 0o4000


class Canary:
    """Watches files from now on (inotify)."""

    def __init__(self, *paths: Path) -> None:
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._descriptor = self._libc.inotify_init1(_NONBLOCK)
        assert self._descriptor >= 0, os.strerror(ctypes.get_errno())
        self._paths: dict[int, Path] = {}
        for path in paths:
            number = self._libc.inotify_add_watch(
                self._descriptor, os.fsencode(path), _ACCESS | _MODIFY | _OPEN
            )
            assert number >= 0, os.strerror(ctypes.get_errno())
            self._paths[number] = path

    def touched(self) -> list[str]:
        """What was done to which since the last time."""
        try:
            events = os.read(self._descriptor, 2**16)
        except BlockingIOError:
            return []
        found: list[str] = []
        while events:
            number, mask, _, length = struct.unpack_from("iIII", events)
            what = [name for bit, name in _NAMES.items() if mask & bit]
            found.append(f"{self._paths[number].name} was {' and '.join(what)}")
            events = events[16 + length :]
        return found

    def close(self) -> None:
        os.close(self._descriptor)

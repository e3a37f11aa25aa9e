"""File descriptors: how many the process may open, and saying so when they run out.

Every connection is one. gRPC takes no more connections than leave `RESERVED` of them to the rest of
the process, so that metrics and reloads go on; what else opens files may still use them up.
"""

import asyncio
import errno
import logging
import os
import resource
from typing import Final

from conveyor_server.metrics import Counter

RESERVED: Final = 128
"""Descriptors for all but connections: a model's files, the metrics endpoint, libraries."""
LOOK_SECONDS: Final = 1.0
TOLD_SECONDS: Final = 60.0
"""How often the log says that descriptors ran out."""
_OUT: Final = frozenset({errno.EMFILE, errno.ENFILE})

_log = logging.getLogger(__name__)


def raise_limit() -> int:
    """Lets the process open as many files as it may, and returns how many."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        except (OSError, ValueError):  # macOS names a limit that it does not grant
            return soft
    return hard if hard != resource.RLIM_INFINITY else 2**31 - 1


def connections_that_fit(wanted: int, descriptors: int) -> int:
    """The connections to take where the process may open so many files."""
    fitting = max(1, descriptors - RESERVED)
    if wanted <= fitting:
        return wanted
    _log.warning(
        "fewer connections are taken than limits.connections_max says: the process may open too"
        " few files; raise ulimit -n, or LimitNOFILE= of systemd",
        extra={"connections": fitting, "connections_max": wanted, "descriptors_max": descriptors},
    )
    return fitting


class DescriptorWatch:
    """Looks again and again whether another file can be opened."""

    def __init__(self, exhausted: Counter) -> None:
        """`exhausted` counts the looks that found none."""
        self._exhausted = exhausted
        self._quiet_until = 0.0

    def start(self) -> None:
        """Looks from now on, on the running loop."""
        self._loop = asyncio.get_running_loop()
        self._timer = self._loop.call_later(LOOK_SECONDS, self._look)

    def stop(self) -> None:
        """Looks no more."""
        self._timer.cancel()

    def _look(self) -> None:
        self._timer = self._loop.call_later(LOOK_SECONDS, self._look)
        try:
            os.close(os.open(os.devnull, os.O_RDONLY))
        except OSError as error:
            if error.errno in _OUT:
                self._tell(error)

    def _tell(self, error: OSError) -> None:
        self._exhausted.add(1)
        if self._loop.time() < self._quiet_until:
            return
        self._quiet_until = self._loop.time() + TOLD_SECONDS
        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        _log.error(
            "file descriptors ran out: no new connection is taken, those there are go on. Raise"
            " ulimit -n, or find who opens so many connections",
            extra={"descriptors_max": soft, "problem": error.strerror},
        )

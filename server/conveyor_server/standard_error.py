"""Standard error that never makes the server wait: a pipe may be full because nobody reads it."""

import io
import os
import select
import stat
import sys
import threading
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Final, TextIO

QUEUE_BYTES_MAX: Final = 2**20
"""Written by the server and not yet taken by standard error."""
DRAIN_SECONDS_MAX: Final = 2.0
"""What a stop waits for a reader that is slow, or gone."""


class StandardError(io.RawIOBase):
    """Takes whatever is written at once; a thread passes it on.

    A regular file has no reader to wait for, so it is written to directly: nothing is lost with the
    process.

    What comes while the queue is full is dropped and counted, until half of the queue is free
    again. Then one line, where the gap is, says how many lines are missing.

    Args:
        descriptor: Where the bytes go.
        notice: Makes the line that says how many lines were dropped.
    """

    def __init__(self, descriptor: int, notice: Callable[[int], bytes]) -> None:
        """Starts the thread."""
        self._descriptor = descriptor
        self._notice = notice
        self._queue: deque[bytes] = deque()
        self._queued_bytes = 0
        self._writing = False
        self._dropped = 0
        """Since the last notice."""
        self._count: Callable[[float], None] = self._forget
        self._changed = threading.Condition()
        self._direct = stat.S_ISREG(os.fstat(descriptor).st_mode)
        # A daemon, for nothing may keep the process: it may be in the middle of a write for ever.
        threading.Thread(target=self._pass_on, name="standard-error", daemon=True).start()

    def count_dropped(self, count: Callable[[float], None]) -> None:
        """Calls `count` with a number of lines whenever lines are dropped, on any thread."""
        with self._changed:
            self._count = count

    def write(self, data: object, /) -> int:
        """Queues bytes, or drops them."""
        line = bytes(data)  # pyright: ignore[reportArgumentType, reportCallIssue]
        with self._changed:
            if self._direct:
                self._write_out(line)
                return len(line)
            room = QUEUE_BYTES_MAX // 2 if self._dropped else QUEUE_BYTES_MAX
            if self._queued_bytes + len(line) > room:
                self._drop(line)
                return len(line)
            self._append_notice()
            self._append(line)
            self._changed.notify_all()
        return len(line)

    def drain(self) -> None:
        """Waits, for a bounded time, until everything was passed on."""
        with self._changed:
            self._changed.wait_for(lambda: not (self._queue or self._writing), DRAIN_SECONDS_MAX)

    def writable(self) -> bool:
        """Always."""
        return True

    def fileno(self) -> int:
        """Of where the bytes go."""
        return self._descriptor

    def isatty(self) -> bool:
        """Whether that is a terminal."""
        return os.isatty(self._descriptor)

    def _append(self, line: bytes) -> None:
        self._queue.append(line)
        self._queued_bytes += len(line)

    def _append_notice(self) -> None:
        if self._dropped:
            self._append(self._notice(self._dropped))
            self._dropped = 0

    def _drop(self, line: bytes) -> None:
        lines = max(1, line.count(b"\n"))
        self._dropped += lines
        self._count(lines)

    def _forget(self, lines: float) -> None:
        """Nobody counts yet."""

    def _pass_on(self) -> None:
        while True:
            with self._changed:
                self._writing = False
                if not self._queue:
                    self._append_notice()
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._queue)
                line = self._queue.popleft()
                self._queued_bytes -= len(line)
                self._writing = True
            self._write_out(line)

    def _write_out(self, line: bytes) -> None:
        try:
            _write_all(self._descriptor, line)
        except OSError:  # nobody can read it any more, or the disk is full
            with self._changed:
                # No notice of this one: it would fail as well, and so on for ever.
                self._count(max(1, line.count(b"\n")))


def _write_all(descriptor: int, data: bytes) -> None:
    while data:
        try:
            data = data[os.write(descriptor, data) :]
        except BlockingIOError:  # whoever shares the pipe made it so
            select.select([], [descriptor], [], 1.0)


def replace_standard_error(notice: Callable[[int], bytes]) -> tuple[TextIO, StandardError]:
    """Makes `sys.stderr`, to which Python writes tracebacks too, one that never waits."""
    descriptor = 2
    if sys.stderr is None:  # closed at the start; the number may be a socket's by now
        descriptor = os.open(os.devnull, os.O_WRONLY)
    else:
        with suppress(OSError):
            sys.stderr.flush()
    raw = StandardError(descriptor, notice)
    stream = io.TextIOWrapper(
        raw,  # pyright: ignore[reportArgumentType]
        encoding="utf-8",
        errors="backslashreplace",
        write_through=True,
    )
    sys.stderr = stream
    return stream, raw

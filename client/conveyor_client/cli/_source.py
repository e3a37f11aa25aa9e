"""Lines of a CSV file or of the standard input, read in a thread of their own."""

import asyncio
import csv
import io
import queue
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self, TextIO, cast

_LINES_WAITING_MAX = 1024
_ENCODING = "utf-8-sig"  # spreadsheets begin a file with a byte order mark


class RowsRefused(Exception):
    """The lines are not rows of the model; the message names the line."""


@dataclass(frozen=True, slots=True)
class Line:
    """One line that is not empty.

    Attributes:
        number: From 1, as an editor counts.
        fields: As they stand.
    """

    number: int
    fields: list[str]


class Source:
    """Hands lines over as they come, a bounded number of them ahead of who takes them.

    The thread is a daemon's, and nobody waits for it: a read of the standard input returns when
    somebody types, and that may be never. Enter it inside a running loop.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        self._loop = asyncio.get_running_loop()
        self._arrived = asyncio.Event()
        self._waiting: queue.Queue[Line | Exception | None] = queue.Queue(_LINES_WAITING_MAX)
        self._left = False

    def __enter__(self) -> Self:
        text = _open(self._path)
        threading.Thread(target=self._read, args=(text,), name="rows", daemon=True).start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._left = True
        while not self._waiting.empty():  # the thread may wait for room
            self._waiting.get_nowait()

    async def take(self, count: int) -> list[Line]:
        """Waits for so many lines; fewer come only at the end, and none after it.

        Raises:
            RowsRefused: What was read is not CSV in UTF-8.
            OSError: It could not be read.
        """
        taken: list[Line] = []
        while len(taken) < count:
            try:
                head = self._waiting.get_nowait()
            except queue.Empty:
                self._arrived.clear()  # it is set in this loop only, so after what set it is here
                await self._arrived.wait()
                continue
            if not isinstance(head, Line):
                self._put(head)  # the end stays the end
                if head is not None and not taken:
                    raise head
                break
            taken.append(head)
        return taken

    def _read(self, text: TextIO) -> None:
        end: Exception | None = RuntimeError("the thread that reads broke off")
        reader = csv.reader(_checked(text))
        try:
            for fields in reader:
                if self._left:
                    break
                if fields:
                    self._put(Line(reader.line_num, fields))
            end = None
        except csv.Error as error:
            end = RowsRefused(f"line {reader.line_num}: {error}")
        except (RowsRefused, OSError) as error:
            end = error
        finally:
            if self._path != "-":
                text.close()
            self._put(end)

    def _put(self, item: Line | Exception | None) -> None:
        self._waiting.put(item)
        if not self._left:
            try:
                self._loop.call_soon_threadsafe(self._arrived.set)
            except RuntimeError:  # the loop is closed: nobody waits any more
                self._left = True


def _open(path: str) -> TextIO:
    """Opens the text; what is not UTF-8 becomes lone surrogates, for `_checked` to find."""
    if path != "-":
        return Path(path).open(newline="", encoding=_ENCODING, errors="surrogateescape")
    try:
        number = sys.stdin.fileno()
    except io.UnsupportedOperation:  # not a file: somebody put a stream of their own there
        stdin = cast("io.TextIOWrapper[io.BufferedReader]", sys.stdin)
        stdin.reconfigure(encoding=_ENCODING, errors="surrogateescape", newline="")
        return stdin
    # Not sys.stdin itself: at exit the interpreter locks that, and a thread that reads holds it.
    return open(number, newline="", encoding=_ENCODING, errors="surrogateescape", closefd=False)


def _checked(text: TextIO) -> Iterator[str]:
    for number, line in enumerate(text, start=1):
        if not line.isascii():
            try:
                line.encode()
            except UnicodeEncodeError:
                raise RowsRefused(f"line {number}: not text in UTF-8") from None
        yield line

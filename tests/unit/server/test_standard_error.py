"""What is written to standard error: passed on in order, or dropped and counted."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path
from typing import Final

from conveyor_server.standard_error import QUEUE_BYTES_MAX, StandardError

LINE: Final = b"x" * 1023 + b"\n"
WAIT_SECONDS_MAX: Final = 30.0


def _notice(lines: int) -> bytes:
    return f"{lines} dropped\n".encode()


def _until(read: object) -> None:
    deadline = time.monotonic() + WAIT_SECONDS_MAX
    while not read():  # type: ignore[operator]
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_lines_arrive_in_order_and_at_once() -> None:
    reader, writer = os.pipe()
    stream = StandardError(writer, _notice)
    lines = [f"line {number}\n".encode() for number in range(1000)]
    for line in lines:
        assert stream.write(line) == len(line)
    stream.drain()
    os.set_blocking(reader, False)
    assert os.read(reader, 2**16) == b"".join(lines)


def test_a_file_has_every_line_as_soon_as_it_is_written(tmp_path: Path) -> None:
    with (tmp_path / "log").open("wb", buffering=0) as file:
        stream = StandardError(file.fileno(), _notice)
        for number in range(1, 1001):
            stream.write(LINE)
            assert (tmp_path / "log").stat().st_size == number * len(LINE)


def test_what_does_not_fit_is_dropped_and_its_place_says_so() -> None:
    reader, writer = os.pipe()
    stream = StandardError(writer, _notice)
    dropped: list[float] = []
    stream.count_dropped(dropped.append)
    count = 2 * QUEUE_BYTES_MAX // len(LINE)
    begun = time.monotonic()
    for _ in range(count):
        stream.write(LINE)
    stream.drain()  # gives up
    assert time.monotonic() - begun < WAIT_SECONDS_MAX
    # What was queued, what the pipe holds, and the line that is being written.
    fits = QUEUE_BYTES_MAX // len(LINE)
    assert fits <= count - sum(dropped) <= fits + 65
    stream.write(LINE)  # still full: it stands in the same gap
    found = bytearray()

    def read() -> None:
        while b"last\n" not in found:
            found.extend(os.read(reader, 2**16))

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    _until(lambda: b"dropped" in found)
    stream.write(b"last\n")
    thread.join(WAIT_SECONDS_MAX)
    lines = bytes(found).splitlines(keepends=True)
    assert lines[:-2] == [LINE] * (count + 1 - int(sum(dropped)))
    assert lines[-2:] == [_notice(int(sum(dropped))), b"last\n"]


def test_a_reader_that_is_gone_is_no_error() -> None:
    reader, writer = os.pipe()
    stream = StandardError(writer, _notice)
    dropped: list[float] = []
    stream.count_dropped(dropped.append)
    os.close(reader)
    stream.write(b"one\ntwo\n")
    stream.write(b"three\n")
    stream.drain()
    assert sum(dropped) == 3


def test_a_pipe_that_somebody_made_nonblocking_loses_nothing() -> None:
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    stream = StandardError(writer, _notice)
    for _ in range(200):
        stream.write(LINE)
    found = b""
    while len(found) < 200 * len(LINE):
        found += os.read(reader, 2**16)
    assert found == 200 * LINE

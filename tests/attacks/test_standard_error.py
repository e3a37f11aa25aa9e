"""Standard error that nobody reads, that is read late, or that is gone."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest

from tests.integration.process import ServerProcess
from tests.integration.wire import Wire, until

SESSIONS: Final = 500
"""Whose ends take more lines than the pipe and the server's queue hold together."""
LABELS: Final = {f"label-{number}": "x" * 256 for number in range(12)}
X: Final = np.zeros((1, 3), np.float32)


class Pipe:
    """A pipe whose end for reading is open. Nobody reads it until somebody does."""

    def __init__(self, path: Path) -> None:
        os.mkfifo(path)
        self.path = path
        self._reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        self._thread = threading.Thread(target=self._read_all, daemon=True)
        self._data = bytearray()

    def begin_to_read(self) -> None:
        os.set_blocking(self._reader, True)
        self._thread.start()

    def _read_all(self) -> None:
        while data := os.read(self._reader, 2**16):
            self._data += data

    def text_at_end(self) -> str:
        """Everything, once nobody can write any more."""
        self._thread.join(30)
        assert not self._thread.is_alive()
        return self._data.decode()

    def lines(self) -> list[dict[str, Any]]:
        """Every whole line so far, each of which has to be JSON."""
        return [json.loads(line) for line in bytes(self._data).split(b"\n")[:-1]]

    def close(self) -> None:
        os.close(self._reader)


@pytest.fixture
def pipe(tmp_path: Path) -> Pipe:
    return Pipe(tmp_path / "standard-error")


Start = Callable[..., ServerProcess]


@pytest.fixture
def start(tmp_path: Path, repository: Path, pipe: Pipe) -> Iterator[Start]:
    """A server whose standard error is the pipe."""
    started: list[ServerProcess] = []

    def begin(before: str = "pass") -> ServerProcess:
        program = (
            f"import os; os.dup2(os.open({str(pipe.path)!r}, os.O_WRONLY), 2);"
            f"{before}; from conveyor_server.cli import main; main()"
        )
        settings = {"shutdown.grace_seconds": 1}
        server = ServerProcess(tmp_path / "server", repository, settings, program=("-c", program))
        started.append(server)
        return server

    yield begin
    for server in started:
        server.kill()


async def _sessions_that_end(wire: Wire, count: int) -> None:
    """Each leaves a line in the log."""

    async def one() -> None:
        opened = await wire.open("tiny", labels=LABELS)
        await wire.step(opened.session.session_id, 1, X)
        await wire.close(opened.session.session_id)

    for _ in range(count // 50):
        async with asyncio.timeout(30):
            await asyncio.gather(*(one() for _ in range(50)))


async def test_calls_go_on_while_nobody_reads_the_log(start: Start, pipe: Pipe) -> None:
    server = start()
    async with Wire(server.address) as wire:
        await _sessions_that_end(wire, SESSIONS)
        dropped = server.metric("conveyor_log_lines_dropped_total")
        assert 0 < dropped < SESSIONS
        pipe.begin_to_read()
        await until(lambda: any("lines" in line for line in pipe.lines()), "a notice")
        await _sessions_that_end(wire, 50)
    assert server.metric("conveyor_log_lines_dropped_total") == dropped
    assert server.stop() == 0
    pipe.text_at_end()
    lines = pipe.lines()
    (notice,) = [line for line in lines if "lines" in line]
    assert notice["lines"] == dropped
    assert (notice["level"], notice["logger"]) == ("warning", "conveyor_server.logs")
    ended = [line for line in lines if line["message"] == "session ended"]
    assert len(ended) == SESSIONS + 50 - dropped
    assert lines[-1]["message"] == "stopped"


async def test_a_log_that_nobody_reads_does_not_keep_the_server(start: Start, pipe: Pipe) -> None:
    server = start()
    async with Wire(server.address) as wire:
        await _sessions_that_end(wire, SESSIONS)
    assert server.stop() == 0
    pipe.close()


def test_nothing_is_lost_of_a_server_that_breaks(start: Start, pipe: Pipe) -> None:
    """A traceback that Python writes itself, through the same queue."""
    server = start("import conveyor_server.app as a; a.App._stop = lambda *_: 1 / 0")
    pipe.begin_to_read()
    server.signal(signal.SIGTERM)
    assert server.wait() == 1
    written = pipe.text_at_end()
    assert '"message": "serving"' in written
    assert written.rstrip().endswith("ZeroDivisionError: division by zero")

"""A server and its terminal: closing the one stops the other, and nothing else does."""

from __future__ import annotations

import asyncio
import os
import pty
import signal
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Final

import pytest

from tests.integration.bundles import TINY, add_model
from tests.integration.process import ServerProcess
from tests.integration.wire import Wire, until

IN_TERMINAL: Final = """
import os, sys
log = os.dup(2)
os.login_tty(os.open("TERMINAL", os.O_RDWR))  # a session of its own, this its terminal
os.dup2(log, 2)
START
"""
DIRECTLY: Final = "from conveyor_server.cli import main; main()"
BELOW_A_SHELL: Final = """
child = os.fork()
if not child:
    from conveyor_server.cli import main; main()
os.waitpid(child, 0)
"""
"""As far as signals go: the first of the session waits for a command in its foreground."""
WITH_NOHUP: Final = """
for descriptor in (0, 1):
    os.dup2(os.open(os.devnull, os.O_RDWR), descriptor)
os.execvp("nohup", ["nohup", sys.executable, "-m", "conveyor_server.cli", *sys.argv[1:]])
"""


class Terminal:
    """A pseudo-terminal: we hold the side of the window."""

    def __init__(self) -> None:
        self._window, self._line = pty.openpty()
        self.name = os.ttyname(self._line)

    def close(self) -> None:
        for descriptor in (self._line, self._window):
            with suppress(OSError):
                os.close(descriptor)


@pytest.fixture
def terminal() -> Iterator[Terminal]:
    opened = Terminal()
    yield opened
    opened.close()


@pytest.fixture
def models(tmp_path: Path) -> Path:
    folder = tmp_path / "models"
    add_model(folder, "tiny", TINY)
    return folder


@pytest.fixture
def start(
    terminal: Terminal, models: Path, tmp_path: Path
) -> Iterator[Callable[..., ServerProcess]]:
    started: list[ServerProcess] = []

    def start_with(how: str) -> ServerProcess:
        code = IN_TERMINAL.replace("TERMINAL", terminal.name).replace("START", how)
        server = ServerProcess(tmp_path / "server", models, {}, program=("-c", code))
        started.append(server)
        return server

    yield start_with
    for server in started:
        with suppress(ProcessLookupError):  # its session's, should a test fail
            os.killpg(server.pid, signal.SIGKILL)
        server.kill()


def messages(server: ServerProcess) -> list[str]:
    return [line["message"] for line in server.log()]


@pytest.mark.parametrize("stderr_too", [False, True])
async def test_closing_the_terminal_stops_the_server(
    start: Callable[..., ServerProcess], terminal: Terminal, stderr_too: bool
) -> None:
    server = start("os.dup2(0, 2);" * stderr_too + DIRECTLY)
    async with Wire(server.address) as wire:
        assert await wire.new_session("tiny")
        terminal.close()
        assert await asyncio.to_thread(server.wait) == 0
    if not stderr_too:
        assert messages(server)[-4:] == [
            "the terminal is gone, the server stops",
            "draining",
            "session ended",
            "stopped",
        ]


async def test_closing_it_stops_what_a_shell_runs_there(
    start: Callable[..., ServerProcess], terminal: Terminal
) -> None:
    server = start(BELOW_A_SHELL)
    terminal.close()
    assert await asyncio.to_thread(server.wait) == -signal.SIGHUP  # the shell
    await until(lambda: "stopped" in messages(server))
    assert not server.problems()


async def test_a_request_to_reload_is_one_with_a_terminal_too(
    start: Callable[..., ServerProcess], terminal: Terminal, models: Path
) -> None:
    server = start(DIRECTLY)
    add_model(models, "second", TINY)
    server.signal(signal.SIGHUP)
    await until(lambda: messages(server).count("model loaded") == 2)
    async with Wire(server.address) as wire:
        assert await wire.new_session("second")
    terminal.close()
    assert await asyncio.to_thread(server.wait) == 0


async def test_under_nohup_it_outlives_the_terminal(
    start: Callable[..., ServerProcess], terminal: Terminal
) -> None:
    server = start(WITH_NOHUP)
    terminal.close()  # the kernel signals at once
    async with Wire(server.address) as wire:
        assert await wire.new_session("tiny")
    assert server.stop() == 0
    assert "the terminal is gone, the server stops" not in messages(server)

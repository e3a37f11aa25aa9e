"""File descriptors run out: it is said once, streams go on, and afterwards all is as before."""

from __future__ import annotations

import os
import resource
from contextlib import ExitStack

import numpy as np

from tests.attacks.attacker import connect, is_closed
from tests.integration.conftest import StartServer
from tests.integration.process import ServerProcess
from tests.integration.wire import Wire, until

RAN_OUT = (
    "file descriptors ran out: no new connection is taken, those there are go on. Raise"
    " ulimit -n, or find who opens so many connections"
)
X = np.zeros((1, 3), np.float32)


def _open_files(server: ServerProcess) -> int:
    return len(os.listdir(f"/proc/{server.pid}/fd"))


def _told(server: ServerProcess) -> list[dict[str, object]]:
    return [line for line in server.log() if line["message"] == RAN_OUT]


async def test_running_out_of_descriptors(start_server: StartServer) -> None:
    server = start_server({"shutdown.grace_seconds": 1}, expected_errors=(RAN_OUT,))
    limits = resource.prlimit(server.pid, resource.RLIMIT_NOFILE)
    async with Wire(server.address) as wire, wire.stream() as stream:
        handle = (await stream.open("tiny")).handle
        with ExitStack() as stack:
            full = _open_files(server) + 2
            resource.prlimit(server.pid, resource.RLIMIT_NOFILE, (full, limits[1]))
            for _ in range(8):
                stack.enter_context(connect(server.address))
            await until(lambda: _told(server))
            await stream.steps(handle, 1, X, 2)
        resource.prlimit(server.pid, resource.RLIMIT_NOFILE, limits)
        assert server.metric("conveyor_descriptors_exhausted_total") >= 1
        await stream.steps(handle, 2, X, 2)
    async with Wire(server.address) as again:
        await again.open("tiny")
    assert len(_told(server)) == 1


FEW = """
import resource
from conveyor_server.cli import main
resource.setrlimit(resource.RLIMIT_NOFILE, (160, 160))
main()
"""


async def test_connections_leave_descriptors_to_the_rest(start_server: StartServer) -> None:
    """Where few files may be opened, connections are refused while others can still be."""
    server = start_server({"shutdown.grace_seconds": 1}, program=("-c", FEW))
    (warning,) = (line for line in server.log() if "connections_max" in line)
    assert (warning["connections"], warning["connections_max"]) == (32, 8192)
    with ExitStack() as stack:
        sockets = [stack.enter_context(connect(server.address)) for _ in range(180)]
        for socket in sockets[40:]:
            assert is_closed(socket)
        assert "conveyor_info" in server.scrape()
        assert not _told(server)

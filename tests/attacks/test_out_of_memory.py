"""Memory that runs out inside calls: they are refused, and the server goes on or ends."""

from __future__ import annotations

import resource
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import numpy as np
import pytest

from conveyor.v1 import session_pb2
from tests.integration.process import ServerProcess
from tests.integration.wire import Refusal, Wire, refused

MIB: Final = 2**20
OUT_OF_MEMORY: Final = Refusal("RESOURCE_EXHAUSTED", "DEVICE_OUT_OF_MEMORY")
ROWS: Final = 3_900
"""Of the model `broad`: 61 MiB of results, in pieces of 256 KiB that become one message."""
ROOM_BYTES: Final = 84 * MIB
"""For the pieces and what else a call needs, but not for the message as well."""


@pytest.fixture
def server(repository: Path, tmp_path: Path) -> Iterator[ServerProcess]:
    settings = {
        "shutdown.grace_seconds": 1,
        "log.level": "warning",
        "limits.principal_results_bytes_max": 1024 * MIB,
        "limits.results_total_bytes_max": 1024 * MIB,
    }
    server = ServerProcess(tmp_path, repository, settings)
    yield server
    server.kill()


@contextmanager
def room_for(server: ServerProcess, more_bytes: int) -> Generator[None]:
    """The server's address space may grow by so much and no more."""
    status = Path(f"/proc/{server.pid}/status").read_text()
    (line,) = (line for line in status.splitlines() if line.startswith("VmSize:"))
    size = int(line.split()[1]) * 1024
    resource.prlimit(server.pid, resource.RLIMIT_AS, (size + more_bytes, resource.RLIM_INFINITY))
    try:
        yield
    finally:
        unlimited = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
        resource.prlimit(server.pid, resource.RLIMIT_AS, unlimited)


async def test_calls_that_memory_does_not_suffice_for_are_refused(server: ServerProcess) -> None:
    large = session_pb2.PredictRequest(model="broad", length=ROWS, rows=bytes(4 * ROWS))
    x = np.zeros((1, 3), np.float32)
    async with Wire(server.address) as wire:
        session_id = await wire.new_session("tiny")
        await wire.step(session_id, 1, x)
        with room_for(server, ROOM_BYTES):
            said = [await refused(wire.sessions.Predict(large)) for _ in range(3)]
        # Native code may not survive it: then the process is gone, and not half of it.
        if any(each.code == "UNAVAILABLE" for each in said):
            assert server.wait() < 0
            return
        assert said == [OUT_OF_MEMORY] * 3
        assert {each.retry_seconds for each in said} == {1.0}
        await wire.step(session_id, 2, x)
        assert (await wire.sessions.Predict(large)).rows_length == ROWS
        assert (await wire.step(session_id, 3, x)).first_step == 3
        assert server.metric("conveyor_inbox_chunks") == 0
        assert server.metric("conveyor_sessions") == 1

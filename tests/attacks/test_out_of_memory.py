"""Memory that runs out inside calls: they are refused, and the server goes on or ends."""

from __future__ import annotations

import asyncio
import resource
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest
from grpc import aio

from conveyor.v1 import session_pb2
from tests.integration.conftest import StartServer
from tests.integration.process import ServerProcess
from tests.integration.wire import Refusal, Wire, refusal_of

MIB: Final = 2**20
OUT_OF_MEMORY: Final = Refusal("RESOURCE_EXHAUSTED", "DEVICE_OUT_OF_MEMORY")
ROWS: Final = 1_500
"""Of the model `broad`: 24 MiB of results."""


@pytest.fixture(scope="module")
def server(start_server: StartServer) -> ServerProcess:
    return start_server(
        {
            "shutdown.grace_seconds": 1,
            "log.level": "warning",
            "limits.principal_results_bytes_max": 1024 * MIB,
            "limits.results_total_bytes_max": 1024 * MIB,
        },
        expected_errors=(
            "out of memory in a call",
            "out of memory in an operation",
            "the engine failed",
        ),
    )


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
        await asyncio.gather(*(wire.sessions.Predict(large) for _ in range(2)))
        with room_for(server, 16 * MIB):
            calls = [wire.sessions.Predict(large) for _ in range(12)]
            outcomes = await asyncio.gather(*calls, return_exceptions=True)
            said = [refusal_of(each) for each in outcomes if isinstance(each, aio.AioRpcError)]
            assert said
            assert set(said) == {OUT_OF_MEMORY}
            assert {each.retry_seconds for each in said} == {1.0}
            await wire.step(session_id, 2, x)
        answers: list[Any] = await asyncio.gather(*(wire.sessions.Predict(large) for _ in range(2)))
        assert {answer.rows_length for answer in answers} == {ROWS}
        assert (await wire.step(session_id, 3, x)).first_step == 3
        assert server.metric("conveyor_inbox_chunks") == 0
        assert server.metric("conveyor_sessions") == 1

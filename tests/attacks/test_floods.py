"""Many calls at once, honest ones and others: nobody loses a call to gRPC's own queue."""

from __future__ import annotations

import asyncio
from typing import Final

import numpy as np
import pytest

from conveyor.v1 import model_pb2
from tests.attacks.attacker import flood_with_resets, resident_bytes
from tests.integration.conftest import StartServer
from tests.integration.process import ServerProcess
from tests.integration.wire import Wire, until

TOKEN: Final = "anna-0123456789abcdef"
CONFIG: Final = f'[auth.tokens]\n"{TOKEN}" = "anna"\n'
MINE: Final = [("authorization", f"Bearer {TOKEN}")]
X: Final = np.zeros((1, 3), np.float32)
BURST_CALLS: Final = 5_000


@pytest.fixture(scope="module")
def server(start_server: StartServer) -> ServerProcess:
    return start_server({"shutdown.grace_seconds": 1}, config=CONFIG)


async def test_a_burst_loses_no_call(server: ServerProcess) -> None:
    async with Wire(server.address) as wire:
        request = model_pb2.ListModelsRequest()
        calls = [wire.models.ListModels(request, metadata=MINE) for _ in range(BURST_CALLS)]
        answers = await asyncio.gather(*calls)
    assert len(answers) == BURST_CALLS


async def test_others_lose_no_call_to_a_flood_of_resets(server: ServerProcess) -> None:
    async with Wire(server.address, MINE) as wire:
        ids = [await wire.new_session("tiny") for _ in range(8)]
        before = resident_bytes(server)
        flood = asyncio.create_task(asyncio.to_thread(flood_with_resets, server.address, 9_600, 3))

        async def step_on(session_id: str) -> None:
            step = 0
            while not flood.done():
                step += 1
                await wire.step(session_id, step, X)

        await asyncio.gather(*map(step_on, ids))
        assert await flood, "the server closed the connection"
        assert resident_bytes(server) - before < 256 * 2**20
        started, handled = "grpc_server_started_total", "grpc_server_handled_total"
        await until(lambda: server.metric(started) == server.metric(handled))

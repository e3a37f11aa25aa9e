"""A server that was stopped goes on as if no time had passed for its sessions."""

from __future__ import annotations

import asyncio
import signal
from typing import Final

import numpy as np
import pytest

from conveyor.v1 import session_pb2
from tests.integration.conftest import StartServer
from tests.integration.process import ServerProcess
from tests.integration.wire import Refusal, Wire, refused, seconds, until

IDLE_SECONDS: Final = 1.0
STOPPED_SECONDS: Final = 3.0
X: Final = np.zeros((1, 3), np.float32)


@pytest.fixture(scope="module")
def server(start_server: StartServer) -> ServerProcess:
    return start_server({"shutdown.grace_seconds": 1, "limits.slow_reader_seconds_max": 2})


async def test_heartbeats_that_lie_in_the_socket_keep_sessions_alive(
    server: ServerProcess,
) -> None:
    async with Wire(server.address) as wire, Wire(server.address) as other:
        streams = [wire.stream() for _ in range(20)]
        entered = [await stream.__aenter__() for stream in streams]
        handles = [
            (await stream.open("tiny", idle_ttl=seconds(IDLE_SECONDS))).handle for stream in entered
        ]
        silent = (await other.open("tiny", idle_ttl=seconds(IDLE_SECONDS))).session.session_id
        server.signal(signal.SIGSTOP)
        try:
            for stream in entered:
                await stream.send(heartbeat=session_pb2.HeartbeatFrame(nonce=7))
            await asyncio.sleep(STOPPED_SECONDS)  # the attack itself
        finally:
            server.signal(signal.SIGCONT)
        for stream, handle in zip(entered, handles, strict=True):
            assert (await stream.next("heartbeat")).nonce == 7
            await stream.steps(handle, 1, X, 2)
        expired = Refusal("NOT_FOUND", "SESSION_EXPIRED")
        await until(lambda: server.metric("conveyor_sessions_ended_total", reason="expired") >= 1)
        assert await refused(other.get(silent)) == expired
        for stream in streams:
            await stream.__aexit__(None, None, None)
    gaps = [each for each in server.log() if each["message"] == "the event loop was not there"]
    assert max(each["seconds"] for each in gaps) > STOPPED_SECONDS - 0.5

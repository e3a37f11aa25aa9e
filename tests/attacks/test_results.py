"""Clients that take no results: what waits for them is bounded, and nobody else notices."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Final

import h2.settings
import numpy as np
import pytest
from google.protobuf.message import Message

from conveyor.v1 import session_pb2
from tests.attacks.attacker import Attacker, framed, resident_bytes
from tests.integration.conftest import StartServer
from tests.integration.process import ServerProcess
from tests.integration.wire import Entry, Refusal, Wire, refused, until

ANNA: Final = "anna-0123456789abcdef"
BERT: Final = "bert-0123456789abcdef"
CONFIG: Final = f'[auth.tokens]\n"{ANNA}" = "anna"\n"{BERT}" = "bert"\n'
AS_ANNA: Final = [("authorization", f"Bearer {ANNA}")]
AS_BERT: Final = [("authorization", f"Bearer {BERT}")]
STREAM: Final = "/conveyor.v1.SessionService/StreamSteps"
STEP: Final = "/conveyor.v1.SessionService/Step"
STREAMS: Final = 100
ROWS: Final = 500
"""Of the model `broad`: 8 MiB of results, as much as one stream may be owed."""
PRINCIPAL_BYTES: Final = 64 * 2**20
X: Final = np.zeros((1, 3), np.float32)
CALLS_LIMIT: Final = Refusal("RESOURCE_EXHAUSTED", "CALLS_LIMIT")


@pytest.fixture(scope="module")
def server(start_server: StartServer) -> ServerProcess:
    return start_server(
        {
            "shutdown.grace_seconds": 1,
            "limits.slow_reader_seconds_max": 3,
            "limits.result_bytes_max": 32 * 2**20,
            "limits.principal_results_bytes_max": PRINCIPAL_BYTES,
        },
        config=CONFIG,
    )


def reads_nothing(address: str) -> Attacker:
    """A client whose windows are closed."""
    attacker = Attacker(address)
    attacker.h2.update_settings({h2.settings.SettingCodes.INITIAL_WINDOW_SIZE: 0})
    attacker.flush()
    return attacker


def send(attacker: Attacker, stream: int, message: Message) -> None:
    """Sends a message on a call when the server's windows have room for it."""
    data = framed(message)
    attacker.read_until(
        lambda: attacker.h2.local_flow_control_window(stream) >= len(data), "there is room"
    )
    attacker.h2.send_data(stream, data)
    attacker.flush()


def open_frame(model: str) -> session_pb2.StreamStepsRequest:
    request = session_pb2.OpenSessionRequest(model=model)
    return session_pb2.StreamStepsRequest(open=session_pb2.OpenFrame(tag=1, session=request))


def steps_frame(first_step: int, length: int, trace: int = 0) -> session_pb2.StreamStepsRequest:
    entry = session_pb2.StepsEntry(
        handle=1,
        first_step=first_step,
        length=length,
        trace=session_pb2.TraceMode.ValueType(trace),
    )
    rows = bytes(4 * length)
    return session_pb2.StreamStepsRequest(steps=session_pb2.StepsFrame(entries=[entry], rows=rows))


async def step_while(wire: Wire, busy: Callable[[], bool]) -> int:
    """Steps one session on a stream, one step at a time; returns how many."""
    done = 0
    async with wire.stream() as stream:
        handle = (await stream.open("tiny")).handle
        while busy():
            done += 1
            await stream.steps(handle, done, X, 2)
    return done


async def test_streams_that_read_nothing_owe_no_more_than_their_principal_may(
    server: ServerProcess,
) -> None:
    async with Wire(server.address, AS_ANNA) as anna, Wire(server.address, AS_BERT) as bert:
        for wire in (anna, bert):
            await wire.new_session("tiny")
        before = most = resident_bytes(server)
        with reads_nothing(server.address) as attacker:
            streams = [
                attacker.call(STREAM, open_frame("broad"), metadata=AS_ANNA, ends=False)
                for _ in range(STREAMS)
            ]
            attacker.flush()
            await until(lambda: server.metric("conveyor_sessions") == STREAMS + 2)
            for stream in streams:
                send(attacker, stream, steps_frame(1, ROWS))
                send(attacker, stream, steps_frame(1 + ROWS, ROWS))

            def attacked() -> bool:
                nonlocal most
                most = max(most, resident_bytes(server))
                return server.metric("conveyor_streams") > 2

            await until(lambda: server.metric("conveyor_results_bytes") > PRINCIPAL_BYTES // 2)
            steps = await asyncio.gather(step_while(anna, attacked), step_while(bert, attacked))
            await until(lambda: server.metric("conveyor_streams") == 0)
        assert min(steps) > 10
        assert server.metric("conveyor_results_bytes") == 0
        assert server.metric("conveyor_rejected_total", reason="SLOW_READER") == STREAMS
        print("growth at worst MiB", (most - before) / 2**20)
        print("afterwards MiB", (resident_bytes(server) - before) / 2**20)
        assert most - before < PRINCIPAL_BYTES + 96 * 2**20
        await until(lambda: resident_bytes(server) - before < 64 * 2**20)

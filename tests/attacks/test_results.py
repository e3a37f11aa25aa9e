"""Clients that take no results: what waits for them is bounded, and nobody else notices."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final

import h2.settings
import numpy as np
import pytest
from google.protobuf.message import Message

from conveyor.v1 import session_pb2
from tests.attacks.attacker import Attacker, framed, resident_bytes
from tests.integration.conftest import StartServer
from tests.integration.process import ServerProcess
from tests.integration.wire import NONE, Refusal, Wire, refused, until

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
            "limits.slow_reader_seconds_max": 1,
            "limits.result_bytes_max": 32 * 2**20,
            "limits.principal_results_bytes_max": PRINCIPAL_BYTES,
        },
        config=CONFIG,
        # gRPC's own, when a client goes with a response on its way.
        expected_errors=(f"ExecuteBatchError raised in core by servicer method [{STEP}]",),
    )


def reads_nothing(address: str, window: int = 1024) -> Attacker:
    """A client that takes so much on each call: 1 KiB is for the frame that a session is open."""
    attacker = Attacker(address)
    attacker.h2.update_settings({h2.settings.SettingCodes.INITIAL_WINDOW_SIZE: window})
    attacker.flush()
    return attacker


def send(attacker: Attacker, stream: int, message: Message) -> None:
    """Sends a message on a call when the server's windows have room for it."""
    data = framed(message)
    while data:
        attacker.read_until(
            lambda: attacker.h2.local_flow_control_window(stream) > 0, "there is room"
        )
        room = attacker.h2.local_flow_control_window(stream)
        size = min(len(data), room, attacker.h2.max_outbound_frame_size)
        attacker.h2.send_data(stream, data[:size])
        attacker.flush()
        data = data[size:]


def open_frame(model: str) -> session_pb2.StreamStepsRequest:
    request = session_pb2.OpenSessionRequest(model=model)
    return session_pb2.StreamStepsRequest(open=session_pb2.OpenFrame(tag=1, session=request))


def steps_frame(
    first_step: int, length: int, row_bytes: int = 4, trace: int = 0
) -> session_pb2.StreamStepsRequest:
    entry = session_pb2.StepsEntry(
        handle=1,
        first_step=first_step,
        length=length,
        trace=session_pb2.TraceMode.ValueType(trace),
    )
    rows = bytes(row_bytes * length)
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
                return server.metric("conveyor_rejected_total", reason="SLOW_READER") < 24

            await until(lambda: server.metric("conveyor_results_bytes") > PRINCIPAL_BYTES // 2)
            steps = await asyncio.gather(step_while(anna, attacked), step_while(bert, attacked))
            assert server.metric("conveyor_results_bytes") > 24 * 2**18, "what is written counts"
        await until(lambda: server.metric("conveyor_streams") == 0)
        await until(lambda: server.metric("conveyor_results_bytes") == 0)
        assert min(steps) > 10
        assert most - before < PRINCIPAL_BYTES + 96 * 2**20
        await until(lambda: resident_bytes(server) - before < 64 * 2**20)


async def test_full_traces_that_nobody_reads_are_bounded(server: ServerProcess) -> None:
    """A chunk of 64 KiB is owed 7 MiB, of which the principal may have nine."""
    before = most = resident_bytes(server)
    sessions = server.metric("conveyor_sessions")
    with reads_nothing(server.address) as attacker:
        streams = [
            attacker.call(STREAM, open_frame("words"), metadata=AS_ANNA, ends=False)
            for _ in range(16)
        ]
        attacker.flush()
        await until(lambda: server.metric("conveyor_sessions") >= sessions + len(streams))
        frame = steps_frame(1, 16_384, 4, session_pb2.TRACE_MODE_FULL)
        for stream in streams:
            send(attacker, stream, frame)
        async with Wire(server.address, AS_ANNA) as anna:

            def attacked() -> bool:
                nonlocal most
                most = max(most, resident_bytes(server))
                return server.metric("conveyor_rejected_total", reason="SLOW_READER") < ended

            ended = server.metric("conveyor_rejected_total", reason="SLOW_READER") + 3
            assert await step_while(anna, attacked) > 10
    await until(lambda: server.metric("conveyor_streams") == 0)
    assert most - before < PRINCIPAL_BYTES + 96 * 2**20
    await until(lambda: server.metric("conveyor_results_bytes") == 0)


async def test_responses_that_nobody_reads_are_bounded(server: ServerProcess) -> None:
    """Of 60 calls that want 1.6 MiB each the principal may have 40."""
    async with Wire(server.address, AS_ANNA) as anna, Wire(server.address, AS_BERT) as bert:
        ids = [await anna.new_session("broad") for _ in range(60)]
        rows = bytes(4 * 100)
        with reads_nothing(server.address, 0) as attacker:
            calls = [
                attacker.call(
                    STEP,
                    session_pb2.StepRequest(session_id=each, first_step=1, length=100, rows=rows),
                    metadata=AS_ANNA,
                )
                for each in ids
            ]
            attacker.flush()
            fit = PRINCIPAL_BYTES // (100 * 4 * 4096 - 4096)
            attacker.read_until(
                lambda: len(refused_of(attacker, calls)) == len(calls) - fit, "some are refused"
            )
            said = refused_of(attacker, calls)
            assert set(said) == {CALLS_LIMIT}
            assert said[0].metadata == {
                "limit": "limits.principal_results_bytes_max",
                "maximum": str(PRINCIPAL_BYTES),
            }
            assert said[0].retry_seconds == 0.5
            assert await refused(anna.step(ids[-1], 1, rows, 100)) == CALLS_LIMIT
            await anna.step(ids[-1], 1, rows[:4], 1, output=NONE)
            await bert.step(await bert.new_session("broad"), 1, rows, 100)
        await until(lambda: server.metric("conveyor_results_bytes") == 0)
        await anna.step(ids[-1], 2, rows, 100)


def refused_of(attacker: Attacker, calls: list[int]) -> list[Refusal]:
    said = [attacker.answers[call].refusal for call in calls]
    return [each for each in said if each is not None]

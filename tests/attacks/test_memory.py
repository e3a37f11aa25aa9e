"""What calls leave in memory: nothing, whether they were refused or not."""

from __future__ import annotations

import asyncio
import signal
import struct
from collections import Counter
from collections.abc import Awaitable
from typing import Any, Final

import numpy as np
import pytest

from conveyor.v1 import model_pb2, session_pb2
from tests.attacks.attacker import Attacker, resident_bytes
from tests.attacks.collecting import LOGGER
from tests.integration.conftest import StartServer
from tests.integration.process import ServerProcess
from tests.integration.wire import Refusal, Wire, refused, until

TOKEN: Final = "anna-0123456789abcdef"
CONFIG: Final = f'[auth.tokens]\n"{TOKEN}" = "anna"\n'
MINE: Final = [("authorization", f"Bearer {TOKEN}")]
GROWTH_BYTES_MAX: Final = 64 * 2**20
STEP: Final = "/conveyor.v1.SessionService/Step"


@pytest.fixture(scope="module")
def server(start_server: StartServer) -> ServerProcess:
    return start_server({"shutdown.grace_seconds": 1}, config=CONFIG)


async def _at_once(count: int, width: int, call: Any) -> None:
    """Makes calls, so many of them at a time."""

    async def some(number: int) -> None:
        for _ in range(count // width):
            await call(number)

    await asyncio.gather(*map(some, range(width)))


async def test_refused_calls_with_large_messages_leave_nothing(server: ServerProcess) -> None:
    large = session_pb2.StepRequest(session_id="s", rows=bytes(4 * 2**20 - 64))

    async with Wire(server.address) as nobody, Wire(server.address, MINE) as anna:

        async def unknown(_: int) -> None:
            said = await refused(nobody.sessions.Step(large))
            assert said == Refusal("UNAUTHENTICATED", "UNAUTHENTICATED")

        async def absent(_: int) -> None:
            said = await refused(anna.sessions.Step(large, metadata=MINE))
            assert said == Refusal("NOT_FOUND", "SESSION_NOT_FOUND")

        for call in (unknown, absent):
            await _at_once(80, 4, call)  # malloc keeps what it once needed
            before = resident_bytes(server)
            await _at_once(200, 4, call)
            assert resident_bytes(server) - before < GROWTH_BYTES_MAX


async def test_answered_calls_with_large_results_leave_nothing(server: ServerProcess) -> None:
    rows = np.zeros((384, 1), np.float32)  # 6 MiB of results
    async with Wire(server.address, MINE) as wire:
        session_id = await wire.new_session("broad")

        async def some(first: int, count: int) -> None:
            for number in range(first, first + count):
                await wire.step(session_id, 1 + 384 * number, rows)

        await some(0, 4)
        before = resident_bytes(server)
        await some(4, 40)
        assert resident_bytes(server) - before < GROWTH_BYTES_MAX


async def test_messages_that_never_end_take_no_more_than_they_may(
    start_server: StartServer,
) -> None:
    """Of forty messages of 4 MiB, sent but for their last bytes, so many are gathered as fit."""
    server = start_server(
        {
            "shutdown.grace_seconds": 1,
            "limits.request_bytes_max": 32 * 2**20,
            "limits.message_seconds_max": 3,
        }
    )
    async with Wire(server.address) as wire:
        await wire.models.ListModels(model_pb2.ListModelsRequest())
    before, peak = resident_bytes(server), 0
    with Attacker(server.address) as attacker:
        unsent = dict.fromkeys((attacker.call(STEP, ends=False) for _ in range(40)), 4 * 2**20)
        for stream in unsent:
            attacker.h2.send_data(stream, struct.pack(">BI", 0, 4 * 2**20 + 16))
        while any(answer.refusal is None for answer in attacker.answers.values()):
            _send_what_may_be_sent(attacker, unsent)
            assert attacker.read()
            peak = max(peak, resident_bytes(server))
        assert set(_reasons(attacker)) == {"CALLS_LIMIT", "DEADLINE_EXCEEDED"}
        assert _reasons(attacker)["DEADLINE_EXCEEDED"] <= 7
    assert peak - before < (32 + 64) * 2**20


def _reasons(attacker: Attacker) -> Counter[str]:
    refusals = (answer.refusal for answer in attacker.answers.values())
    return Counter(refusal.reason for refusal in refusals if refusal is not None)


def _send_what_may_be_sent(attacker: Attacker, unsent: dict[int, int]) -> None:
    for stream in list(unsent):
        answer = attacker.answers[stream]
        while answer.refusal is None and answer.reset is None:
            window = attacker.h2.local_flow_control_window(stream)
            size = min(unsent[stream], window, attacker.h2.max_outbound_frame_size)
            if size <= 0:
                break
            attacker.h2.send_data(stream, bytes(size))
            unsent[stream] -= size
    attacker.flush()


async def test_nothing_waits_for_the_garbage_collector(start_server: StartServer) -> None:
    server = start_server(
        {"shutdown.grace_seconds": 1, "listen.reflection": "true"},
        config=CONFIG,
        program=("-m", "tests.attacks.collecting"),
    )
    async with Wire(server.address, MINE) as anna, Wire(server.address) as nobody:
        await _some_of_everything(server, anna, nobody)
        await _garbage(server)  # what the first calls leave once
        for _ in range(20):
            await _some_of_everything(server, anna, nobody)
        found = await _garbage(server)
    # gRPC's own: a function that looks the handler up, the method's name and the metadata.
    grpc_own = ("grpc._cython.", "_cython_", "importlib._bootstrap._Metadatum", "builtins.tuple")
    ours = {name: count for name, count in found.items() if not name.startswith(grpc_own)}
    assert not ours, ours
    assert found.get("builtins.tuple", 0) <= found["grpc._cython.cygrpc._HandlerCallDetails"]


async def _some_of_everything(server: ServerProcess, anna: Wire, nobody: Wire) -> None:
    """Every way in which a unary call, and a stream, may end."""
    x = np.zeros((2, 3), np.float32)
    session_id = await anna.new_session("tiny")
    await anna.step(session_id, 1, x)
    await anna.predict("tiny", x)
    await anna.generate(model="words", prompt=bytes(4), prompt_length=1, steps_max=2)
    async with anna.stream() as stream:
        opened = await stream.open("tiny")
        await stream.steps(opened.handle, 1, x, 2)
    failing: list[Awaitable[Any]] = [
        nobody.step(session_id, 1, x),
        nobody.sessions.StreamSteps().read(),
        nobody.reflection().read(),
        anna.step(session_id, 9, x),
        anna.step("absent", 1, x),
        anna.step(session_id, 3, bytes(5), length=2),
        anna.get("absent"),
        anna.predict("tiny", np.full((1, 3), np.nan, np.float32)),
        anna.generate(model="words", prompt=bytes(3), prompt_length=1, steps_max=2),
        anna.open("tiny", session_id=session_id, token="malformed"),
        anna.channel.unary_unary(STEP)(b"\xff\xff", metadata=MINE),
    ]
    for call in failing:
        assert (await refused(call)).reason
    cancelled = anna.sessions.Predict(
        session_pb2.PredictRequest(model="heavy", length=400, rows=bytes(400 * 32)), metadata=MINE
    )
    await until(lambda: server.metric("conveyor_inbox_chunks") > 0)
    cancelled.cancel()
    await anna.close(session_id)


async def _garbage(server: ServerProcess) -> dict[str, int]:
    """What only the collector frees, by type."""
    await until(lambda: server.metric("conveyor_inbox_chunks") == 0)
    seen = len([line for line in server.log() if line["logger"] == LOGGER])
    server.signal(signal.SIGUSR1)

    def told() -> list[dict[str, Any]]:
        return [line for line in server.log() if line["logger"] == LOGGER][seen:]

    await until(told)
    return told()[0]["found"]

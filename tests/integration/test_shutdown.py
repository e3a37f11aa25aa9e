"""SIGTERM: streams are told, what was accepted is answered, nothing new begins, and it ends."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Callable
from contextlib import AsyncExitStack
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from grpc_health.v1 import health_pb2

from tests.integration.conftest import StartServer
from tests.integration.wire import LAST, NONE, Entry, Refusal, Wire, refused, until

Rows = Callable[..., npt.NDArray[Any]]
GRACE_SECONDS = 20
"""Far longer than a test takes: the server must not use it up when nothing keeps it."""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_streams_are_told_and_what_runs_is_answered(
    start_server: StartServer, rows: Rows, number: signal.Signals
) -> None:
    server = start_server(
        {"shutdown.grace_seconds": GRACE_SECONDS, "shutdown.reconnect_after_seconds": 2.5}
    )
    x = rows(1500, 8)
    async with Wire(server.address) as wire, wire.stream() as busy, wire.stream() as idle:
        handle = (await busy.open("heavy")).handle
        other = (await idle.open("tiny")).handle
        await busy.send_steps(Entry(handle, 1, x, LAST))
        await busy.pieces(1, 1)
        began = time.monotonic()
        server.signal(number)
        for stream in (busy, idle):
            drain = await stream.next("drain")
            assert drain.reconnect_after.ToMicroseconds() == 2_500_000
        # Opening is over, stepping is not.
        draining = await idle.open_or_fail("tiny")
        assert draining == Refusal("UNAVAILABLE", "SERVER_DRAINING")
        assert isinstance(draining, Refusal)
        assert draining.retry_seconds is not None
        assert len(await idle.steps(other, 1, rows(3), 2)) == 24
        applied = sum(e.length for f in busy.unread for e in f.results.entries) + 16
        busy.unread.clear()
        while applied < 1500:
            applied += sum(entry.length for entry in (await busy.next("results")).entries)
        await busy.end()
        await idle.end()
        assert await asyncio.to_thread(server.wait) == 0
        assert time.monotonic() - began < GRACE_SECONDS / 2
    messages = [line["message"] for line in server.log()]
    assert messages[-4:] == ["draining", "session ended", "session ended", "stopped"]


async def test_new_connections_and_calls_are_refused(start_server: StartServer, rows: Rows) -> None:
    server = start_server({"shutdown.grace_seconds": GRACE_SECONDS})
    async with Wire(server.address) as wire, wire.stream() as stream:
        await stream.open("tiny")
        server.signal(signal.SIGTERM)
        await stream.next("drain")
        async with Wire(server.address) as late:
            said = await refused(late.open("tiny"))
            assert said.code == "UNAVAILABLE"
        await stream.end()
        assert await asyncio.to_thread(server.wait) == 0


async def test_health_falls_before_the_server_goes(start_server: StartServer) -> None:
    server = start_server({"shutdown.grace_seconds": GRACE_SECONDS})
    async with Wire(server.address) as wire, wire.stream() as stream:
        await stream.open("tiny")
        watch = wire.health.Watch(health_pb2.HealthCheckRequest())
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
        server.signal(signal.SIGTERM)
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
        watch.cancel()
        await stream.end()
        assert await asyncio.to_thread(server.wait) == 0


async def test_clients_that_stay_are_cut_when_the_grace_is_over(
    start_server: StartServer, rows: Rows
) -> None:
    server = start_server({"shutdown.grace_seconds": 0.5})
    async with AsyncExitStack() as stack:
        wire = await stack.enter_async_context(Wire(server.address))
        streams = [await stack.enter_async_context(wire.stream()) for _ in range(40)]
        for stream in streams:
            await stream.open("tiny")
        began = time.monotonic()
        server.signal(signal.SIGTERM)
        for stream in streams:
            await stream.next("drain")
        assert await asyncio.to_thread(server.wait) == 0
        assert time.monotonic() - began < 10
        for stream in streams:
            assert (await stream.call.code()).name in ("UNAVAILABLE", "CANCELLED")
    assert server.log()[-1]["message"] == "stopped"  # and nothing after it that is not JSON


async def test_generations_and_predictions_under_way_end_well(
    start_server: StartServer, rows: Rows
) -> None:
    server = start_server({"shutdown.grace_seconds": GRACE_SECONDS})
    async with Wire(server.address) as wire, wire.stream() as stream:
        await stream.open("tiny")
        generated = asyncio.ensure_future(
            wire.generate(model="words", prompt=bytes(4), prompt_length=1, steps_max=3000)
        )
        predicted = asyncio.ensure_future(wire.predict("heavy", rows(1500, 8)))
        await until(lambda: server.metric("conveyor_sessions") == 3)
        server.signal(signal.SIGTERM)
        await stream.next("drain")
        await stream.end()
        made = await generated
        assert sum(len(response.tokens) for response in made) == 3000
        assert len(await predicted) == 1500 * 4
        assert await asyncio.to_thread(server.wait) == 0


async def test_killing_one_server_leaves_nothing_that_keeps_the_next_from_starting(
    start_server: StartServer, rows: Rows
) -> None:
    first = start_server()
    async with Wire(first.address) as wire, wire.stream() as stream:
        handle = (await stream.open("heavy")).handle
        await stream.send_steps(Entry(handle, 1, rows(2000, 8), NONE))
        await stream.pieces(1, 1)
        second = start_server({"listen.address": "127.0.0.1:0"})
        assert second.address != first.address
        async with Wire(second.address) as there:
            out = await there.predict("tiny", np.zeros((1, 3), np.float32))
            assert len(out) == 8

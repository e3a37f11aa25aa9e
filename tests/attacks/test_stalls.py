"""What takes long for one client does not keep the others waiting."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest
from grpc_health.v1 import health_pb2

from conveyor.v1 import session_pb2
from conveyor_server.store.checkpoint import Checkpoint, Header, encode
from tests.integration.bundles import TINY, add_model
from tests.integration.conftest import StartServer
from tests.integration.process import ServerProcess
from tests.integration.wire import Entry, Refusal, Stream, Wire, refused

X: Final = np.zeros((1, 3), np.float32)
AT_ONCE: Final = 4
STEPS: Final = 150
TIMES_MAX: Final = 3.0
SLACK_SECONDS: Final = 0.01
"""For a machine that others use as well."""
Call = Callable[[], Awaitable[Any]]


@pytest.fixture(scope="module")
def server(start_server: StartServer, tmp_path_factory: pytest.TempPathFactory) -> ServerProcess:
    models: Path = tmp_path_factory.mktemp("models")
    add_model(models, "tiny", TINY)
    settings = {"shutdown.grace_seconds": 1, "log.level": "warning"}
    return start_server(settings, models=models)


async def median_beside(server: ServerProcess, call: Call | None) -> float:
    """The median time of a client's steps while others make calls without a pause."""
    over = False

    async def calls() -> None:
        assert call is not None
        while not over:
            await call()

    async with Wire(server.address) as wire:
        session_id = await wire.new_session("tiny")
        others = [asyncio.create_task(calls()) for _ in range(AT_ONCE if call else 0)]
        took: list[float] = []
        for number in range(1, STEPS + 1):
            begun = time.perf_counter()
            await wire.step(session_id, number, X)
            took.append(time.perf_counter() - begun)
        over = True
        await asyncio.gather(*others)
        await wire.close(session_id)
    return statistics.median(took)


async def check(server: ServerProcess, call: Call, plain: Call) -> None:
    """Steps beside `call` take little longer than beside as many `plain` calls."""
    allowed = TIMES_MAX * await median_beside(server, plain) + SLACK_SECONDS
    took = await median_beside(server, call)
    assert took < allowed, f"{1e3 * took:.1f} ms, allowed {1e3 * allowed:.1f} ms"


async def test_imports_of_4_mib(server: ServerProcess) -> None:
    """Of no model that is served: each is hashed whole, and then refused."""
    carry = np.random.default_rng(0).random(2**20 - 1000, np.float32).tobytes()
    header = Header("s", "", "other", 1, "sha256:00", 1, 1, len(carry))
    snapshot = encode(Checkpoint(header, carry))
    request = session_pb2.ImportSessionRequest(snapshot=snapshot)
    damaged = session_pb2.ImportSessionRequest(snapshot=b"x" + snapshot[1:])
    async with Wire(server.address) as other:

        async def imports(request: session_pb2.ImportSessionRequest, reason: str) -> None:
            said = await refused(other.sessions.ImportSession(request))
            assert said.reason == reason

        await check(
            server,
            lambda: imports(request, "SNAPSHOT_INCOMPATIBLE"),
            lambda: imports(damaged, "SNAPSHOT_CORRUPT"),  # as large, and seen at once
        )


async def test_lists_of_1000_labelled_sessions(server: ServerProcess) -> None:
    labels = {f"key-{number}": "x" * 200 for number in range(16)}
    async with Wire(server.address) as other:
        opened = [await other.open("tiny", labels=labels) for _ in range(1000)]
        ids = {each.session.session_id for each in opened}
        request = session_pb2.ListSessionsRequest(page_size=1000)
        page = await other.sessions.ListSessions(request)
        assert page.ByteSize() < 64 * 2**10
        assert page.total_size >= 1000
        listed = {each.session_id for each in page.sessions}
        while page.next_page_token:
            request.page_token = page.next_page_token
            page = await other.sessions.ListSessions(request)
            assert page.sessions
            listed |= {each.session_id for each in page.sessions}
        assert ids <= listed
        request.page_token = ""
        session_id = opened[0].session.session_id
        await check(
            server, lambda: other.sessions.ListSessions(request), lambda: other.get(session_id)
        )
        for session_id in ids:
            await other.close(session_id)


async def test_calls_with_a_wrong_shape(server: ServerProcess) -> None:
    async with Wire(server.address) as other:
        session_id = await other.new_session("tiny")

        async def wrong() -> None:
            said = await refused(other.step(session_id, 1, bytes(5), length=2))
            assert said == Refusal("INVALID_ARGUMENT", "INVALID_SHAPE")

        await check(server, wrong, lambda: other.get(session_id))


async def test_opens_beside_streams_that_step(server: ServerProcess) -> None:
    """An open waits for the batch that runs, if one does: little more than what needs no tick."""
    async with Wire(server.address) as stepping, Wire(server.address) as other:
        streams = [Stream(stepping) for _ in range(40)]
        handles = [(await stream.open("tiny")).handle for stream in streams]
        over = False

        async def step_on(stream: Stream, handle: int) -> None:
            sent = done = 0
            while not over:
                while sent < done + 16:
                    sent += 1
                    await stream.send_steps(Entry(handle, sent, X))
                done += len((await stream.next("results")).entries)
            stream.cancel()

        tasks = [asyncio.create_task(step_on(*each)) for each in zip(streams, handles, strict=True)]
        checks, opens = list[float](), list[float]()
        for _ in range(20):
            begun = time.perf_counter()
            await other.health.Check(health_pb2.HealthCheckRequest())
            checked = time.perf_counter()
            await other.open("tiny")
            checks.append(checked - begun)
            opens.append(time.perf_counter() - checked)
        over = True
        await asyncio.gather(*tasks)
    assert statistics.median(opens) < TIMES_MAX * statistics.median(checks) + SLACK_SECONDS

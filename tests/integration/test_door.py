"""The door itself: what is counted, admitted, fenced and cut there, whatever lies behind it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pytest
from grpc import aio
from grpc_health.v1 import health_pb2

from conveyor.v1 import model_pb2, session_pb2, session_pb2_grpc
from tests.integration.conftest import StartServer
from tests.integration.process import ServerProcess
from tests.integration.wire import Entry, Refusal, Wire, refused, until

Rows = Callable[..., npt.NDArray[Any]]
TOKEN: Final = "anna-0123456789abcdef"
MODEL_NOT_FOUND: Final = Refusal("NOT_FOUND", "MODEL_NOT_FOUND")


@pytest.fixture(scope="module")
def server(start_server: StartServer) -> ServerProcess:
    return start_server(
        {
            "shutdown.grace_seconds": 1,
            "limits.slow_reader_seconds_max": 3,
            "limits.outbox_bytes_max": 2**18,
            "limits.result_bytes_max": 2**22,
            "limits.metadata_bytes_max": 1024,
        }
    )


@pytest.fixture(scope="module")
def guarded(start_server: StartServer) -> ServerProcess:
    return start_server(
        {"shutdown.grace_seconds": 1, "listen.reflection": "true"},
        config=f'[auth.tokens]\n"{TOKEN}" = "anna"\n',
    )


async def test_health_of_an_unknown_service_is_counted_as_what_it_is(
    wire: Wire, server: ServerProcess
) -> None:
    request = health_pb2.HealthCheckRequest(service="nothing")
    assert (await refused(wire.health.Check(request))).code == "NOT_FOUND"
    handled = {"grpc_service": "grpc.health.v1.Health", "grpc_method": "Check"}
    # The status is on its way before the call is counted.
    counted = partial(server.metric, "grpc_server_handled_total", **handled)
    await until(lambda: counted(grpc_code="NOT_FOUND") == 1)
    assert counted(grpc_code="UNKNOWN") == 0


async def test_unknown_methods_are_started_and_handled(wire: Wire, server: ServerProcess) -> None:
    call = wire.channel.unary_unary("/conveyor.v1.SessionService/Nothing")
    assert (await refused(call(b""))).code == "UNIMPLEMENTED"
    for name in ("grpc_server_started_total", "grpc_server_handled_total"):
        await until(lambda name=name: server.metric(name, grpc_method="unknown") == 1)


async def test_reflection_asks_for_a_token_and_is_counted(guarded: ServerProcess) -> None:
    async with Wire(guarded.address) as nobody:
        said = await refused(nobody.reflection().read())
        assert said == Refusal("UNAUTHENTICATED", "UNAUTHENTICATED")
    async with Wire(guarded.address, [("authorization", f"Bearer {TOKEN}")]) as anna:
        assert "conveyor.v1.SessionService" in await anna.reflected()
    counted = {"grpc_method": "ServerReflectionInfo"}
    assert guarded.metric("grpc_server_handled_total", **counted, grpc_code="OK") == 1
    assert guarded.metric("grpc_server_handled_total", **counted, grpc_code="UNAUTHENTICATED") == 1


async def test_metadata_is_refused_by_us_and_with_a_reason(wire: Wire) -> None:
    too_large = Refusal("RESOURCE_EXHAUSTED", "MESSAGE_TOO_LARGE")
    for size in (800, 900):  # the rest is what gRPC itself sends
        wire.metadata = (("note", "x" * size),)
        for _ in range(20):
            await wire.open("tiny")
    for size in (1100, 2000, 3000):
        wire.metadata = (("note", "x" * size),)
        for _ in range(20):  # the transport would refuse at random
            said = await refused(wire.open("tiny"))
            assert said == too_large
            assert said.metadata["limit"] == "limits.metadata_bytes_max"


async def test_long_texts_are_not_sent_back(wire: Wire) -> None:
    name = "x" * 100_000
    calls = [
        wire.open(name),
        wire.open(name, session_id="there"),
        wire.predict(name, np.zeros((1, 3), np.float32)),
        wire.generate(model=name, prompt=bytes(4), prompt_length=1, steps_max=1),
        wire.models.GetModel(model_pb2.GetModelRequest(name=name)),
    ]
    for call in calls:
        said = await refused(call)
        assert said == MODEL_NOT_FOUND
        assert said.message.startswith("there is no model with a name of ")
        assert len(said.message) < 100
        assert not said.metadata
    assert await refused(wire.open("n" * 128)) == MODEL_NOT_FOUND
    said = await refused(wire.open(session_id="there", token="t" * 513))
    assert said == Refusal("INVALID_ARGUMENT", "INVALID_TOKEN")


async def test_predict_is_refused_for_what_its_results_would_take(wire: Wire) -> None:
    row_bytes = 4096 * 4
    fits = 2**22 // row_bytes
    assert len(await wire.predict("broad", np.zeros((fits, 1), np.float32))) == 2**22
    said = await refused(wire.predict("broad", np.zeros((fits + 1, 1), np.float32)))
    assert said == Refusal("INVALID_ARGUMENT", "CHUNK_TOO_LONG")
    assert said.metadata["limit"] == "limits.result_bytes_max"
    request = session_pb2.PredictRequest(
        model="broad", length=2 * fits, rows=bytes(8 * fits), output=session_pb2.OUTPUT_MODE_LAST
    )
    assert len((await wire.sessions.Predict(request)).rows) == row_bytes


async def test_a_frame_of_many_results_is_answered_in_full(wire: Wire) -> None:
    steps, frames = 60, 40  # each chunk more than the bound, all of them 150 times as much
    async with wire.stream() as stream:
        handles = [(await stream.open("broad")).handle for _ in range(frames)]
        x = np.zeros((steps, 1), np.float32)
        await stream.send_steps(*(Entry(handle, 1, x) for handle in handles))
        answered = 0
        while answered < steps * frames:
            frame = await stream.next("results")
            answered += sum(entry.length for entry in frame.entries)
        assert answered == steps * frames


async def test_a_later_claim_ends_a_generation(wire: Wire, rows: Rows) -> None:
    opened = await wire.open("loop")
    session_id = opened.session.session_id
    request = session_pb2.GenerateRequest(
        session_id=session_id, prompt=rows(2, 2).tobytes(), prompt_length=2, steps_max=60_000
    )
    call = wire.sessions.Generate(request)
    assert await call.read() is not aio.EOF
    assert (await wire.open(session_id=session_id)).session.epoch == opened.session.epoch + 1

    async def read_on() -> None:
        while await call.read() is not aio.EOF:
            pass

    said = await refused(read_on())
    assert said == Refusal("ABORTED", "SESSION_SUPERSEDED")
    applied = (await wire.get(session_id)).applied_step
    assert applied < 60_000
    await wire.step(session_id, applied + 1, rows(1, 2))


async def test_a_generation_whose_client_reads_nothing_is_ended(
    wire: Wire, server: ServerProcess
) -> None:
    rejected = {"reason": "SLOW_READER"}
    before = server.metric("conveyor_rejected_total", **rejected)
    # 60 000 rows are half a megabyte: more than goes to a client that does not read.
    options = [("grpc.http2.bdp_probe", 0), ("grpc.use_local_subchannel_pool", 1)]
    async with aio.insecure_channel(server.address, options=options) as channel:
        stub = session_pb2_grpc.SessionServiceStub(channel)
        request = session_pb2.GenerateRequest(
            model="loop", prompt=bytes(8), prompt_length=1, steps_max=60_000
        )
        call = stub.Generate(request)
        await call.read()
        await until(lambda: server.metric("conveyor_rejected_total", **rejected) == before + 1)
        counted = {"grpc_method": "Generate", "grpc_code": "RESOURCE_EXHAUSTED"}
        assert server.metric("grpc_server_handled_total", **counted) >= 1
        call.cancel()

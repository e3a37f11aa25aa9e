"""Who may call: tokens on every kind of RPC, and sessions that are nobody else's."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Final

import numpy as np
import pytest
from grpc_health.v1 import health_pb2

from conveyor.v1 import model_pb2, session_pb2
from tests.integration.conftest import StartServer
from tests.integration.process import ServerProcess
from tests.integration.wire import Refusal, Stream, Wire, refused

ANNA: Final = "anna-0123456789abcdef"
BERT: Final = "bert-0123456789abcdef"
X: Final = np.random.default_rng(0).standard_normal((4, 3), dtype=np.float32)
CONFIG: Final = f'[auth.tokens]\n"{ANNA}" = "anna"\n"{BERT}" = "bert"\n'


@pytest.fixture(scope="module")
def server(start_server: StartServer) -> ServerProcess:
    return start_server({"shutdown.grace_seconds": 1}, config=CONFIG)


def _wire(server: ServerProcess, *metadata: tuple[str, str]) -> Wire:
    return Wire(server.address, metadata)


def _as(server: ServerProcess, token: str) -> Wire:
    return _wire(server, ("authorization", f"Bearer {token}"))


BAD: Final[dict[str, Sequence[tuple[str, str]]]] = {
    "none": [],
    "unknown": [("authorization", "Bearer nobody-0123456789abcd")],
    "a part": [("authorization", f"Bearer {ANNA[:-1]}")],
    "more": [("authorization", f"Bearer {ANNA}x")],
    "no scheme": [("authorization", ANNA)],
    "other scheme": [("authorization", f"Basic {ANNA}")],
    "small scheme": [("authorization", f"bearer {ANNA}")],
    "empty": [("authorization", "")],
    "empty bearer": [("authorization", "Bearer ")],
    "other key": [("x-authorization", f"Bearer {ANNA}")],
    "a routing key": [("conveyor-key", "anna")],
}


@pytest.mark.parametrize("metadata", BAD.values(), ids=BAD.keys())
async def test_nobody_gets_in_without_a_token(
    server: ServerProcess, metadata: Sequence[tuple[str, str]]
) -> None:
    unauthenticated = Refusal("UNAUTHENTICATED", "UNAUTHENTICATED")
    async with _wire(server, *metadata) as wire:
        unary = wire.open("tiny")
        assert await refused(unary) == unauthenticated
        assert await refused(wire.step("s", 1, X)) == unauthenticated
        models = wire.models.ListModels(model_pb2.ListModelsRequest(), metadata=wire.metadata)
        assert await refused(models) == unauthenticated
        server_stream = wire.generate(model="words", prompt=bytes(4), prompt_length=1, steps_max=1)
        assert await refused(server_stream) == unauthenticated
        assert await refused(Stream(wire).call.read()) == unauthenticated


async def test_every_unary_call_asks_for_a_token(server: ServerProcess) -> None:
    service = session_pb2.DESCRIPTOR.services_by_name["SessionService"]
    async with _wire(server) as wire:
        for method in service.methods:
            if method.client_streaming or method.server_streaming:
                continue
            request = getattr(session_pb2, method.input_type.name)()
            said = await refused(getattr(wire.sessions, method.name)(request))
            assert said == Refusal("UNAUTHENTICATED", "UNAUTHENTICATED"), method.name


Call = Callable[[Wire, str], Awaitable[Any]]


def _call(rpc: str, message: type[Any], **fields: Any) -> Call:
    return lambda wire, session_id: getattr(wire.sessions, rpc)(
        message(session_id=session_id, **fields), metadata=wire.metadata
    )


CALLS: Final[dict[str, Call]] = {
    "step": lambda wire, session_id: wire.step(session_id, 1, X),
    "get": lambda wire, session_id: wire.get(session_id),
    "close": lambda wire, session_id: wire.close(session_id),
    "export": lambda wire, session_id: wire.export(session_id),
    "resume": lambda wire, session_id: wire.open(session_id=session_id, mode=2),
    "generate": lambda wire, session_id: wire.generate(session_id=session_id, steps_max=1),
    "reset": _call("ResetSession", session_pb2.ResetSessionRequest),
    "fork": _call("ForkSession", session_pb2.ForkSessionRequest, new_session_ids=[""]),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
async def test_somebody_elses_session_looks_like_none(server: ServerProcess, call: Call) -> None:
    async with _as(server, ANNA) as anna, _as(server, BERT) as bert:
        session_id = await anna.new_session("tiny")
        await anna.step(session_id, 1, X)
        before = await anna.get(session_id)
        absent = session_id[:-1] + ("0" if session_id[-1] != "0" else "1")
        hers, nobodys = await refused(call(bert, session_id)), await refused(call(bert, absent))
        assert hers == nobodys == Refusal("NOT_FOUND", "SESSION_NOT_FOUND")
        assert hers.message == nobodys.message.replace(absent, session_id)
        assert hers.metadata == nobodys.metadata
        assert await anna.get(session_id) == before
        await anna.close(session_id)
        gone = await refused(call(bert, session_id))
        assert gone == nobodys
        assert gone.message == hers.message


async def test_ids_are_each_principals_own(server: ServerProcess) -> None:
    async with _as(server, ANNA) as anna, _as(server, BERT) as bert:
        for wire in (anna, bert):
            opened = await wire.open("tiny", session_id="mine", mode=1)
            assert opened.session.epoch == 1
        await anna.step("mine", 1, X)
        assert (await bert.get("mine")).applied_step == 0
        for wire in (anna, bert):
            page = await wire.sessions.ListSessions(
                session_pb2.ListSessionsRequest(), metadata=wire.metadata
            )
            assert [session.session_id for session in page.sessions] == ["mine"]
            assert page.total_size == 1


async def test_somebody_elses_session_on_a_stream(server: ServerProcess) -> None:
    async with _as(server, ANNA) as anna, _as(server, BERT) as bert, bert.stream() as stream:
        session_id = await anna.new_session("tiny")
        said = await stream.open_or_fail(session_id=session_id, mode=2)
        assert said == Refusal("NOT_FOUND", "SESSION_NOT_FOUND")
        assert (await anna.get(session_id)).epoch == 1


async def test_a_snapshot_says_nothing_of_who_took_it(server: ServerProcess) -> None:
    async with _as(server, ANNA) as anna, _as(server, BERT) as bert:
        session_id = await anna.new_session("tiny")
        await anna.step(session_id, 1, X)
        snapshot = await anna.export(session_id)
        assert b"anna" not in snapshot
        request = session_pb2.ImportSessionRequest(snapshot=snapshot)
        imported = await bert.sessions.ImportSession(request, metadata=bert.metadata)
        assert imported.session.applied_step == 4


async def test_no_secret_and_no_line_break_reaches_the_log(server: ServerProcess) -> None:
    async with _as(server, ANNA) as anna:
        await refused(anna.open("ti\r\n\x1b[31mny"))
        await refused(anna.get("x\r\n"))
    assert ANNA not in server.log_text()
    assert "\x1b" not in server.log_text()
    assert server.log()


async def test_health_is_open_to_all(server: ServerProcess) -> None:
    async with _wire(server) as wire:
        answer = await wire.health.Check(health_pb2.HealthCheckRequest())
        assert answer.status == health_pb2.HealthCheckResponse.SERVING


async def test_who_lists_health_learns_the_models_and_needs_a_token(server: ServerProcess) -> None:
    request = health_pb2.HealthListRequest()
    async with _wire(server) as nobody, _as(server, ANNA) as anna:
        said = await refused(nobody.health.List(request))
        assert said == Refusal("UNAUTHENTICATED", "UNAUTHENTICATED")
        listed = await anna.health.List(request, metadata=anna.metadata)
        assert listed.statuses["tiny"].status == health_pb2.HealthCheckResponse.SERVING

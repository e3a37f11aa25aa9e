"""Calls without a token, a message or sense: each ends soon, and nobody else is refused for it."""

from __future__ import annotations

import time
from collections import Counter
from functools import partial
from typing import Final

import pytest
from grpc_health.v1 import health_pb2

from conveyor.v1 import model_pb2, session_pb2
from tests.attacks.attacker import Attacker
from tests.integration.conftest import StartServer
from tests.integration.process import ServerProcess
from tests.integration.wire import Refusal, Wire, refused, until

TOKEN: Final = "anna-0123456789abcdef"
CONFIG: Final = f'[auth.tokens]\n"{TOKEN}" = "anna"\n'
MINE: Final = [("authorization", f"Bearer {TOKEN}")]
STEP: Final = "/conveyor.v1.SessionService/Step"
STREAM: Final = "/conveyor.v1.SessionService/StreamSteps"
GENERATE: Final = "/conveyor.v1.SessionService/Generate"
LIST_MODELS: Final = "/conveyor.v1.ModelService/ListModels"
CHECK: Final = "/grpc.health.v1.Health/Check"
WATCH: Final = "/grpc.health.v1.Health/Watch"
GARBAGE: Final = b"\xff\xff\xff\xff"
MALFORMED: Final = Refusal("INVALID_ARGUMENT", "INVALID_FIELD")
UNAUTHENTICATED: Final = Refusal("UNAUTHENTICATED", "UNAUTHENTICATED")
CALLS_LIMIT: Final = Refusal("RESOURCE_EXHAUSTED", "CALLS_LIMIT")


@pytest.fixture(scope="module")
def server(start_server: StartServer) -> ServerProcess:
    return start_server(
        {
            "shutdown.grace_seconds": 1,
            "limits.concurrent_calls_max": 40,
            "limits.connection_calls_max": 30,
            "limits.message_seconds_max": 1,
            "limits.health_calls_max": 40,
            "limits.connection_watches_max": 3,
        },
        config=CONFIG,
    )


def refusals(attacker: Attacker, streams: list[int]) -> Counter[Refusal | None]:
    return Counter(attacker.answer(stream).refusal for stream in streams)


# --- calls that never send their message ----------------------------------------------------------


def test_calls_without_a_token_end_before_their_message_comes(server: ServerProcess) -> None:
    with Attacker(server.address) as attacker:
        for method in (STEP, STREAM, "/inference.GRPCInferenceService/ModelInfer"):
            stream = attacker.call(method, ends=False)
            attacker.flush()
            assert attacker.answer(stream).refusal == UNAUTHENTICATED


def test_a_message_has_to_come_in_time(server: ServerProcess) -> None:
    with Attacker(server.address) as attacker:
        begun = time.monotonic()
        silent = attacker.call(STEP, metadata=MINE, ends=False)
        half = attacker.call(STEP, metadata=MINE, ends=False)
        attacker.h2.send_data(half, b"\0\0\0\1\0" + bytes(16))
        probe = attacker.call(CHECK, ends=False)
        attacker.flush()
        late = Refusal("DEADLINE_EXCEEDED", "DEADLINE_EXCEEDED")
        assert refusals(attacker, [silent, half, probe]) == {late: 3}
        assert time.monotonic() - begun >= 1
        none = attacker.call(STEP, metadata=MINE)
        attacker.flush()
        assert attacker.answer(none).refusal == MALFORMED


async def test_silent_calls_keep_nobody_out(server: ServerProcess) -> None:
    """As many as the server takes, again and again; the others are told when to come back."""
    attackers = [Attacker(server.address) for _ in range(2)]
    streams = [
        [attacker.call(STEP, metadata=MINE, ends=False) for _ in range(30)]
        for attacker in attackers
    ]
    for attacker in attackers:
        attacker.flush()
    async with Wire(server.address, MINE) as wire:
        models = partial(wire.models.ListModels, model_pb2.ListModelsRequest(), metadata=MINE)
        await until(lambda: server.metric("conveyor_rejected_total", reason="CALLS_LIMIT") >= 20)
        said = await refused(models())
        assert said == CALLS_LIMIT
        assert said.metadata == {"limit": "limits.concurrent_calls_max", "maximum": "40"}
        assert said.retry_seconds == 0.5
        await wire.health.Check(health_pb2.HealthCheckRequest())
        late = Refusal("DEADLINE_EXCEEDED", "DEADLINE_EXCEEDED")
        ended = sum(map(refusals, attackers, streams), Counter())
        assert ended == {late: 40, CALLS_LIMIT: 20}
        await models()
    for attacker in attackers:
        attacker.socket.close()


async def test_calls_at_their_limit(server: ServerProcess) -> None:
    with Attacker(server.address) as one, Attacker(server.address) as other:
        kept = [one.call(STREAM, metadata=MINE, ends=False) for _ in range(30)]
        kept += [other.call(STREAM, metadata=MINE, ends=False) for _ in range(9)]
        one.flush()
        other.flush()
        async with Wire(server.address, MINE) as wire:
            await until(lambda: server.metric("conveyor_streams") == 39)
            await wire.models.ListModels(model_pb2.ListModelsRequest(), metadata=MINE)
    await until(lambda: server.metric("conveyor_streams") == 0)


def test_a_connection_is_told_how_many_calls_it_may_make(server: ServerProcess) -> None:
    with Attacker(server.address) as attacker:
        attacker.read_until(
            lambda: attacker.h2.remote_settings.max_concurrent_streams == 240, "settings come"
        )
        streams = [attacker.call(STREAM, metadata=MINE, ends=False) for _ in range(31)]
        attacker.flush()
        said = attacker.answer(streams[30]).refusal
        assert said == CALLS_LIMIT
        assert said.metadata == {"limit": "limits.connection_calls_max", "maximum": "30"}
        assert attacker.answers[streams[29]].refusal is None


# --- health ---------------------------------------------------------------------------------------


async def test_health_answers_while_others_watch_and_wait(server: ServerProcess) -> None:
    with Attacker(server.address) as attacker:
        request = health_pb2.HealthCheckRequest()
        watches = [attacker.call(WATCH, request) for _ in range(5)]
        attacker.flush()
        assert refusals(attacker, watches[3:]) == {CALLS_LIMIT: 2}
        attacker.read_until(
            lambda: all(attacker.answers[stream].data for stream in watches[:3]), "watches answer"
        )
        async with Wire(server.address) as wire:
            await wire.health.Check(request)
            watch = wire.health.Watch(request)
            assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
            watch.cancel()


async def test_of_silent_checks_the_oldest_is_given_up(server: ServerProcess) -> None:
    attackers = [Attacker(server.address) for _ in range(2)]
    first = [attackers[0].call(CHECK, ends=False) for _ in range(30)]
    attackers[0].flush()
    second = [attackers[1].call(CHECK, ends=False) for _ in range(30)]
    attackers[1].flush()
    async with Wire(server.address) as wire:
        await wire.health.Check(health_pb2.HealthCheckRequest())
    late = Refusal("DEADLINE_EXCEEDED", "DEADLINE_EXCEEDED")
    ended = refusals(attackers[0], first) + refusals(attackers[1], second)
    assert ended[CALLS_LIMIT] >= 20
    assert set(ended) == {CALLS_LIMIT, late}
    for attacker in attackers:
        attacker.socket.close()


async def test_watches_in_all(start_server: StartServer) -> None:
    server = start_server({"limits.health_calls_max": 4, "limits.connection_watches_max": 3})
    request = health_pb2.HealthCheckRequest()
    with Attacker(server.address) as one, Attacker(server.address) as other:
        three = [one.call(WATCH, request) for _ in range(3)]
        one.flush()
        one.read_until(lambda: all(one.answers[each].data for each in three), "three watch")
        two = [other.call(WATCH, request) for _ in range(2)]
        other.flush()
        assert other.answer(two[1]).refusal == CALLS_LIMIT
        other.read_until(lambda: bool(other.answers[two[0]].data), "the fourth watches")


# --- what cannot be parsed ------------------------------------------------------------------------


def test_malformed_messages_are_the_callers_mistake(server: ServerProcess) -> None:
    """Whoever sends them, and on whatever kind of call; the log has nothing of it."""
    bad_utf8 = b"\x0a\x02\xff\xfe"  # a session id that is no text
    count = server.metric("conveyor_rejected_total", reason="INVALID_FIELD")
    log = len(server.log())
    with Attacker(server.address) as attacker:
        calls = [
            attacker.call(method, data, metadata=MINE)
            for method in (STEP, STREAM, GENERATE)
            for data in (GARBAGE, bad_utf8)
        ]
        attacker.flush()
        assert refusals(attacker, calls) == {MALFORMED: 6}
        nobodys = [attacker.call(CHECK, GARBAGE) for _ in range(20)]
        attacker.flush()
        assert refusals(attacker, nobodys) == {MALFORMED: 20}
        strangers = [attacker.call(STEP, GARBAGE) for _ in range(10)]
        attacker.flush()
        assert refusals(attacker, strangers) == {UNAUTHENTICATED: 10}
        answer = attacker.answers[calls[0]].refusal
        assert answer is not None
        assert answer.metadata == {"field": "message"}
    assert server.metric("conveyor_rejected_total", reason="INVALID_FIELD") == count + 26
    assert server.log()[log:] == []


async def test_a_client_that_goes_while_its_call_fails_is_no_error_of_ours(
    server: ServerProcess,
) -> None:
    log = len(server.log())
    for _ in range(20):
        with Attacker(server.address) as attacker:
            for _ in range(15):
                attacker.call(STEP, GARBAGE, metadata=MINE)
                attacker.call(LIST_MODELS, b"", metadata=MINE)
            attacker.flush()
    started = {"grpc_type": "unary_unary"}
    async with Wire(server.address, MINE) as wire:
        await wire.models.ListModels(model_pb2.ListModelsRequest(), metadata=MINE)

    def all_ended() -> bool:
        return server.metric("grpc_server_started_total", **started) == server.metric(
            "grpc_server_handled_total", **started
        )

    await until(all_ended)
    assert server.log()[log:] == []


# --- tokens and metadata --------------------------------------------------------------------------


@pytest.mark.parametrize("others", [("Bearer wrong",), (f"Bearer {TOKEN}",)])
def test_two_authorizations_are_none(server: ServerProcess, others: tuple[str, ...]) -> None:
    with Attacker(server.address) as attacker:
        twice = [("authorization", other) for other in others]
        calls = [
            attacker.call(LIST_MODELS, b"", metadata=[*twice, *MINE]),
            attacker.call(LIST_MODELS, b"", metadata=[*MINE, *twice]),
        ]
        attacker.flush()
        assert refusals(attacker, calls) == {UNAUTHENTICATED: 2}
        once = attacker.call(LIST_MODELS, b"", metadata=MINE)
        attacker.flush()
        answer = attacker.answer(once).refusal
        assert answer is not None
        assert answer.code == "OK"


def test_every_entry_of_the_metadata_counts(server: ServerProcess) -> None:
    with Attacker(server.address) as attacker:
        repeated = [("note", "x" * 1000)] * 17
        too_much = attacker.call(LIST_MODELS, b"", metadata=[*MINE, *repeated])
        within = attacker.call(LIST_MODELS, b"", metadata=[*MINE, *repeated[1:]])
        attacker.flush()
        said = attacker.answer(too_much).refusal
        assert said == Refusal("RESOURCE_EXHAUSTED", "MESSAGE_TOO_LARGE")
        answer = attacker.answer(within).refusal
        assert answer is not None
        assert answer.code == "OK"


# --- bytes ----------------------------------------------------------------------------------------


async def test_bytes_of_requests_are_bounded(start_server: StartServer) -> None:
    """Two megabytes in all: a late message counts as the largest, one that runs as what it is."""
    server = start_server(
        {
            "shutdown.grace_seconds": 1,
            "limits.request_bytes_max": 2 * 2**20,
            "limits.message_bytes_max": 2**20,
            "limits.frame_entries_max": 1,
            "limits.message_seconds_max": 5,
        }
    )
    megabyte = session_pb2.StepRequest(session_id="s", rows=bytes(2**20 - 64))
    with Attacker(server.address) as attacker:
        late = attacker.call(STEP, ends=False)
        attacker.h2.send_data(late, b"\0\0\x0f\0\0")
        attacker.flush()
        async with Wire(server.address) as wire:
            # Beside one that is late nothing as large fits, and what is small does.
            second = attacker.call(STEP, ends=False)
            attacker.flush()
            said = attacker.answer(second).refusal
            assert said == CALLS_LIMIT
            assert said.metadata == {
                "limit": "limits.request_bytes_max",
                "maximum": str(2 * 2**20),
            }
            assert (await refused(wire.get("s"))).reason == "SESSION_NOT_FOUND"
            attacker.reset(late)
            attacker.flush()

            async def fits() -> bool:
                return (await refused(wire.sessions.Step(megabyte))).reason == "SESSION_NOT_FOUND"

            await until(fits)

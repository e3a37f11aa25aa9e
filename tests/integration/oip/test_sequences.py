"""A sequence is a session: how it begins and ends, what it shares with the native services."""

from __future__ import annotations

import asyncio
import signal
import time
from itertools import count
from typing import Any

import grpc
import numpy as np
import numpy.typing as npt
import pytest
from grpc import aio

from conveyor.oip import inference_pb2
from conveyor.v1 import session_pb2
from tests.integration.conftest import StartServer
from tests.integration.oip.protocol import Protocol, output
from tests.integration.process import ServerProcess
from tests.integration.wire import Refusal, Wire, refused, until

IDS = count(2_000_000)
ROW = np.array([[0.5, -1.0, 2.0]], dtype=np.float32)
HEAVY = np.zeros((4000, 8), dtype=np.float32)
"""Seconds of work."""
STREAM = {"grpc_method": "ModelStreamInfer"}
NOT_STARTED = "must specify the START flag on the first request of the sequence"
UNAVAILABLE = Refusal("UNAVAILABLE", "SERVER_DRAINING")


def rows(steps: int, seed: int = 0) -> npt.NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal((steps, 3)).astype(np.float32)


def stepped(answers: list[inference_pb2.ModelStreamInferResponse]) -> bytes:
    """The output rows of answers that are no errors."""
    assert not [each.error_message for each in answers if each.error_message]
    return b"".join(output(each.infer_response).tobytes() for each in answers)


async def sessions(wire: Wire) -> dict[str, session_pb2.Session]:
    """The caller's sessions by id."""
    request = session_pb2.ListSessionsRequest(page_size=1000)
    listed = await wire.sessions.ListSessions(request, metadata=wire.metadata)
    return {each.session_id: each for each in listed.sessions}


async def test_start_opens_a_session_and_end_closes_it(protocol: Protocol, wire: Wire) -> None:
    x, name = rows(4), f"life-{next(IDS)}"
    session_id = f"oip.s:tiny:{name}"
    out = [await protocol.infer("tiny", x[:2], name, start=True)]
    session = (await sessions(wire))[session_id]
    assert (session.model, session.version, session.applied_step) == ("tiny", 1, 2)
    assert session.idle_ttl.ToSeconds() == 600
    out.append(await protocol.infer("tiny", x[2:3], name))
    out.append(await protocol.infer("tiny", x[3:], name, end=True))
    assert session_id not in await sessions(wire)
    found = b"".join(output(each).tobytes() for each in out)
    assert found == await wire.predict("tiny", x)
    assert NOT_STARTED in (await refused(protocol.infer("tiny", x, name))).message


async def test_a_session_can_be_worked_on_by_both_protocols(protocol: Protocol, wire: Wire) -> None:
    x, number = rows(5), next(IDS)
    session_id = f"oip.i:tiny:{number}"
    out = output(await protocol.infer("tiny", x[:2], number, start=True)).tobytes()
    out += (await wire.step(session_id, 3, x[2:3])).rows
    out += output(await protocol.infer("tiny", x[3:4], number)).tobytes()
    again = await wire.step(session_id, 4, x[3:4])  # a step of the other protocol, once more
    assert again.duplicate
    out += output(await protocol.infer("tiny", x[4:], number)).tobytes()
    assert out == await wire.predict("tiny", x)
    await wire.close(session_id)
    assert NOT_STARTED in (await refused(protocol.infer("tiny", x, number))).message


async def test_start_takes_a_live_sequence_back_to_its_beginning(
    protocol: Protocol, wire: Wire
) -> None:
    x, number = rows(3), next(IDS)
    expected = await wire.predict("tiny", x)
    for _ in range(2):
        out = [await protocol.infer("tiny", x[:1], number, start=True)]
        out.append(await protocol.infer("tiny", x[1:], number))
        assert b"".join(output(each).tobytes() for each in out) == expected
    assert (await wire.get(f"oip.i:tiny:{number}")).applied_step == 3


async def test_what_is_queued_finishes_before_a_start(protocol: Protocol) -> None:
    number = next(IDS)
    async with protocol.stream() as stream:
        await stream.send("heavy", HEAVY[:500], number, start=True)
        await stream.send("heavy", HEAVY[:500], number)
        await stream.send("heavy", HEAVY[:500], number, start=True)
        first, second, third = [output(each.infer_response) for each in await stream.answers(3)]
    assert len(first) == len(second) == 500
    assert first.tobytes() == third.tobytes() != second.tobytes()


async def test_after_its_end_a_sequence_has_to_start_even_if_nothing_is_answered_yet(
    protocol: Protocol,
) -> None:
    number = next(IDS)
    async with protocol.stream() as stream:
        await stream.send("heavy", HEAVY[:500], number, start=True, end=True)
        await stream.send("heavy", HEAVY[:1], number, request_id="late")
        await stream.send("heavy", HEAVY[:500], number, start=True)
        first, late, again = await stream.answers(3)
    assert NOT_STARTED in late.error_message
    assert late.infer_response.id == "late"
    assert stepped([first]) == stepped([again])


async def test_answers_leave_in_the_order_of_requests_across_sequences(protocol: Protocol) -> None:
    async with protocol.stream() as stream:
        await stream.send("heavy", HEAVY[:800], next(IDS), start=True, request_id="0")
        for number in range(1, 20):
            await stream.send("tiny", ROW, next(IDS), start=True, request_id=f"{number}")
        answers = await stream.end()
    assert [each.infer_response.id for each in answers] == [f"{number}" for number in range(20)]
    assert all(
        each.infer_response.parameters["triton_final_response"].bool_param for each in answers
    )


async def test_a_bad_request_costs_the_stream_nothing(protocol: Protocol, wire: Wire) -> None:
    x, number = rows(2), next(IDS)
    async with protocol.stream() as stream:
        await stream.send("tiny", x[:1], number, start=True)
        await stream.send("tiny", ROW, number, raw=b"123", request_id="short")
        await stream.send("unknown", ROW, number, request_id="unknown")
        await stream.send("tiny", ROW, request_id="none")
        await stream.send("tiny", x[1:], number)
        answers = await stream.end()
    assert [each.infer_response.id for each in answers] == ["", "short", "unknown", "none", ""]
    assert "bytes" in answers[1].error_message
    unknown = "Request for unknown model: 'unknown' is not found; this server has broad, "
    assert answers[2].error_message.startswith(unknown)
    assert "correlation ID" in answers[3].error_message
    assert not answers[1].infer_response.outputs
    assert stepped([answers[0], answers[4]]) == await wire.predict("tiny", x)


async def test_a_stream_that_ends_on_errors_ends_with_their_status(protocol: Protocol) -> None:
    async with protocol.stream(triton_grpc_error="true") as stream:
        await stream.send("heavy", HEAVY[:100], next(IDS), start=True)
        await stream.send("tiny", ROW, 5_555, request_id="lost")
        (first,) = await stream.answers(1)
        assert not first.error_message
        with pytest.raises(aio.AioRpcError) as caught:
            await stream.end()
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert NOT_STARTED in (caught.value.details() or "")


async def test_what_a_cancelled_stream_sent_is_dropped(
    server: ServerProcess, protocol: Protocol, wire: Wire
) -> None:
    number = next(IDS)
    session_id = f"oip.i:heavy:{number}"
    async with protocol.stream() as stream:
        await stream.send("heavy", HEAVY[:4], number, start=True)
        await stream.answers(1)
        for _ in range(4):
            await stream.send("heavy", HEAVY, number)

        async def begun() -> bool:
            return (await wire.get(session_id)).applied_step > 4

        await until(begun)
        stream.call.cancel()

    async def idle() -> bool:
        return (await wire.get(session_id)).state == session_pb2.SESSION_STATE_IDLE

    await until(idle)
    assert (await wire.get(session_id)).applied_step < 4 + 4 * len(HEAVY)
    await protocol.infer("heavy", HEAVY[:1], number, end=True)  # it lives on
    assert server.metric("conveyor_inbox_chunks") == 0


async def test_what_a_cancelled_call_sent_is_dropped(
    server: ServerProcess, protocol: Protocol, wire: Wire
) -> None:
    number = next(IDS)
    await protocol.infer("heavy", HEAVY[:1], number, start=True)
    ahead = asyncio.create_task(protocol.infer("heavy", HEAVY, number))
    behind = asyncio.create_task(protocol.infer("heavy", HEAVY[:10], number))
    await until(lambda: server.metric("conveyor_inbox_chunks") == 2)
    behind.cancel()
    await asyncio.wait([behind])
    await until(lambda: server.metric("conveyor_inbox_chunks") == 1)
    await ahead
    assert (await wire.get(f"oip.i:heavy:{number}")).applied_step == 1 + len(HEAVY)


async def test_a_session_of_another_model_is_no_sequence_of_this_one(
    protocol: Protocol, wire: Wire
) -> None:
    number = next(IDS)
    session_id = f"oip.i:tiny:{number}"
    await wire.open("heavy", session_id=session_id)
    assert NOT_STARTED in (await refused(protocol.infer("tiny", ROW, number))).message
    out = await protocol.infer("tiny", ROW, number, start=True)
    assert (out.model_name, output(out).tobytes()) == ("tiny", await wire.predict("tiny", ROW))
    assert (await wire.get(session_id)).model == "tiny"


async def test_a_request_that_does_not_begin_in_time_is_not_run(
    protocol: Protocol, wire: Wire
) -> None:
    number = next(IDS)
    async with protocol.stream() as stream:
        await stream.send("heavy", HEAVY[:1000], number, start=True)
        timeout = {"timeout": {"int64_param": 1}}
        await stream.send("heavy", HEAVY[:1], number, parameters=timeout)
        await stream.send("heavy", HEAVY[:1], number)
        answers = await stream.end()
    assert "did not start before its deadline" in answers[1].error_message
    assert [bool(each.error_message) for each in answers] == [False, True, False]
    assert (await wire.get(f"oip.i:heavy:{number}")).applied_step == 1001


async def test_a_quarantined_sequence_says_so_and_starts_again(
    protocol: Protocol, wire: Wire
) -> None:
    number = next(IDS)
    wild, still = np.full((3, 1), 1000.0, np.float32), np.zeros((1, 1), np.float32)
    found = await refused(protocol.infer("explosive", wild, number, start=True))
    assert found == Refusal("DATA_LOSS", "SESSION_QUARANTINED")
    assert (await refused(protocol.infer("explosive", still, number))).code == "DATA_LOSS"
    out = await protocol.infer("explosive", still, number, start=True)
    assert output(out).tobytes() == await wire.predict("explosive", still)
    await refused(protocol.infer("explosive", wild, number, end=True))
    assert f"oip.i:explosive:{number}" not in await sessions(wire)


async def test_sequences_are_each_principals_own(start_server: StartServer) -> None:
    tokens = {"ann": "a" * 16, "bob": "b" * 16}
    config = "[auth.tokens]\n" + "".join(f'"{token}" = "{who}"\n' for who, token in tokens.items())
    server = start_server({"shutdown.grace_seconds": 2}, config=config)

    def bearer(who: str) -> tuple[tuple[str, str], ...]:
        return (("authorization", f"Bearer {tokens[who]}"),)

    async with (
        Protocol(server.address) as nobody,
        Protocol(server.address, bearer("ann")) as ann,
        Protocol(server.address, bearer("bob")) as bob,
        Wire(server.address, bearer("ann")) as wire,
    ):
        denied = Refusal("UNAUTHENTICATED", "UNAUTHENTICATED")
        assert await refused(nobody.infer("tiny", ROW, 1, start=True)) == denied
        ready = inference_pb2.ServerReadyRequest()
        assert await refused(nobody.stub.ServerReady(ready)) == denied
        async with nobody.stream() as stream:
            with pytest.raises(aio.AioRpcError, match="Bearer"):
                await stream.end()
        first = await ann.infer("tiny", ROW, 1, start=True)
        assert NOT_STARTED in (await refused(bob.infer("tiny", ROW, 1))).message
        second = await bob.infer("tiny", ROW, 1, start=True)
        assert first.raw_output_contents == second.raw_output_contents
        assert list(await sessions(wire)) == ["oip.i:tiny:1"]


async def test_the_limits_of_sessions_hold_for_sequences(start_server: StartServer) -> None:
    server = start_server({"limits.principal_sessions_max": 2, "shutdown.grace_seconds": 2})
    async with Protocol(server.address) as protocol, protocol.stream() as stream:
        for number in (1, 2):
            await protocol.infer("tiny", ROW, number, start=True)
        full = Refusal("RESOURCE_EXHAUSTED", "PRINCIPAL_SESSIONS_LIMIT")
        assert await refused(protocol.infer("tiny", ROW, 3, start=True)) == full
        for _ in range(2):
            await stream.send("tiny", ROW, 3, start=True)
            await stream.send("tiny", ROW, 3)
        texts = [each.error_message for each in await stream.answers(4)]
        assert texts[0] == texts[2]
        assert "limits.principal_sessions_max is 2" in texts[0]
        assert NOT_STARTED in texts[1]
        assert texts[1] == texts[3]
        await protocol.infer("tiny", ROW, 1, start=True)  # a live one may begin again
        await protocol.infer("tiny", ROW, 1, end=True)
        await protocol.infer("tiny", ROW, 3, start=True)


async def test_an_idle_sequence_expires(start_server: StartServer) -> None:
    server = start_server({"limits.idle_seconds_default": 0.05, "shutdown.grace_seconds": 2})
    async with Protocol(server.address) as protocol, Wire(server.address) as wire:
        model = inference_pb2.ModelConfigRequest(name="tiny")
        batching = (await protocol.stub.ModelConfig(model)).config.sequence_batching
        assert batching.max_sequence_idle_microseconds == 50_000
        await protocol.infer("tiny", ROW, 1, start=True)

        async def gone() -> bool:
            return not await sessions(wire)

        await until(gone)
        assert NOT_STARTED in (await refused(protocol.infer("tiny", ROW, 1))).message
        assert server.metric("conveyor_sessions_ended_total", reason="expired") == 1


async def test_streams_of_both_protocols_are_counted_together(start_server: StartServer) -> None:
    server = start_server({"limits.streams_max": 1, "shutdown.grace_seconds": 2})
    async with Protocol(server.address) as protocol, protocol.stream() as stream:
        await stream.send("tiny", ROW, 1, start=True)
        await stream.answers(1)
        assert server.metric("conveyor_streams") == 1
        async with protocol.stream() as second:
            with pytest.raises(aio.AioRpcError) as caught:
                await second.end()
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


async def test_calls_messages_and_steps_are_counted(start_server: StartServer) -> None:
    server = start_server({"shutdown.grace_seconds": 2})
    async with Protocol(server.address) as protocol:
        await protocol.infer("tiny", ROW, 1, start=True)
        async with protocol.stream() as stream:
            for step in range(3):
                await stream.send("tiny", rows(2), 2, start=step == 0, end=step == 2)
            await stream.send("tiny", ROW, 3)
            assert len(await stream.end()) == 4
    assert server.metric("conveyor_steps_total", model="tiny") == 7
    assert server.metric("grpc_server_msg_received_total", **STREAM) == 4
    assert server.metric("grpc_server_msg_sent_total", **STREAM) == 4
    handled = {"grpc_method": "ModelInfer", "grpc_code": "OK"}
    assert server.metric("grpc_server_handled_total", **handled) == 1
    assert server.metric("conveyor_rejected_total", reason="INVALID_FIELD") == 1
    assert server.metric("conveyor_sessions_ended_total", reason="closed") == 1


async def test_failures_are_in_the_statistics(start_server: StartServer) -> None:
    server = start_server({"shutdown.grace_seconds": 2})
    async with Protocol(server.address) as protocol:
        await protocol.infer("tiny", rows(40), 1, start=True)
        await refused(protocol.infer("tiny", ROW, 1, shape=(2, 1, 3)))
        async with protocol.stream() as stream:
            await stream.send("tiny", ROW, 1, raw=b"")
            await stream.send("tiny", ROW, 1)
            await stream.end()
        async with protocol.stream(triton_grpc_error="true") as stream:
            await stream.send("tiny", ROW, 1, raw=b"")
            await refused(stream.end())
        wanted = inference_pb2.ModelStatisticsRequest(name="tiny", version="1")
        (found,) = (await protocol.stub.ModelStatistics(wanted)).model_stats
    assert (found.name, found.version) == ("tiny", "1")
    assert (found.inference_count, found.execution_count) == (2, 2)
    assert found.inference_stats.success.count == found.inference_stats.queue.count == 2
    assert found.inference_stats.fail.count == 3
    assert found.inference_stats.fail.ns > 0
    assert found.batch_stats[0].compute_infer == found.inference_stats.compute_infer
    assert abs(found.last_inference / 1e3 - time.time()) < 60


async def test_a_stopping_server_answers_what_it_took_and_is_unavailable(
    start_server: StartServer,
) -> None:
    server = start_server({"shutdown.grace_seconds": 20})
    async with Protocol(server.address) as protocol, Wire(server.address) as wire:
        await protocol.infer("tiny", ROW, 1, start=True)
        async with protocol.stream() as busy, protocol.stream() as idle:
            await idle.send("tiny", ROW, 2, start=True)
            await idle.answers(1)
            await busy.send("heavy", HEAVY, 1, start=True)

            async def begun() -> bool:
                live = await sessions(wire)
                return "oip.i:heavy:1" in live and live["oip.i:heavy:1"].applied_step > 0

            await until(begun)
            server.signal(signal.SIGTERM)
            with pytest.raises(aio.AioRpcError) as caught:
                async with asyncio.timeout(30):
                    await idle.call.read()
            assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
            await busy.send("tiny", ROW, 9, start=True, request_id="late")
            answer, late = await busy.answers(2)
            assert len(output(answer.infer_response)) == len(HEAVY)
            assert late.infer_response.id == "late"
            assert "shutting down" in late.error_message
            with pytest.raises(aio.AioRpcError) as caught:
                async with asyncio.timeout(30):
                    await busy.call.read()
            assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    assert server.wait() == 0


async def test_a_long_answer_waits_for_a_reader(start_server: StartServer) -> None:
    """More is wanted than may wait: the stream is not read until there is room, and all comes."""
    server = start_server({"limits.outbox_bytes_max": 100_000, "shutdown.grace_seconds": 2})
    x = np.zeros((4, 1), dtype=np.float32)
    async with Protocol(server.address) as protocol, protocol.stream() as stream:
        for step in range(40):
            await stream.send("broad", x, 1, start=step == 0, request_id=f"{step}")
        answers: list[Any] = await stream.end()
    assert [each.infer_response.id for each in answers] == [f"{step}" for step in range(40)]
    assert len(stepped(answers)) == 40 * 4 * 4096 * 4

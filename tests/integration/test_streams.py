"""StreamSteps: many sessions on a stream, many streams, and every way they part."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from grpc import aio

from conveyor.v1 import session_pb2
from tests.integration.process import ServerProcess
from tests.integration.wire import (
    ALL,
    LAST,
    NONE,
    Entry,
    Refusal,
    Stream,
    Wire,
    refusal,
    refused,
    until,
)

Rows = Callable[..., npt.NDArray[Any]]
SUPERSEDED = Refusal("ABORTED", "SESSION_SUPERSEDED")


async def test_a_stream_opens_steps_and_closes(wire: Wire, rows: Rows) -> None:
    x = rows(5)
    async with wire.stream() as stream:
        opened = await stream.open("tiny")
        assert opened.handle > 0
        assert opened.session.session.epoch == 1
        out = await stream.steps(opened.handle, 1, x, 2)
        assert out == await wire.predict("tiny", x)
        await stream.send(close=session_pb2.CloseFrame(handle=opened.handle))
        closed = await stream.next("closed")
        assert (closed.handle, closed.applied_step, closed.status.code) == (opened.handle, 5, 0)
        gone = Refusal("NOT_FOUND", "SESSION_CLOSED")
        assert await refused(wire.get(opened.session.session.session_id)) == gone
        await stream.end()
        assert not stream.unread


async def test_many_sessions_on_one_stream_keep_their_bits(wire: Wire, rows: Rows) -> None:
    inputs = [rows(12, seed=number) for number in range(40)]
    outs = [bytearray() for _ in inputs]
    async with wire.stream() as stream:
        handles = [(await stream.open("tiny")).handle for _ in inputs]
        assert len(set(handles)) == len(handles)
        for step in range(0, 12, 2):
            order = np.random.default_rng(step).permutation(len(inputs))
            await stream.send_steps(
                *(Entry(handles[n], step + 1, inputs[n][step : step + 2]) for n in order)
            )
            for piece in await stream.pieces(len(inputs), 2):
                outs[handles.index(piece.handle)] += piece.rows
    for x, out in zip(inputs, outs, strict=True):
        assert bytes(out) == await wire.predict("tiny", x)


async def test_results_of_one_tick_leave_in_one_frame(wire: Wire, rows: Rows) -> None:
    async with wire.stream() as stream:
        handles = [(await stream.open("tiny")).handle for _ in range(20)]
        await stream.send_steps(*(Entry(handle, 1, rows(1)) for handle in handles))
        results = await stream.next("results")
        assert [entry.handle for entry in results.entries] == handles


async def test_many_streams_at_once_are_batched_together(
    wire: Wire, server: ServerProcess, rows: Rows
) -> None:
    x = rows(64)

    async def run() -> bytes:
        async with wire.stream() as stream:
            handle = (await stream.open("tiny")).handle
            outs = [await stream.steps(handle, t + 1, x[t : t + 1], 2) for t in range(64)]
            await stream.send(close=session_pb2.CloseFrame(handle=handle))
            await stream.next("closed")
            return b"".join(outs)

    def ticks() -> tuple[float, float]:
        sessions = server.metric("conveyor_tick_sessions_sum", model="tiny")
        return sessions, server.metric("conveyor_tick_sessions_count", model="tiny")

    sessions_before, ticks_before = ticks()
    outs = await asyncio.gather(*(run() for _ in range(16)))
    sessions_after, ticks_after = ticks()
    assert set(outs) == {await wire.predict("tiny", x)}
    assert sessions_after - sessions_before == 16 * 64
    assert ticks_after - ticks_before < 16 * 64 / 2


async def test_pipelined_chunks_are_answered_in_order(wire: Wire, rows: Rows) -> None:
    x = rows(100)
    async with wire.stream() as stream:
        handle = (await stream.open("tiny")).handle
        for t in range(0, 100, 5):
            await stream.send_steps(Entry(handle, t + 1, x[t : t + 5]))
        pieces = await stream.pieces(20, 2)
    assert [piece.first_step for piece in pieces] == list(range(1, 101, 5))
    assert b"".join(piece.rows for piece in pieces) == await wire.predict("tiny", x)


async def test_several_chunks_of_one_session_in_one_frame_run_in_order(
    wire: Wire, rows: Rows
) -> None:
    x = rows(6)
    async with wire.stream() as stream:
        handle = (await stream.open("tiny")).handle
        await stream.send_steps(
            Entry(handle, 1, x[:1]), Entry(handle, 2, x[1:4]), Entry(handle, 5, x[4:])
        )
        pieces = await stream.pieces(3, 2)
    assert b"".join(piece.rows for piece in pieces) == await wire.predict("tiny", x)


async def test_output_modes(wire: Wire, rows: Rows) -> None:
    x = rows(40)  # several quanta
    whole = await wire.predict("tiny", x)
    async with wire.stream() as stream:
        handles = [(await stream.open("tiny")).handle for _ in range(4)]
        modes = [0, ALL, LAST, NONE]
        for handle, mode in zip(handles, modes, strict=True):
            out = await stream.steps(handle, 1, x, 2, output=mode)
            expected = {LAST: whole[-8:], NONE: b""}.get(mode, whole)
            assert out == expected
            # What was not sent back was applied all the same.
            follow = await stream.steps(handle, 41, x[:1], 2)
            assert follow == (await wire.predict("tiny", np.concatenate((x, x[:1]))))[-8:]


async def test_a_long_chunk_is_answered_in_pieces_and_lets_others_between(
    wire: Wire, rows: Rows
) -> None:
    long, short = rows(2000, 8), rows(1, 8, seed=1)
    async with wire.stream() as stream:
        one = (await stream.open("heavy")).handle
        other = (await stream.open("heavy")).handle
        await stream.send_steps(Entry(one, 1, long, LAST))
        first = await stream.pieces(1, 1)
        assert (first[0].handle, first[0].length) == (one, 16)
        await stream.send_steps(Entry(other, 1, short))
        done, between, answered = 16, 0, False
        while done < 2000:
            for entry in (await stream.next("results")).entries:
                if entry.handle == other:
                    answered = True
                    continue
                assert entry.first_step == done + 1
                done += entry.length
                assert entry.rows_length == (done == 2000)
                between += answered
        assert between > 10, "the other session waited for the long chunk"


async def test_half_closing_lets_what_was_sent_be_answered(wire: Wire, rows: Rows) -> None:
    x = rows(300, 8)
    async with wire.stream() as stream:
        opened = await stream.open("heavy")
        await stream.send_steps(Entry(opened.handle, 1, x, NONE))
        await stream.end()
        assert stream.call.done()
        assert (await stream.call.code()).name == "OK"
        done = [entry for frame in stream.unread for entry in frame.results.entries]
        assert sum(entry.length for entry in done) == 300
    assert (await wire.get(opened.session.session.session_id)).applied_step == 300


async def test_an_open_sent_just_before_half_closing_is_answered(wire: Wire) -> None:
    async with wire.stream() as stream:
        request = session_pb2.OpenSessionRequest(model="tiny")
        await stream.send(open=session_pb2.OpenFrame(tag=9, session=request))
        await stream.end()
        assert [frame.opened.tag for frame in stream.unread] == [9]


async def test_cancelling_detaches_the_session_and_drops_what_waits(wire: Wire, rows: Rows) -> None:
    x = rows(16_384, 8)
    async with wire.stream() as stream:
        opened = await stream.open("heavy")
        await stream.send_steps(Entry(opened.handle, 1, x, NONE))
        await stream.pieces(1, 1)
    session_id = opened.session.session.session_id

    async def idle() -> bool:
        session = await wire.get(session_id)
        return session.state == session_pb2.SESSION_STATE_IDLE

    await until(idle)
    session = await wire.get(session_id)
    assert 16 <= session.applied_step < 16_384
    assert session.epoch == 1
    follow = await wire.step(session_id, session.applied_step + 1, x[:1])
    assert follow.length == 1


async def test_a_dropped_connection_resumes_with_the_bits_of_an_unbroken_run(
    server: ServerProcess, wire: Wire, rows: Rows
) -> None:
    x = rows(200, 4)
    out = bytearray()
    session_id, token, handle, applied = "", "", 0, 0
    for cut in (37, 90, 91, 200):
        async with Wire(server.address) as connection, connection.stream() as stream:
            if session_id:
                opened = await stream.open(
                    session_id=session_id, token=token, mode=session_pb2.OPEN_MODE_RESUME
                )
                assert opened.session.resumed
            else:
                opened = await stream.open("deep")
            session_id, token = opened.session.session.session_id, opened.session.token
            handle, applied = opened.handle, opened.session.session.applied_step
            assert applied == len(out) // 12
            out += await stream.steps(handle, applied + 1, x[applied:cut], 3)
    assert bytes(out) == await wire.predict("deep", x)


async def test_a_newer_stream_takes_the_session_over(wire: Wire, rows: Rows) -> None:
    x = rows(4)
    async with wire.stream() as older, wire.stream() as newer:
        first = await older.open("tiny")
        session_id = first.session.session.session_id
        out = await older.steps(first.handle, 1, x[:2], 2)
        second = await newer.open(session_id=session_id)
        assert (second.session.session.epoch, second.session.session.applied_step) == (2, 2)
        closed = await older.next("closed")
        assert (closed.handle, closed.applied_step) == (first.handle, 2)
        assert refusal(closed.status) == SUPERSEDED
        out += await newer.steps(second.handle, 3, x[2:], 2)
        assert out == await wire.predict("tiny", x)
        # The older stream goes on, without that session.
        await older.send_steps(Entry(first.handle, 5, x[:1]))
        said, frame = await older.failure()
        assert said == Refusal("INVALID_ARGUMENT", "UNKNOWN_HANDLE")
        assert (frame.handle, frame.first_step) == (first.handle, 5)
        again = await older.open("tiny")
        await older.steps(again.handle, 1, x, 2)


async def test_chunks_that_wait_when_a_newer_stream_comes_are_not_run(
    wire: Wire, rows: Rows
) -> None:
    x = rows(4000, 8)
    async with wire.stream() as older, wire.stream() as newer:
        first = await older.open("heavy")
        await older.send_steps(Entry(first.handle, 1, x, NONE))
        await older.pieces(1, 1)
        session_id = first.session.session.session_id
        second = await newer.open(session_id=session_id)
        applied = second.session.session.applied_step
        assert applied < 4000
        said, frame = await older.failure()
        assert said == SUPERSEDED
        assert frame.first_step == applied + 1
        assert refusal((await older.next("closed")).status) == SUPERSEDED
        await newer.steps(second.handle, applied + 1, x[:1], 1)
    assert (await wire.get(session_id)).applied_step == applied + 1


async def test_opening_one_session_twice_on_a_stream_closes_the_first_handle(
    wire: Wire, rows: Rows
) -> None:
    async with wire.stream() as stream:
        first = await stream.open("tiny")
        second = await stream.open(session_id=first.session.session.session_id)
        assert second.handle != first.handle
        assert (await stream.next("closed")).handle == first.handle
        await stream.steps(second.handle, 1, rows(1), 2)


async def test_a_unary_step_and_a_stream_share_a_session(wire: Wire, rows: Rows) -> None:
    x = rows(6)
    async with wire.stream() as stream:
        opened = await stream.open("tiny")
        session_id = opened.session.session.session_id
        out = await stream.steps(opened.handle, 1, x[:2], 2)
        out += (await wire.step(session_id, 3, x[2:4])).rows
        assert await refused(wire.step(session_id, 5, x[4:5], epoch=7)) == SUPERSEDED
        await stream.send_steps(Entry(opened.handle, 3, x[2:3]))
        assert (await stream.pieces(1, 2))[0].duplicate
        out += await stream.steps(opened.handle, 5, x[4:], 2)
    assert out == await wire.predict("tiny", x)


async def test_detaching_leaves_the_session_alive(wire: Wire, rows: Rows) -> None:
    async with wire.stream() as stream:
        opened = await stream.open("tiny")
        await stream.steps(opened.handle, 1, rows(3), 2)
        await stream.send(close=session_pb2.CloseFrame(handle=opened.handle, detach=True))
        closed = await stream.next("closed")
        assert (closed.status.code, closed.applied_step) == (0, 3)
        session_id = opened.session.session.session_id
        again = await stream.open(session_id=session_id)
        assert again.handle != opened.handle
        assert again.session.session.applied_step == 3


async def test_closing_waits_for_what_was_sent_before(wire: Wire, rows: Rows) -> None:
    async with wire.stream() as stream:
        opened = await stream.open("heavy")
        await stream.send_steps(Entry(opened.handle, 1, rows(200, 8), NONE))
        await stream.send(close=session_pb2.CloseFrame(handle=opened.handle))
        closed = await stream.next("closed")
        assert (closed.status.code, closed.applied_step) == (0, 200)


async def test_closing_from_elsewhere_tells_the_stream(wire: Wire, rows: Rows) -> None:
    async with wire.stream() as stream:
        opened = await stream.open("tiny")
        await stream.steps(opened.handle, 1, rows(2), 2)
        await wire.close(opened.session.session.session_id)
        closed = await stream.next("closed")
        assert refusal(closed.status) == Refusal("NOT_FOUND", "SESSION_CLOSED")
        assert closed.applied_step == 2


async def test_a_heartbeat_is_answered_and_keeps_sessions_alive(wire: Wire) -> None:
    async with wire.stream() as stream:
        opened = await stream.open("tiny")
        session_id = opened.session.session.session_id
        before = (await wire.get(session_id)).active_time.ToMicroseconds()
        await stream.send(heartbeat=session_pb2.HeartbeatFrame(nonce=77))
        assert (await stream.next("heartbeat")).nonce == 77
        await until(lambda: _active_after(wire, session_id, before))


async def _active_after(wire: Wire, session_id: str, before: int) -> bool:
    return (await wire.get(session_id)).active_time.ToMicroseconds() > before


async def test_a_chunk_that_cannot_begin_in_time_is_not_run(wire: Wire, rows: Rows) -> None:
    async with wire.stream() as stream:
        opened = await stream.open("tiny")
        await stream.send_steps(Entry(opened.handle, 1, rows(2)), timeout_seconds=-1)
        said, frame = await stream.failure()
        assert said == Refusal("DEADLINE_EXCEEDED", "DEADLINE_EXCEEDED")
        assert (frame.handle, frame.first_step) == (opened.handle, 1)
        await stream.send_steps(Entry(opened.handle, 1, rows(2)), timeout_seconds=60)
        assert (await stream.pieces(1, 2))[0].first_step == 1


@pytest.mark.parametrize("chunks", [1, 3])
async def test_a_failed_chunk_fails_those_sent_after_it_and_nothing_else(
    wire: Wire, rows: Rows, chunks: int
) -> None:
    x = rows(10)
    async with wire.stream() as stream:
        one, other = (await stream.open("tiny")).handle, (await stream.open("tiny")).handle
        await stream.send_steps(
            Entry(one, 5, x[:1]),
            *(Entry(one, 6 + number, x[:1]) for number in range(chunks - 1)),
            Entry(other, 1, x),
        )
        for number in range(chunks):
            said, frame = await stream.failure()
            assert said == Refusal("FAILED_PRECONDITION", "STEP_GAP")
            assert said.metadata["expected_step"] == "1"
            assert (frame.handle, frame.first_step) == (one, 5 + number)
        pieces = await stream.pieces(1, 2)
        assert pieces[0].handle == other
        await stream.steps(one, 1, x, 2)


async def test_streams_on_one_connection_end_independently(wire: Wire, rows: Rows) -> None:
    async with wire.stream() as kept:
        opened = await kept.open("tiny")
        stream = Stream(wire)
        await stream.open("tiny")
        stream.cancel()
        with pytest.raises((aio.AioRpcError, asyncio.CancelledError)):
            await stream.call.read()
        await kept.steps(opened.handle, 1, rows(3), 2)
        assert not kept.call.done()


async def test_an_unknown_session_on_a_stream_leaves_it_open(wire: Wire, rows: Rows) -> None:
    async with wire.stream() as stream:
        said = await stream.open_or_fail(session_id="nobody", mode=session_pb2.OPEN_MODE_RESUME)
        assert said == Refusal("NOT_FOUND", "SESSION_NOT_FOUND")
        opened = await stream.open("tiny")
        await stream.steps(opened.handle, 1, rows(1), 2)

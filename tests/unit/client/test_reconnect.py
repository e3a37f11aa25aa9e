"""What happens when connections break, servers drain or restart, and others take the session."""

import asyncio
from collections.abc import AsyncIterator

import grpc
import numpy as np
import pytest

from conveyor.v1 import session_pb2
from conveyor_client import (
    DataLoss,
    DeadlineExceeded,
    LimitExceeded,
    Options,
    Reconnect,
    ServerError,
    SessionNotFound,
    SessionSuperseded,
    TransportError,
    Unauthenticated,
    Unavailable,
    aio,
)
from tests.unit.client.conftest import QUICK
from tests.unit.client.fake.refusals import Refusal, make_status
from tests.unit.client.fake.server import FakeServer, until
from tests.unit.client.fake.sessions import State, World


def assert_each_step_ran_once(world: World) -> None:
    for state in world.sessions.values():
        assert set(state.runs.values()) <= {1}
        assert sorted(state.runs) == list(range(1, state.applied + 1))


async def opened_again(session: aio.Session) -> None:
    """Waits until the session was opened a second time."""
    await until(lambda: session.epoch >= 2)


@pytest.mark.parametrize(
    ("code", "text"),
    [
        (grpc.StatusCode.UNAVAILABLE, "Socket closed"),
        (grpc.StatusCode.INTERNAL, "Received RST_STREAM with error code 2"),
        (grpc.StatusCode.CANCELLED, "RST_STREAM with error code 8"),
        (grpc.StatusCode.UNKNOWN, "Stream removed"),
    ],
)
async def test_a_break_in_the_middle_is_not_noticed(
    server: FakeServer, client: aio.Client, code: grpc.StatusCode, text: str
) -> None:
    server.faults.break_with, server.faults.break_with_text = code, text
    async with client.session("counter") as session:
        server.faults.break_after_results = 3
        outs = [out async for out in session.stream(np.ones((20, 2)), in_flight=8)]
        assert [out[0] for out in outs] == list(range(1, 21))
        assert server.streams_seen == 2
        assert session.epoch == 2
        assert_each_step_ran_once(server.world)


async def test_a_chunk_answered_in_part_is_finished_after_the_break(
    server: FakeServer, client: aio.Client
) -> None:
    server.faults.piece_steps_max = 10
    async with client.session("counter") as session:
        server.faults.break_after_results = 4
        out = await session.step(np.ones((60, 2)))
        np.testing.assert_array_equal(out[:, 0], np.arange(1, 61))
        assert_each_step_ran_once(server.world)
    again = [e for f in server.world.frames for e in f.steps.entries][-1]
    assert (again.first_step, again.length) == (41, 20)


async def test_no_more_is_in_flight_than_the_server_can_answer_again(
    server: FakeServer, client: aio.Client
) -> None:
    server.held_steps = 16
    async with client.session("counter") as session:
        for _ in range(5):
            server.faults.break_after_results = server.streams[0].results_sent
            out = await session.step(np.ones((100, 2)))  # every answer to what was sent is lost
            assert out[-1, 0] == session.applied_step
        assert session.epoch == 6
        assert_each_step_ran_once(server.world)


async def test_many_sessions_come_back_together(server: FakeServer, client: aio.Client) -> None:
    sessions = [client.session("counter") for _ in range(30)]
    await asyncio.gather(*(session.open() for session in sessions))

    async def run(session: aio.Session) -> list[float]:
        return [out[0] async for out in session.stream(np.ones((40, 2)), in_flight=4)]

    for _ in range(3):
        server.faults.break_after_results = 100
        outs = await asyncio.gather(*(run(session) for session in sessions))
    assert outs == [list(map(float, range(81, 121)))] * 30
    assert server.streams_seen == 4
    assert_each_step_ran_once(server.world)


async def test_a_server_restarted_on_the_same_port_is_found_again() -> None:
    world = World()
    server = await FakeServer(world).start()
    async with aio.Client(server.target, options=QUICK) as client:
        async with client.session("counter") as session:
            await session.step([1, 1])
            await server.stop()
            step = asyncio.ensure_future(session.step([2, 2]))
            other = FakeServer(world)
            other.port = server.port
            await other.start()
            assert (await step).tolist() == [3, 3]
            assert (await session.step([1, 1])).tolist() == [4, 4]
            assert_each_step_ran_once(world)
        await other.stop()


async def test_a_drain_loses_nothing_and_opens_elsewhere(
    server: FakeServer, client: aio.Client
) -> None:
    async with client.session("counter") as session, client.session("counter") as other:

        async def inputs() -> AsyncIterator[list[float]]:
            for n in range(40):
                if n == 20:
                    await server.drain(reconnect_after=0.01)
                yield [1, 1]

        outs = [out[0] async for out in session.stream(inputs(), in_flight=4)]
        assert outs == list(range(1, 41))
        assert (await other.step([1, 1])).tolist() == [1, 1]
        assert server.streams_seen == 2
        assert_each_step_ran_once(server.world)


async def test_chunks_a_draining_server_gives_back_are_run_elsewhere(
    server: FakeServer, client: aio.Client
) -> None:
    async with client.session("counter") as session:
        await session.step([1, 1])

        def refuse(state: State, first_step: int) -> None:
            if server.streams_seen == 1:
                raise Refusal("SERVER_DRAINING")

        server.faults.step_hook = refuse
        outs = await asyncio.gather(*(session.step([1, 1]) for _ in range(5)))
        assert [out[0] for out in outs] == [2, 3, 4, 5, 6]
        assert server.streams_seen == 2
        assert_each_step_ran_once(server.world)


async def test_a_moved_session_is_opened_again_on_the_same_stream(
    server: FakeServer, client: aio.Client
) -> None:
    async with client.session("counter") as session:
        moved = False

        def move(state: State, first_step: int) -> None:
            nonlocal moved
            if not moved:
                moved = True
                raise Refusal("SESSION_MOVED")

        server.faults.step_hook = move
        assert (await session.step([1, 1])).tolist() == [1, 1]
        assert server.streams_seen == 1
        assert session.epoch == 2


async def test_a_superseded_session_is_not_fought_over(
    server: FakeServer, client: aio.Client
) -> None:
    async with (
        aio.Client(server.target, options=QUICK) as newer,
        client.session("counter", session_id="both") as session,
    ):
        await session.step([1, 1])
        async with newer.resume("both") as taken:
            assert (await taken.step([1, 1])).tolist() == [2, 2]
            with pytest.raises(SessionSuperseded):
                await session.step([1, 1])
            assert (await taken.step([1, 1])).tolist() == [3, 3]
            assert taken.epoch == 2
    assert server.world.calls["CloseSession"] == 0


async def test_a_session_stepped_by_somebody_else_while_away_is_given_up(
    server: FakeServer, client: aio.Client
) -> None:
    session = client.session("counter", session_id="both")
    await session.open()
    await session.step([1, 1])
    state = server.world.sessions["both"]
    server.faults.break_after_results = 0
    # The break comes with the answer to step 2; before the client is back the session has moved on.
    step = asyncio.ensure_future(session.step([1, 1]))
    await until(lambda: state.applied >= 2)
    row = np.array([7, 7], "<f4").tobytes()
    for n in (3, 4):
        state.run(n, row)
    with pytest.raises(SessionSuperseded):
        await step


async def test_state_lost_beyond_the_buffer_is_said_aloud(
    server: FakeServer, client: aio.Client
) -> None:
    async with client.session("counter") as session:  # not durable: answered inputs are not kept
        await session.step(np.ones((5, 2)))
        server.world.sessions[session.session_id].go_back(0)
        server.break_streams()
        await opened_again(session)
        with pytest.raises(DataLoss, match="had answered step 5"):
            await session.step([1, 1])
        with pytest.raises(DataLoss):
            await session.step([1, 1])


async def test_state_lost_within_the_buffer_is_replayed(
    server: FakeServer, client: aio.Client
) -> None:
    async with client.session("counter", durability="async") as session:
        state = server.world.sessions[session.session_id]
        await session.step(np.ones((4, 2)))
        state.checkpoint()
        await session.step(np.ones((3, 2)))
        assert session.durable_step == 4
        await session.step(np.ones((3, 2)))
        state.go_back(4)
        server.break_streams()
        await opened_again(session)
        out = await session.step([1, 1])
        assert out.tolist() == [11, 11]
        assert session.applied_step == 11
        assert state.runs[4] == 1
        assert state.runs[5] == 2


async def test_the_buffer_of_a_durable_session_is_bounded(server: FakeServer) -> None:
    server.window = session_pb2.ReplayWindow(steps_max=8, bytes_max=1 << 20)
    async with (
        aio.Client(server.target, options=QUICK) as client,
        client.session("counter", durability="async") as session,
    ):
        await session.step(np.ones((8, 2)))
        waiting = asyncio.ensure_future(session.step([1, 1]))
        await session.info()
        assert not waiting.done()
        state = server.world.sessions[session.session_id]
        assert state.applied == 8
        state.checkpoint()
        entry = session_pb2.DurableEntry(handle=state.handle, durable_step=8)
        frame = session_pb2.DurableFrame(entries=[entry])
        state.holder.put(session_pb2.StreamStepsResponse(durable=frame))
        assert (await waiting).tolist() == [9, 9]
        assert session.durable_step == 8


async def test_a_server_that_forgot_the_session_ends_it() -> None:
    server = await FakeServer().start()
    async with aio.Client(server.target, options=QUICK) as client:
        session = client.session("counter")
        await session.open()
        await session.step([1, 1])
        await server.stop()
        other = FakeServer()
        other.port = server.port
        async with other:
            with pytest.raises(SessionNotFound):
                await session.step([1, 1])
            with pytest.raises(SessionNotFound):
                await session.step([1, 1])


async def test_reconnecting_is_bounded() -> None:
    options = Options(
        reconnect=Reconnect(attempts_max=3, backoff_seconds_min=0.001, backoff_seconds_max=0.002)
    )
    server = await FakeServer().start()
    async with aio.Client(server.target, options=options) as client:
        session = client.session("counter")
        await session.open()
        await server.stop()
        with pytest.raises(TransportError) as caught:
            await session.step([1, 1])
        assert caught.value.code is grpc.StatusCode.UNAVAILABLE
        assert caught.value.reason == "TRANSPORT"


async def test_reconnecting_can_be_turned_off(server: FakeServer) -> None:
    options = Options(reconnect=Reconnect(attempts_max=0))
    async with aio.Client(server.target, options=options) as client:
        session = client.session("counter")
        await session.open()
        server.faults.break_after_results = 0
        with pytest.raises(TransportError, match="Socket closed"):
            await session.step([1, 1])


async def test_a_server_that_is_not_there_is_told_at_once() -> None:
    async with FakeServer() as server:
        target = server.target
    async with aio.Client(target) as client:
        with pytest.raises(Unavailable):
            await client.session("counter").open()
        assert not await client.wait_healthy(timeout_seconds=0.1)


async def test_errors_that_no_new_connection_mends_end_the_sessions(
    server: FakeServer, client: aio.Client
) -> None:
    server.faults.break_with = grpc.StatusCode.UNAUTHENTICATED
    server.faults.break_with_text = "token expired"
    session = client.session("counter")
    await session.open()
    server.faults.break_after_results = 0
    with pytest.raises(Unauthenticated, match="token expired"):
        await session.step([1, 1])
    server.faults.break_after_results = None
    async with client.session("counter") as fresh:  # the next one gets a stream of its own
        assert (await fresh.step([1, 1])).tolist() == [1, 1]


async def test_a_silent_server_counts_as_a_broken_connection(server: FakeServer) -> None:
    options = Options(
        timeout_seconds=10.0,
        heartbeat_seconds=0.05,
        silence_seconds_max=0.4,
        reconnect=Reconnect(backoff_seconds_min=0.005, backoff_seconds_max=0.05),
    )
    async with (
        aio.Client(server.target, options=options) as client,
        client.session("counter") as session,
    ):
        server.streams[0].silent = True
        step = asyncio.ensure_future(session.step([1, 1]))
        assert (await step).tolist() == [1, 1]
        assert server.streams_seen >= 2
        assert_each_step_ran_once(server.world)


async def test_heartbeats_keep_short_leases_alive(server: FakeServer, client: aio.Client) -> None:
    async with client.session("counter", idle_seconds=0.06):
        await until(lambda: any(frame.HasField("heartbeat") for frame in server.world.frames))


async def test_a_session_can_be_closed_while_the_connection_is_away(server: FakeServer) -> None:
    slow = Reconnect(backoff_seconds_min=30.0, backoff_seconds_max=30.0)
    options = Options(timeout_seconds=5.0, reconnect=slow)
    async with aio.Client(server.target, options=options) as client:
        session = client.session("counter")
        await session.open()
        server.faults.break_after_results = 0
        with pytest.raises(DeadlineExceeded):
            await session.step([1, 1], timeout_seconds=0.2)
        await session.close()
        assert server.world.calls["CloseSession"] == 1
        assert session.session_id in server.world.ended


async def test_a_reset_across_a_break_keeps_the_numbers(
    server: FakeServer, client: aio.Client
) -> None:
    async with client.session("counter") as session:
        await session.step(np.ones((5, 2)))
        server.break_streams()
        await session.reset()
        assert (await session.step([1, 1])).tolist() == [1, 1]
        assert session.applied_step == 1


async def test_a_server_that_breaks_the_contract_does_not_confuse_the_client(
    server: FakeServer, client: aio.Client
) -> None:
    async with client.session("counter") as session:
        await session.step([1, 1])
        entry = session_pb2.ResultsEntry(handle=99, first_step=1, length=1, rows_length=1)
        frame = session_pb2.ResultsFrame(entries=[entry], rows=b"\0" * 8)
        server.streams[0].put(session_pb2.StreamStepsResponse(results=frame))
        assert (await session.step([1, 1])).tolist() == [2, 2]
        assert (await session.step([1, 1])).tolist() == [3, 3]
        assert_each_step_ran_once(server.world)


async def test_frames_refused_as_a_whole_do_not_hang(server: FakeServer) -> None:
    """A failure of no session ends the connection; what is not retryable ends the sessions too."""
    async with aio.Client(server.target, options=QUICK) as client:
        session = client.session("counter")
        await session.open()
        server.faults.hold_results = asyncio.Event()
        step = asyncio.ensure_future(session.step([1, 1]))
        await until(lambda: server.world.sessions[session.session_id].applied > 0)
        status = make_status("INTERNAL", code=grpc.StatusCode.INTERNAL)
        failure = session_pb2.FailureFrame(status=status)
        await server.streams[0].context.write(session_pb2.StreamStepsResponse(failure=failure))
        with pytest.raises(ServerError) as caught:
            await step
        assert caught.value.reason == "INTERNAL"


async def test_a_full_client_says_so(server: FakeServer) -> None:
    options = Options(streams_max=2, stream_sessions_max=1)
    async with aio.Client(server.target, options=options) as client:
        async with client.session("counter"), client.session("counter"):
            with pytest.raises(LimitExceeded):
                await client.session("counter").open()
        async with client.session("counter"):
            pass

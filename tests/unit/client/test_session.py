"""Stepping: shapes, chunks, output choices, streams of inputs, errors of single chunks."""

import asyncio
from collections.abc import AsyncIterator

import numpy as np
import pytest

from conveyor_client import (
    DeadlineExceeded,
    EmptyChunk,
    InvalidShape,
    LimitExceeded,
    NonFiniteInput,
    NotOpen,
    SessionEnded,
    StepConflict,
    StepGap,
    TokenOutOfRange,
    aio,
)
from tests.unit.client.conftest import QUICK
from tests.unit.client.fake.refusals import Refusal
from tests.unit.client.fake.server import FakeServer, until
from tests.unit.client.fake.sessions import State


async def test_one_step_gives_a_row_and_a_chunk_gives_rows(client: aio.Client) -> None:
    async with client.session("counter") as session:
        one = await session.step([1.0, 2.0])
        many = await session.step(np.ones((3, 2)))
        assert one.shape == (2,)
        assert one.dtype == np.float32
        np.testing.assert_array_equal(one, [1, 2])
        np.testing.assert_array_equal(many, [[2, 3], [3, 4], [4, 5]])
        assert many.flags.writeable
        assert session.applied_step == 4
        assert session.epoch == 1
        assert not session.resumed
        assert session.model.name == "counter"


async def test_tokens_step_on_scalars_and_take_vectors_as_chunks(client: aio.Client) -> None:
    async with client.session("tokens") as session:
        assert (await session.step(3)).shape == (3,)
        assert (await session.step(np.int64(1))).tolist() == [4, 4, 4]
        assert (await session.step([1, 1])).tolist() == [[5, 5, 5], [6, 6, 6]]
        assert (await session.step(session.model.input.encode("bd"))).shape == (2, 3)


@pytest.mark.parametrize("inputs", [1.0, [1.0], [1.0, 2.0, 3.0], np.ones((1, 1, 2)), ["a", "b"]])
async def test_wrong_shapes_are_refused_here(client: aio.Client, inputs: object) -> None:
    async with client.session("counter") as session:
        with pytest.raises(InvalidShape) as caught:
            await session.step(inputs)  # type: ignore[arg-type]
        assert caught.value.reason == "INVALID_SHAPE"
        assert session.applied_step == 0


@pytest.mark.parametrize(
    ("inputs", "error"),
    [(1.5, InvalidShape), ([[1]], InvalidShape), (2**40, TokenOutOfRange), ([], EmptyChunk)],
)
async def test_wrong_tokens_are_refused_here(
    client: aio.Client, inputs: object, error: type[Exception]
) -> None:
    async with client.session("tokens") as session:
        with pytest.raises(error):
            await session.step(inputs)  # type: ignore[arg-type]


async def test_a_chunk_without_steps_is_refused_here(client: aio.Client) -> None:
    async with client.session("counter") as session:
        with pytest.raises(EmptyChunk):
            await session.step(np.ones((0, 2)))


@pytest.mark.parametrize("piece_steps_max", [1, 3, 64])
async def test_long_chunks_are_cut_and_put_together(
    server: FakeServer, client: aio.Client, piece_steps_max: int
) -> None:
    server.faults.piece_steps_max = piece_steps_max
    async with client.session("counter") as session:
        out = await session.step(np.ones((200, 2)))  # the server takes 64 in a chunk
        np.testing.assert_array_equal(out[:, 0], np.arange(1, 201))
        last = await session.step(np.ones((100, 2)), output="last")
        np.testing.assert_array_equal(last, [300, 300])
        assert (await session.step(np.ones((100, 2)), output="none")).shape == (0, 2)
        assert session.applied_step == 400
    lengths = [e.length for f in server.world.frames for e in f.steps.entries]
    assert max(lengths) <= 64


async def test_sessions_choose_their_output(client: aio.Client) -> None:
    async with client.session("counter", output="last") as session:
        assert (await session.step(np.ones((5, 2)))).tolist() == [5, 5]
        assert (await session.step([1, 1])).tolist() == [6, 6]
        assert (await session.step(np.ones((2, 2)), output="all")).shape == (2, 2)


async def test_everything_submitted_in_one_turn_leaves_in_one_frame(
    server: FakeServer, client: aio.Client
) -> None:
    sessions = [client.session("counter") for _ in range(20)]
    await asyncio.gather(*(session.open() for session in sessions))
    server.world.frames.clear()
    outs = await asyncio.gather(*(s.step([i, 1]) for i, s in enumerate(sessions)))
    steps = [frame for frame in server.world.frames if frame.WhichOneof("frame") == "steps"]
    assert [len(frame.steps.entries) for frame in steps] == [20]
    assert [out[0] for out in outs] == list(range(20))
    assert server.streams_seen == 1


async def test_frames_stay_within_the_servers_message_size(server: FakeServer) -> None:
    server.limits.message_bytes_max = 4096
    async with aio.Client(server.target, options=QUICK) as client:
        sessions = [client.session("counter") for _ in range(8)]
        await asyncio.gather(*(session.open() for session in sessions))
        outs = await asyncio.gather(*(s.step(np.ones((128, 2))) for s in sessions))
        assert all(out[-1, 0] == 128 for out in outs)
    sizes = [frame.ByteSize() for frame in server.world.frames]
    assert max(sizes) <= 4096


async def test_stream_yields_in_order(client: aio.Client) -> None:
    async with client.session("counter") as session:
        outs = [out async for out in session.stream(np.ones((50, 2)), in_flight=7)]
        assert [out[0] for out in outs] == list(range(1, 51))


async def test_stream_yields_while_the_next_input_is_awaited(client: aio.Client) -> None:
    ready: asyncio.Queue[list[float] | None] = asyncio.Queue()

    async def live() -> AsyncIterator[list[float]]:
        while (item := await ready.get()) is not None:
            yield item

    async with client.session("counter") as session:
        outs = session.stream(live(), in_flight=4)
        for n in range(1, 4):
            ready.put_nowait([1, 1])
            assert (await anext(outs))[0] == n
        ready.put_nowait(None)
        assert [out async for out in outs] == []


async def test_stream_keeps_to_its_bound(server: FakeServer, client: aio.Client) -> None:
    server.faults.hold_results = asyncio.Event()
    read = 0

    def inputs():
        nonlocal read
        for _ in range(100):
            read += 1
            yield [1, 1]

    async with client.session("counter") as session:
        outs = session.stream(inputs(), in_flight=5)
        first = asyncio.ensure_future(anext(outs))
        await until(lambda: len(server.world.sessions[session.session_id].runs) >= 5)
        assert read <= 6
        server.faults.hold_results.set()
        await first
        assert len([out async for out in outs]) == 99


async def test_stream_raises_what_its_inputs_raise(client: aio.Client) -> None:
    def inputs():
        yield [1, 1]
        raise RuntimeError("no more sensors")

    async with client.session("counter") as session:
        outs = session.stream(inputs())
        assert (await anext(outs)).tolist() == [1, 1]
        with pytest.raises(RuntimeError, match="no more sensors"):
            await anext(outs)


async def test_a_refused_chunk_dooms_those_behind_it_and_no_more(
    server: FakeServer, client: aio.Client
) -> None:
    async with client.session("counter") as session:
        steps = [[1, 1], [np.nan, 1], [1, 1], [1, 1]]
        results = await asyncio.gather(
            *(session.step(step) for step in steps), return_exceptions=True
        )
        assert results[0].tolist() == [1, 1]  # type: ignore[union-attr]
        assert isinstance(results[1], NonFiniteInput)
        assert all(isinstance(result, StepGap) for result in results[2:])
        assert session.applied_step == 1
        assert (await session.step([5, 5])).tolist() == [6, 6]
        assert session.applied_step == 2
    assert server.world.calls["StreamSteps"] == 1


async def test_failures_are_typed_with_what_the_server_said(
    server: FakeServer, client: aio.Client
) -> None:
    def full(state: State, first_step: int) -> None:
        raise Refusal("STREAM_SESSIONS_LIMIT", retry_seconds=1.5, limit="7")

    async with client.session("counter") as session:
        server.faults.step_hook = full
        with pytest.raises(LimitExceeded) as caught:
            await session.step([1, 1])
        assert caught.value.retry_after_seconds == 1.5
        assert caught.value.retryable
        assert caught.value.metadata == {"limit": "7"}
        server.faults.step_hook = None
        assert (await session.step([1, 1])).tolist() == [1, 1]


async def test_a_timed_out_step_may_run_and_the_next_is_numbered_after_it(
    server: FakeServer, client: aio.Client
) -> None:
    server.faults.hold_results = asyncio.Event()
    async with client.session("counter") as session:
        with pytest.raises(DeadlineExceeded) as caught:
            await session.step([1, 1], timeout_seconds=0.05)
        assert caught.value.reason == "CLIENT"
        server.faults.hold_results.set()
        assert (await session.step([1, 1])).tolist() == [2, 2]
    timeouts = [f.steps.timeout.nanos for f in server.world.frames if f.HasField("steps")]
    assert timeouts == [50_000_000, 0]


@pytest.mark.parametrize("give_up", ["by time", "by cancelling", "by leaving the stream"])
@pytest.mark.parametrize(("length", "refused_at"), [(2, 1), (300, 1), (300, 65)])
async def test_steps_go_on_where_the_server_dropped_what_was_given_up(
    server: FakeServer, client: aio.Client, give_up: str, length: int, refused_at: int
) -> None:
    """The caller steps again before the server says that it dropped the chunk, or a part of it."""
    dropped: list[int] = []

    def drop(state: State, first_step: int) -> None:
        if first_step == refused_at and not dropped:
            dropped.append(first_step)
            raise Refusal("DEADLINE_EXCEEDED")

    server.faults.step_hook = drop
    server.faults.hold_results = asyncio.Event()
    async with client.session("counter") as session:
        state = server.world.sessions[session.session_id]
        chunk = np.ones((length, 2))  # beyond 64 in parts, of which two are sent ahead
        if give_up == "by time":
            with pytest.raises(DeadlineExceeded):
                await session.step(chunk, timeout_seconds=0.05)
        elif give_up == "by cancelling":
            step = asyncio.ensure_future(session.step(chunk))
            await until(lambda: bool(dropped))
            step.cancel()
        else:
            outs = session.stream([chunk])
            first = asyncio.ensure_future(anext(outs))
            await until(lambda: bool(dropped))
            first.cancel()
            await asyncio.wait({first})
            await outs.aclose()
        await until(lambda: bool(dropped))
        after = asyncio.ensure_future(session.step([1000, 1000]))
        await session.info()  # a whole round trip later it has long been submitted
        server.faults.hold_results.set()
        assert (await after)[0] == refused_at - 1 + 1000
        assert session.applied_step == refused_at
        assert (await session.step([1, 1]))[0] == refused_at + 1000
        assert state.runs == dict.fromkeys(range(1, refused_at + 2), 1)


async def test_a_cancelled_step_does_not_disturb_the_numbers(
    server: FakeServer, client: aio.Client
) -> None:
    server.faults.hold_results = asyncio.Event()
    async with client.session("counter") as session:
        step = asyncio.ensure_future(session.step([1, 1]))
        await until(lambda: server.world.sessions[session.session_id].applied > 0)
        step.cancel()
        server.faults.hold_results.set()
        assert (await session.step([1, 1])).tolist() == [2, 2]


async def test_the_replay_window_makes_steps_wait(server: FakeServer) -> None:
    server.limits.steps_in_flight_max = 4
    server.faults.hold_results = asyncio.Event()
    async with (
        aio.Client(server.target, options=QUICK) as client,
        client.session("counter") as session,
    ):
        steps = [asyncio.ensure_future(session.step([1, 1])) for _ in range(10)]
        state = server.world.sessions[session.session_id]
        await until(lambda: state.applied >= 4)
        await session.info()  # a whole round trip later
        assert state.applied == 4
        server.faults.hold_results.set()
        outs = await asyncio.gather(*steps)
        assert [out[0] for out in outs] == list(range(1, 11))


async def test_stepping_a_session_behind_its_back_is_told(
    client: aio.Client, server: FakeServer
) -> None:
    async with client.session("counter") as session:
        await session.step([1, 1])
        await client.step(session.session_id, [2, 2], first_step=2)
        with pytest.raises(StepConflict):
            await session.step([3, 3])


async def test_use_before_opening_and_after_closing_is_told(client: aio.Client) -> None:
    session = client.session("counter")
    with pytest.raises(NotOpen):
        await session.step([1, 1])
    with pytest.raises(NotOpen):
        _ = session.model
    await session.open()
    await session.open()
    await session.close()
    await session.close()
    with pytest.raises(NotOpen):
        await session.step([1, 1])


async def test_closing_ends_and_detaching_keeps(client: aio.Client) -> None:
    async with client.session("counter") as session:
        await session.step([1, 1])
    with pytest.raises(SessionEnded) as caught:
        await client.resume(session.session_id).open()
    assert caught.value.ending == "closed"

    async with client.session("counter") as session:
        await session.step([1, 1])
        await session.detach()
    async with client.resume(session.session_id, token=session.token) as again:
        assert again.resumed
        assert again.epoch == 2
        assert again.applied_step == 1
        assert (await again.step([1, 1])).tolist() == [2, 2]


async def test_fork_reset_rewind_export_import(server: FakeServer, client: aio.Client) -> None:
    async with client.session("counter") as session:
        await session.step([[1, 1], [2, 2]])
        left, right = await session.fork(["left", "right"])
        async with left, right:
            assert (await left.step([10, 0])).tolist() == [13, 3]
            assert (await right.step([0, 10])).tolist() == [3, 13]
        snapshot = await session.export()
        server.world.sessions[session.session_id].checkpoint()
        await session.step([100, 100])
        await session.rewind(2)
        assert session.applied_step == 2
        assert (await session.step([1, 1])).tolist() == [4, 4]
        await session.reset()
        assert session.applied_step == 0
        assert (await session.step([1, 1])).tolist() == [1, 1]
        async with await client.import_session(snapshot, session_id="copy") as copy:
            assert copy.session_id == "copy"
            assert (await copy.step([1, 1])).tolist() == [4, 4]


async def test_generation_moves_the_session_on(client: aio.Client) -> None:
    async with client.session("tokens") as session:
        generation = session.generate([1, 2], steps_max=4)
        tokens = [token async for token in generation]
        assert tokens == [3, 2, 0, 0]
        assert generation.end == "steps_max"
        assert generation.applied_step == session.applied_step == 5
        assert (await session.step(1)).tolist() == [9, 9, 9]
        stopped = session.generate(steps_max=50, stop_tokens=[2])
        assert [token async for token in stopped][-1] == 2
        assert stopped.end == "stop_token"
    rows = await client.generate("counter", [[1.0, 2.0]], steps_max=2)
    assert [row.tolist() async for row in rows] == [[1, 2], [2, 4]]  # type: ignore[union-attr]


async def test_generation_left_early_leaves_a_usable_session(client: aio.Client) -> None:
    async with client.session("tokens") as session:
        async with session.generate([1], steps_max=900) as generation:
            async for _ in generation:
                break
        before = session.applied_step
        await session.step(0)
        assert session.applied_step == before + 1


async def test_steps_wait_while_something_is_done_alone(client: aio.Client) -> None:
    async with client.session("counter") as session:
        await session.step([5, 5])
        outs = await asyncio.gather(session.step([1, 1]), session.reset(), session.step([2, 2]))
        assert outs[0].tolist() == [6, 6]
        assert outs[2].tolist() == [2, 2]


async def test_sessions_spread_over_streams_when_one_is_full(server: FakeServer) -> None:
    server.faults.stream_sessions_max = 3  # less than the server promises in its limits
    async with aio.Client(server.target, options=QUICK) as client:
        sessions = [client.session("counter") for _ in range(7)]
        for session in sessions:
            await session.open()
        assert server.streams_seen == 3
        outs = await asyncio.gather(*(session.step([1, 1]) for session in sessions))
        assert all(out.tolist() == [1, 1] for out in outs)


async def test_streams_are_keyed_for_the_proxy(server: FakeServer, client: aio.Client) -> None:
    async with (
        client.session("counter", session_id="mine", own_stream=True),
        client.session("counter"),
        client.session("counter"),
    ):
        pass
    streams = [m["conveyor-key"] for m in server.world.metadata if "conveyor-key" in m]
    assert streams[0] == "mine"
    assert len(set(streams)) == 2

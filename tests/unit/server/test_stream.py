"""One StreamSteps call by hand: what it takes, what it is owed, and what it says."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from typing import Any, cast

import pytest
from grpc import aio

from conveyor.v1 import session_pb2
from conveyor_server.admission.admission import Admission, result_bytes
from conveyor_server.config import Config, LimitsConfig
from conveyor_server.core import Chunk, Piece
from conveyor_server.errors import SlowReader, StepGap
from conveyor_server.metrics import Metrics
from conveyor_server.rpc.outbox import Outbox
from conveyor_server.rpc.results import ResultsBudget
from conveyor_server.rpc.service import Services
from conveyor_server.rpc.stream import OPERATIONS_MAX, StepStream
from conveyor_server.rpc.streams import Streams
from conveyor_server.scheduler.operations import Operations
from tests.support.clock import FakeClock
from tests.support.models import FEATURES
from tests.support.rig import Rig, rows_of

ROW_BYTES = FEATURES.output_row_bytes
Frame = session_pb2.StreamStepsResponse


class _Context:
    """The client: what it sends, and what it reads while it reads."""

    def __init__(self) -> None:
        self.sent: asyncio.Queue[Any] = asyncio.Queue()
        self.written: list[Frame] = []
        self.reads = asyncio.Event()
        self.reads.set()

    async def read(self) -> Any:
        return await self.sent.get()

    async def write(self, frame: Frame) -> None:
        await self.reads.wait()
        self.written.append(frame)

    def said(self, kind: str) -> list[Any]:
        return [getattr(each, kind) for each in self.written if each.WhichOneof("frame") == kind]


class _Driver:
    """Keeps chunks and operations until the test carries them out."""

    def __init__(self, rig: Rig) -> None:
        self.operations = rig.operations
        self.chunks: list[Chunk] = []
        self.posted: list[Callable[[Operations], None]] = []

    def submit(self, chunk: Chunk) -> None:
        self.chunks.append(chunk)

    def post(self, operation: Callable[[Operations], None]) -> None:
        self.posted.append(operation)

    def tick_at_once(self) -> None:
        pass

    def carry_out(self) -> None:
        posted, self.posted = self.posted, []
        for operation in posted:
            operation(self.operations)


class _Call:
    """A stream under way."""

    def __init__(self, results: ResultsBudget | None = None, **limits: Any) -> None:
        self.limits = LimitsConfig(**limits)
        rig = Rig(limits=self.limits)
        self.context = _Context()
        self.driver = _Driver(rig)
        self.metrics = Metrics()
        services = Services(
            Config(flags={"limits": limits}),  # pyright: ignore[reportCallIssue]
            Admission(self.limits),
            cast(Any, self.driver),
            cast(Any, None),
            self.metrics,
            FakeClock(),
            "cpu",
            results or ResultsBudget(self.limits),
        )
        self.stream = StepStream(
            services, "ann", cast(Any, self.context), Streams(self.limits.streams_max)
        )

    async def send(self, **frame: Any) -> None:
        self.context.sent.put_nowait(session_pb2.StreamStepsRequest(**frame))
        await settle()

    async def open(self, session_id: str) -> int:
        request = session_pb2.OpenSessionRequest(
            model=FEATURES.key.name, session_id=session_id, mode=session_pb2.OPEN_MODE_UNSPECIFIED
        )
        await self.send(open=session_pb2.OpenFrame(tag=1, session=request))
        self.driver.carry_out()
        await settle()
        return self.context.said("opened")[-1].handle

    async def steps(self, *entries: tuple[int, int, int], output: int = 1) -> None:
        """Sends a frame of (handle, first step, length)."""
        await self.send(
            steps=session_pb2.StepsFrame(
                entries=[
                    session_pb2.StepsEntry(
                        handle=handle,
                        first_step=first,
                        length=length,
                        output=session_pb2.OutputMode.ValueType(output),
                    )
                    for handle, first, length in entries
                ],
                rows=b"".join(rows_of(FEATURES, *range(length)) for _, _, length in entries),
            )
        )

    async def answer(self, chunk: Chunk, pieces: int = 1) -> None:
        length = chunk.length // pieces
        for number in range(pieces):
            first = chunk.first_step + number * length
            rows = bytes(result_bytes(chunk) // pieces)
            final = number == pieces - 1
            chunk.done += length
            self.stream.piece(chunk, Piece(first, length, rows, length, final))
        await settle()

    async def end(self) -> None:
        self.context.sent.put_nowait(aio.EOF)
        await settle()


async def settle() -> None:
    """Lets everything run that can."""
    for _ in range(20):
        await asyncio.sleep(0)


@asynccontextmanager
async def _served(call: _Call) -> AsyncIterator[asyncio.Task[None]]:
    task = asyncio.create_task(call.stream.serve())
    try:
        yield task
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def test_chunks_are_taken_while_their_results_fit() -> None:
    call = _Call(outbox_bytes_max=10 * 1024)
    steps = 4 * 1024 // ROW_BYTES  # so that two fit
    async with _served(call):
        handles = [await call.open(f"s{n}") for n in range(5)]
        await call.steps(*((handle, 1, steps) for handle in handles))
        taken = call.driver.chunks
        assert [chunk.handle for chunk in taken] == handles[:2]
        await call.answer(taken[0], pieces=1)
        assert [chunk.handle for chunk in taken] == handles[:3]
        call.stream.failed(taken[1], 1, StepGap(1, 2))
        await settle()
        assert [chunk.handle for chunk in taken] == handles[:4]
        for number in (2, 3, 4):
            await call.answer(taken[number])
        assert len(taken) == 5
        answered = [e.handle for frame in call.context.said("results") for e in frame.entries]
        assert answered == [handles[0], *handles[2:]]


async def test_what_is_not_read_keeps_chunks_out_too() -> None:
    call = _Call(outbox_bytes_max=10 * 1024)
    steps = 8 * 1024 // ROW_BYTES
    async with _served(call):
        handles = [await call.open(f"s{n}") for n in range(4)]
        call.context.reads.clear()
        await call.steps(*((handle, 1, steps) for handle in handles))
        taken = call.driver.chunks
        await call.answer(taken[0])  # the one frame that is being written counts no more
        await call.answer(taken[1])
        assert len(taken) == 2
        call.context.reads.set()
        await settle()
        assert len(taken) == 3


async def test_a_chunk_that_wants_more_than_the_bound_goes_alone() -> None:
    call = _Call(outbox_bytes_max=1024)
    steps = 4 * 1024 // ROW_BYTES
    async with _served(call):
        handle = await call.open("s")
        await call.steps((handle, 1, 1), (handle, 2, steps), (handle, 2 + steps, 1))
        taken = call.driver.chunks
        assert len(taken) == 1
        await call.answer(taken[0])
        assert len(taken) == 2
        await call.answer(taken[1], pieces=2)
        assert len(taken) == 3


@pytest.mark.parametrize(("output", "taken"), [(2, 50), (3, 50)])
async def test_rows_that_are_not_wanted_take_no_room(output: int, taken: int) -> None:
    call = _Call(outbox_bytes_max=1024)
    async with _served(call):
        handle = await call.open("s")
        await call.steps(*((handle, 1 + 20 * n, 20) for n in range(taken)), output=output)
        assert len(call.driver.chunks) == taken


async def test_a_close_behind_waiting_chunks_comes_after_them() -> None:
    call = _Call(outbox_bytes_max=1024)
    steps = 1024 // ROW_BYTES
    async with _served(call):
        handle = await call.open("s")
        await call.steps((handle, 1, steps), (handle, 1 + steps, steps))
        await call.send(close=session_pb2.CloseFrame(handle=handle))
        assert not call.driver.posted
        await call.answer(call.driver.chunks[0])
        assert [chunk.first_step for chunk in call.driver.chunks] == [1, 1 + steps]
        assert len(call.driver.posted) == 1


async def test_a_chunk_that_asks_for_too_much_is_refused() -> None:
    call = _Call(result_bytes_max=1024)
    fits = 1024 // ROW_BYTES
    async with _served(call):
        handle = await call.open("s")
        await call.steps((handle, 1, fits), (handle, 1 + fits, fits + 1))
        assert [chunk.length for chunk in call.driver.chunks] == [fits]
        (failure,) = call.context.said("failure")
        assert failure.first_step == 1 + fits
        assert "would return 1,032 bytes" in failure.status.message
        await call.steps((handle, 1 + fits, fits + 1), output=2)
        assert len(call.driver.chunks) == 2


async def test_a_frame_refused_as_a_whole_fails_each_of_its_chunks() -> None:
    call = _Call()
    async with _served(call):
        handle = await call.open("s")
        await call.steps((handle, 1, 2), (handle + 7, 1, 1), (handle, 3, 1))
        said = [(each.handle, each.first_step) for each in call.context.said("failure")]
        assert said == [(handle, 1), (handle + 7, 1), (handle, 3)]
        counted = {labels: n for labels, n in call.metrics.rejected.values.items() if n}
        assert counted == {("UNKNOWN_HANDLE",): 3}


async def test_heartbeats_wait_as_one_and_each_is_answered() -> None:
    call = _Call()
    async with _served(call):
        await call.open("s")
        for nonce in range(1, 6):
            await call.send(heartbeat=session_pb2.HeartbeatFrame(nonce=nonce))
        assert len(call.driver.posted) == 1
        assert [each.nonce for each in call.context.said("heartbeat")] == [1, 2, 3, 4, 5]
        call.driver.carry_out()
        await call.send(heartbeat=session_pb2.HeartbeatFrame(nonce=6))
        assert len(call.driver.posted) == 1


async def test_nothing_is_read_while_too_many_closes_wait() -> None:
    call = _Call()
    async with _served(call):
        handle = await call.open("s")
        for _ in range(OPERATIONS_MAX + 9):
            call.context.sent.put_nowait(
                session_pb2.StreamStepsRequest(
                    close=session_pb2.CloseFrame(handle=handle, detach=True)
                )
            )
        for _ in range(200):
            await settle()
        assert len(call.driver.posted) == OPERATIONS_MAX
        assert call.context.sent.qsize() == 9
        call.driver.carry_out()
        await settle()
        assert call.context.sent.empty()


async def test_a_slow_reader_is_cut_after_it_half_closed_too() -> None:
    call = _Call(slow_reader_seconds_max=0.05)
    async with _served(call) as task:
        handle = await call.open("s")
        await call.steps((handle, 1, 1))
        call.context.reads.clear()
        await call.answer(call.driver.chunks[0])
        await call.end()
        async with asyncio.timeout(10):
            with pytest.raises(SlowReader):
                await asyncio.shield(task)


async def test_a_half_close_is_answered_in_full() -> None:
    call = _Call()
    async with _served(call) as task:
        handle = await call.open("s")
        await call.steps((handle, 1, 1))
        await call.end()
        assert not task.done()
        await call.answer(call.driver.chunks[0])
        async with asyncio.timeout(10):
            await task
        assert len(call.context.said("results")) == 1


async def test_what_cannot_be_converted_ends_its_stream_and_no_tick() -> None:
    call = _Call()
    async with _served(call) as task:
        request = session_pb2.OpenSessionRequest(model=FEATURES.key.name, session_id="s")
        await call.send(open=session_pb2.OpenFrame(tag=1, session=request))
        operations = call.driver.operations

        class Broken:
            """Opens sessions of which no message can be made."""

            def open(self, *arguments: Any) -> Any:
                opened = operations.open(*arguments)
                return replace(opened, view=replace(opened.view, create_seconds=float("nan")))

        (opening,) = call.driver.posted
        opening(cast(Any, Broken()))  # the scheduler's side: nothing is raised here
        with pytest.raises(ValueError, match="NaN"):
            await task


async def test_pieces_without_rows_count() -> None:
    account = ResultsBudget(LimitsConfig()).account("ann", lambda: None)
    outbox, context = Outbox(Metrics(), 2**20, account), _Context()
    for step in range(40_000):
        outbox.put_piece(1, Piece(step + 1, 1, b"", 0, final=True))
    assert account.size_bytes >= 40_000 * 50  # about what they take on the wire and more than that
    await outbox.flush(cast(Any, context))
    assert account.size_bytes == 0
    assert max(frame.ByteSize() for frame in context.written) <= 2**20
    assert sum(len(frame.results.entries) for frame in context.written) == 40_000


async def test_streams_of_one_principal_wait_for_room_in_order() -> None:
    """What one stream's client leaves unread keeps others waiting until it goes."""
    limits = {
        "result_bytes_max": 200_000,
        "principal_results_bytes_max": 200_000,
        "outbox_bytes_max": 200_000,
    }
    results = ResultsBudget(LimitsConfig(**limits))
    steps = 16_000
    calls = [_Call(results, **limits) for _ in range(3)]
    async with AsyncExitStack() as stack:
        tasks = [await stack.enter_async_context(_served(call)) for call in calls]
        handles = [await call.open("s") for call in calls]
        for call, handle in zip(calls, handles, strict=True):
            await call.steps((handle, 1, steps))
        assert [len(call.driver.chunks) for call in calls] == [1, 0, 0]
        await calls[2].steps((handles[2], 1, 1))
        assert not calls[2].driver.chunks, "it is not read while it waits"
        calls[0].context.reads.clear()
        await calls[0].answer(calls[0].driver.chunks[0])
        assert [len(call.driver.chunks) for call in calls] == [1, 0, 0]
        tasks[0].cancel()
        await settle()
        assert tasks[0].done()
        assert not calls[1].driver.chunks, "a frame that is being written counts"
        calls[0].context.reads.set()
        await settle()
        assert [len(call.driver.chunks) for call in calls] == [1, 1, 0]
        await calls[1].answer(calls[1].driver.chunks[0])
        assert [len(call.driver.chunks) for call in calls] == [1, 1, 2]
        await calls[2].answer(calls[2].driver.chunks[0])
        await calls[2].answer(calls[2].driver.chunks[1])
        assert results.size_bytes == 0

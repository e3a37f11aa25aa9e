"""Sequences of the inference protocol on a real scheduler that ticks when the test says so."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any, cast

import pytest
from grpc import aio
from hypothesis import given
from hypothesis import strategies as st

from conveyor.oip import inference_pb2
from conveyor_server.config import Config
from conveyor_server.core import SESSION_ID, MemoryRows, ModelInfo, ModelKey, SessionState
from conveyor_server.errors import EngineFailed, ServerDraining, SlowReader
from conveyor_server.rpc.oip import responses as responses_module
from conveyor_server.rpc.oip import statistics as statistics_module
from conveyor_server.rpc.oip import stream as stream_module
from conveyor_server.rpc.oip.requests import Asked, session_id_of
from conveyor_server.rpc.oip.sequences import Sequences
from conveyor_server.rpc.oip.statistics import Statistics
from conveyor_server.rpc.oip.stream import InferStream
from conveyor_server.rpc.oip.tensors import Steps
from conveyor_server.rpc.oip.underway import Request
from conveyor_server.rpc.results import ResultsBudget
from conveyor_server.rpc.service import Services
from conveyor_server.rpc.streams import Streams
from conveyor_server.scheduler.operations import Operations
from tests.support.models import ATTENTIVE, FEATURES
from tests.support.rig import PRINCIPAL, Rig, rows_of

NEWER = replace(FEATURES, key=ModelKey(FEATURES.key.name, 2))
NOT_STARTED = "must specify the START flag"
SESSION = f"oip.i:{FEATURES.key.name}:1"


class _Driver:
    """The rig, without a loop of its own."""

    def __init__(self, rig: Rig) -> None:
        self._rig = rig
        self.submit = rig.scheduler.inbox.put
        self.model = rig.models.resolve
        self.peek = rig.operations.get

    async def call(self, operation: Callable[[Operations], Any]) -> Any:
        return operation(self._rig.operations)

    def post(self, operation: Callable[[Operations], None]) -> None:
        self._rig.scheduler.inbox.put_operation(lambda: operation(self._rig.operations))

    def tick_at_once(self) -> None:
        pass


class _Context:
    """The client: what it sends, and what it reads while it reads."""

    def __init__(self) -> None:
        self.sent: asyncio.Queue[Any] = asyncio.Queue()
        self.written: list[tuple[str, str]] = []
        self.lengths: list[int] = []
        self.reads = asyncio.Event()
        self.reads.set()

    def invocation_metadata(self) -> tuple[tuple[str, str], ...]:
        return ()

    async def read(self) -> Any:
        return await self.sent.get()

    async def write(self, answer: inference_pb2.ModelStreamInferResponse) -> None:
        # As it is now: the stream may fill the same message in anew for the next answer.
        self.written.append((answer.infer_response.id, answer.error_message))
        for tensor, rows in zip(
            answer.infer_response.outputs, answer.infer_response.raw_output_contents, strict=True
        ):
            assert len(rows) == tensor.shape[1] * FEATURES.output_row_bytes
            self.lengths.append(tensor.shape[1])
        await self.reads.wait()


class _Call:
    """A server and one stream of it."""

    def __init__(self, quantum_steps: int = 4, **limits: Any) -> None:
        self.rig = Rig((FEATURES, NEWER, ATTENTIVE), quantum_steps=quantum_steps, **limits)
        self.rig.models.retire(NEWER.key)  # until a test adds it
        self.context = _Context()
        self.streams = Streams(self.rig.limits.streams_max)
        services = Services(
            Config(flags={"limits": limits}),  # pyright: ignore[reportCallIssue]
            self.rig.admission,
            cast(Any, _Driver(self.rig)),
            cast(Any, None),
            self.rig.metrics,
            self.rig.clock,
            "cpu",
            ResultsBudget(self.rig.limits),
        )
        self.statistics = Statistics(self.rig.clock)
        self.sequences = Sequences(services, self.streams)
        self.stream = InferStream(
            services,
            self.sequences,
            self.statistics,
            PRINCIPAL,
            cast(Any, self.context),
            self.streams,
        )

    async def send(
        self,
        request_id: str,
        *values: int,
        sequence: int = 1,
        start: bool = False,
        end: bool = False,
        version: str = "",
    ) -> None:
        values = values or (1,)
        message = inference_pb2.ModelInferRequest(
            model_name=FEATURES.key.name, id=request_id, model_version=version
        )
        message.parameters["sequence_id"].int64_param = sequence
        message.parameters["sequence_start"].bool_param = start
        message.parameters["sequence_end"].bool_param = end
        message.inputs.add(name="INPUT", datatype="FP32", shape=(1, len(values), 2))
        message.raw_input_contents.append(rows_of(FEATURES, *values))
        self.context.sent.put_nowait(message)
        await settle()

    async def run(self) -> list[tuple[str, str]]:
        """Ticks until there is nothing to do; returns what was written by then."""
        self.rig.run()
        await settle()
        return self.context.written


async def settle() -> None:
    """Lets everything run that can."""
    for _ in range(20):
        await asyncio.sleep(0)


@asynccontextmanager
async def _served(call: _Call) -> AsyncIterator[asyncio.Task[None]]:
    task = asyncio.create_task(call.stream.serve())
    await settle()
    try:
        yield task
    finally:
        task.cancel()
        await asyncio.wait([task])


NAMES = st.from_regex(r"[a-z0-9][a-z0-9_-]{0,62}", fullmatch=True)
SEQUENCES = st.one_of(
    st.integers(1, 2**64 - 1),
    st.text(min_size=1, max_size=128),
    st.from_regex(r"[0-9a-z:.-]{1,60}", fullmatch=True),
)


@given(NAMES, SEQUENCES, NAMES, SEQUENCES)
def test_different_sequences_are_different_sessions(
    model: str, sequence: int | str, other_model: str, other: int | str
) -> None:
    one, two = session_id_of(model, sequence), session_id_of(other_model, other)
    assert SESSION_ID.fullmatch(one)
    same = model == other_model and type(sequence) is type(other) and sequence == other
    assert (one == two) == same
    assert session_id_of(model, sequence) == one


def test_a_text_that_looks_like_a_digest_is_another_sequence() -> None:
    digest = session_id_of("m", "\n").rpartition(":")[2]
    assert session_id_of("m", digest) != session_id_of("m", "\n")


async def test_a_full_inbox_neither_opens_nor_resets() -> None:
    call = _Call(inbox_chunks_max=1)
    async with _served(call):
        await call.send("a", start=True)
        assert await call.run() == [("a", "")]
        await call.send("b")
        await call.send("c", start=True)
        await call.send("d", sequence=2, start=True)
        assert await call.run() == [
            ("a", ""),
            ("b", ""),
            ("c", "the inbox is full: 1 chunks are pending (limits.inbox_chunks_max is 1)"),
            ("d", "the inbox is full: 1 chunks are pending (limits.inbox_chunks_max is 1)"),
        ]
        assert call.rig.view(SESSION).applied_step == 2
        assert len(call.rig.scheduler.sessions) == 1


async def test_an_end_that_may_be_sent_again_leaves_the_session() -> None:
    call = _Call()
    async with _served(call):
        await call.send("a", start=True)
        await call.run()
        call.rig.engine.fail_next.append(EngineFailed("out of order"))
        await call.send("b", end=True)
        assert (await call.run())[-1] == ("b", "out of order")
        assert call.rig.view(SESSION).applied_step == 1
        await call.send("c", end=True)
        assert (await call.run())[-1] == ("c", "")
        assert len(call.rig.scheduler.sessions) == 0
        await call.send("d", start=True)  # and nothing waits for the END that failed
        assert (await call.run())[-1] == ("d", "")


async def test_a_start_waits_for_the_end_before_it() -> None:
    call = _Call()
    async with _served(call):
        for life in range(3):
            await call.send(f"{life}", start=True, end=True)
        await call.send("3", start=True)
        for _ in range(4):
            await call.run()
        await call.send("4")  # the ENDs are of the lives before
        assert await call.run() == [(f"{number}", "") for number in range(5)]
        assert call.rig.view(SESSION).applied_step == 2


async def test_two_starts_at_once_do_not_share_a_memory() -> None:
    call = _Call()
    first, second = (_started(call, ATTENTIVE, rows) for rows in (1, 2))
    await call.run()
    assert (first.done, first.error) == (True, None)
    assert second.error is not None
    assert second.error.reason == "SESSION_EXISTS"
    view = call.rig.view(first.key[1])
    assert (view.applied_step, view.memory_rows) == (1, 1)


async def test_a_start_waits_for_every_end_of_its_sequence() -> None:
    """Two streams may end one sequence at the same time, and neither may be forgotten."""
    call = _Call()
    _started(call, FEATURES, end=True)
    waits = asyncio.create_task(call.sequences.model_of(_asked(FEATURES), PRINCIPAL))
    await settle()
    _started(call, FEATURES, end=True)
    assert not waits.done()
    await call.run()
    async with asyncio.timeout(5):
        assert await waits is FEATURES


def _asked(model: ModelInfo, *, end: bool = False) -> Asked:
    name = model.key.name
    return Asked(
        name, None, "", session_id_of(name, 1), 1, start=True, end=end, timeout_seconds=None
    )


def _started(call: _Call, model: ModelInfo, memory_rows: int = 0, *, end: bool = False) -> Request:
    """A START of one step, handed in without a look at what is on its way."""
    request = Request(_asked(model, end=end), call.stream, call.rig.clock.monotonic())
    memory = MemoryRows(memory_rows, bytes(12) * memory_rows) if memory_rows else None
    steps = Steps(1, rows_of(model, 1), stacked=True, memory=memory)
    call.sequences.submit(request, model, PRINCIPAL, steps)
    return request


async def test_a_sequence_stays_on_its_version_until_it_starts_again() -> None:
    call = _Call()
    async with _served(call):
        await call.send("a", start=True)
        await call.run()
        call.rig.models.add(NEWER)
        await call.send("b", version="2")
        await call.send("c", version="1")
        await call.send("d")
        texts = [text for _, text in await call.run()]
        assert NOT_STARTED in texts[1]
        assert texts[2:] == ["", ""]
        assert call.rig.view(SESSION).model is FEATURES
        await call.send("e", start=True)
        assert (await call.run())[-1] == ("e", "")
        view = call.rig.view(SESSION)
        assert (view.model, view.applied_step) == (NEWER, 1)


async def test_a_busy_sequence_does_not_change_its_version() -> None:
    call = _Call(quantum_steps=1)
    async with _served(call):
        await call.send("a", *range(4), start=True)
        call.rig.scheduler.tick()
        call.rig.models.add(NEWER)
        await call.send("b", start=True)
        assert call.rig.view(SESSION).state is SessionState.ACTIVE
        written = await call.run()
        assert written == [("a", ""), ("b", f"sequence 1 of model '{FEATURES.key.name}' still"
                                            " runs on version 1")]  # fmt: skip
        view = call.rig.view(SESSION)
        assert (view.model, view.applied_step) == (FEATURES, 4)


async def test_requests_of_one_tick_are_one_execution() -> None:
    call = _Call()
    async with _served(call):
        for number in range(1, 5):
            await call.send(f"{number}", sequence=number, start=True)
        call.rig.clock.advance(0.5)
        await call.run()
        call.rig.clock.advance(1)
        await call.send("5", sequence=1)
        await call.run()
        (found,) = call.statistics.message([FEATURES]).model_stats
        assert (found.inference_count, found.execution_count) == (5, 2)
        assert (found.inference_stats.queue.count, found.inference_stats.queue.ns) == (5, 2 * 10**9)
        call.statistics.keep([])
        (found,) = call.statistics.message([FEATURES]).model_stats
        assert found.inference_count == 0


async def test_more_is_not_taken_than_may_be_owed() -> None:
    call = _Call(outbox_bytes_max=1024)
    call.context.reads.clear()
    async with _served(call):
        await call.send("0", start=True)
        for number in range(1, 10):
            await call.send(f"{number}")
        owed = call.rig.scheduler.inbox.chunks
        assert owed == 1024 // (256 + 1 + FEATURES.output_row_bytes)
        await call.run()
        assert call.context.written == [("0", "")]
        call.context.reads.set()
        for _ in range(10):
            await settle()
            await call.run()
        assert call.context.written == [(f"{number}", "") for number in range(10)]


async def test_refusals_are_owed_too() -> None:
    call = _Call(outbox_bytes_max=1024)
    call.context.reads.clear()
    async with _served(call):
        for number in range(10):
            await call.send(f"{number}")
        assert call.context.sent.qsize() > 3
        call.context.reads.set()
        await settle()
        assert [request_id for request_id, _ in call.context.written] == [*map(str, range(10))]


async def test_a_client_that_reads_nothing_loses_its_stream() -> None:
    call = _Call(slow_reader_seconds_max=0.05)
    call.context.reads.clear()
    async with _served(call) as task:
        await call.send("a", start=True)
        await call.run()
        async with asyncio.timeout(10):
            with pytest.raises(SlowReader):
                await asyncio.shield(task)


async def test_the_sequences_that_are_remembered_are_bounded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(stream_module, "SEQUENCES_KNOWN_MAX", 2)
    call = _Call()
    async with _served(call):
        for number in range(1, 5):
            await call.send(f"{number}", sequence=number, start=True)
            await call.run()
        for number in range(1, 5):  # those that were forgotten are looked up
            await call.send(f"{number}", sequence=number)
            assert (await call.run())[-1] == (f"{number}", "")
        assert len(call.stream.known) == 2


async def test_the_versions_that_are_counted_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics_module, "TALLIES_MAX", 1)
    call = _Call()
    async with _served(call):
        await call.send("a", start=True)
        await call.run()
        call.rig.models.add(NEWER)
        await call.send("b", start=True)
        await call.run()
    counts = [
        each.inference_count for each in call.statistics.message([FEATURES, NEWER]).model_stats
    ]
    assert counts == [0, 1]


async def test_large_and_long_forgotten_answers_are_made_anew(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(responses_module, "READY_MADE_MAX", 2)
    monkeypatch.setattr(responses_module, "READY_MADE_BYTES_MAX", 4 * FEATURES.output_row_bytes)
    call = _Call()
    async with _served(call):
        for number, length in enumerate((1, 2, 5, 3, 4, 1, 6)):
            await call.send(f"{number}", *range(length), start=number == 0)
        await call.run()
    assert call.context.written == [(f"{number}", "") for number in range(7)]
    assert call.context.lengths == [1, 2, 5, 3, 4, 1, 6]


async def test_what_is_left_of_a_cancelled_stream_begins_nothing() -> None:
    call = _Call(quantum_steps=1)
    async with _served(call) as task:
        await call.send("a", *range(3), start=True)
        call.rig.scheduler.tick()
        await call.send("b")
        await call.send("c", sequence=2, start=True)
        task.cancel()
        await asyncio.wait([task])
        call.rig.run()
        assert call.rig.view(SESSION).applied_step == 1
        assert len(call.rig.scheduler.sessions) == 1
        assert call.rig.scheduler.inbox.chunks == 0


async def test_a_stopping_server_ends_a_stream_once_it_is_answered() -> None:
    call = _Call()
    async with _served(call) as task:
        with call.streams.joined(call.stream):
            await call.send("a", start=True)
            call.streams.drain(1.0)
            await settle()
            assert not task.done()
            await call.send("b")
            await call.run()
            async with asyncio.timeout(10):
                with pytest.raises(ServerDraining):
                    await asyncio.shield(task)
    assert call.context.written == [("a", ""), ("b", ServerDraining().message)]


async def test_a_half_close_is_answered_in_full() -> None:
    call = _Call()
    async with _served(call) as task:
        await call.send("a", start=True)
        call.context.sent.put_nowait(aio.EOF)
        await settle()
        assert not task.done()
        await call.run()
        async with asyncio.timeout(10):
            await task
        assert call.context.written == [("a", "")]

"""Numbering and replay without a server, for any cuts, pieces, breaks and checkpoints."""

import asyncio
import gc
from collections.abc import Iterator
from contextlib import closing

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conveyor.v1 import session_pb2
from conveyor_client import (
    ConveyorError,
    DataLoss,
    DeadlineExceeded,
    NonFiniteInput,
    SessionSuperseded,
    StepGap,
    StepResultNotHeld,
)
from conveyor_client._chunk import Chunk
from conveyor_client._ledger import Ledger, Window
from conveyor_client._trace import TracePiece, trace_from_pieces

ALL = session_pb2.OUTPUT_MODE_ALL
WIDE = Window(steps_max=1000, bytes_max=100_000, in_flight_steps_max=1000)


@pytest.fixture
def loop() -> Iterator[asyncio.AbstractEventLoop]:
    loop = asyncio.new_event_loop()
    yield loop
    loop.close()


def row(step: int) -> bytes:
    return step.to_bytes(4, "little")


def submit(ledger: Ledger, loop: asyncio.AbstractEventLoop, length: int, label: int = 0) -> Chunk:
    rows = b"".join(row(label + n) for n in range(length))
    chunk = Chunk(rows, length, ALL, session_pb2.TRACE_MODE_UNSPECIFIED, loop.create_future())
    ledger.pending.append(chunk)
    return chunk


def take_all(ledger: Ledger) -> list[Chunk]:
    taken: list[Chunk] = []
    while (chunk := ledger.take()) is not None:
        taken.append(chunk)
    return taken


def answer(ledger: Ledger, first_step: int, length: int, durable_step: int = 0) -> bool:
    entry = session_pb2.ResultsEntry(
        handle=1,
        first_step=first_step,
        length=length,
        rows_length=length,
        durable_step=durable_step,
    )
    return ledger.answer(entry, b"".join(row(first_step + n) for n in range(length)))


class Server:
    """What a session on a server remembers: applied steps, a checkpoint, what it has to tell."""

    def __init__(self) -> None:
        self.inputs: list[bytes] = []
        self.durable = 0
        self.queue: list[tuple[int, int, ConveyorError | None]] = []

    def receive(self, chunk: Chunk, *, late: bool = False) -> None:
        """Runs a chunk; refuses it behind a gap, and where it is late and has a time limit."""
        start = (chunk.expected - chunk.first_step) * 4
        payload = chunk.rows[start:]
        assert len(payload) == chunk.missing * 4
        error: ConveyorError | None = None
        if chunk.expected > len(self.inputs) + 1:
            expected_step = str(len(self.inputs) + 1)
            error = StepGap("a gap", metadata={"expected_step": expected_step})
        elif late and chunk.timeout_seconds is not None and chunk.expected > len(self.inputs):
            error = DeadlineExceeded("late")
        self.queue.append((chunk.expected, chunk.missing, error))
        for n in range(0 if error else chunk.missing):
            step, data = chunk.expected + n, payload[n * 4 : n * 4 + 4]
            if step <= len(self.inputs):
                assert self.inputs[step - 1] == data, "another payload under a known number"
            else:
                self.inputs.append(data)

    def crash(self) -> None:
        del self.inputs[self.durable :]

    def tell(self, ledger: Ledger, piece: int) -> None:
        """Tells the first that is to be told, of results so many steps."""
        first_step, length, error = self.queue.pop(0)
        if error is not None:
            assert ledger.refuse(first_step, error)
            return
        assert answer(ledger, first_step, piece, self.durable)
        if piece < length:
            self.queue.insert(0, (first_step + piece, length - piece, None))


class Caller:
    """What callers submit, in parts, and what they know of it."""

    def __init__(self, ledger: Ledger, loop: asyncio.AbstractEventLoop) -> None:
        self.ledger, self.loop = ledger, loop
        self.inputs: list[list[Chunk]] = []
        self.waited_for: list[list[Chunk]] = []
        self.ahead: dict[Chunk, list[Chunk]] = {}  # what it was submitted behind, unanswered
        self.submitted = 0

    def submit(self, lengths: list[int], timeout_seconds: float | None) -> None:
        parts: list[Chunk] = []
        ahead = [chunk for chunks in self.waited_for for chunk in chunks]
        for length in lengths:
            part = submit(self.ledger, self.loop, length, label=self.submitted + 1)
            part.timeout_seconds = timeout_seconds
            part.follows = parts[-1] if parts else None
            self.ahead[part] = ahead + parts
            parts.append(part)
            self.submitted += length
        self.inputs.append(parts)
        self.waited_for.append(parts)

    def give_up(self, parts: list[Chunk]) -> None:
        self.waited_for.remove(parts)
        for part in parts:
            self.ledger.give_up(part)

    def look(self) -> None:
        """Callers notice what is answered, or failed."""
        for parts in list(self.waited_for):
            if any(part.failed for part in parts) or all(part.future.done() for part in parts):
                self.give_up(parts)


@settings(max_examples=300, deadline=None)
@given(data=st.data(), durable=st.booleans(), timeouts=st.booleans())
def test_every_step_is_answered_once_and_in_order_whatever_happens(
    data: st.DataObject, durable: bool, timeouts: bool
) -> None:
    with closing(asyncio.new_event_loop()) as loop:
        window = Window(steps_max=24, bytes_max=80, in_flight_steps_max=12)
        ledger, server = Ledger(window, 4), Server()
        ledger.keeps_until_durable = durable
        caller = Caller(ledger, loop)
        run_scenario(data, server, caller, timeouts)
        for chunk in (chunk for parts in caller.inputs for chunk in parts):
            check_outcome(chunk, server, caller.ahead[chunk])
        for parts in caller.inputs:
            ran = [data in server.inputs for part in parts for data in inputs_of(part)]
            assert ran == sorted(ran, reverse=True), "of an input there ran more than a beginning"
        labels = [int.from_bytes(data, "little") for data in server.inputs]
        assert labels == sorted(set(labels))
        assert len(labels) == caller.submitted or timeouts
        assert ledger.held == (0, 0)


def run_scenario(data: st.DataObject, server: Server, caller: Caller, timeouts: bool) -> None:
    ledger = caller.ledger
    actions = ["submit", "answer", "break"]
    actions += ["checkpoint", "crash"] if ledger.keeps_until_durable else []
    actions += ["give up", "look"] if timeouts else []
    for _ in range(data.draw(st.integers(5, 40))):
        act = data.draw(st.sampled_from(actions))
        if act == "submit":
            lengths = data.draw(st.lists(st.integers(1, 8), min_size=1, max_size=4))
            limited = timeouts and data.draw(st.booleans())
            caller.submit(lengths, 1.0 if limited else None)
        elif act == "answer" and server.queue:
            server.tell(ledger, data.draw(st.integers(1, server.queue[0][1])))
        elif act == "give up" and caller.waited_for:
            caller.give_up(data.draw(st.sampled_from(caller.waited_for)))
        elif act == "look":
            caller.look()
        elif act == "checkpoint":
            server.durable = len(server.inputs)
            ledger.durable(server.durable)
        elif act in ("break", "crash"):
            server.queue.clear()
            if act == "crash":
                server.crash()
            ledger.resume(len(server.inputs), server.durable)
        for chunk in take_all(ledger):
            server.receive(chunk, late=timeouts and data.draw(st.booleans()))
        steps, size = ledger.held
        assert steps <= ledger.window.steps_max
        assert size <= ledger.window.bytes_max
    for _ in range(200):  # everything is answered and checkpointed in the end
        for chunk in take_all(ledger):
            server.receive(chunk)
        while server.queue:
            server.tell(ledger, server.queue[0][1])
        server.durable = len(server.inputs)
        ledger.durable(server.durable)


def inputs_of(chunk: Chunk) -> list[bytes]:
    return [chunk.rows[at : at + 4] for at in range(0, len(chunk.rows), 4)]


def check_outcome(chunk: Chunk, server: Server, ahead: list[Chunk]) -> None:
    assert chunk.future.done()
    if chunk.future.cancelled():  # given up: it may have run or not
        return
    error = chunk.future.exception()
    if error is None:
        first, last = chunk.first_step, chunk.last_step
        assert b"".join(chunk.pieces) == b"".join(row(step) for step in range(first, last + 1))
        assert server.inputs[first - 1 : last] == inputs_of(chunk)
        return
    assert not set(inputs_of(chunk)) & set(server.inputs)
    if isinstance(error, StepGap):
        assert any(before.failed for before in ahead), "nobody could know of a reason"
    else:
        assert isinstance(error, DeadlineExceeded)


def test_pieces_that_fit_nothing_are_refused(loop: asyncio.AbstractEventLoop) -> None:
    ledger = Ledger(WIDE, 4)
    assert not answer(ledger, 1, 1)
    submit(ledger, loop, 4)
    take_all(ledger)
    assert not answer(ledger, 2, 1)
    assert not answer(ledger, 1, 5)
    assert not answer(ledger, 1, 0)
    assert answer(ledger, 1, 3)
    assert not answer(ledger, 1, 3)
    assert answer(ledger, 4, 1)


def test_the_window_holds_back_and_lets_a_single_giant_pass(
    loop: asyncio.AbstractEventLoop,
) -> None:
    ledger = Ledger(Window(steps_max=10, bytes_max=1000, in_flight_steps_max=4), 4)
    giant, small = submit(ledger, loop, 30), submit(ledger, loop, 1)
    assert take_all(ledger) == [giant]
    assert answer(ledger, 1, 30)
    assert take_all(ledger) == [small]
    assert small.first_step == 31


def test_what_is_given_up_while_it_waits_gets_no_number(loop: asyncio.AbstractEventLoop) -> None:
    ledger = Ledger(Window(steps_max=4, bytes_max=1000, in_flight_steps_max=4), 4)
    submit(ledger, loop, 4)
    take_all(ledger)
    gone, kept = submit(ledger, loop, 1), submit(ledger, loop, 1)
    gone.future.cancel()
    assert answer(ledger, 1, 4)
    assert take_all(ledger) == [kept]
    assert kept.first_step == 5


def test_after_a_failure_numbers_go_on_where_it_happened(loop: asyncio.AbstractEventLoop) -> None:
    ledger = Ledger(WIDE, 4)
    first, bad, after = (submit(ledger, loop, 2) for _ in range(3))
    take_all(ledger)
    assert ledger.refuse(3, NonFiniteInput("nan"))  # told at the door, before the first is answered
    waiting = submit(ledger, loop, 2)
    assert take_all(ledger) == []
    assert answer(ledger, 1, 2)
    assert ledger.refuse(5, StepGap("gap", metadata={"expected_step": "3"}))
    assert take_all(ledger) == [waiting]
    assert waiting.first_step == 3
    assert first.future.result() is first
    assert isinstance(bad.future.exception(), NonFiniteInput)
    assert isinstance(after.future.exception(), StepGap)


def test_no_part_runs_behind_a_part_that_was_refused(loop: asyncio.AbstractEventLoop) -> None:
    """The middle one is refused at the door, and nobody has looked when the first is answered."""
    ledger = Ledger(Window(steps_max=100, bytes_max=10_000, in_flight_steps_max=4), 4)
    first, bad, last = (submit(ledger, loop, 2) for _ in range(3))
    bad.follows, last.follows = first, bad
    after = submit(ledger, loop, 2)
    assert take_all(ledger) == [first, bad]
    assert ledger.refuse(3, NonFiniteInput("nan"))
    assert answer(ledger, 1, 2)
    assert take_all(ledger) == [after]
    assert after.first_step == 3
    assert last.failed


def test_what_was_answered_in_time_is_replayed_without_a_limit(
    loop: asyncio.AbstractEventLoop,
) -> None:
    ledger = Ledger(WIDE, 4)
    ledger.keeps_until_durable = True
    submit(ledger, loop, 2).timeout_seconds = 0.5
    (sent,) = take_all(ledger)
    assert sent.timeout_seconds == 0.5
    assert answer(ledger, 1, 2)
    ledger.resume(0, 0)
    (again,) = take_all(ledger)
    assert again.timeout_seconds is None


def test_a_break_while_recovering_fails_what_was_doomed(loop: asyncio.AbstractEventLoop) -> None:
    ledger = Ledger(WIDE, 4)
    bad, doomed = submit(ledger, loop, 1), submit(ledger, loop, 1)
    take_all(ledger)
    ledger.refuse(1, NonFiniteInput("nan"))
    ledger.resume(0, 0)
    assert ledger.idle
    assert isinstance(doomed.future.exception(), NonFiniteInput)
    assert doomed.future.exception() is not bad.future.exception()
    again = submit(ledger, loop, 1)
    assert take_all(ledger) == [again]
    assert again.first_step == 1


def test_a_forgotten_result_does_not_turn_the_numbers_back(
    loop: asyncio.AbstractEventLoop,
) -> None:
    ledger = Ledger(WIDE, 4)
    lost, after = submit(ledger, loop, 2), submit(ledger, loop, 1)
    take_all(ledger)
    ledger.resume(2, 0)
    take_all(ledger)
    assert ledger.refuse(1, StepResultNotHeld("forgotten"))
    assert answer(ledger, 3, 1)
    assert isinstance(lost.future.exception(), StepResultNotHeld)
    assert after.future.result() is after
    assert ledger.next_step == 4


def test_lost_state_is_told_unless_the_buffer_covers_it(loop: asyncio.AbstractEventLoop) -> None:
    for durable in (False, True):
        ledger = Ledger(WIDE, 4)
        ledger.keeps_until_durable = durable
        submit(ledger, loop, 3)
        take_all(ledger)
        assert answer(ledger, 1, 3)
        if durable:
            ledger.resume(1, 1)
            (chunk,) = take_all(ledger)
            assert (chunk.expected, chunk.missing) == (2, 2)
            assert answer(ledger, 2, 2)
            assert ledger.answered_step == 3
        else:
            with pytest.raises(DataLoss):
                ledger.resume(1, 0)


def test_a_server_ahead_of_the_client_means_somebody_else(loop: asyncio.AbstractEventLoop) -> None:
    ledger = Ledger(WIDE, 4)
    submit(ledger, loop, 1)
    take_all(ledger)
    with pytest.raises(SessionSuperseded):
        ledger.resume(2, 0)


def test_replays_keep_to_what_may_be_in_flight(loop: asyncio.AbstractEventLoop) -> None:
    ledger = Ledger(Window(steps_max=100, bytes_max=10_000, in_flight_steps_max=4), 4)
    ledger.keeps_until_durable = True
    for n in range(5):
        submit(ledger, loop, 4)
        take_all(ledger)
        assert answer(ledger, 1 + n * 4, 4)
    ledger.resume(0, 0)
    sent = 0
    while (chunk := ledger.take()) is not None:
        assert ledger.take() is None
        assert answer(ledger, chunk.expected, chunk.missing)
        sent += 1
    assert sent == 5


def test_a_replayed_piece_may_straddle_what_was_told(loop: asyncio.AbstractEventLoop) -> None:
    ledger = Ledger(WIDE, 4)
    ledger.keeps_until_durable = True
    chunk = submit(ledger, loop, 6)
    take_all(ledger)
    assert answer(ledger, 1, 4)
    ledger.resume(2, 0)
    take_all(ledger)
    assert answer(ledger, 3, 4)
    assert b"".join(chunk.future.result().pieces) == b"".join(row(n) for n in range(1, 7))


def test_the_traces_of_a_replay_lie_where_its_outputs_do(loop: asyncio.AbstractEventLoop) -> None:
    """Steps 1 to 3 were told, the server is back at 1 and answers 2 to 5, and 6 from memory."""
    ledger = Ledger(WIDE, 4)
    full = session_pb2.TRACE_MODE_FULL
    chunk = Chunk(b"".join(map(row, range(6))), 6, ALL, full, loop.create_future())
    ledger.pending.append(chunk)
    take_all(ledger)

    def answer_traced(first_step: int, length: int, *, traced: bool) -> None:
        entry = session_pb2.ResultsEntry(
            handle=1, first_step=first_step, length=length, rows_length=length
        )
        if traced:
            values = np.arange(first_step, first_step + length, dtype="<f4").tobytes()
            layer = entry.trace.layers.add(cell="rnn")
            layer.gates.add(name="h", units=1, values=values)
        rows = b"".join(row(first_step + n) for n in range(length))
        assert ledger.answer(entry, rows)

    answer_traced(1, 3, traced=True)
    ledger.resume(1, 0)
    take_all(ledger)
    answer_traced(2, 4, traced=True)
    answer_traced(6, 1, traced=False)
    assert chunk.future.done()
    trace = trace_from_pieces(1, chunk.traces)
    values = trace.layers[0]["h"].values
    assert values is not None
    np.testing.assert_array_equal(values[:, 0], [1, 2, 3, 4, 5, np.nan])
    assert trace.covered.tolist() == [True] * 5 + [False]
    assert b"".join(chunk.pieces) == b"".join(row(n) for n in range(1, 7))


def test_what_is_kept_for_replay_keeps_no_answer(loop: asyncio.AbstractEventLoop) -> None:
    ledger = Ledger(WIDE, 4)
    ledger.keeps_until_durable = True
    full = session_pb2.TRACE_MODE_FULL
    ledger.pending.append(Chunk(row(0), 1, ALL, full, loop.create_future()))
    take_all(ledger)
    entry = session_pb2.ResultsEntry(handle=1, first_step=1, length=1, rows_length=1)
    entry.trace.layers.add(cell="rnn")
    assert ledger.answer(entry, row(1))
    gc.collect()
    assert ledger.held == (1, 4)
    assert not [kept for kept in gc.get_objects() if type(kept) is TracePiece]
    ledger.resume(0, 0)  # and can be sent again all the same
    (again,) = take_all(ledger)
    assert (again.rows, again.expected, again.missing) == (row(0), 1, 1)


def test_abandoning_fails_everything_with_errors_of_their_own(
    loop: asyncio.AbstractEventLoop,
) -> None:
    ledger = Ledger(Window(steps_max=2, bytes_max=100, in_flight_steps_max=2), 4)
    sent, waiting = submit(ledger, loop, 2), submit(ledger, loop, 2)
    take_all(ledger)
    ledger.abandon(DataLoss("gone"))
    errors = [chunk.future.exception() for chunk in (sent, waiting)]
    assert [type(error) for error in errors] == [DataLoss, DataLoss]
    assert errors[0] is not errors[1]
    assert ledger.held == (0, 0)

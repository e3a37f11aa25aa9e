"""Which steps of a session were sent, answered and made durable, and what must be sent again.

No input or output happens here: the session feeds in what it sends and what it hears, and asks what
to do. That makes the rules of numbering and replay testable without a server.

A chunk is *pending* until it has a number, *in flight* until it is answered whole, and, where the
session is durable, *retained* until a checkpoint covers it. In flight and retained together are the
replay buffer, and `Window` bounds it in steps and in bytes.
"""

from collections import deque
from dataclasses import dataclass

from conveyor.v1 import session_pb2
from conveyor_client._chunk import Chunk
from conveyor_client._errors import (
    ConveyorError,
    DataLoss,
    SessionSuperseded,
    StepGap,
    StepResultNotHeld,
)
from conveyor_client._trace import TracePiece


@dataclass(frozen=True, slots=True)
class Window:
    """What a session may have outstanding.

    Attributes:
        steps_max: Steps in the replay buffer.
        bytes_max: Input bytes in the replay buffer.
        in_flight_steps_max: Steps sent and not answered yet.
    """

    steps_max: int
    bytes_max: int
    in_flight_steps_max: int


class Ledger:
    """The numbers of one session."""

    def __init__(self, window: Window, output_row_bytes: int) -> None:
        self.window = window
        self.keeps_until_durable = False
        self.paused = False
        self.next_step = 1
        self.answered_step = 0
        self.durable_step = 0
        self.pending: deque[Chunk] = deque()
        self._output_row_bytes = output_row_bytes
        self._in_flight: deque[Chunk] = deque()
        self._retained: deque[Chunk] = deque()
        self._to_resend: deque[Chunk] = deque()  # in flight, but not on this connection yet
        self._wire_steps = 0
        self._held_steps = 0
        self._held_bytes = 0
        self._continue_at: int | None = None  # after a failure: the number to go on with
        self._failure: ConveyorError | None = None
        self._given_up = False  # perhaps something in flight: looked up when it matters

    @property
    def idle(self) -> bool:
        """Whether nothing is in flight."""
        return not self._in_flight

    @property
    def waiting(self) -> bool:
        """Whether there is anything `take` might give."""
        return bool(self.pending or self._to_resend)

    @property
    def held(self) -> tuple[int, int]:
        """Steps and bytes in the replay buffer."""
        return self._held_steps, self._held_bytes

    @property
    def settled(self) -> bool:
        """Whether the present connection owes no further answer."""
        return self._wire_steps == 0

    # --- sending ---------------------------------------------------------------------------------

    def take(self) -> Chunk | None:
        """Finds the next chunk to send: one from before the break, or a pending one, now numbered.

        Returns:
            The chunk, to be sent from its step `expected` on, or None if there is none or no room.
        """
        if self._to_resend:
            chunk = self._to_resend[0]
            if not self._has_wire_room(chunk.missing):
                return None
            self._to_resend.popleft()
        else:
            chunk = self._take_pending()
            if chunk is None:
                return None
        chunk.sent = True
        self._wire_steps += chunk.missing
        return chunk

    def _take_pending(self) -> Chunk | None:
        if self.paused or self._number_unknown():
            return None
        while self.pending:
            chunk = self.pending[0]
            if chunk.follows is not None and chunk.follows.failed:
                chunk.future.cancel()
            if chunk.future.done():  # given up while it waited: it never had a number
                self.pending.popleft()
                continue
            if not (self._has_wire_room(chunk.length) and self._has_buffer_room(chunk)):
                return None
            self.pending.popleft()
            chunk.follows = None
            chunk.first_step = chunk.expected = self.next_step
            self.next_step += chunk.length
            self._in_flight.append(chunk)
            self._held_steps += chunk.length
            self._held_bytes += len(chunk.rows)
            return chunk
        return None

    def _number_unknown(self) -> bool:
        """Whether the number of the next chunk hangs on what is in flight.

        It does after a failure, as the chunks behind it are still to be refused, and while a chunk
        that was given up is not answered: the server may have run it or refused it.
        """
        if self._given_up:
            self._given_up = any(chunk.future.done() for chunk in self._in_flight)
        return self._given_up or self._continue_at is not None

    def give_up(self, chunk: Chunk) -> None:
        """Stops waiting for a chunk; of no effect on one that is answered.

        Without a number, it will not run. With one it may; whatever is submitted from now on is not
        sent before the server has told.
        """
        if chunk.future.cancel() or chunk.failed:
            self._given_up = True

    # Alone, a chunk beyond a whole window passes: the server shall say what is wrong with it.

    def _has_wire_room(self, steps: int) -> bool:
        return not self._wire_steps or self._wire_steps + steps <= self.window.in_flight_steps_max

    def _has_buffer_room(self, chunk: Chunk) -> bool:
        return not self._held_steps or (
            self._held_steps + chunk.length <= self.window.steps_max
            and self._held_bytes + len(chunk.rows) <= self.window.bytes_max
        )

    # --- hearing ---------------------------------------------------------------------------------

    def answer(self, entry: session_pb2.ResultsEntry, rows: bytes) -> bool:
        """Takes one piece of results.

        Args:
            entry: The piece.
            rows: Its packed output rows.

        Returns:
            False if the piece does not fit what was sent, which breaks the contract.
        """
        if not self._in_flight:
            return False
        chunk = self._in_flight[0]
        first_step, length = entry.first_step, entry.length
        after = first_step + length
        if first_step != chunk.expected or length < 1 or length > chunk.missing or not chunk.sent:
            return False
        chunk.expected = after
        self._wire_steps -= length
        known = chunk.first_step + chunk.received - first_step  # steps told before the break
        if known < length:
            if rows:
                whole = known <= 0 or entry.rows_length != length
                chunk.pieces.append(rows if whole else rows[known * self._output_row_bytes :])
            if chunk.trace:
                trace = entry.trace if entry.HasField("trace") else None
                told = max(known, 0)
                chunk.traces.append(TracePiece(length - told, trace, told))
            chunk.received = after - chunk.first_step
            self.answered_step = after - 1
        self.durable(entry.durable_step)
        if chunk.expected > chunk.last_step:
            self._leave_flight(chunk)
            chunk.deliver()
        return True

    def durable(self, step: int) -> None:
        """Drops what a checkpoint covers from the replay buffer."""
        if step <= self.durable_step:
            return
        self.durable_step = step
        while self._retained and self._retained[0].last_step <= step:
            self._release(self._retained.popleft())

    def refuse(self, first_step: int, error: ConveyorError) -> bool:
        """Takes the failure of a chunk.

        The chunk is failed with the error. Those sent after it can only be refused too, as their
        numbers are too high now, so sending stops until they are answered and goes on with the
        number that failed.

        Args:
            first_step: The first step of the chunk that was not applied.
            error: Why.

        Returns:
            False if nothing is in flight.
        """
        chunk = self._find(first_step)
        if chunk is None:
            return False
        self._wire_steps -= chunk.missing
        self._remove(chunk)
        if isinstance(error, StepResultNotHeld):  # it ran, long ago: the numbers go on behind it
            self.answered_step = max(self.answered_step, chunk.last_step)
        elif not chunk.doomed:
            self._go_on_at(chunk, first_step, error)
        chunk.fail(error)
        self._settle()
        return True

    def give_back(self, first_step: int) -> bool:
        """Marks a chunk as not run but not failed: the next connection will take it.

        Args:
            first_step: The first step of it that was not applied.

        Returns:
            False if nothing is in flight.
        """
        chunk = self._find(first_step)
        if chunk is None:
            return False
        if chunk.sent:
            chunk.sent = False
            self._wire_steps -= chunk.missing
        return True

    def resume(self, applied_step: int, durable_step: int) -> None:
        """Works out what `take` gives next, after the session was opened again.

        Args:
            applied_step: The last step the server has applied.
            durable_step: The step of its newest checkpoint.

        Raises:
            DataLoss: The server lost steps whose inputs are no longer here.
            SessionSuperseded: Somebody else has stepped the session meanwhile.
        """
        if applied_step >= self.next_step:
            raise SessionSuperseded(
                f"the session is at step {applied_step}, but this client's last one was"
                f" {self.next_step - 1}: another program steps the same session",
                reason="SESSION_SUPERSEDED",
            )
        self._drop_doomed()
        have_step = min(applied_step, self.answered_step)
        lost = [chunk for chunk in self._retained if chunk.last_step > have_step]
        oldest = next(iter(lost or self._in_flight), None)
        covered_from = oldest.first_step if oldest else self.next_step
        if applied_step < self.answered_step and covered_from > applied_step + 1:
            raise DataLoss(
                f"the server went back to step {applied_step}, although it had answered step"
                f" {self.answered_step}; the inputs from step {applied_step + 1} on are no longer"
                " kept to send again",
                reason="STORE_LOST_WRITES",
            )
        for chunk in reversed(lost):
            self._retained.remove(chunk)
            self._in_flight.appendleft(chunk)
        self.durable_step = min(self.durable_step, durable_step)
        self.durable(durable_step)
        while self._in_flight and self._in_flight[0].last_step <= have_step:
            self._leave_flight(self._in_flight[0])  # was replayed, and applied again, before
        for chunk in self._in_flight:
            chunk.sent = False
            chunk.expected = max(chunk.first_step, have_step + 1)
        self._to_resend = deque(self._in_flight)
        self._wire_steps = 0
        self._settle()

    def rebase(self, applied_step: int, durable_step: int) -> None:
        """Starts the numbers anew, after an opening, a reset, a rewind or a generation.

        Args:
            applied_step: The session's last applied step.
            durable_step: The step of its newest checkpoint.
        """
        assert not self._in_flight, "the session was not idle"
        self._retained.clear()
        self._held_steps = self._held_bytes = 0
        self._continue_at = None
        self.next_step = applied_step + 1
        self.answered_step = applied_step
        self.durable_step = durable_step

    def drop_pending(self, error: ConveyorError) -> None:
        """Fails what has no number yet."""
        for chunk in self.pending:
            chunk.fail(error.copy())
        self.pending.clear()

    def abandon(self, error: ConveyorError) -> None:
        """Fails everything that waits, because the session is over for this client."""
        for chunk in (*self._in_flight, *self.pending):
            chunk.fail(error.copy())
        for queue in (self.pending, self._in_flight, self._retained, self._to_resend):
            queue.clear()
        self._wire_steps = self._held_steps = self._held_bytes = 0

    # --- bookkeeping -----------------------------------------------------------------------------

    def _find(self, first_step: int) -> Chunk | None:
        # The oldest of that number: a number given twice, after a failure, is answered in order.
        sent = [chunk for chunk in self._in_flight if chunk.sent]
        for chunk in sent:
            if chunk.first_step <= first_step <= chunk.last_step:
                return chunk
        return next(iter(sent), None)

    def _remove(self, chunk: Chunk) -> None:
        self._in_flight.remove(chunk)
        self._release(chunk)

    def _leave_flight(self, chunk: Chunk) -> None:
        self._in_flight.popleft()
        if self.keeps_until_durable and chunk.last_step > self.durable_step:
            self._retained.append(chunk.without_answer())
        else:
            self._release(chunk)
        self._settle()

    def _release(self, chunk: Chunk) -> None:
        self._held_steps -= chunk.length
        self._held_bytes -= len(chunk.rows)

    def _go_on_at(self, chunk: Chunk, first_step: int, error: ConveyorError) -> None:
        inside = chunk.first_step <= first_step <= chunk.last_step
        self._continue_at = first_step if inside else chunk.first_step + chunk.received
        if isinstance(error, StepGap) and error.expected_step:
            self._continue_at = error.expected_step
        self._failure = error
        for other in self._in_flight:
            if other.first_step > chunk.first_step:
                other.doomed = True

    def _drop_doomed(self) -> None:
        doomed = [chunk for chunk in self._in_flight if chunk.doomed]
        for chunk in doomed:
            assert self._failure is not None, "a chunk is doomed by a failure"
            self._remove(chunk)
            chunk.fail(self._failure.copy())

    def _settle(self) -> None:
        if self._continue_at is None or self._in_flight:
            return
        self.next_step = self._continue_at
        self.answered_step = self.next_step - 1
        self._continue_at = self._failure = None

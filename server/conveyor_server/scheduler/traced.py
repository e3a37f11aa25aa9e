"""A scheduler and a driver that tell, of every chunk, when it waited and in which ticks it ran.

They stand in for the plain ones where calls are traced, so that the plain ones have nothing to ask.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from conveyor_server.core import Chunk, Reply
from conveyor_server.errors import ConveyorError
from conveyor_server.scheduler.driver import Driver
from conveyor_server.scheduler.scheduler import Batch, Outcome, Scheduler, Turn


@dataclass(frozen=True, slots=True)
class Ticked:
    """A chunk's part in one tick."""

    session_id: str
    model: str
    first_step: int
    steps: int
    """Of this chunk."""
    engine_seconds: float
    tick_sessions: int
    tick_steps: int
    """Of all sessions in the tick."""
    failed: str
    """The reason if the engine failed, else empty."""


class CallTrace(Protocol):
    """What is written down of one call. Called on the scheduler's thread; must not block."""

    def queued(self, session_id: str, first_step: int, waited_seconds: float) -> None:
        """A chunk begins to run."""
        ...

    def ticked(self, ticked: Ticked) -> None:
        """Steps of a chunk were run."""
        ...


class Traces(Protocol):
    """Which call a chunk belongs to.

    A call is known by what its chunks are answered by, or what stands behind that: one object for
    each call, however many chunks it sends.
    """

    def sent(self, asker: object) -> None:
        """The call under way sends chunks that are answered by `asker`."""
        ...

    def of(self, asker: object) -> CallTrace | None:
        """The call that chunks answered by `asker` belong to, if it is traced."""
        ...


@runtime_checkable
class OneOfMany(Protocol):
    """A reply that is made anew for each message of a call."""

    waiting: object
    """What there is one of for the whole call."""


def asker(reply: Reply) -> object:
    """What the call of a chunk is known by."""
    return reply.waiting if isinstance(reply, OneOfMany) else reply


class TracedDriver(Driver):
    """A driver that is told by which call a chunk is handed in."""

    def __init__(self, inline_multiply_adds_max: int, traces: Traces) -> None:
        """Call `start` before anything else."""
        super().__init__(inline_multiply_adds_max)
        self._traces = traces

    def submit(self, chunk: Chunk) -> None:
        """See `Driver.submit`."""
        self._traces.sent(asker(chunk.reply))
        super().submit(chunk)


class TracedScheduler(Scheduler):
    """A scheduler that tells what it does."""

    def __init__(self, traces: Traces, **parts: Any) -> None:
        """`parts` as those of `Scheduler`."""
        super().__init__(**parts)
        self._traces = traces
        self._engine_seconds = 0.0

    def begin(self) -> Turn | None:
        """See `Scheduler.begin`."""
        turn = super().begin()
        if isinstance(turn, Batch):
            now = self.clock.monotonic()
            for chunk, _, trace in self._traced(turn):
                if not chunk.done:
                    trace.queued(chunk.session_id, chunk.first_step, now - chunk.arrived_seconds)
        return turn

    def execute(self, turn: Turn) -> Outcome:
        """See `Scheduler.execute`."""
        started = self.clock.monotonic()
        try:
            return super().execute(turn)
        finally:
            self._engine_seconds = self.clock.monotonic() - started

    def finish(self, turn: Turn, outcome: Outcome) -> None:
        """See `Scheduler.finish`.

        What is told comes first: the answer may end the call.
        """
        if isinstance(turn, Batch):
            self._tell(turn, outcome)
        super().finish(turn, outcome)

    def _tell(self, batch: Batch, outcome: Outcome) -> None:
        tick_steps = sum(work.length for work in batch.works)
        for chunk, steps, trace in self._traced(batch):
            trace.ticked(
                Ticked(
                    session_id=chunk.session_id,
                    model=batch.model.name,
                    first_step=chunk.first_step + chunk.done,
                    steps=steps,
                    engine_seconds=self._engine_seconds,
                    tick_sessions=len(batch.works),
                    tick_steps=tick_steps,
                    failed=outcome.reason if isinstance(outcome, ConveyorError) else "",
                )
            )

    def _traced(self, batch: Batch) -> Iterator[tuple[Chunk, int, CallTrace]]:
        for session, work in zip(batch.sessions, batch.works, strict=True):
            chunk = session.queue[0]
            assert isinstance(chunk, Chunk)
            trace = self._traces.of(asker(chunk.reply))
            if trace is not None:
                yield chunk, work.length, trace

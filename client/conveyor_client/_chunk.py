"""Steps that were submitted together, on their way to the server and back."""

import asyncio
from dataclasses import dataclass, field, replace

from conveyor_client._errors import ConveyorError
from conveyor_client._nouns import OutputValue, TraceValue
from conveyor_client._trace import TracePiece


@dataclass(slots=True, eq=False)
class Chunk:
    """Consecutive steps that were submitted together.

    Attributes:
        rows: The packed inputs.
        length: The number of steps.
        future: Where the chunk itself is delivered once it is answered whole.
        first_step: Its number; 0 while it is pending.
        received: How many of its steps have been answered to the caller.
        expected: The step the next piece from this connection begins with.
        sent: Whether it was sent on this connection.
        doomed: A chunk before it failed, so the server will refuse this one.
        follows: While it is pending: the part before it of the same input. It may only run if that
            one does.
    """

    rows: bytes
    length: int
    output: OutputValue
    trace: TraceValue
    future: "asyncio.Future[Chunk]"
    timeout_seconds: float | None = None
    first_step: int = 0
    received: int = 0
    expected: int = 0
    sent: bool = False
    doomed: bool = False
    follows: "Chunk | None" = None
    pieces: list[bytes] = field(default_factory=list[bytes])
    traces: list[TracePiece] = field(default_factory=list[TracePiece])

    @property
    def last_step(self) -> int:
        """The number of its last step."""
        return self.first_step + self.length - 1

    @property
    def missing(self) -> int:
        """Steps this connection has not answered."""
        return self.last_step - self.expected + 1

    @property
    def failed(self) -> bool:
        """Whether it was refused, ran out of time or was cancelled, as far as its caller sees."""
        future = self.future
        return future.cancelled() or (future.done() and future.exception() is not None)

    def without_answer(self) -> "Chunk":
        """What it takes to send it again; outputs and traces are bounded by no window.

        It was answered in time, so it is sent again without a time limit.
        """
        future = self.future.get_loop().create_future()  # that of the answer holds the answer
        return replace(self, future=future, timeout_seconds=None, pieces=[], traces=[])

    def deliver(self) -> None:
        """Hands the answered chunk to whoever still waits for it."""
        if not self.future.done():
            self.future.set_result(self)

    def fail(self, error: ConveyorError) -> None:
        """Raises the error where the chunk is awaited."""
        if not self.future.done():
            self.future.set_exception(error)
            self.future.exception()  # seen: whoever stopped waiting does not want it logged

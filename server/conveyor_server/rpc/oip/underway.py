"""A request on its way from a client to the scheduler and back."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from conveyor_server.core import Chunk, ModelInfo, Piece, SessionKey, WholeSequence
from conveyor_server.errors import ConveyorError
from conveyor_server.rpc.oip.refusals import translated
from conveyor_server.rpc.oip.requests import Asked


class Waiting(Protocol):
    """Who sent a request and waits for what becomes of it."""

    def answered(self, request: "Request") -> None:
        """It is done or it failed. Called on the scheduler's thread; must not block."""
        ...


@dataclass(slots=True, eq=False)
class Request:
    """One request on its way. Implements `core.Reply` for its chunk."""

    asked: Asked
    waiting: Waiting
    received_seconds: float
    model: ModelInfo | None = None
    length: int = 0
    stacked: bool = True
    """Whether the tensors have a dimension for steps."""
    rows: list[bytes] = field(default_factory=list[bytes])
    error: ConveyorError | None = None
    done: bool = False
    dropped: bool = False
    """Whether nobody waits for it any more."""
    submitted_seconds: float = 0.0
    begun_seconds: float = 0.0
    opening: ConveyorError | None = None
    """Why the sequence could not be begun."""
    ended: "Callable[[Request], None] | None" = None
    """Whom to tell if the sequence ends with it."""
    key: SessionKey = ("", "")
    whole: WholeSequence | None = None
    """If it is a sequence for a model that cannot be stepped."""

    def piece(self, chunk: Chunk, piece: Piece) -> None:
        """See `core.Reply`."""
        self.rows.append(piece.rows)
        if piece.final:
            self.begun_seconds = chunk.begun_seconds
            self._end()

    def failed(self, chunk: Chunk, first_step: int, error: ConveyorError) -> None:
        """See `core.Reply`."""
        self.fail(self.opening or error)

    def settled(self, outcome: bytes | ConveyorError) -> None:
        """See `core.WholeSequence`."""
        if isinstance(outcome, ConveyorError):
            self.fail(outcome)
        else:
            self.rows.append(outcome)
            self._end()

    def fail(self, error: ConveyorError) -> None:
        """It ends here."""
        asked = self.asked
        self.error = translated(error, asked.model, asked.sequence)
        self._end()

    def _end(self) -> None:
        self.done = True
        if self.ended is not None:
            self.ended(self)
        self.waiting.answered(self)

"""A whole chunk's answer at once."""

from collections.abc import Callable
from dataclasses import dataclass, field

from conveyor_server.core import Chunk, Piece, Trace
from conveyor_server.errors import ConveyorError


@dataclass(slots=True)
class Collected:
    """Implements `core.Reply` for callers who want a whole chunk's answer at once.

    `settle` is called once, with the error or None.
    """

    settle: Callable[[ConveyorError | None], None]
    rows: list[bytes] = field(default_factory=list[bytes])
    rows_length: int = 0
    durable_step: int = 0
    duplicate: bool = False
    traces: list[Trace] = field(default_factory=list[Trace])
    """Of the pieces that ran, in order and without gaps: what was taken before comes first."""

    def piece(self, chunk: Chunk, piece: Piece) -> None:
        """See `core.Reply`."""
        self.rows.append(piece.rows)
        self.rows_length += piece.rows_length
        self.durable_step = piece.durable_step
        self.duplicate = self.duplicate or piece.duplicate
        if piece.trace is not None:
            self.traces.append(piece.trace)
        if piece.final:
            self.settle(None)

    def failed(self, chunk: Chunk, first_step: int, error: ConveyorError) -> None:
        """See `core.Reply`."""
        self.settle(error)

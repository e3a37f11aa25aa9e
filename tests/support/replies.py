"""What tests hand in where the server expects somebody who waits."""

from dataclasses import dataclass, field
from typing import Generic, TypeVar

from conveyor_server.core import Chunk, Piece
from conveyor_server.errors import ConveyorError

T = TypeVar("T")


@dataclass(eq=False)
class Answer:
    """All that came for one chunk."""

    chunk: Chunk
    pieces: list[Piece] = field(default_factory=list[Piece])
    error: ConveyorError | None = None
    failed_step: int | None = None

    @property
    def settled(self) -> bool:
        """Whether nothing more may come."""
        return self.error is not None or bool(self.pieces and self.pieces[-1].final)

    @property
    def rows(self) -> bytes:
        """The output rows of all pieces."""
        return b"".join(piece.rows for piece in self.pieces)


@dataclass(frozen=True)
class Loss:
    """One call of `Owner.lost`."""

    session_id: str
    epoch: int
    applied_step: int
    error: ConveyorError


class Recorder:
    """Implements `core.Owner` (and so `core.Reply`): keeps what comes, and checks its form.

    Pieces have to come in order and without gaps, and nothing may follow a chunk's end.
    """

    def __init__(self) -> None:
        self.answers: dict[Chunk, Answer] = {}
        self.losses: list[Loss] = []

    def piece(self, chunk: Chunk, piece: Piece) -> None:
        answer = self._answer(chunk)
        done = sum(each.length for each in answer.pieces)
        assert piece.length >= 1
        assert piece.first_step == chunk.first_step + done, "a piece is missing or came twice"
        assert piece.final == (done + piece.length == chunk.length)
        answer.pieces.append(piece)

    def failed(self, chunk: Chunk, first_step: int, error: ConveyorError) -> None:
        answer = self._answer(chunk)
        done = sum(each.length for each in answer.pieces)
        assert first_step == chunk.first_step + done, "the failure names another step"
        answer.error, answer.failed_step = error, first_step

    def lost(self, session_id: str, epoch: int, applied_step: int, error: ConveyorError) -> None:
        self.losses.append(Loss(session_id, epoch, applied_step, error))

    def of(self, chunk: Chunk) -> Answer:
        """What came for a chunk so far."""
        return self.answers.get(chunk) or Answer(chunk)

    def _answer(self, chunk: Chunk) -> Answer:
        answer = self.answers.setdefault(chunk, Answer(chunk))
        assert not answer.settled, "a chunk was answered twice"
        return answer


class Outcome(Generic[T]):
    """Implements `operations.Future`: takes one outcome."""

    def __init__(self) -> None:
        self._results: list[T] = []
        self.error: ConveyorError | None = None

    @property
    def done(self) -> bool:
        """Whether it came."""
        return bool(self._results) or self.error is not None

    @property
    def result(self) -> T:
        """The result; raises the error if there is one instead."""
        if self.error is not None:
            raise self.error
        assert self._results, "nothing came yet"
        return self._results[0]

    def set_result(self, result: T, /) -> None:
        assert not self.done, "settled twice"
        self._results.append(result)

    def set_exception(self, exception: ConveyorError, /) -> None:
        assert not self.done, "settled twice"
        self.error = exception

"""What a session has to be, written down as simply as it can be."""

from dataclasses import dataclass, field, replace

from conveyor_server.core import Chunk, ModelInfo, OutputMode, Piece, SessionKey
from tests.support.engine import split, straight_through, trace_of


@dataclass(eq=False)
class Expected:
    """One session as the rules have it: the inputs it took, one after the other, and who owns it.

    Nothing here batches, pages, queues or forgets.
    """

    key: SessionKey
    model: ModelInfo
    idle_seconds: float
    created: float
    lifetime_seconds: float
    touched: float
    """When something last kept it alive, for certain."""
    memory: bytes = b""
    """What it attends over."""
    carry: bytes = b""
    inputs: list[bytes] = field(default_factory=list[bytes])
    outputs: list[bytes] = field(default_factory=list[bytes])
    epoch: int = 1
    owner: object = None
    quarantined: bool = False
    closing: int = 0
    """Closes that wait for what was sent before them."""
    ephemeral: bool = False
    planned: dict[int, bytes] = field(default_factory=dict[int, bytes])
    """The row last sent for each step that is not taken yet."""

    def __post_init__(self) -> None:
        self.carry = self.carry or bytes(self.model.carry_bytes)

    @property
    def applied(self) -> int:
        """Steps taken."""
        return len(self.inputs)

    @property
    def lease_ends(self) -> float:
        """When it ends if nothing keeps it alive."""
        return min(self.touched + self.idle_seconds, self.lifetime_ends)

    @property
    def lifetime_ends(self) -> float:
        """When it ends whatever keeps it alive."""
        return self.created + self.lifetime_seconds

    def take(self, chunk: Chunk, piece: Piece) -> None:
        """Checks a piece of an answer, and takes its steps if they are new."""
        inputs = self.part(chunk, piece.first_step, piece.length)
        if piece.duplicate:
            last = piece.first_step + piece.length - 1
            assert last <= self.applied, "answered from memory, but never taken"
            assert inputs == self.inputs[piece.first_step - 1 : last], "another payload"
            outputs = self.outputs[piece.first_step - 1 : last]
        else:
            assert not self.quarantined, "a quarantined session was stepped"
            assert piece.first_step == self.applied + 1, "a step was lost or taken twice"
            outputs, self.carry = straight_through(
                self.model, b"".join(inputs), self.carry, self.memory
            )
            self.inputs += inputs
            self.outputs += outputs
        shown = None
        if chunk.trace and not piece.duplicate:
            shown = trace_of(self.model, outputs, self.memory, chunk.trace)
        assert piece.trace == shown, "another trace than alone and straight through"
        if chunk.output is OutputMode.NONE or (chunk.output is OutputMode.LAST and not piece.final):
            outputs = []
        elif chunk.output is OutputMode.LAST:
            outputs = outputs[-1:]
        assert piece.rows_length == len(outputs)
        assert piece.rows == b"".join(outputs), "other bits than alone and straight through"

    def part(self, chunk: Chunk, first_step: int, length: int) -> list[bytes]:
        """The input rows of some of a chunk's steps."""
        start = first_step - chunk.first_step
        return split(self.model, chunk.rows)[start : start + length]

    def contradicts(self, chunk: Chunk) -> bool:
        """Whether a step of the chunk was taken with another payload."""
        rows = split(self.model, chunk.rows)
        return any(
            row != self.inputs[step - 1]
            for step, row in enumerate(rows, start=chunk.first_step)
            if step <= self.applied
        )

    def row(self, step: int) -> bytes | None:
        """The input of a step, if it was taken or sent."""
        return self.inputs[step - 1] if step <= self.applied else self.planned.get(step)

    def restart(self) -> None:
        """It was reset."""
        self.carry = bytes(self.model.carry_bytes)
        self.inputs, self.outputs = [], []
        self.planned = {}
        self.quarantined = False

    def copy(self, key: SessionKey, now: float, idle_seconds: float) -> "Expected":
        """A session that begins where this one is."""
        return replace(
            self,
            key=key,
            idle_seconds=idle_seconds,
            created=now,
            touched=now,
            inputs=list(self.inputs),
            outputs=list(self.outputs),
            epoch=1,
            owner=None,
            quarantined=False,
            closing=0,
            ephemeral=False,
            planned={},
        )

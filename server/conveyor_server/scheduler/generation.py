"""Closed loops: each output becomes the next input, without leaving the server.

A generation is a chain of one-step chunks. Each result makes the next chunk, which goes through the
inbox like any other, so generations are batched with everybody's steps and with one another.
"""

import enum
from collections.abc import Callable
from dataclasses import dataclass

from conveyor_server.core import Chunk, InputKind, ModelInfo, Piece
from conveyor_server.errors import ConveyorError
from conveyor_server.scheduler.sampling import Sampling

UNREAD_MAX = 256
"""Outputs a generation may be ahead of its reader; then it pauses."""


class GenerationEnd(enum.IntEnum):
    """Why a generation ended; the values are the contract's."""

    STEPS_MAX = 1
    STOP_TOKEN = 2


@dataclass(frozen=True, slots=True)
class Made:
    """One output: the step it was made from, and a token or a row."""

    step: int
    token: int
    row: bytes


@dataclass(frozen=True, slots=True)
class Plan:
    """What to generate."""

    model: ModelInfo
    steps_max: int
    sampling: Sampling
    stop_tokens: frozenset[int]


class Generation:
    """Takes each step's output, makes the next step's input and hands it in.

    Implements `core.Reply`. Every output is fed back, the last one too: so the session's state
    includes all that was sent, and a later generation goes on where this one ended.
    """

    def __init__(
        self,
        plan: Plan,
        submit: Callable[[int, bytes, "Generation"], None],
        changed: Callable[[], None],
    ) -> None:
        """Makes nothing yet.

        Args:
            plan: What to make.
            submit: Hands in a step: its number, its row and this generation.
            changed: Called when there is something to read.
        """
        self.plan = plan
        self._submit = submit
        self._changed = changed
        self._unread: list[Made] = []
        self._made = 0
        self._paused: tuple[int, bytes] | None = None
        self.applied_step = 0
        self.end: GenerationEnd | None = None
        """Set once everything is fed back."""
        self.error: ConveyorError | None = None
        self._ending: GenerationEnd | None = None

    def begin(self, applied_step: int, output: bytes) -> None:
        """Starts from the output of a step that was taken before."""
        self.applied_step = applied_step
        self._make(applied_step, output)

    def take(self) -> list[Made]:
        """What was made since the last call; a paused generation goes on."""
        unread, self._unread = self._unread, []
        if self._paused is not None:
            step, row = self._paused
            self._paused = None
            self._feed(step, row)
        return unread

    def stop(self) -> None:
        """The reader is gone: what runs ends, nothing more is begun."""
        self._ending = self._ending or GenerationEnd.STEPS_MAX

    def piece(self, chunk: Chunk, piece: Piece) -> None:
        """See `core.Reply`."""
        self.applied_step = piece.first_step + piece.length - 1
        if not piece.final:
            return
        if self._ending is not None:
            self.end = self._ending
            self._changed()
        else:
            self._make(self.applied_step, piece.rows)

    def failed(self, chunk: Chunk, first_step: int, error: ConveyorError) -> None:
        """See `core.Reply`."""
        self.error = error
        self._changed()

    def _make(self, step: int, output: bytes) -> None:
        plan = self.plan
        row, token = output, 0
        if plan.model.input_kind is InputKind.TOKENS:
            token = plan.sampling.draw(output, plan.model.activation, step)
            row = token.to_bytes(4, "little")
        self._made += 1
        self._unread.append(Made(step, token, row))
        if plan.model.input_kind is InputKind.TOKENS and token in plan.stop_tokens:
            self._ending = GenerationEnd.STOP_TOKEN
        elif self._made >= plan.steps_max:
            self._ending = GenerationEnd.STEPS_MAX
        if len(self._unread) >= UNREAD_MAX:
            self._paused = (step + 1, row)
        else:
            self._feed(step + 1, row)
        self._changed()

    def _feed(self, step: int, row: bytes) -> None:
        try:
            self._submit(step, row, self)
        except ConveyorError as error:
            self.error = error

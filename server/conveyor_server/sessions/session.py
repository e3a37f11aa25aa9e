"""One session: a sequence's state on one model version, and the chunks waiting for it."""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from conveyor_server.core import (
    NEXT_STEP,
    Chunk,
    Durability,
    ModelInfo,
    OutputMode,
    Owner,
    Piece,
    SessionKey,
    SessionState,
    SessionView,
    Tier,
)
from conveyor_server.errors import ConveyorError, StepGap
from conveyor_server.sessions.held import HeldResults
from conveyor_server.sessions.memory import SharedMemory


@dataclass(frozen=True, slots=True, eq=False)
class Barrier:
    """Something to do to a session once all that was sent before it has run.

    That is to close, reset, fork or export it.
    """

    run: Callable[["Session"], None]
    fail: Callable[[ConveyorError], None]
    """Called instead if the session ends first."""


@dataclass(slots=True, eq=False)
class Session:
    """The state machine of one session.

    Chunks wait in `queue` and are looked at only when they reach its head: by then everything
    before them is applied, so whether one runs, is answered from memory or is refused is decided in
    one place, `settle`.
    """

    session_id: str
    principal: str
    model: ModelInfo
    idle_seconds: float
    lifetime_seconds: float
    created_monotonic: float
    created_wall: float
    held: HeldResults
    durability: Durability = Durability.NONE
    labels: tuple[tuple[str, str], ...] = ()
    ephemeral: bool = False
    memory: SharedMemory | None = None
    """What it attends over."""
    epoch: int = 1
    applied: int = 0
    durable: int = 0
    owner: Owner | None = None
    quarantined: bool = False
    slot: int | None = None
    paged_tier: Tier = Tier.UNSET
    """Where the carry lies while there is no slot."""
    active_monotonic: float = 0.0
    queue: deque[Chunk | Barrier] = field(default_factory=deque[Chunk | Barrier])
    steps_in_flight: int = 0
    ready: bool = False
    """Whether it waits in a batching queue."""
    waits_for_slot: bool = False
    """Whether it was taken into a tick and found no slot: then it is the next to get one."""
    running: bool = False
    """Whether it is part of the batch that runs now."""

    @property
    def key(self) -> SessionKey:
        """Principal and id."""
        return self.principal, self.session_id

    @property
    def state(self) -> SessionState:
        """What it is doing."""
        if self.quarantined:
            return SessionState.QUARANTINED
        return SessionState.ACTIVE if self.queue or self.running else SessionState.IDLE

    @property
    def tier(self) -> Tier:
        """Where its carry lies."""
        return self.paged_tier if self.slot is None else Tier.DEVICE

    @property
    def lifetime_ends(self) -> float:
        """Monotonic time at which it ends however busy it is."""
        return self.created_monotonic + self.lifetime_seconds

    @property
    def lease_ends(self) -> float:
        """Monotonic time at which it ends if nothing more is heard."""
        return min(self.active_monotonic + self.idle_seconds, self.lifetime_ends)

    def settle(self, chunk: Chunk) -> Piece | None:
        """Decides what becomes of the chunk at the head of the queue.

        Returns:
            None: its next step is the session's next one and has to run. Else a piece of it, or all
                of it, answered from memory.

        Raises:
            StepGap: Its next step is beyond the session's next one.
            StepConflict: It repeats a step with another payload.
            StepResultNotHeld: It repeats a step whose result is forgotten.
        """
        if chunk.first_step == NEXT_STEP:
            chunk.first_step = self.applied + 1
        first_step = chunk.first_step + chunk.done
        if first_step > self.applied + 1:
            raise StepGap(first_step, self.applied + 1)
        if first_step == self.applied + 1:
            return None
        length = min(chunk.length - chunk.done, self.applied - first_step + 1)
        final = chunk.done + length == chunk.length
        wanted = chunk.output
        if wanted is OutputMode.LAST and not final:
            wanted = OutputMode.NONE
        row_bytes = self.model.input_row_bytes
        inputs = chunk.rows[chunk.done * row_bytes : (chunk.done + length) * row_bytes]
        rows, count = self.held.recall(first_step, length, inputs, wanted)
        return Piece(first_step, length, rows, count, final, duplicate=True)

    @property
    def memory_bytes(self) -> int:
        """Bytes of what it attends over, shared or not."""
        return 0 if self.memory is None else len(self.memory.rows)

    def view(self, now_monotonic: float) -> SessionView:
        """The session as it is now; wall times are reckoned from the monotonic ones."""
        wall = self.created_wall - self.created_monotonic
        return SessionView(
            session_id=self.session_id,
            model=self.model,
            state=self.state,
            tier=self.tier,
            epoch=self.epoch,
            applied_step=self.applied,
            durable_step=self.durable,
            durability=self.durability,
            state_bytes=self.model.carry_bytes + self.memory_bytes,
            create_seconds=self.created_wall,
            active_seconds=wall + self.active_monotonic,
            expire_seconds=wall + max(self.lease_ends, now_monotonic),
            idle_seconds=self.idle_seconds,
            labels=self.labels,
            memory_rows=0 if self.memory is None else self.memory.length,
        )

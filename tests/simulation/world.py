"""What a run is played on, and what has happened in it so far."""

import struct
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, NamedTuple

from conveyor_server.core import Chunk, SessionKey, SessionView, WholeSequence
from conveyor_server.errors import ConveyorError
from conveyor_server.scheduler.scheduler import Turn
from tests.simulation.expected import Expected
from tests.support.models import ATTENTIVE, BOTHWAYS, FEATURES, TOKENS
from tests.support.replies import Recorder
from tests.support.rig import Rig

PRINCIPALS: Final = ("ann", "bob")
STREAMS: Final = 4
"""Streams 0 and 2 are the first principal's, 1 and 3 the second's."""
POISON: Final = {
    FEATURES.key: struct.pack("<2f", 666.0, 666.0),
    TOKENS.key: struct.pack("<i", 7),
    ATTENTIVE.key: struct.pack("<2f", 666.0, 666.0),
}
STREAMABLE: Final = (FEATURES, TOKENS, ATTENTIVE)


@dataclass(frozen=True)
class Setup:
    """What one run is played on; all of it small, so that every bound is met often."""

    slots: int = 2
    batch_sessions_max: int = 3
    quantum_steps: int = 2
    sessions_max: int = 8
    principal_sessions_max: int = 6
    steps_in_flight_max: int = 24
    inbox_chunks_max: int = 12
    inbox_bytes_max: int = 1024
    held_results_steps_max: int = 8
    held_results_bytes_max: int = 1_000
    held_results_total_bytes_max: int = 2_000
    host_state_bytes_max: int = 1 << 30
    memories_bytes_max: int = 1 << 30
    predictions_max: int = 3
    running_predictions_max: int = 2
    idle_seconds_default: float = 20.0
    idle_seconds_max: float = 60.0
    lifetime_seconds_max: float = 200.0
    ended_sessions_max: int = 16
    ended_seconds_max: float = 50.0


class Claim(NamedTuple):
    """What a stream was told when it opened a session."""

    session: Expected
    epoch: int


class Caller(Recorder):
    """Somebody who steps sessions and may own some."""

    def __init__(self, principal: str) -> None:
        super().__init__()
        self.principal = principal
        self.claims: dict[str, Claim] = {}
        """What it holds, by session id."""


class World:
    """The server, its callers, and every session as the rules have it."""

    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        limits = {
            name: value
            for name, value in vars(setup).items()
            if name not in ("slots", "batch_sessions_max", "quantum_steps")
        }
        self.rig = Rig(
            (*STREAMABLE, BOTHWAYS),
            slots=setup.slots,
            batch_sessions_max=setup.batch_sessions_max,
            quantum_steps=setup.quantum_steps,
            **limits,
        )
        self.rig.engine.poisoned = set(POISON.values())
        self.streams: list[Caller] = []
        """Those that live as long as the run."""
        self.live: dict[SessionKey, Expected] = {}
        self.ended: Counter[str] = Counter()
        """How often each kind of thing happened, so that tests can see that it did."""
        self.unanswered: dict[Chunk, Expected | None] = {}
        self.snapshots: list[tuple[bytes, Expected]] = []
        self.operations_waiting = 0
        self.whole: list[WholeSequence] = []
        """Whole sequences that somebody waits for."""
        self.batch: Turn | None = None
        self.dropping: SessionKey | None = None
        """The session whose owner's chunks are being dropped just now."""
        self.failing: ConveyorError | None = None
        self.failing_memories: list[ConveyorError] = []

    @property
    def now(self) -> float:
        """Monotonic time."""
        return self.rig.clock.monotonic()

    def post(self, operation: Callable[[], None]) -> None:
        """Runs something between two ticks, as the driver does."""
        self.operations_waiting += 1

        def run() -> None:
            self.operations_waiting -= 1
            operation()

        self.rig.scheduler.inbox.put_operation(run)

    def created(self, expected: Expected, view: SessionView) -> None:
        """A session was made."""
        assert expected.key not in self.live, "made over another one"
        assert view.session_id == expected.key[1]
        assert view.applied_step == expected.applied
        expected.epoch = view.epoch
        self.live[expected.key] = expected
        self.ended["created"] += 1

    def over(self, expected: Expected, word: str) -> None:
        """A session is no more."""
        if expected.owner is not None:
            assert isinstance(expected.owner, Caller)
            expected.owner.claims.pop(expected.key[1], None)
        del self.live[expected.key]
        self.ended[word] += 1

    def stands(self, claim: Claim) -> bool:
        """Whether nobody claimed the session since."""
        live = self.live.get(claim.session.key) is claim.session
        return live and claim.session.epoch == claim.epoch

    def holds(self, stream: Caller, claim: Claim) -> bool:
        """Whether the claim stands and was not given back."""
        return self.stands(claim) and claim.session.owner is stream

    def settled(self, chunk: Chunk) -> None:
        """A chunk has all its answer."""
        del self.unanswered[chunk]
        expected = self.live.get((chunk.principal, chunk.session_id))
        if expected is not None and expected.ephemeral:
            self.discard(expected.key)

    def discard(self, key: SessionKey) -> None:
        """The call is over that a session was made for."""

        def run() -> None:
            self.rig.operations.discard(*key)
            if key in self.live:
                self.over(self.live[key], "discarded")

        self.post(run)

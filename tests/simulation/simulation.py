"""A whole server below its door, driven step by step and compared with the rules after each one.

Everything is real but time and arithmetic. What callers send goes through admission into the inbox,
just as from `rpc`; a tick is taken in its three parts, so that things arrive while a batch runs, as
they do with the driver's worker thread.
"""

import itertools
import struct
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

from conveyor_server.admission.admission import Binding, Entry
from conveyor_server.core import (
    Chunk,
    MemoryRows,
    ModelInfo,
    OpenMode,
    OpenRequest,
    OutputMode,
    Piece,
    SessionKey,
    SessionState,
    SessionView,
    TraceMode,
    WholeSequence,
)
from conveyor_server.errors import (
    ConveyorError,
    DeviceOutOfMemory,
    EngineFailed,
    InboxFull,
    SessionEnded,
    SessionNotFound,
)
from conveyor_server.scheduler.scheduler import Batch, Outcome, Turn
from conveyor_server.sessions.session import Session
from tests.simulation.expected import Expected
from tests.support.engine import whole
from tests.support.models import ATTENTIVE, BOTHWAYS, FEATURES, TOKENS
from tests.support.replies import Outcome as Answered
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
RECORD_BYTES_MAX: Final = 512
"""No record of the small models is larger."""
ENDINGS: Final = {"SESSION_EXPIRED", "SESSION_CLOSED", "SESSION_EVICTED", "SESSION_NOT_FOUND"}


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


class Stream(Recorder):
    """A caller: a stream that owns sessions, or a call that waits for one answer."""

    def __init__(self, simulation: "Simulation", principal: str) -> None:
        super().__init__()
        self._simulation = simulation
        self.principal = principal
        self.claims: dict[str, Claim] = {}
        """What it holds, by session id."""

    def piece(self, chunk: Chunk, piece: Piece) -> None:
        super().piece(chunk, piece)
        self._simulation.on_piece(chunk, piece)

    def failed(self, chunk: Chunk, first_step: int, error: ConveyorError) -> None:
        super().failed(chunk, first_step, error)
        self._simulation.on_failed(chunk, first_step, error)

    def lost(self, session_id: str, epoch: int, applied_step: int, error: ConveyorError) -> None:
        super().lost(session_id, epoch, applied_step, error)
        self._simulation.on_lost(self, session_id, epoch, applied_step, error)


class Simulation:
    """The server, the callers, and what has to be true of them."""

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
        self.streams = [Stream(self, PRINCIPALS[number % 2]) for number in range(STREAMS)]
        self.live: dict[SessionKey, Expected] = {}
        self.ended: Counter[str] = Counter()
        """How often each kind of thing happened, so that tests can see that it did."""
        self.unanswered: dict[Chunk, Expected | None] = {}
        self.snapshots: list[tuple[bytes, Expected]] = []
        self.operations_waiting = 0
        self.whole: list[WholeSequence] = []
        """Whole sequences that somebody waits for."""
        self.batch: Turn | None = None
        self._outcome: Outcome | None = None
        self._dropping: SessionKey | None = None
        """The session whose owner's chunks are being dropped just now."""
        self._failing: ConveyorError | None = None
        self._failing_memories: list[ConveyorError] = []
        self._numbers = itertools.count(1)

    @property
    def now(self) -> float:
        return self.rig.clock.monotonic()

    # --- callers: steps --------------------------------------------------------------------------

    def send(
        self,
        key: SessionKey,
        stream: Stream | None,
        first_step: int,
        rows: Sequence[bytes],
        output: OutputMode,
        *,
        epoch: int = 0,
        seconds: float | None = None,
        trace: TraceMode = TraceMode.NONE,
    ) -> Chunk | None:
        """A chunk comes in: on a stream, or as a call of its own that names no claim or one."""
        target = self.live.get(key)
        if stream is not None:
            if key[1] not in stream.claims:
                return None  # its own bookkeeping refuses it
            target, epoch = stream.claims[key[1]]
        model = target.model if target else FEATURES
        reply = stream or Stream(self, key[0])
        binding = Binding(*key, epoch, model, reply, handle=0 if stream is None else 1)
        entry = Entry(binding, first_step, len(rows), output, trace)
        deadline = None if seconds is None else self.now + seconds
        chunk = self.rig.admission.chunk(entry, b"".join(rows), self.now, deadline)
        inbox = self.rig.scheduler.inbox
        size = inbox.size_bytes + len(chunk.rows)
        full = inbox.chunks >= self.setup.inbox_chunks_max or size > self.setup.inbox_bytes_max
        try:
            inbox.put(chunk)
        except InboxFull:
            assert full, "refused although there was room"
            self.ended["INBOX_FULL"] += 1
            return None
        assert not full, "taken although there was no room"
        self.unanswered[chunk] = target if epoch else None
        if target is not None:
            target.planned.update(enumerate(rows, start=first_step))
        return chunk

    def rows(self, key: SessionKey, kind: str, length: int, back: int) -> tuple[int, list[bytes]]:
        """A chunk's first step and rows.

        Args:
            key: The session.
            kind: `next`, what follows what was sent; `poison`, the same with a row that makes the
                carry non-finite; `again`, steps sent before; `conflict`, those with other rows;
                `gap`, steps with some left out before them.
            length: Its steps.
            back: How far `again` and `conflict` go back, and how many steps a gap leaves out.
        """
        expected = self.live.get(key)
        if expected is None:
            return 1 + back, [self.fresh_row(FEATURES) for _ in range(length)]
        after = max(expected.applied, *expected.planned, 0) + 1
        first_step = {"again": max(1, after - 1 - back), "conflict": max(1, after - 1 - back),
                      "gap": after + 1 + back}.get(kind, after)  # fmt: skip
        steps = range(first_step, first_step + length)
        rows = [expected.row(step) or self.fresh_row(expected.model) for step in steps]
        if kind == "conflict":
            rows[back % length] = self.fresh_row(expected.model)
        if kind == "poison":
            rows[-1] = POISON[expected.model.key]
        return first_step, rows

    def fresh_row(self, model: ModelInfo) -> bytes:
        """An input row not sent before, as far as there are so many."""
        number = next(self._numbers)
        if model.vocabulary_size:
            return struct.pack("<i", number % 7)
        return struct.pack("<2f", number % 65_521, number // 65_521)

    # --- callers: operations ---------------------------------------------------------------------

    def open(
        self,
        stream: Stream | None,
        key: SessionKey,
        *,
        mode: OpenMode = OpenMode.EITHER,
        model: ModelInfo = FEATURES,
        memory: int = 0,
        idle_seconds: float | None = None,
    ) -> None:
        """Opens a session, for a stream or for nobody; `memory` is which of several it is given."""
        rows = None
        if model.memory_row_size:
            rows = MemoryRows(memory + 1, bytes([memory + 1]) * 12 * (memory + 1))
        request = OpenRequest(
            *key,
            "" if mode is OpenMode.RESUME else model.key.name,
            mode=mode,
            idle_seconds=idle_seconds,
            memory=rows,
        )
        self._post(lambda: self._open(stream, request))

    def close(self, stream: Stream | None, key: SessionKey) -> None:
        """Closes a session: by a frame on a stream, or by a call."""
        claim = None if stream is None else stream.claims.get(key[1])
        if stream is not None and claim is None:
            return

        def done(view: SessionView) -> None:
            assert claim is None or self._stands(claim), "closed by a stream that lost it"
            assert view.applied_step == self.live[key].applied
            self._over(self.live[key], "closed")

        def run() -> None:
            if key in self.live:
                self.live[key].closing += 1
            epoch = 0 if claim is None else claim.epoch
            outcome = self._answered(done, key, claim)
            self.rig.operations.close(*key, outcome, stream, epoch)

        self._post(run)

    def reset(self, key: SessionKey) -> None:
        """Takes a session back to its beginning."""

        def done(view: SessionView) -> None:
            self.live[key].restart()
            self.live[key].touched = self.now
            assert view.applied_step == 0
            assert view.state is not SessionState.QUARANTINED

        outcome = self._answered(done, key)
        self._post(lambda: self.rig.operations.reset(*key, outcome))

    def fork(self, key: SessionKey, new_ids: Sequence[str], at_step: int = 0) -> None:
        """Copies a session."""

        def done(views: list[SessionView]) -> None:
            source = self.live[key]
            assert not source.quarantined
            assert at_step in (0, source.applied)
            for new_id, view in zip(new_ids, views, strict=True):
                new_key = (key[0], new_id or view.session_id)
                self._created(source.copy(new_key, self.now, source.idle_seconds), view)
                self.ended["shared"] += bool(source.memory)

        outcome = self._answered(done, key)
        self._post(lambda: self.rig.operations.fork(*key, new_ids, at_step, outcome))

    def export(self, key: SessionKey) -> None:
        """Takes a snapshot."""

        def done(result: tuple[SessionView, bytes]) -> None:
            source = self.live[key]
            assert not source.quarantined
            self.snapshots.append((result[1], source.copy(key, 0.0, 0.0)))

        outcome = self._answered(done, key)
        self._post(lambda: self.rig.operations.export(*key, outcome))

    def import_(self, number: int, key: SessionKey, idle_seconds: float) -> None:
        """Makes a session from a snapshot taken before, perhaps by somebody else."""
        if not self.snapshots:
            return
        snapshot, source = self.snapshots[number % len(self.snapshots)]

        def run() -> None:
            try:
                view = self.rig.operations.import_(key[0], snapshot, key[1], idle_seconds)
            except ConveyorError as error:
                self._justify_refusal(error, key, memory=source.memory)
            else:
                self._created(source.copy(key, self.now, idle_seconds), view)

        self._post(run)

    def detach(self, stream: Stream, session_id: str) -> None:
        """A stream gives a session back."""
        claim = stream.claims.get(session_id)
        if claim is None:
            return
        expected = claim.session

        def run() -> None:
            held = self._holds(stream, claim)
            self._dropping = expected.key
            if held:
                del stream.claims[session_id]
                expected.owner = None
            applied = self.rig.operations.detach(*expected.key, claim.epoch, stream)
            self._dropping = None
            assert applied == (expected.applied if held else None)

        self._post(run)

    def keep_alive(self, stream: Stream) -> None:
        """A heartbeat."""

        def run() -> None:
            self.rig.operations.keep_alive(stream.principal, list(stream.claims), stream)
            for claim in stream.claims.values():
                claim.session.touched = self.now

        self._post(run)

    def predict(self, principal: str, length: int) -> None:
        """A call that has a session for itself, as long as it lasts."""
        request = OpenRequest(principal, "", FEATURES.key.name, ephemeral=True)

        def run() -> None:
            try:
                view = self.rig.operations.open(request).view
            except ConveyorError as error:
                self._justify_refusal(error, (principal, ""))
                return
            key = (principal, view.session_id)
            idle, lifetime = self.setup.idle_seconds_default, self.setup.lifetime_seconds_max
            expected = Expected(
                key, FEATURES, idle, self.now, lifetime, self.now, ephemeral=True, closing=1
            )
            self._created(expected, view)
            first_step, rows = self.rows(key, "next", length, 0)
            chunk = self.send(key, None, first_step, rows, OutputMode.ALL, epoch=view.epoch)
            if chunk is None:
                self._discard(key)

        self._post(run)

    def predict_whole(self, length: int, output: OutputMode, seconds: float | None) -> None:
        """A call for a model that cannot be stepped."""
        rows = b"".join(self.fresh_row(BOTHWAYS) for _ in range(length))
        outputs = {OutputMode.ALL: length, OutputMode.LAST: 1, OutputMode.NONE: 0}[output]
        due = None if seconds is None else self.now + seconds

        def settle(outcome: bytes | ConveyorError) -> None:
            self.whole.remove(sequence)
            if isinstance(outcome, bytes):
                expected = whole(BOTHWAYS, rows)
                assert outcome == b"".join(expected[length - outputs :])
                self.ended["whole"] += 1
                return
            if outcome.reason == "DEADLINE_EXCEEDED":
                assert due is not None
                assert self.now > due
            else:
                assert outcome is self._failing
            self.ended[f"whole {outcome.reason}"] += 1

        sequence = WholeSequence(BOTHWAYS, rows, length, outputs, settle, self.now, due)

        def run() -> None:
            inbox, setup = self.rig.scheduler.inbox, self.setup
            full = (
                len(self.whole) >= setup.predictions_max
                or inbox.chunks >= setup.inbox_chunks_max
                or inbox.size_bytes + len(rows) > setup.inbox_bytes_max
            )
            try:
                self.rig.operations.predict(sequence)
            except InboxFull:
                assert full, "refused although there was room"
                self.ended["whole INBOX_FULL"] += 1
            else:
                assert not full, "taken although there was no room"
                self.whole.append(sequence)

        self._post(run)

    def give_up(self, number: int) -> None:
        """A caller goes whose whole sequence is not done."""
        if not self.whole:
            return
        sequence = self.whole[number % len(self.whole)]

        def run() -> None:
            self.rig.operations.drop_prediction(sequence)
            if sequence in self.whole:
                self.whole.remove(sequence)
                self.ended["given up"] += 1

        self._post(run)

    def _discard(self, key: SessionKey) -> None:
        def run() -> None:
            self.rig.operations.discard(*key)
            if key in self.live:
                self._over(self.live[key], "discarded")

        self._post(run)

    # --- the engine and time ---------------------------------------------------------------------

    def fail_next(self, *, memory: bool) -> None:
        """The next engine call will fail."""
        error: ConveyorError = EngineFailed("broken")
        if memory:
            error = DeviceOutOfMemory("full", limit="device memory", maximum="fake")
        self.rig.engine.fail_next = [error]

    def fail_next_memory(self) -> None:
        """The next memory will not get onto the device."""
        error = DeviceOutOfMemory("full", limit="device memory", maximum="fake")
        self.rig.engine.fail_next_memory = [error]
        self._failing_memories.append(error)

    def begin(self) -> None:
        """The first part of a tick and the engine call; things may arrive before `finish`."""
        assert self.batch is None
        page_outs = self.rig.metrics.page_outs.total()
        self.batch = self.rig.scheduler.begin()
        self._notice_ended()
        self._check_leases()
        page_outs = self.rig.metrics.page_outs.total() - page_outs
        # What this very tick pages out is counted at the next one.
        bound = self.setup.host_state_bytes_max + page_outs * RECORD_BYTES_MAX
        assert self.rig.store.size_bytes <= bound
        if self.batch is not None:
            self._outcome = self.rig.scheduler.execute(self.batch)

    def finish(self) -> None:
        """The last part of a tick."""
        batch, outcome = self.batch, self._outcome
        assert batch is not None
        self.batch, self._outcome = None, None
        if isinstance(outcome, ConveyorError):
            self._failing = outcome
        elif isinstance(batch, Batch):
            assert isinstance(outcome, list)
            for session, done in zip(batch.sessions, outcome, strict=True):
                if not done.finite:
                    self.live[session.key].quarantined = True
                    self.ended["quarantined"] += 1
        self.rig.scheduler.finish(batch, outcome)
        self._failing = None
        self._notice_ended()
        self.check()

    def tick(self) -> None:
        """A whole tick, or the rest of one."""
        if self.batch is None:
            self.begin()
        if self.batch is not None:
            self.finish()
        self.check()

    def drain(self) -> None:
        """Ticks until there is nothing to do; then everything must have been answered."""
        for _ in range(2_000):
            self.tick()
            if not self.rig.scheduler.has_work:
                break
        else:
            raise AssertionError("the scheduler never comes to rest")
        assert not self.unanswered, "a chunk was never answered"
        assert not self.operations_waiting, "an operation was never answered"
        assert not self.whole, "a whole sequence was never answered"
        assert self.rig.scheduler.inbox.chunks == 0
        assert self.rig.scheduler.inbox.size_bytes == 0
        assert all(not session.queue for session in self.rig.scheduler.sessions)

    # --- what the server says --------------------------------------------------------------------

    def on_piece(self, chunk: Chunk, piece: Piece) -> None:
        """Some steps were answered."""
        expected = self.live.get((chunk.principal, chunk.session_id))
        assert expected is not None, "a session that is over was stepped"
        if chunk.epoch:
            assert self.unanswered[chunk] is expected, "a chunk ran on a later session of its id"
            assert chunk.epoch == expected.epoch, "a chunk of a lost claim was run"
        if chunk.reply in self.streams:
            assert expected.owner is chunk.reply, "run for a stream that gave the session back"
        expected.take(chunk, piece)
        self.ended["duplicate" if piece.duplicate else "applied"] += 1
        self.ended["traced"] += piece.trace is not None
        if not piece.duplicate:
            expected.touched = self.now
        if piece.final:
            self._settled(chunk)

    def on_failed(self, chunk: Chunk, first_step: int, error: ConveyorError) -> None:
        """A chunk was refused, or ended before its end."""
        key = (chunk.principal, chunk.session_id)
        expected = self.live.get(key)
        self._justify_failure(expected, chunk, first_step, error)
        self.ended[error.reason] += 1
        self._settled(chunk)
        if expected is not None:
            expected.planned = {}

    def on_lost(
        self, stream: Stream, session_id: str, epoch: int, applied: int, error: ConveyorError
    ) -> None:
        """A stream was told that a session is no longer its own."""
        claim = stream.claims.pop(session_id)
        expected = claim.session
        assert self._holds(stream, claim)
        assert (epoch, applied) == (claim.epoch, expected.applied)
        expected.owner = None
        if isinstance(error, SessionEnded):
            self._justify_end(expected, error)
        else:
            assert error.reason == "SESSION_SUPERSEDED"
            assert self._dropping == expected.key

    # --- invariants ------------------------------------------------------------------------------

    def check(self) -> None:
        """What has to be true between any two things that happen."""
        self._check_slots()
        self._check_memories()
        self._check_counts()
        for key, expected in self.live.items():
            session = self.rig.scheduler.sessions.find(key)
            assert session is not None, f"{key} is gone"
            self._check_session(session, expected)
            self._check_invisible(key)
        self._check_listing()

    def _check_slots(self) -> None:
        engine, sessions = self.rig.engine, list(self.rig.scheduler.sessions)
        for model in STREAMABLE:
            allocator = engine.allocators[model.key]
            allocator.check()
            slots = [
                session.slot
                for session in sessions
                if session.model is model and session.slot is not None
            ]
            assert len(set(slots)) == len(slots) == allocator.used
            assert 0 not in slots, "the dummy slot was handed out"
            assert self.rig.scheduler.residency.resident(model.key) == len(slots)
        on_host = sum(
            len(self.rig.store.get(session.key))
            for session in sessions
            if session.slot is None and session.tier != 0
        )
        assert self.rig.store.size_bytes == on_host, "a record without a session"

    def _check_memories(self) -> None:
        """Every memory is some live session's, and on the device as long as one has a slot."""
        memories, sessions = self.rig.scheduler.memories, list(self.rig.scheduler.sessions)
        attending = Counter(session.memory for session in sessions if session.memory is not None)
        resident = Counter(
            session.memory
            for session in sessions
            if session.memory is not None and session.slot is not None
        )
        for memory, count in attending.items():
            assert memory.sessions == count
            assert memory.resident == resident[memory]
            assert bool(memory.number) == bool(resident[memory])
        assert memories.size_bytes == sum(len(memory.rows) for memory in attending)
        assert memories.size_bytes <= self.setup.memories_bytes_max
        assert memories.device_bytes == sum(len(memory.rows) for memory in resident)
        on_device = self.rig.engine.memories[ATTENTIVE.key]
        assert on_device == {memory.number: memory.rows for memory in resident}
        assert not any(self.rig.engine.memories[key] for key in (FEATURES.key, TOKENS.key))

    def _check_counts(self) -> None:
        scheduler, setup = self.rig.scheduler, self.setup
        accepted = len(self.unanswered) + len(self.whole)
        assert scheduler.inbox.chunks == accepted <= setup.inbox_chunks_max
        size = sum(len(each.rows) for each in (*self.unanswered, *self.whole))
        predictions = scheduler.predictions
        assert predictions.waiting + predictions.running == len(self.whole)
        assert len(self.whole) <= setup.predictions_max
        assert predictions.running <= setup.running_predictions_max
        assert scheduler.inbox.size_bytes == size <= setup.inbox_bytes_max
        assert len(scheduler.sessions) == len(self.live) <= setup.sessions_max
        owners = Counter(key[0] for key in self.live)
        assert max(owners.values(), default=0) <= setup.principal_sessions_max
        models = Counter(expected.model.key for expected in self.live.values())
        models[BOTHWAYS.key] += len(self.whole)
        assert +scheduler.models.sessions == +models
        held = sum(session.held.size_bytes for session in scheduler.sessions)
        assert scheduler.held.size_bytes == held <= setup.held_results_total_bytes_max
        assert len(scheduler.sessions._tombstones) <= setup.ended_sessions_max
        assert len(scheduler.sessions._leases) <= 2 * len(self.live) + 64

    def _check_session(self, session: Session, expected: Expected) -> None:
        assert session.applied == expected.applied
        assert session.epoch == expected.epoch
        assert session.owner is expected.owner
        assert session.quarantined == expected.quarantined
        assert (b"" if session.memory is None else session.memory.rows) == expected.memory
        running = isinstance(self.batch, Batch) and session in self.batch.sessions
        assert session.running == running
        if not running:
            carry = self.rig.scheduler.residency.checkpoint(session).carry
            assert carry == expected.carry, "another carry than straight through"
            assert session.ready == bool(session.queue), "a chunk waits that nobody will run"
        assert session.held.steps <= self.setup.held_results_steps_max
        assert session.held.size_bytes <= self.setup.held_results_bytes_max
        queued = [item for item in session.queue if isinstance(item, Chunk)]
        assert session.steps_in_flight == sum(chunk.length for chunk in queued)
        assert expected.ephemeral or session.steps_in_flight <= self.setup.steps_in_flight_max
        assert set(queued) <= set(self.unanswered)

    def _check_listing(self) -> None:
        for principal in PRINCIPALS:
            views, more, total = self.rig.operations.page(principal, after="", size=100, model="")
            mine = sorted(
                key[1]
                for key, expected in self.live.items()
                if key[0] == principal and not expected.ephemeral
            )
            assert [view.session_id for view in views] == mine
            assert (more, total) == (False, len(mine))

    def _check_invisible(self, key: SessionKey) -> None:
        """A session is as good as none to anybody else."""
        for stranger in ("eve", *(each for each in PRINCIPALS if each != key[0])):
            if (stranger, key[1]) in self.live:
                continue
            try:
                self.rig.operations.get(stranger, key[1])
            except SessionNotFound as error:
                message = error.message
            except SessionEnded:
                assert stranger in PRINCIPALS  # it had one of its own under that id
                continue
            assert message == f"there is no session {key[1]!r}"

    # --- what is allowed -------------------------------------------------------------------------

    def _justify_failure(
        self, expected: Expected | None, chunk: Chunk, first_step: int, error: ConveyorError
    ) -> None:
        reason = error.reason
        begun = first_step != chunk.first_step
        if reason in ENDINGS:
            if expected is not None:
                assert isinstance(error, SessionEnded)
                self._justify_end(expected, error)
            return
        assert expected is not None, f"{reason}, though there is no such session"
        if reason == "SESSION_SUPERSEDED":
            lost = self.unanswered[chunk] is not expected or chunk.epoch != expected.epoch
            assert chunk.epoch, "a chunk that named no claim was dropped with one"
            given_back = chunk.handle and expected.owner is not chunk.reply
            assert lost or given_back or self._dropping == expected.key
        elif reason == "SESSION_MISMATCH":
            assert chunk.model is not expected.model
        elif reason == "STEP_GAP":
            assert first_step > expected.applied + 1
            assert error.metadata["expected_step"] == str(expected.applied + 1)
        elif reason == "STEP_CONFLICT":
            assert expected.contradicts(chunk)
        elif reason == "STEP_RESULT_NOT_HELD":
            assert first_step <= expected.applied
        elif reason in ("ENGINE_FAILED", "DEVICE_OUT_OF_MEMORY"):
            of_memory = bool(expected.memory) and error in self._failing_memories
            assert error is self._failing or of_memory
            self.ended["MEMORY_FAILED"] += of_memory
        elif reason == "SESSION_QUARANTINED":
            assert expected.quarantined
        elif reason == "STEPS_IN_FLIGHT_LIMIT":
            assert not expected.ephemeral
            before = itertools.takewhile(lambda each: each is not chunk, self.unanswered)
            in_flight = sum(each.length for each in before if same_session(each, expected.key))
            assert in_flight + chunk.length > self.setup.steps_in_flight_max
        elif reason == "DEADLINE_EXCEEDED":
            assert chunk.deadline_seconds is not None
            assert self.now > chunk.deadline_seconds
            assert not begun
        else:
            raise AssertionError(f"{reason} is no reason to refuse a chunk")

    def _justify_refusal(
        self,
        error: ConveyorError,
        key: SessionKey,
        mode: OpenMode = OpenMode.CREATE,
        memory: bytes = b"",
    ) -> None:
        """Why a session could not be opened or made."""
        live, reason = self.live, error.reason
        self.ended[reason] += 1
        mine = sum(each[0] == key[0] for each in live)
        if reason == "SESSION_EXISTS":
            assert mode is OpenMode.CREATE
            assert key in live
        elif reason in ENDINGS:
            assert mode is OpenMode.RESUME
            assert key not in live
        elif reason == "SESSION_MISMATCH":
            assert key in live
        elif error.metadata.get("limit") == "limits.host_state_bytes_max":
            assert mode is OpenMode.CREATE, "an open takes no host memory"
            assert self.setup.host_state_bytes_max < 1 << 30
            self.ended["HOST_STATE_LIMIT"] += 1
        elif error.metadata.get("limit") == "limits.memories_bytes_max":
            held = self.rig.scheduler.memories.size_bytes
            assert held + len(memory) > self.setup.memories_bytes_max
            self.ended["MEMORIES_LIMIT"] += 1
        elif reason == "SESSIONS_LIMIT":
            assert len(live) >= self.setup.sessions_max
        else:
            assert reason == "PRINCIPAL_SESSIONS_LIMIT"
            assert mine >= self.setup.principal_sessions_max

    def _justify_end(self, expected: Expected, error: SessionEnded) -> None:
        if error.reason == "SESSION_CLOSED":
            assert expected.closing, "closed by nobody"
        elif error.reason == "SESSION_EVICTED":
            assert self.setup.host_state_bytes_max < 1 << 30, "evicted without need"
        else:
            assert error.reason == "SESSION_EXPIRED"
            accepted = any(same_session(chunk, expected.key) for chunk in self.unanswered)
            ends = expected.lifetime_ends if accepted else expected.lease_ends
            assert self.now >= ends, "expired before its time"

    # --- helpers ---------------------------------------------------------------------------------

    def _post(self, operation: Callable[[], None]) -> None:
        self.operations_waiting += 1

        def run() -> None:
            self.operations_waiting -= 1
            operation()

        self.rig.scheduler.inbox.put_operation(run)

    def _open(self, stream: Stream | None, request: OpenRequest) -> None:
        key = (request.principal, request.session_id)
        before = self.live.get(key)
        self._dropping = key
        try:
            opened = self.rig.operations.open(request, stream)
        except ConveyorError as error:
            memory = b"" if request.memory is None else request.memory.rows
            self._justify_refusal(error, key, request.mode, memory)
            return
        finally:
            self._dropping = None
        view = opened.view
        assert self.rig.scheduler.sessions.find(key) is not None, "opened, but not there"
        expected = self.live.get(key)
        if opened.resumed:
            assert expected is not None
            assert expected is before
            assert request.mode is not OpenMode.CREATE
            assert view.epoch == expected.epoch + 1
            assert view.applied_step == expected.applied
            assert request.memory is None or request.memory.rows == expected.memory
            expected.epoch += 1
            expected.touched = self.now
            expected.idle_seconds = request.idle_seconds or expected.idle_seconds
            self.ended["resumed"] += 1
        else:
            assert expected is None
            assert request.mode is not OpenMode.RESUME
            model = next(each for each in STREAMABLE if each.key.name == request.model)
            memory = b"" if request.memory is None else request.memory.rows
            idle = request.idle_seconds or self.setup.idle_seconds_default
            lifetime = self.setup.lifetime_seconds_max
            expected = Expected(key, model, idle, self.now, lifetime, self.now, memory)
            self._created(expected, view)
        expected.owner = stream
        expected.planned = {}
        if stream is not None:
            stream.claims[key[1]] = Claim(expected, view.epoch)

    def _created(self, expected: Expected, view: SessionView) -> None:
        assert expected.key not in self.live, "made over another one"
        assert view.session_id == expected.key[1]
        assert view.applied_step == expected.applied
        expected.epoch = view.epoch
        self.live[expected.key] = expected
        self.ended["created"] += 1

    def _over(self, expected: Expected, word: str) -> None:
        if expected.owner is not None:
            assert isinstance(expected.owner, Stream)
            expected.owner.claims.pop(expected.key[1], None)
        del self.live[expected.key]
        self.ended[word] += 1

    def _answered(
        self,
        done: Callable[..., None],
        key: SessionKey,
        claim: Claim | None = None,
    ) -> Answered[object]:
        """Takes the outcome of an operation that waits in a session's queue."""
        self.operations_waiting += 1

        def settle(result: object, error: ConveyorError | None) -> None:
            self.operations_waiting -= 1
            if error is None:
                done(result)
                return
            self.ended[f"operation {error.reason}"] += 1
            expected = self.live.get(key)
            if error.reason == "SESSION_SUPERSEDED":
                assert claim is not None
                claimed_now = self._dropping == key
                assert claimed_now or not self._stands(claim), "an owner was refused"
                if expected is not None:
                    expected.closing -= 1
            elif error.reason == "SESSION_QUARANTINED":
                assert expected is not None
                assert expected.quarantined
            elif error.reason in ENDINGS and expected is not None:
                assert isinstance(error, SessionEnded)
                self._justify_end(expected, error)

        return Settling(settle)

    def _stands(self, claim: Claim) -> bool:
        """Whether nobody claimed the session since."""
        live = self.live.get(claim.session.key) is claim.session
        return live and claim.session.epoch == claim.epoch

    def _holds(self, stream: Stream, claim: Claim) -> bool:
        """Whether the claim stands and was not given back."""
        return self._stands(claim) and claim.session.owner is stream

    def _settled(self, chunk: Chunk) -> None:
        del self.unanswered[chunk]
        expected = self.live.get((chunk.principal, chunk.session_id))
        if expected is not None and expected.ephemeral:
            self._discard(expected.key)

    def _notice_ended(self) -> None:
        """Sessions that the server ended by itself have to have had a reason to end."""
        sessions = self.rig.scheduler.sessions
        for key, expected in list(self.live.items()):
            if sessions.find(key) is None:
                try:
                    sessions.get(key, self.now)
                except SessionEnded as error:
                    self._justify_end(expected, error)
                    self._over(expected, error.reason)
                except SessionNotFound:
                    self._over(expected, "forgotten")  # more ended at once than are remembered

    def _check_leases(self) -> None:
        """Nothing outlives its lease; looked at where the scheduler has just done so too."""
        for key, expected in self.live.items():
            session = self.rig.scheduler.sessions.find(key)
            assert session is not None
            assert self.now < expected.lifetime_ends, "alive beyond its lifetime"
            if not session.queue and not session.running:
                assert self.now < session.lease_ends, "idle beyond its lease"


class Settling(Answered[object]):
    """Implements `operations.Future`, and passes the outcome on."""

    def __init__(self, settle: Callable[[object, ConveyorError | None], None]) -> None:
        super().__init__()
        self._settle = settle

    def set_result(self, result: object, /) -> None:
        super().set_result(result)
        self._settle(result, None)

    def set_exception(self, exception: ConveyorError, /) -> None:
        super().set_exception(exception)
        self._settle(None, exception)


def same_session(chunk: Chunk, key: SessionKey) -> bool:
    """Whether a chunk is for that session."""
    return (chunk.principal, chunk.session_id) == key

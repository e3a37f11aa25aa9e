"""What callers do: steps and operations, each checked where its answer comes."""

import itertools
import struct
from collections.abc import Callable, Sequence

from conveyor_server.admission.admission import Binding, Entry
from conveyor_server.core import (
    Chunk,
    MemoryRows,
    ModelInfo,
    OpenMode,
    OpenRequest,
    OutputMode,
    SessionKey,
    SessionState,
    SessionView,
    TraceMode,
    WholeSequence,
)
from conveyor_server.errors import ConveyorError, InboxFull, SessionEnded
from conveyor_server.store.checkpoint import Checkpoint, encode, read_snapshot
from tests.simulation.expected import Expected
from tests.simulation.reasons import ENDINGS, justify_end, justify_refusal
from tests.simulation.streams import Stream
from tests.simulation.world import POISON, STREAMABLE, Claim, World
from tests.support.engine import whole
from tests.support.models import BOTHWAYS, FEATURES
from tests.support.replies import Outcome as Answered


class Callers:
    """Everybody who asks something of the server."""

    def __init__(self, world: World) -> None:
        self.world = world
        self._numbers = itertools.count(1)

    # --- steps -----------------------------------------------------------------------------------

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
        world = self.world
        target = world.live.get(key)
        if stream is not None:
            if key[1] not in stream.claims:
                return None  # its own bookkeeping refuses it
            target, epoch = stream.claims[key[1]]
        model = target.model if target else FEATURES
        reply = stream or Stream(world, key[0])
        binding = Binding(*key, epoch, model, reply, handle=0 if stream is None else 1)
        entry = Entry(binding, first_step, len(rows), output, trace)
        deadline = None if seconds is None else world.now + seconds
        chunk = world.rig.admission.chunk(entry, b"".join(rows), world.now, deadline)
        inbox = world.rig.scheduler.inbox
        size = inbox.size_bytes + len(chunk.rows)
        full = inbox.chunks >= world.setup.inbox_chunks_max or size > world.setup.inbox_bytes_max
        try:
            inbox.put(chunk)
        except InboxFull:
            assert full, "refused although there was room"
            world.ended["INBOX_FULL"] += 1
            return None
        assert not full, "taken although there was no room"
        world.unanswered[chunk] = target if epoch else None
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
        expected = self.world.live.get(key)
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

    # --- operations ------------------------------------------------------------------------------

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
        self.world.post(lambda: self._open(stream, request))

    def close(self, stream: Stream | None, key: SessionKey) -> None:
        """Closes a session: by a frame on a stream, or by a call."""
        claim = None if stream is None else stream.claims.get(key[1])
        if stream is not None and claim is None:
            return

        def done(view: SessionView) -> None:
            assert claim is None or self.world.stands(claim), "closed by a stream that lost it"
            assert view.applied_step == self.world.live[key].applied
            self.world.over(self.world.live[key], "closed")

        def run() -> None:
            if key in self.world.live:
                self.world.live[key].closing += 1
            epoch = 0 if claim is None else claim.epoch
            outcome = self._answered(done, key, claim)
            self.world.rig.operations.close(*key, outcome, stream, epoch)

        self.world.post(run)

    def reset(self, key: SessionKey) -> None:
        """Takes a session back to its beginning."""

        def done(view: SessionView) -> None:
            self.world.live[key].restart()
            self.world.live[key].touched = self.world.now
            assert view.applied_step == 0
            assert view.state is not SessionState.QUARANTINED

        outcome = self._answered(done, key)
        self.world.post(lambda: self.world.rig.operations.reset(*key, outcome))

    def fork(self, key: SessionKey, new_ids: Sequence[str], at_step: int = 0) -> None:
        """Copies a session."""

        def done(views: list[SessionView]) -> None:
            source = self.world.live[key]
            assert not source.quarantined
            assert at_step in (0, source.applied)
            for new_id, view in zip(new_ids, views, strict=True):
                new_key = (key[0], new_id or view.session_id)
                self.world.created(source.copy(new_key, self.world.now, source.idle_seconds), view)
                self.world.ended["shared"] += bool(source.memory)

        outcome = self._answered(done, key)
        self.world.post(lambda: self.world.rig.operations.fork(*key, new_ids, at_step, outcome))

    def export(self, key: SessionKey) -> None:
        """Takes a snapshot."""

        def done(result: tuple[SessionView, Checkpoint]) -> None:
            source = self.world.live[key]
            assert not source.quarantined
            self.world.snapshots.append((encode(result[1]), source.copy(key, 0.0, 0.0)))

        outcome = self._answered(done, key)
        self.world.post(lambda: self.world.rig.operations.export(*key, outcome))

    def import_(self, number: int, key: SessionKey, idle_seconds: float) -> None:
        """Makes a session from a snapshot taken before, perhaps by somebody else."""
        if not self.world.snapshots:
            return
        snapshot, source = self.world.snapshots[number % len(self.world.snapshots)]

        def run() -> None:
            try:
                taken = read_snapshot(snapshot)
                view = self.world.rig.operations.import_(key[0], taken, key[1], idle_seconds)
            except ConveyorError as error:
                justify_refusal(self.world, error, key, memory=source.memory)
            else:
                self.world.created(source.copy(key, self.world.now, idle_seconds), view)

        self.world.post(run)

    def detach(self, stream: Stream, session_id: str) -> None:
        """A stream gives a session back."""
        claim = stream.claims.get(session_id)
        if claim is None:
            return
        expected = claim.session

        def run() -> None:
            held = self.world.holds(stream, claim)
            self.world.dropping = expected.key
            if held:
                del stream.claims[session_id]
                expected.owner = None
            applied = self.world.rig.operations.detach(*expected.key, claim.epoch, stream)
            self.world.dropping = None
            assert applied == (expected.applied if held else None)

        self.world.post(run)

    def keep_alive(self, stream: Stream) -> None:
        """A heartbeat."""

        def run() -> None:
            self.world.rig.operations.keep_alive(stream.principal, list(stream.claims), stream)
            for claim in stream.claims.values():
                claim.session.touched = self.world.now

        self.world.post(run)

    def predict(self, principal: str, length: int) -> None:
        """A call that has a session for itself, as long as it lasts."""
        world = self.world
        request = OpenRequest(principal, "", FEATURES.key.name, ephemeral=True)

        def run() -> None:
            try:
                view = world.rig.operations.open(request).view
            except ConveyorError as error:
                justify_refusal(world, error, (principal, ""))
                return
            key = (principal, view.session_id)
            idle, lifetime = world.setup.idle_seconds_default, world.setup.lifetime_seconds_max
            now = world.now
            expected = Expected(key, FEATURES, idle, now, lifetime, now, ephemeral=True, closing=1)
            world.created(expected, view)
            first_step, rows = self.rows(key, "next", length, 0)
            chunk = self.send(key, None, first_step, rows, OutputMode.ALL, epoch=view.epoch)
            if chunk is None:
                world.discard(key)

        world.post(run)

    def predict_whole(self, length: int, output: OutputMode, seconds: float | None) -> None:
        """A call for a model that cannot be stepped."""
        world = self.world
        rows = b"".join(self.fresh_row(BOTHWAYS) for _ in range(length))
        outputs = {OutputMode.ALL: length, OutputMode.LAST: 1, OutputMode.NONE: 0}[output]
        due = None if seconds is None else world.now + seconds

        def settle(outcome: bytes | ConveyorError) -> None:
            world.whole.remove(sequence)
            if isinstance(outcome, bytes):
                expected = whole(BOTHWAYS, rows)
                assert outcome == b"".join(expected[length - outputs :])
                world.ended["whole"] += 1
                return
            if outcome.reason == "DEADLINE_EXCEEDED":
                assert due is not None
                assert world.now > due
            else:
                assert outcome is world.failing
            world.ended[f"whole {outcome.reason}"] += 1

        sequence = WholeSequence(BOTHWAYS, rows, length, outputs, settle, world.now, due)

        def run() -> None:
            inbox, setup = world.rig.scheduler.inbox, world.setup
            full = (
                len(world.whole) >= setup.predictions_max
                or inbox.chunks >= setup.inbox_chunks_max
                or inbox.size_bytes + len(rows) > setup.inbox_bytes_max
            )
            try:
                world.rig.operations.predict(sequence)
            except InboxFull:
                assert full, "refused although there was room"
                world.ended["whole INBOX_FULL"] += 1
            else:
                assert not full, "taken although there was no room"
                world.whole.append(sequence)

        world.post(run)

    def give_up(self, number: int) -> None:
        """A caller goes whose whole sequence is not done."""
        world = self.world
        if not world.whole:
            return
        sequence = world.whole[number % len(world.whole)]

        def run() -> None:
            world.rig.operations.drop_prediction(sequence)
            if sequence in world.whole:
                world.whole.remove(sequence)
                world.ended["given up"] += 1

        world.post(run)

    # --- helpers ---------------------------------------------------------------------------------

    def _open(self, stream: Stream | None, request: OpenRequest) -> None:
        world = self.world
        key = (request.principal, request.session_id)
        before = world.live.get(key)
        world.dropping = key
        try:
            opened = world.rig.operations.open(request, stream)
        except ConveyorError as error:
            memory = b"" if request.memory is None else request.memory.rows
            justify_refusal(world, error, key, request.mode, memory)
            return
        finally:
            world.dropping = None
        view = opened.view
        assert world.rig.scheduler.sessions.find(key) is not None, "opened, but not there"
        expected = world.live.get(key)
        if opened.resumed:
            assert expected is not None
            assert expected is before
            assert request.mode is not OpenMode.CREATE
            assert view.epoch == expected.epoch + 1
            assert view.applied_step == expected.applied
            assert request.memory is None or request.memory.rows == expected.memory
            expected.epoch += 1
            expected.touched = world.now
            expected.idle_seconds = request.idle_seconds or expected.idle_seconds
            world.ended["resumed"] += 1
        else:
            assert expected is None
            assert request.mode is not OpenMode.RESUME
            model = next(each for each in STREAMABLE if each.key.name == request.model)
            memory = b"" if request.memory is None else request.memory.rows
            idle = request.idle_seconds or world.setup.idle_seconds_default
            lifetime = world.setup.lifetime_seconds_max
            expected = Expected(key, model, idle, world.now, lifetime, world.now, memory)
            world.created(expected, view)
        expected.owner = stream
        expected.planned = {}
        if stream is not None:
            stream.claims[key[1]] = Claim(expected, view.epoch)

    def _answered(
        self,
        done: Callable[..., None],
        key: SessionKey,
        claim: Claim | None = None,
    ) -> Answered[object]:
        """Takes the outcome of an operation that waits in a session's queue."""
        world = self.world
        world.operations_waiting += 1

        def settle(result: object, error: ConveyorError | None) -> None:
            world.operations_waiting -= 1
            if error is None:
                done(result)
                return
            world.ended[f"operation {error.reason}"] += 1
            expected = world.live.get(key)
            if error.reason == "SESSION_SUPERSEDED":
                assert claim is not None
                claimed_now = world.dropping == key
                assert claimed_now or not world.stands(claim), "an owner was refused"
                if expected is not None:
                    expected.closing -= 1
            elif error.reason == "SESSION_QUARANTINED":
                assert expected is not None
                assert expected.quarantined
            elif error.reason in ENDINGS and expected is not None:
                assert isinstance(error, SessionEnded)
                justify_end(world, expected, error)

        return Settling(settle)


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

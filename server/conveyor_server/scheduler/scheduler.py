"""The scheduler: it alone changes sessions, one tick after another.

A tick has three parts, so that the middle one, which touches no session, may run on another thread:
`begin` takes in what arrived and selects a batch, `execute` is the engine call, `finish`
applies what came of it.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from conveyor_server.clock import Clock
from conveyor_server.config import LimitsConfig
from conveyor_server.core import Chunk, ModelKey, OutputMode, Piece
from conveyor_server.engine.port import Done, Engine, Work
from conveyor_server.errors import (
    ConveyorError,
    DataLost,
    DeadlineExceeded,
    SessionEnded,
    SessionEvicted,
    SessionExpired,
    limit_text,
)
from conveyor_server.metrics import Metrics
from conveyor_server.scheduler.batching import ReadyQueues
from conveyor_server.scheduler.inbox import Inbox
from conveyor_server.scheduler.memories import Memories
from conveyor_server.scheduler.models import ModelTable
from conveyor_server.scheduler.predictions import Predictions, Slice
from conveyor_server.scheduler.refusals import check_arrival, check_in_time, quarantined
from conveyor_server.scheduler.residency import Residency
from conveyor_server.sessions.held import HeldBudget
from conveyor_server.sessions.session import Barrier, Session
from conveyor_server.sessions.table import SessionTable
from conveyor_server.store.port import CarryStore

READ_SECONDS: Final = 1.0
"""What it takes at most to read what arrived while the server was not there."""
_log = logging.getLogger(__name__)


@dataclass(slots=True)
class Batch:
    """What one tick runs: of each session one chunk's next steps."""

    model: ModelKey
    sessions: list[Session]
    works: list[Work]
    multiply_adds: int
    """How much work that is."""


Turn = Batch | Slice
"""What one tick runs."""
Outcome = list[Done] | bytes | ConveyorError | None
"""What came of it: of a batch results or an error, of a slice rows or an error once it is over."""


class Scheduler:
    """Owns sessions, slots and the order in which chunks run."""

    def __init__(  # noqa: PLR0913  parts and settings, given by name and in one place
        self,
        *,
        engine: Engine,
        store: CarryStore,
        models: ModelTable,
        limits: LimitsConfig,
        batch_sessions_max: int,
        quantum_steps: int,
        clock: Clock,
        metrics: Metrics,
        wake: Callable[[], None] = lambda: None,
    ) -> None:
        """`wake` is called when something arrives in the inbox."""
        self.clock = clock
        self.limits = limits
        self.models = models
        self.metrics = metrics
        self.inbox = Inbox(limits.inbox_chunks_max, limits.inbox_bytes_max, wake)
        self.sessions = SessionTable(
            sessions_max=limits.sessions_max,
            principal_sessions_max=limits.principal_sessions_max,
            ended_sessions_max=limits.ended_sessions_max,
            ended_seconds_max=limits.ended_seconds_max,
        )
        self.memories = Memories(engine, limits.memories_bytes_max)
        self.residency = Residency(engine, store, self.memories, metrics)
        self.held = HeldBudget(limits.held_results_total_bytes_max)
        self.predictions = Predictions(
            engine=engine,
            inbox=self.inbox,
            models=models,
            limits=limits,
            slice_steps=quantum_steps,
            metrics=metrics,
        )
        self._engine = engine
        self._store = store
        self._ready = ReadyQueues(batch_sessions_max, quantum_steps)
        self._now = clock.monotonic()
        self._expire_from = self._now

    def tick(self) -> bool:
        """One round. Returns whether anything ran."""
        turn = self.begin()
        if turn is None:
            return False
        self.finish(turn, self.execute(turn))
        return True

    def begin(self) -> Turn | None:
        """Takes in what arrived, ends what expired and selects what runs next.

        Returns None if there is nothing to run.
        """
        self.take_in()
        self._expire_leases()
        self._bound_store()
        for key in self.predictions.begin(self._now):
            self._ready.add_turn(key)
        return self._select()

    def take_in(self) -> None:
        """Queues the chunks that arrived with their sessions, and carries operations out.

        Between two engine calls, like everything that touches sessions.
        """
        self._now = self.clock.monotonic()
        self._drain_inbox()

    def execute(self, turn: Turn) -> Outcome:
        """The engine call; touches no session, so it may run on any thread."""
        started = self.clock.monotonic()
        try:
            if isinstance(turn, Slice):
                return self.predictions.execute(turn)
            return self._engine.run(turn.model, turn.works)
        except ConveyorError as error:
            return error
        finally:
            self.metrics.tick_seconds.observe(self.clock.monotonic() - started, turn.model.name)

    def finish(self, turn: Turn, outcome: Outcome) -> None:
        """Applies a turn's results, answers who waits and queues what is left to run."""
        self._now = self.clock.monotonic()
        if isinstance(turn, Slice):
            assert not isinstance(outcome, list)
            self.predictions.finish(turn, outcome, self._now)
        else:
            assert isinstance(outcome, list | ConveyorError)
            self._finish_batch(turn, outcome)
        self._bound_store()

    def _finish_batch(self, batch: Batch, outcome: list[Done] | ConveyorError) -> None:
        self.metrics.tick_sessions.observe(len(batch.works), batch.model.name)
        for position, session in enumerate(batch.sessions):
            session.running = False
            chunk = session.queue[0]
            assert isinstance(chunk, Chunk)
            if isinstance(outcome, ConveyorError):
                self._fail_head(session, chunk, outcome)
            elif not outcome[position].finite:
                session.quarantined = True  # `advance` refuses what waits
            else:
                self._apply(session, chunk, batch.works[position], outcome[position])
            self.advance(session)
        if not isinstance(outcome, ConveyorError):
            steps = sum(work.length for work in batch.works)
            self.metrics.steps.add(steps, batch.model.name)
            self.metrics.tick_steps.observe(steps, batch.model.name)

    @property
    def host_room_bytes(self) -> int:
        """Bytes of carries that host memory still takes; below 0, somebody has to go."""
        return self.limits.host_state_bytes_max - self._store.size_bytes

    @property
    def has_work(self) -> bool:
        """Whether another tick should follow at once."""
        return bool(self._ready or self.predictions) or len(self.inbox) > 0

    def next_wakeup(self) -> float | None:
        """Monotonic time at which a tick is due even if nothing arrives."""
        due = self.sessions.next_expiry()
        return None if due is None else max(due, self._expire_from)

    def was_late(self, seconds: float) -> None:
        """Nobody was served for so long, so it shortens no lease.

        What arrived meanwhile is read before any lease ends.
        """
        now = self.clock.monotonic()
        self._expire_from = now + READ_SECONDS
        self.sessions.prolong(seconds, now)

    def advance(self, session: Session) -> None:
        """Answers or refuses what is at the head of a queue until something there has to run."""
        while session.queue and not session.running:
            head = session.queue[0]
            if isinstance(head, Barrier):
                session.queue.popleft()
                head.run(session)
                continue
            if session.quarantined:
                self._fail_head(session, head, quarantined(session))
                continue
            try:
                piece = session.settle(head)
            except ConveyorError as error:
                self._fail_head(session, head, error)
                continue
            if piece is None:
                self._ready.add(session)
                return
            self.metrics.duplicates.add(piece.length, session.model.key.name)
            self._answer(session, head, piece)

    def end(self, session: Session, error: SessionEnded, *, tell_owner: bool = True) -> None:
        """Ends a session: its queue fails, its slot is freed, its owner is told."""
        assert not session.running
        self.fail_queue(session, error)
        if tell_owner and session.owner is not None:
            session.owner.lost(session.session_id, session.epoch, session.applied, error)
        self.residency.drop(session)
        self.memories.leave(session.memory)
        self.held.forget(session.key)
        self.sessions.remove(session, type(error), self._now)
        self.models.session_ended(session.model.key)
        if not session.ephemeral:
            reason = error.reason.removeprefix("SESSION_").lower()
            self.metrics.sessions_ended.add(1, reason)
            self.log_end(session, reason)

    def log_end(self, session: Session, reason: str) -> None:
        """Writes down that a session is over."""
        _log.info(
            "session ended",
            extra={
                "reason": reason,
                "session": session.session_id,
                "principal": session.principal,
                "model": session.model.key.name,
                "version": session.model.key.version,
                "steps": session.applied,
                "seconds": round(self.clock.monotonic() - session.created_monotonic, 3),
                "quarantined": session.quarantined,
                "labels": dict(session.labels),
            },
        )

    def fail_queue(self, session: Session, error: ConveyorError) -> None:
        """Fails everything that waits."""
        self.fail_chunks(session, error)
        while session.queue:
            barrier = session.queue.popleft()
            assert isinstance(barrier, Barrier)
            barrier.fail(error)

    def fail_chunks(
        self,
        session: Session,
        error: ConveyorError,
        *,
        only: Callable[[Chunk], bool] = lambda chunk: True,
    ) -> None:
        """Fails the chunks that wait, or `only` some of them.

        Call `advance` after it.
        """
        assert not session.running
        self._ready.discard(session)
        waiting = list(session.queue)
        session.queue.clear()
        for item in waiting:
            if isinstance(item, Chunk) and only(item):
                self._finished(session, item)
                item.reply.failed(item, item.first_step + item.done, error)
            else:
                session.queue.append(item)

    # --- the parts of begin ----------------------------------------------------------------------

    def _drain_inbox(self) -> None:
        # Only what is there now: operations may put more in, and the tick must come to its end.
        for _ in range(len(self.inbox)):
            item = self.inbox.take()
            if isinstance(item, Chunk):
                self._arrive(item)
            elif item is not None:
                item()

    def _arrive(self, chunk: Chunk) -> None:
        try:
            session = self.sessions.get((chunk.principal, chunk.session_id), self._now)
            check_arrival(session, chunk, self.limits.steps_in_flight_max)
        except ConveyorError as error:
            self.inbox.finished(chunk)
            chunk.reply.failed(chunk, chunk.first_step, error)
            return
        session.active_monotonic = self._now
        session.steps_in_flight += chunk.length
        session.queue.append(chunk)
        if len(session.queue) == 1:
            self.advance(session)

    def _expire_leases(self) -> None:
        if self._now < self._expire_from:
            return
        for session in self.sessions.expired(self._now):
            self.end(session, SessionExpired(_expiry(session, self._now)))

    def _bound_store(self) -> None:
        """Evicts those idle longest; one with something to do is never idle.

        So beyond the bound lie at most the carries of sessions that wait for a slot, of which the
        inbox has a bound of its own.
        """
        if self.host_room_bytes >= 0:
            return
        for key in self._store.oldest_first():
            session = self.sessions.find(key)
            assert session is not None, "a record without a session"
            if not session.queue:
                evicted = SessionEvicted(
                    f"session {session.session_id!r} was evicted to free memory"
                )
                self.end(session, evicted)
            if self.host_room_bytes >= 0:
                return

    def _select(self) -> Turn | None:
        while (taken := self._ready.take()) is not None:
            model, candidates = taken
            if (part := self.predictions.take(model)) is not None:
                return part
            if any(session.slot is None for session in candidates):
                # First those that waited, then those that need nobody paged out.
                candidates.sort(key=lambda each: (not each.waits_for_slot, each.slot is None))
            batch = Batch(model, [], [], 0)
            selected: set[Session] = set()
            victims = self.residency.victims(model, candidates)
            waiting: list[Session] = []  # for a slot
            for session in candidates:
                chunk = session.queue[0]
                assert isinstance(chunk, Chunk)
                try:
                    check_in_time(chunk, self._now)
                    session.waits_for_slot = not self.residency.bring_in(session, selected, victims)
                except ConveyorError as error:
                    self._refuse(session, chunk, error)
                    continue
                if session.waits_for_slot:
                    waiting.append(session)
                else:
                    selected.add(session)
                    self._schedule(batch, session, chunk)
            self._ready.put_back(waiting)
            if batch.works:
                return batch
        return None

    def _schedule(self, batch: Batch, session: Session, chunk: Chunk) -> None:
        model = session.model
        left = chunk.length - chunk.done
        steps = self._ready.quantum(left)
        if chunk.output is OutputMode.ALL:
            outputs = steps
        else:
            outputs = 1 if chunk.output is OutputMode.LAST and steps == left else 0
        rows = chunk.rows
        if steps != chunk.length:
            row_bytes = model.input_row_bytes
            rows = rows[chunk.done * row_bytes : (chunk.done + steps) * row_bytes]
        if not chunk.done:
            chunk.begun_seconds = self._now
            self.metrics.queue_seconds.observe(self._now - chunk.arrived_seconds, model.key.name)
        assert session.slot is not None
        session.running = True
        batch.sessions.append(session)
        memory = 0 if session.memory is None else session.memory.number
        batch.works.append(Work(session.slot, steps, rows, outputs, memory, chunk.trace))
        batch.multiply_adds += steps * model.step_multiply_adds

    def _refuse(self, session: Session, chunk: Chunk, error: ConveyorError) -> None:
        """A chunk cannot run in this tick, and the others can."""
        session.waits_for_slot = False
        if not isinstance(error, DeadlineExceeded):
            _log.error(
                "a session could not be brought in",
                exc_info=error,
                extra={"session": session.session_id, "model": session.model.key.name},
            )
        if isinstance(error, DataLost):
            session.quarantined = True
        self._fail_head(session, chunk, error)
        self.advance(session)

    # --- the parts of finish ---------------------------------------------------------------------

    def _apply(self, session: Session, chunk: Chunk, work: Work, done: Done) -> None:
        first_step = session.applied + 1
        assert chunk.first_step + chunk.done == first_step
        session.applied += work.length
        session.active_monotonic = self._now
        session.held.add(first_step, work.length, bytes(work.rows), done.rows, work.outputs)
        self.held.update(session.key, session.held)
        final = chunk.done + work.length == chunk.length
        piece = Piece(first_step, work.length, done.rows, work.outputs, final, trace=done.trace)
        self._answer(session, chunk, piece)

    def _answer(self, session: Session, chunk: Chunk, piece: Piece) -> None:
        chunk.done += piece.length
        piece.durable_step = session.durable
        if piece.final:
            session.queue.popleft()
            self._finished(session, chunk)
            waited = self._now - chunk.arrived_seconds
            self.metrics.step_seconds.observe(waited, session.model.key.name)
        chunk.reply.piece(chunk, piece)

    def _fail_head(self, session: Session, chunk: Chunk, error: ConveyorError) -> None:
        session.queue.popleft()
        self._finished(session, chunk)
        chunk.reply.failed(chunk, chunk.first_step + chunk.done, error)

    def _finished(self, session: Session, chunk: Chunk) -> None:
        session.steps_in_flight -= chunk.length
        self.inbox.finished(chunk)


def _expiry(session: Session, now: float) -> str:
    """Why a session whose lease is over has ended."""
    if now < session.lifetime_ends:
        return f"session {session.session_id!r} has expired: idle for {session.idle_seconds:,g} s"
    bound = limit_text("limits.lifetime_seconds_max", session.lifetime_seconds)
    return f"session {session.session_id!r} has expired: it reached its lifetime ({bound})"

"""Whole sequences through models that cannot be stepped: a slice at a time.

A model with such sequences has its turn like any other, and in each turn one slice of one of them
is run. So a long sequence delays everybody else by one slice, and a busy server delays it by the
other models' turns.
"""

from collections import OrderedDict, deque
from dataclasses import dataclass

from conveyor_server.config import LimitsConfig
from conveyor_server.core import ModelKey, WholeSequence
from conveyor_server.engine.port import Engine, Prediction
from conveyor_server.errors import ConveyorError, DeadlineExceeded, InboxFull
from conveyor_server.metrics import Metrics
from conveyor_server.scheduler.inbox import Inbox
from conveyor_server.scheduler.models import ModelTable


@dataclass(slots=True, eq=False)
class Running:
    """A sequence on its way."""

    sequence: WholeSequence
    prediction: Prediction | None = None
    """None before its first slice."""


@dataclass(slots=True, eq=False)
class Slice:
    """What one tick runs of a sequence."""

    model: ModelKey
    running: Running
    steps: int
    """At most so many steps of one layer."""
    multiply_adds: int
    """No less than the work that is."""


class Predictions:
    """Sequences that wait for their turn and those that are begun.

    Only some are begun at once, for each holds what a layer puts out at every step. Those take
    turns; the others are begun in the order in which they came.
    """

    def __init__(
        self,
        *,
        engine: Engine,
        inbox: Inbox,
        models: ModelTable,
        limits: LimitsConfig,
        slice_steps: int,
        metrics: Metrics,
    ) -> None:
        """`slice_steps` of one layer in a tick."""
        self._engine = engine
        self._inbox = inbox
        self._models = models
        self._limits = limits
        self._slice_steps = slice_steps
        self._metrics = metrics
        self._waiting: OrderedDict[WholeSequence, None] = OrderedDict()
        self._running: OrderedDict[ModelKey, deque[Running]] = OrderedDict()

    def __bool__(self) -> bool:
        return bool(self._waiting or self._running)

    @property
    def waiting(self) -> int:
        """Sequences that are not begun."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Sequences that are begun."""
        return sum(len(each) for each in self._running.values())

    def add(self, sequence: WholeSequence) -> None:
        """Accepts a sequence.

        Raises:
            InboxFull: As many are there as may be, or the inbox has no room for it.
        """
        if self.waiting + self.running >= self._limits.predictions_max:
            raise InboxFull(
                f"{self.waiting + self.running:,} predictions of whole sequences are pending",
                limit="limits.predictions_max",
                maximum=self._limits.predictions_max,
            )
        self._inbox.accept(sequence)
        self._models.session_began(sequence.model.key)
        self._waiting[sequence] = None

    def begin(self, now: float) -> list[ModelKey]:
        """Drops what is out of time and begins as many sequences as may be.

        Returns:
            The models that have something to run.
        """
        for sequence in list(self._waiting):
            self._drop_if_late(sequence, now)
        for running in [each for model in self._running.values() for each in model]:
            self._drop_if_late(running.sequence, now)
        while self._waiting and self.running < self._limits.running_predictions_max:
            sequence, _ = self._waiting.popitem(last=False)
            key = sequence.model.key
            self._running.setdefault(key, deque()).append(Running(sequence))
            self._metrics.queue_seconds.observe(now - sequence.arrived_seconds, key.name)
        return list(self._running)

    def take(self, key: ModelKey) -> Slice | None:
        """The next slice of a model's sequences, if it has any. Call `finish` with it."""
        queue = self._running.get(key)
        if not queue:
            return None
        queue.rotate(-1)
        running = queue[-1]
        work = self._slice_steps * running.sequence.model.step_multiply_adds
        return Slice(key, running, self._slice_steps, work)

    def execute(self, part: Slice) -> bytes | None:
        """Runs a slice; touches nothing else, so it may run on any thread.

        Raises:
            EngineFailed, DeviceOutOfMemory, SessionQuarantined.
        """
        running = part.running
        if running.prediction is None:
            sequence = running.sequence
            running.prediction = self._engine.predict(
                part.model, sequence.rows, sequence.length, sequence.outputs
            )
        return running.prediction.advance(part.steps)

    def finish(self, part: Slice, outcome: bytes | ConveyorError | None, now: float) -> None:
        """Takes what came of a slice: output rows, what went wrong, or None: there is more."""
        if outcome is None:
            return
        sequence, name = part.running.sequence, part.model.name
        if isinstance(outcome, bytes):
            self._metrics.steps.add(sequence.length, name)
            self._metrics.step_seconds.observe(now - sequence.arrived_seconds, name)
        self._settle(sequence, outcome)

    def cancel(self, sequence: WholeSequence) -> None:
        """Nobody waits for a sequence any more; it may be over."""
        if self._forget(sequence):
            self._release(sequence)

    def _drop_if_late(self, sequence: WholeSequence, now: float) -> None:
        due = sequence.deadline_seconds
        if due is not None and now > due:
            self._settle(sequence, DeadlineExceeded("the sequence was not done within its time"))

    def _settle(self, sequence: WholeSequence, outcome: bytes | ConveyorError) -> None:
        forgotten = self._forget(sequence)
        assert forgotten, "a sequence was settled twice"
        self._release(sequence)
        sequence.settle(outcome)

    def _forget(self, sequence: WholeSequence) -> bool:
        if sequence in self._waiting:
            del self._waiting[sequence]
            return True
        key = sequence.model.key
        queue = self._running.get(key, deque[Running]())
        for running in queue:
            if running.sequence is sequence:
                queue.remove(running)
                if not queue:
                    del self._running[key]
                return True
        return False

    def _release(self, sequence: WholeSequence) -> None:
        self._inbox.finished(sequence)
        self._models.session_ended(sequence.model.key)

"""The real admission, scheduler, operations and sessions on a fake clock and a fake engine."""

import struct
from collections.abc import Sequence
from typing import Any

from conveyor_server.admission.admission import Admission, Binding, Entry
from conveyor_server.config import LimitsConfig
from conveyor_server.core import (
    Chunk,
    ModelInfo,
    ModelKey,
    Opened,
    OpenMode,
    OpenRequest,
    OutputMode,
    Owner,
    Reply,
    SessionView,
    TraceMode,
)
from conveyor_server.metrics import Metrics
from conveyor_server.scheduler.models import ModelTable
from conveyor_server.scheduler.operations import Operations
from conveyor_server.scheduler.scheduler import Scheduler
from conveyor_server.sessions.session import Session
from conveyor_server.store.checkpoint import Checkpoint, encode
from conveyor_server.store.memory import MemoryStore
from tests.support.clock import FakeClock
from tests.support.engine import FakeEngine
from tests.support.models import FEATURES
from tests.support.replies import Outcome, Recorder

PRINCIPAL = "ann"


def rows_of(model: ModelInfo, *values: int) -> bytes:
    """An input row for each value."""
    if model.vocabulary_size:
        return struct.pack(f"<{len(values)}i", *values)
    size = model.input_size
    return struct.pack(f"<{len(values) * size}f", *(value for value in values for _ in range(size)))


class Rig:
    """Everything of a server below its door, wired as the app wires it."""

    def __init__(
        self,
        models: Sequence[ModelInfo] = (FEATURES,),
        *,
        slots: int = 8,
        batch_sessions_max: int = 8,
        quantum_steps: int = 4,
        limits: LimitsConfig | None = None,
        **limit_values: Any,
    ) -> None:
        self.limits = limits or LimitsConfig(**limit_values)
        self.clock = FakeClock()
        self.engine = FakeEngine(models, slots)
        self.store = MemoryStore()
        self.dropped: list[ModelKey] = []
        self.models = ModelTable(dropped=self.dropped.append)
        for model in models:
            self.models.add(model)
        self.metrics = Metrics()
        self.admission = Admission(self.limits)
        self.scheduler = Scheduler(
            engine=self.engine,
            store=self.store,
            models=self.models,
            limits=self.limits,
            batch_sessions_max=batch_sessions_max,
            quantum_steps=quantum_steps,
            clock=self.clock,
            metrics=self.metrics,
        )
        self.operations = Operations(self.scheduler, "life")
        self.model = models[0]

    def open(
        self,
        session_id: str = "s",
        owner: Owner | None = None,
        *,
        principal: str = PRINCIPAL,
        model: str | None = None,
        mode: OpenMode = OpenMode.EITHER,
        **more: Any,
    ) -> Opened:
        """Opens a session."""
        name = self.model.key.name if model is None else model
        request = OpenRequest(principal, session_id, name, mode=mode, **more)
        return self.operations.open(request, owner)

    def view(self, session_id: str = "s", principal: str = PRINCIPAL) -> SessionView:
        """Describes a session."""
        return self.operations.get(principal, session_id)

    def session(self, session_id: str = "s", principal: str = PRINCIPAL) -> Session:
        """The session itself."""
        session = self.scheduler.sessions.find((principal, session_id))
        assert session is not None
        return session

    def send(
        self,
        session_id: str,
        first_step: int,
        values: Sequence[int],
        reply: Reply,
        *,
        principal: str = PRINCIPAL,
        output: OutputMode = OutputMode.ALL,
        epoch: int = 0,
        handle: int = 0,
        deadline: float | None = None,
        model: ModelInfo | None = None,
        trace: TraceMode = TraceMode.NONE,
    ) -> Chunk:
        """Hands a chunk in through the door."""
        model = model or self.model
        binding = Binding(principal, session_id, epoch, model, reply, handle)
        entry = Entry(binding, first_step, len(values), output, trace)
        chunk = self.admission.chunk(
            entry, rows_of(model, *values), self.clock.monotonic(), deadline
        )
        self.scheduler.inbox.put(chunk)
        return chunk

    def run(self, ticks_max: int = 10_000) -> int:
        """Ticks until there is nothing to do. Returns how many times the engine ran."""
        ran = 0
        for _ in range(ticks_max):
            ran += self.scheduler.tick()
            if not self.scheduler.has_work:
                return ran
        raise AssertionError(f"still not idle after {ticks_max} ticks")

    def step(self, session_id: str, first_step: int, values: Sequence[int], **more: Any) -> bytes:
        """Runs a chunk to its end and returns its rows, or raises its error."""
        recorder = Recorder()
        chunk = self.send(session_id, first_step, values, recorder, **more)
        self.run()
        answer = recorder.of(chunk)
        if answer.error is not None:
            raise answer.error
        assert answer.settled
        return answer.rows

    def close(self, session_id: str = "s", principal: str = PRINCIPAL) -> SessionView:
        """Closes a session that has nothing to do."""
        outcome = Outcome[SessionView]()
        self.operations.close(principal, session_id, outcome)
        return outcome.result

    def reset(self, session_id: str = "s", principal: str = PRINCIPAL) -> SessionView:
        """Resets a session that has nothing to do."""
        outcome = Outcome[SessionView]()
        self.operations.reset(principal, session_id, outcome)
        return outcome.result

    def fork(
        self, session_id: str, *new_ids: str, at_step: int = 0, principal: str = PRINCIPAL
    ) -> list[SessionView]:
        """Forks a session that has nothing to do."""
        outcome = Outcome[list[SessionView]]()
        self.operations.fork(principal, session_id, new_ids, at_step, outcome)
        return outcome.result

    def export(self, session_id: str = "s", principal: str = PRINCIPAL) -> bytes:
        """Takes a snapshot of a session that has nothing to do."""
        outcome = Outcome[tuple[SessionView, Checkpoint]]()
        self.operations.export(principal, session_id, outcome)
        return encode(outcome.result[1])

"""The sessions of the fake server: a running sum each, with all that it was ever sent."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from conveyor.v1 import model_pb2, session_pb2
from tests.unit.client.fake.models import GATES, add, attention_weights, gate_values
from tests.unit.client.fake.refusals import Refusal, make_duration


@dataclass
class State:
    """One session."""

    session_id: str
    model: model_pb2.Model
    epoch: int = 0
    carry: np.ndarray = field(default_factory=lambda: np.zeros(3, np.float32))
    applied: int = 0
    durable: int = 0
    durability: int = session_pb2.DURABILITY_NONE
    inputs: dict[int, bytes] = field(default_factory=dict)
    results: dict[int, bytes] = field(default_factory=dict)
    runs: Counter[int] = field(default_factory=Counter)
    checkpoints: dict[int, np.ndarray] = field(default_factory=dict)
    idle_seconds: float = 60.0
    labels: dict[str, str] = field(default_factory=dict)
    memory: np.ndarray = field(default_factory=lambda: np.zeros((0, 1), np.float32))
    held_steps: int = 1000
    holder: Any = None
    handle: int = 0

    def describe(self) -> session_pb2.Session:
        """What the server tells of it."""
        return session_pb2.Session(
            session_id=self.session_id,
            model=self.model.name,
            version=self.model.version,
            model_digest=self.model.digest,
            state=session_pb2.SESSION_STATE_IDLE,
            tier=session_pb2.STATE_TIER_DEVICE,
            epoch=self.epoch,
            applied_step=self.applied,
            durable_step=self.durable,
            durability=self.durability,
            memory_rows=len(self.memory),
            idle_ttl=make_duration(self.idle_seconds),
            labels=self.labels,
        )

    def run(self, first_step: int, row: bytes) -> tuple[bytes, bool]:
        """Applies or repeats one step."""
        if first_step > self.applied + 1:
            raise Refusal("STEP_GAP", expected_step=str(self.applied + 1))
        if first_step <= self.applied:
            if first_step not in self.results:
                raise Refusal("STEP_RESULT_NOT_HELD")
            if self.inputs[first_step] != row:
                raise Refusal("STEP_CONFLICT")
            return self.results[first_step], True
        out = add(self.model, self.carry, row, self.memory)
        self.applied = first_step
        self.runs[first_step] += 1
        self.inputs[first_step] = row
        self.results[first_step] = out
        self.inputs.pop(first_step - self.held_steps, None)
        self.results.pop(first_step - self.held_steps, None)
        return out, False

    def checkpoint(self) -> None:
        """Makes what was applied so far durable."""
        self.durable = self.applied
        self.checkpoints[self.applied] = self.carry.copy()

    def go_back(self, step: int) -> None:
        """Forgets what came after a checkpoint, as a crash would."""
        self.carry = self.checkpoints[step].copy() if step else np.zeros(3, np.float32)
        self.applied = self.durable = step
        self.inputs = {n: row for n, row in self.inputs.items() if n <= step}
        self.results = {n: row for n, row in self.results.items() if n <= step}


@dataclass
class World:
    """What outlives a server."""

    sessions: dict[str, State] = field(default_factory=dict)
    ended: dict[str, str] = field(default_factory=dict)
    calls: Counter[str] = field(default_factory=Counter)
    frames: list[session_pb2.StreamStepsRequest] = field(default_factory=list)
    metadata: list[dict[str, str]] = field(default_factory=list)

    def find(self, session_id: str) -> State:
        """A session that lives, or why there is none."""
        if session_id in self.ended:
            raise Refusal(self.ended[session_id])
        state = self.sessions.get(session_id)
        if state is None:
            raise Refusal("SESSION_NOT_FOUND")
        return state

    def end(self, session_id: str, reason: str = "SESSION_CLOSED") -> State:
        """Ends a session."""
        self.ended[session_id] = reason
        return self.sessions.pop(session_id)


def take_memory(model: model_pb2.Model, given: bool, memory: session_pb2.Memory) -> np.ndarray:
    """What a new session attends over; no rows for a model without attention."""
    wanted = model.signature.HasField("memory")
    elements = model.signature.memory.row_elements
    if given != wanted or len(memory.rows) != memory.length * elements * 4:
        raise Refusal("INVALID_MEMORY")
    if not wanted:
        return np.zeros((0, 1), "<f4")
    if memory.length > model.limits.memory_rows_max:
        raise Refusal("MEMORY_TOO_LARGE")
    return np.frombuffer(memory.rows, "<f4").reshape(-1, elements)


def make_trace(state: State, mode: int, first_step: int, length: int) -> session_pb2.Trace:
    """The trace of steps that ran."""
    trace = session_pb2.Trace()
    for number, layer in enumerate(state.model.layers):
        traced = trace.layers.add(layer=number, cell=layer.cell)
        for name in GATES[layer.cell]:
            values = gate_values(number, name, first_step, length, layer.size)
            gate = traced.gates.add(name=name, units=layer.size)
            if mode == session_pb2.TRACE_MODE_FULL:
                gate.values = values.tobytes()
                continue
            for row in values:
                gate.summaries.add(
                    mean=row.mean(),
                    minimum=row.min(),
                    maximum=row.max(),
                    share_low=np.mean(row < 0.1),
                    share_high=np.mean(row > 0.9),
                )
    if len(state.memory):
        trace.attention_columns = len(state.memory)
        trace.attention = attention_weights(first_step, length, len(state.memory)).tobytes()
    return trace


def run_rows(state: State, first_step: int, length: int, rows: bytes) -> tuple[bytes, bool]:
    """Steps a session on a chunk."""
    size = state.model.signature.input.row_bytes
    assert len(rows) == length * size
    answers = [state.run(first_step + i, rows[i * size : (i + 1) * size]) for i in range(length)]
    return b"".join(row for row, _ in answers), any(duplicate for _, duplicate in answers)

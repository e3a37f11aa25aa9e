"""Hypothesis looks for the shortest series of events that breaks a rule."""

from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from conveyor_server.core import OpenMode, OutputMode, SessionKey, TraceMode
from tests.simulation.simulation import Simulation
from tests.simulation.streams import Stream
from tests.simulation.world import PRINCIPALS, STREAMS, Setup
from tests.support.models import ATTENTIVE, FEATURES, TOKENS

SESSION_IDS = st.sampled_from("abc")
KEYS = st.tuples(st.sampled_from(PRINCIPALS), SESSION_IDS)
NUMBERS = st.integers(0, STREAMS - 1)
KINDS = st.sampled_from(["next"] * 6 + ["again", "again", "conflict", "gap", "poison"])
LENGTHS = st.sampled_from([1, 1, 2, 3, 7])
OUTPUTS = st.sampled_from(OutputMode)


class ServerMachine(RuleBasedStateMachine):
    """Rules are what callers, the engine and time may do; `Simulation` says what must hold."""

    @initialize(
        slots=st.integers(1, 3),
        quantum=st.sampled_from([1, 2, 16]),
        batch=st.integers(1, 4),
        held=st.sampled_from([0, 4, 64]),
        host=st.sampled_from([1024, 1 << 30]),
        memories=st.sampled_from([60, 1 << 30]),
    )
    def start(
        self, slots: int, quantum: int, batch: int, held: int, host: int, memories: int
    ) -> None:
        setup = Setup(
            slots=slots,
            quantum_steps=quantum,
            batch_sessions_max=batch,
            held_results_steps_max=held,
            host_state_bytes_max=host,
            memories_bytes_max=memories,
        )
        self.simulation = Simulation(setup)
        self.callers = self.simulation.callers

    def stream(self, number: int) -> Stream:
        return self.simulation.streams[number]

    def key(self, number: int, session_id: str) -> SessionKey:
        return self.stream(number).principal, session_id

    # --- callers ---------------------------------------------------------------------------------

    @rule(
        number=NUMBERS,
        session_id=SESSION_IDS,
        mode=st.sampled_from([OpenMode.EITHER] * 3 + [OpenMode.CREATE, OpenMode.RESUME]),
        model=st.sampled_from([FEATURES] * 3 + [ATTENTIVE] * 2 + [TOKENS]),
        memory=st.sampled_from([0, 0, 1, 4]),
        idle=st.sampled_from([None, None, 2.0, 60.0]),
        alone=st.sampled_from([False] * 4 + [True]),
    )
    def open(self, number: int, session_id: str, alone: bool, **wanted: Any) -> None:
        stream = None if alone else self.stream(number)
        idle = wanted.pop("idle")
        self.callers.open(stream, self.key(number, session_id), idle_seconds=idle, **wanted)

    @rule(
        number=NUMBERS,
        session_id=SESSION_IDS,
        kind=KINDS,
        length=LENGTHS,
        output=OUTPUTS,
        back=st.integers(0, 3),
        trace=st.sampled_from([TraceMode.NONE, *TraceMode]),
    )
    def step(
        self,
        number: int,
        session_id: str,
        kind: str,
        length: int,
        output: OutputMode,
        back: int,
        trace: TraceMode,
    ) -> None:
        key = self.key(number, session_id)
        first_step, rows = self.callers.rows(key, kind, length, back)
        self.callers.send(key, self.stream(number), first_step, rows, output, trace=trace)

    @rule(
        key=KEYS,
        kind=KINDS,
        length=LENGTHS,
        output=OUTPUTS,
        back=st.integers(0, 3),
        epoch=st.integers(0, 3),
        seconds=st.sampled_from([None, 0.5]),
    )
    def call(
        self,
        key: SessionKey,
        kind: str,
        length: int,
        output: OutputMode,
        back: int,
        epoch: int,
        seconds: float | None,
    ) -> None:
        first_step, rows = self.callers.rows(key, kind, length, back)
        self.callers.send(key, None, first_step, rows, output, epoch=epoch, seconds=seconds)

    @rule(number=NUMBERS, session_id=SESSION_IDS, by_call=st.booleans())
    def close(self, number: int, session_id: str, by_call: bool) -> None:
        stream = None if by_call else self.stream(number)
        self.callers.close(stream, self.key(number, session_id))

    @rule(key=KEYS)
    def reset(self, key: SessionKey) -> None:
        self.callers.reset(key)

    @rule(key=KEYS, new_id=st.sampled_from(["a", "b", "d", ""]), at_step=st.sampled_from([0, 0, 2]))
    def fork(self, key: SessionKey, new_id: str, at_step: int) -> None:
        self.callers.fork(key, [new_id, "e"], at_step)

    @rule(key=KEYS)
    def export(self, key: SessionKey) -> None:
        self.callers.export(key)

    @rule(number=st.integers(0, 5), key=KEYS)
    def import_(self, number: int, key: SessionKey) -> None:
        self.callers.import_(number, key, 10.0)

    @rule(number=NUMBERS, session_id=SESSION_IDS)
    def detach(self, number: int, session_id: str) -> None:
        self.callers.detach(self.stream(number), session_id)

    @rule(number=NUMBERS)
    def keep_alive(self, number: int) -> None:
        self.callers.keep_alive(self.stream(number))

    @rule(principal=st.sampled_from(PRINCIPALS), length=st.sampled_from([1, 5, 40]))
    def predict(self, principal: str, length: int) -> None:
        self.callers.predict(principal, length)

    @rule(length=st.sampled_from([1, 3, 8]), output=OUTPUTS, seconds=st.sampled_from([None, 0.5]))
    def predict_whole(self, length: int, output: OutputMode, seconds: float | None) -> None:
        self.callers.predict_whole(length, output, seconds)

    @rule(number=st.integers(0, 3))
    def give_up(self, number: int) -> None:
        self.callers.give_up(number)

    # --- the engine and time ---------------------------------------------------------------------

    @rule()
    def tick(self) -> None:
        self.simulation.tick()

    @precondition(lambda self: self.simulation.world.batch is None)
    @rule()
    def begin(self) -> None:
        self.simulation.begin()

    @precondition(lambda self: self.simulation.world.batch is not None)
    @rule()
    def finish(self) -> None:
        self.simulation.finish()

    @rule(memory=st.booleans())
    def fail_next(self, memory: bool) -> None:
        self.simulation.fail_next(memory=memory)

    @rule()
    def fail_next_memory(self) -> None:
        self.simulation.fail_next_memory()

    @rule(seconds=st.sampled_from([0.1, 1.0, 9.0, 30.0, 100.0]))
    def advance(self, seconds: float) -> None:
        self.simulation.world.rig.clock.advance(seconds)

    @rule(seconds=st.sampled_from([-3600.0, 3600.0]))
    def jump_wall(self, seconds: float) -> None:
        self.simulation.world.rig.clock.jump_wall(seconds)

    # --- what must hold --------------------------------------------------------------------------

    @invariant()
    def every_rule_holds(self) -> None:
        self.simulation.check()

    def teardown(self) -> None:
        if hasattr(self, "simulation"):
            self.simulation.drain()


# Passing takes seconds; making a failure short may take minutes, and is worth them.
pytestmark = pytest.mark.timeout(600)
ServerMachine.TestCase.settings = settings(max_examples=300, stateful_step_count=50)
TestServer = ServerMachine.TestCase

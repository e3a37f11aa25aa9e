"""The promise "same bits" as a property of one engine: what is compared, and with what.

A scenario is a network, some sessions with inputs of their own, what they attend over, and a plan:
which sessions run together in each tick, in what order, how many steps each, how many outputs are
wanted, who is traced, and who is moved to another slot on the way. Whatever the plan, every output,
every trace and every final carry has to equal that of the session alone, its whole input in one
piece; and that of an untraced session alone, its outputs.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import numpy.typing as npt
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from conveyor_models import ModelSpec
from conveyor_server.core import TraceMode
from conveyor_server.engine.port import Work
from conveyor_server.engine.products import ProductFamily
from tests.fidelity.networks import (
    CPU,
    Loaded,
    Rows,
    families,
    load,
    make_bundle,
    make_spec,
    random_memory,
    random_rows,
    random_weights,
)
from tests.fidelity.random_specs import memory_lengths, specs
from tests.fidelity.traced import Parts, cut, parts_of

SESSIONS_MAX: Final = 40
"""More than one block of rows."""
STEPS_MAX: Final = 24

SETTINGS: Final = settings(
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


@dataclass(frozen=True)
class Turn:
    """One session's part of a tick."""

    session: int
    steps: int
    outputs: int
    move: bool
    """Whether its carry goes to another slot before."""
    trace: TraceMode = TraceMode.NONE


@dataclass(frozen=True)
class Scenario:
    spec: ModelSpec
    seed: int
    lengths: tuple[int, ...]
    """Steps of each session."""
    ticks: tuple[tuple[Turn, ...], ...]
    memories: tuple[int, ...] = ()
    """Rows of each memory; the sessions take them in turn, so that some share one."""

    def inputs(self) -> list[Rows]:
        return [
            random_rows(self.spec, length, self.seed + number)
            for number, length in enumerate(self.lengths)
        ]

    def memory_of(self, session: int) -> Rows | None:
        if self.spec.attention is None:
            return None
        number = session % len(self.memories)
        return random_memory(self.spec, self.memories[number], self.seed + number)

    def traces_of(self, session: int) -> set[TraceMode]:
        """How it is traced at one time or another."""
        turns = [turn for tick in self.ticks for turn in tick if turn.session == session]
        return {turn.trace for turn in turns if turn.trace}


@st.composite
def scenarios(draw: st.DrawFn) -> Scenario:
    lengths = draw(st.lists(st.integers(1, STEPS_MAX), min_size=1, max_size=SESSIONS_MAX))
    modes = st.sampled_from([TraceMode.NONE] * 4 + [TraceMode.SUMMARY, TraceMode.FULL])
    turn = st.builds(
        Turn,
        session=st.integers(0, len(lengths) - 1),
        steps=st.integers(1, STEPS_MAX),
        outputs=st.integers(0, STEPS_MAX),
        move=st.booleans(),
        trace=modes,
    )
    tick = st.lists(turn, min_size=1, max_size=SESSIONS_MAX, unique_by=lambda each: each.session)
    spec = draw(specs())
    memories = st.lists(memory_lengths, min_size=1, max_size=8)
    return Scenario(
        spec=spec,
        seed=draw(st.integers(0, 2**16)),
        lengths=tuple(lengths),
        ticks=tuple(tuple(turns) for turns in draw(st.lists(tick, min_size=1, max_size=6))),
        memories=() if spec.attention is None else tuple(draw(memories)),
    )


@dataclass(frozen=True)
class _Alone:
    """What becomes of a session that runs alone, all at once."""

    outputs: npt.NDArray[Any]
    carry: bytes
    traces: dict[TraceMode, Parts]


def difference(scenario: Scenario, family: ProductFamily, device: torch.device = CPU) -> str | None:
    """Where a scenario's bits differ from those of each session alone; None if nowhere."""
    bundle = make_bundle(scenario.spec, random_weights(scenario.spec, scenario.seed))
    slots = 2 * len(scenario.lengths)
    threads = torch.get_num_threads()
    loaded = load(bundle, family=family, slots=slots, device=device, threads=threads)
    together = _Plan(loaded, scenario)
    for tick in scenario.ticks:
        together.tick(tick)
    together.finish()
    return together.found


class _Plan:
    def __init__(self, loaded: Loaded, scenario: Scenario) -> None:
        self.found: str | None = None
        self._loaded = loaded
        self._inputs = scenario.inputs()
        self._alone = [self._run_alone(scenario, each) for each in range(len(self._inputs))]
        self._done = [0] * len(self._inputs)
        self._slots = [loaded.acquire() for _ in self._inputs]
        shared = [loaded.add_memory(scenario.memory_of(n)) for n in range(len(scenario.memories))]
        self._memories = [shared[n % len(shared)] if shared else 0 for n in range(len(self._slots))]

    def _run_alone(self, scenario: Scenario, session: int) -> _Alone:
        loaded, rows = self._loaded, self._inputs[session]
        memory = loaded.add_memory(scenario.memory_of(session))
        traces: dict[TraceMode, Parts] = {}
        found: set[tuple[bytes, bytes]] = set()
        outputs, carry = b"", b""
        for mode in (TraceMode.NONE, *sorted(scenario.traces_of(session))):
            slot = loaded.acquire()
            work = Work(slot, len(rows), rows.tobytes(), len(rows), memory, mode)
            (done,) = loaded.engine.run(loaded.key, [work])
            outputs, carry = done.rows, loaded.engine.read(loaded.key, slot)
            found.add((outputs, carry))
            traces[mode] = parts_of(done.trace)
            loaded.engine.release(loaded.key, slot)
        if len(found) > 1:
            self._note(f"session {session} alone, if traced")
        if memory:
            loaded.engine.drop_memory(loaded.key, memory)
        return _Alone(loaded.unpack(outputs), carry, traces)

    def tick(self, turns: tuple[Turn, ...]) -> None:
        parts: list[Turn] = []
        for turn in turns:
            left = len(self._inputs[turn.session]) - self._done[turn.session]
            steps = min(turn.steps, left)
            if not steps:
                continue
            if turn.move:
                self._move(turn.session)
            outputs = min(turn.outputs, steps)
            parts.append(Turn(turn.session, steps, outputs, move=False, trace=turn.trace))
        if parts:
            self._run(parts)

    def finish(self) -> None:
        left = [(s, len(rows) - self._done[s]) for s, rows in enumerate(self._inputs)]
        if parts := [Turn(session, steps, steps, move=False) for session, steps in left if steps]:
            self._run(parts)
        for session, alone in enumerate(self._alone):
            if self._loaded.engine.read(self._loaded.key, self._slots[session]) != alone.carry:
                self._note(f"the carry of session {session}")

    def _run(self, parts: list[Turn]) -> None:
        works: list[Work] = []
        for turn in parts:
            session, begin = turn.session, self._done[turn.session]
            rows = self._inputs[session][begin : begin + turn.steps].tobytes()
            slot, memory = self._slots[session], self._memories[session]
            works.append(Work(slot, turn.steps, rows, turn.outputs, memory, turn.trace))
            self._done[session] += turn.steps
        for turn, done in zip(parts, self._loaded.engine.run(self._loaded.key, works), strict=True):
            alone, end = self._alone[turn.session], self._done[turn.session]
            where = f"session {turn.session}, steps up to {end}, in a batch of {len(parts)}"
            if done.rows != alone.outputs[end - turn.outputs : end].tobytes() or not done.finite:
                self._note(where)
            expected = cut(alone.traces[turn.trace], end - turn.steps, end)
            if cut(parts_of(done.trace), 0, turn.steps) != expected:
                self._note(f"trace of {where}")

    def _move(self, session: int) -> None:
        """As paging does: out of one slot, into another that somebody used before."""
        engine, key = self._loaded.engine, self._loaded.key
        carry = engine.read(key, self._slots[session])
        other = self._loaded.acquire()
        engine.release(key, self._slots[session])
        engine.write(key, other, carry)
        self._slots[session] = other

    def _note(self, where: str) -> None:
        self.found = self.found or where


def holds(
    make_family: Callable[[], ProductFamily], *, examples: int, device: torch.device = CPU
) -> None:
    """Asserts the promise over many scenarios."""

    @settings(SETTINGS, max_examples=examples, phases=[Phase.generate, Phase.shrink])
    @given(scenarios())
    def check(scenario: Scenario) -> None:
        assert difference(scenario, make_family(), device) is None

    check()


def holds_in_slices(
    make_family: Callable[[], ProductFamily], *, examples: int, device: torch.device = CPU
) -> None:
    """Asserts that a whole sequence has the same bits in whatever slices it is run."""

    @settings(SETTINGS, max_examples=examples, phases=[Phase.generate, Phase.shrink])
    @given(
        specs(("forward", "reverse", "bidirectional", "bidirectional")).filter(
            lambda spec: not spec.streamable
        ),
        st.integers(1, 50),
        st.integers(0, 50),
        st.lists(st.integers(1, 60), min_size=1),
        st.integers(0, 2**16),
    )
    def check(spec: ModelSpec, steps: int, outputs: int, slices: list[int], seed: int) -> None:
        bundle = make_bundle(spec, random_weights(spec, seed))
        threads = torch.get_num_threads()
        loaded = load(bundle, family=make_family(), device=device, threads=threads)
        rows = random_rows(spec, steps, seed)
        whole = loaded.predict(rows)
        outputs = min(outputs, steps)
        prediction = loaded.engine.predict(loaded.key, rows.tobytes(), steps, outputs)
        taken = 0
        while (done := prediction.advance(slices[taken % len(slices)])) is None:
            taken += 1
        assert done == whole[steps - outputs :].tobytes()

    check()


CROWDS: Final[dict[str, tuple[ModelSpec, int]]] = {
    "lstm": (make_spec([512], features=3), 160),
    "clipped lstm": (make_spec([{"size": 512, "clip": 2.0}], features=3), 100),
    "gru": (make_spec([{"cell": "gru", "size": 512}], features=3, head=1), 200),
    "attention": (
        make_spec(
            [{"cell": "gru", "size": 33}],
            features=3,
            attention={"memory_size": 40, "size": 100, "gate": True},
        ),
        19,
    ),
}
"""So many sessions that threads share the work of element-wise functions, and how many."""


def crowds_hold(family: ProductFamily) -> None:
    """Asserts that bits do not depend on where one thread's share ends and another's begins."""
    threads = torch.get_num_threads()
    for name, (spec, sessions) in CROWDS.items():
        bundle = make_bundle(spec, random_weights(spec, 0))
        loaded = load(bundle, family=family, slots=sessions, threads=threads)
        inputs = [random_rows(spec, 1 + n % 2, n) for n in range(sessions)]
        memories: list[Rows | None] = [None] * sessions
        if spec.attention is not None:
            memories = [random_memory(spec, 60 - n % 3, n) for n in range(sessions)]
        together = loaded.run_works(inputs, memories, TraceMode.FULL)
        for number, done in enumerate(together):
            part = slice(number, number + 1)
            alone = loaded.run_works(inputs[part], memories[part], TraceMode.FULL)
            assert alone == [done], f"{name}, session {number}, {threads} threads"


if __name__ == "__main__":  # with a number of threads, which torch keeps for a whole process
    count = int(sys.argv[1])
    torch.set_num_threads(count)
    for each in families(count):
        crowds_hold(each)
        holds(lambda each=each: each, examples=int(sys.argv[2]))
        holds_in_slices(lambda each=each: each, examples=int(sys.argv[2]) // 2)
        print(f"{each.name}: same bits with {torch.get_num_threads()} threads")

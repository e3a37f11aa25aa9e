"""The promise "same bits" as a property of one engine: what is compared, and with what.

A scenario is a network, some sessions with inputs of their own, and a plan: which sessions run
together in each tick, in what order, how many steps each, how many outputs are wanted, and who is
moved to another slot on the way. Whatever the plan, every output and every final carry has to equal
that of the session alone, its whole input in one piece.
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
from conveyor_server.engine.port import Work
from conveyor_server.engine.products import ProductFamily
from tests.fidelity.networks import (
    CPU,
    Loaded,
    families,
    load,
    make_bundle,
    make_spec,
    random_rows,
    random_weights,
)

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


@dataclass(frozen=True)
class Scenario:
    spec: ModelSpec
    seed: int
    lengths: tuple[int, ...]
    """Steps of each session."""
    ticks: tuple[tuple[Turn, ...], ...]

    def inputs(self) -> list[npt.NDArray[Any]]:
        return [
            random_rows(self.spec, length, self.seed + number)
            for number, length in enumerate(self.lengths)
        ]


_sizes = st.one_of(st.integers(1, 40), st.sampled_from([1, 3, 17, 31, 32, 33, 63, 64, 65, 100]))


@st.composite
def specs(draw: st.DrawFn) -> ModelSpec:
    layers: list[int | tuple[int, int]] = []
    for size in draw(st.lists(_sizes, min_size=1, max_size=3)):
        projected = size > 1 and draw(st.booleans())
        layers.append((size, draw(st.integers(1, size - 1))) if projected else size)
    options: dict[str, Any] = {
        "head": draw(st.one_of(st.just(0), _sizes)),
        "head_bias": draw(st.booleans()),
        "activation": draw(st.sampled_from(["none", "softmax", "log_softmax", "sigmoid"])),
    }
    if draw(st.booleans()):
        return make_spec(layers, features=draw(_sizes), **options)
    return make_spec(layers, tokens=draw(_sizes), embedding=draw(_sizes), **options)


@st.composite
def scenarios(draw: st.DrawFn) -> Scenario:
    lengths = draw(st.lists(st.integers(1, STEPS_MAX), min_size=1, max_size=SESSIONS_MAX))
    turn = st.builds(
        Turn,
        session=st.integers(0, len(lengths) - 1),
        steps=st.integers(1, STEPS_MAX),
        outputs=st.integers(0, STEPS_MAX),
        move=st.booleans(),
    )
    tick = st.lists(turn, min_size=1, max_size=SESSIONS_MAX, unique_by=lambda each: each.session)
    return Scenario(
        spec=draw(specs()),
        seed=draw(st.integers(0, 2**16)),
        lengths=tuple(lengths),
        ticks=tuple(tuple(turns) for turns in draw(st.lists(tick, min_size=1, max_size=6))),
    )


def difference(scenario: Scenario, family: ProductFamily, device: torch.device = CPU) -> str | None:
    """Where a scenario's bits differ from those of each session alone; None if nowhere."""
    bundle = make_bundle(scenario.spec, random_weights(scenario.spec, scenario.seed))
    slots = 2 * len(scenario.lengths)
    threads = torch.get_num_threads()
    loaded = load(bundle, family=family, slots=slots, device=device, threads=threads)
    alone = _run_alone(loaded, scenario)
    together = _Plan(loaded, scenario, alone)
    for tick in scenario.ticks:
        together.tick(tick)
    together.finish()
    return together.found


def _run_alone(loaded: Loaded, scenario: Scenario) -> list[tuple[npt.NDArray[Any], bytes]]:
    results: list[tuple[npt.NDArray[Any], bytes]] = []
    for rows in scenario.inputs():
        slot = loaded.acquire()
        out = loaded.run(slot, rows)
        results.append((out, loaded.engine.read(loaded.key, slot)))
        loaded.engine.release(loaded.key, slot)
    return results


class _Plan:
    def __init__(
        self,
        loaded: Loaded,
        scenario: Scenario,
        alone: list[tuple[npt.NDArray[Any], bytes]],
    ) -> None:
        self._loaded = loaded
        self._inputs = scenario.inputs()
        self._alone = alone
        self._done = [0] * len(self._inputs)
        self._slots = [loaded.acquire() for _ in self._inputs]
        self.found: str | None = None

    def tick(self, turns: tuple[Turn, ...]) -> None:
        parts: list[tuple[int, int, int]] = []
        for turn in turns:
            steps = min(turn.steps, len(self._inputs[turn.session]) - self._done[turn.session])
            if not steps:
                continue
            if turn.move:
                self._move(turn.session)
            parts.append((turn.session, steps, min(turn.outputs, steps)))
        if parts:
            self._run(parts)

    def finish(self) -> None:
        left = [(s, len(rows) - self._done[s]) for s, rows in enumerate(self._inputs)]
        if parts := [(session, steps, steps) for session, steps in left if steps]:
            self._run(parts)
        for session, (_, carry) in enumerate(self._alone):
            if self._loaded.engine.read(self._loaded.key, self._slots[session]) != carry:
                self._note(f"the carry of session {session}")

    def _run(self, parts: list[tuple[int, int, int]]) -> None:
        works: list[Work] = []
        for session, steps, outputs in parts:
            begin = self._done[session]
            rows = self._inputs[session][begin : begin + steps].tobytes()
            works.append(Work(self._slots[session], steps, rows, outputs))
            self._done[session] += steps
        for (session, _, outputs), done in zip(
            parts, self._loaded.engine.run(self._loaded.key, works), strict=True
        ):
            end = self._done[session]
            expected = self._alone[session][0][end - outputs : end].tobytes()
            if done.rows != expected or not done.finite:
                self._note(f"session {session}, steps up to {end}, in a batch of {len(parts)}")

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


if __name__ == "__main__":  # with a number of threads, which torch keeps for a whole process
    count = int(sys.argv[1])
    torch.set_num_threads(count)
    for each in families(count):
        holds(lambda each=each: each, examples=int(sys.argv[2]))
        print(f"{each.name}: same bits with {torch.get_num_threads()} threads")

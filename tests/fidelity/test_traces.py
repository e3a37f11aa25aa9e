"""Traces: what they show against the equations, in full and summarised, and that they only look.

Error is norm(trace - ref) / norm(ref) of each gate, state and row of attention weights over 100
steps. Over every case it was at most 6.6e-7.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt
import pytest

from conveyor_models import ModelSpec
from conveyor_server.core import TraceMode
from conveyor_server.engine.port import Done
from tests.fidelity import reference
from tests.fidelity.cases import FAMILIES, MEMORY_ROWS, MISTAKE_SHOWS, STREAMED
from tests.fidelity.networks import (
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
from tests.fidelity.traced import Parts, parts_of

STEPS: Final = 100
TOLERANCE: Final = 2e-6
CASES: Final = {name: spec for name, spec in STREAMED.items() if spec.layers[0].size < 512}


def _memories(spec: ModelSpec, sessions: int) -> list[Rows | None]:
    if spec.attention is None:
        return [None] * sessions
    return [random_memory(spec, MEMORY_ROWS[-1 - n % 4], n) for n in range(sessions)]


def _exact(followed: reference.Followed) -> Parts:
    parts = {
        f"{number}.{name}": values
        for number, layer in enumerate(followed.layers)
        for name, values in layer.items()
    }
    if followed.attention is not None:
        parts["attention"] = followed.attention
    return parts


def _run(loaded: Loaded, mode: TraceMode, lengths: tuple[int, ...]) -> list[Done]:
    spec = loaded.spec
    inputs = [random_rows(spec, steps, number) for number, steps in enumerate(lengths)]
    return loaded.run_works(inputs, _memories(spec, len(lengths)), mode)


@pytest.mark.parametrize("spec", CASES.values(), ids=CASES.keys())
def test_a_trace_shows_what_the_equations_say(spec: ModelSpec) -> None:
    weights = random_weights(spec, 0)
    loaded = load(make_bundle(spec, weights), family=families(1)[-1])
    lengths = (STEPS, 1, 17, 99)
    for number, done in enumerate(_run(loaded, TraceMode.FULL, lengths)):
        assert done.trace is not None
        assert (done.trace.mode, done.trace.steps) == (TraceMode.FULL, lengths[number])
        assert [each.cell for each in done.trace.layers] == [each.cell for each in spec.layers]
        rows = random_rows(spec, lengths[number], number)
        memory = _memories(spec, len(lengths))[number]
        expected = _exact(reference.follow(spec, weights, rows, memory))
        seen = parts_of(done.trace)
        assert seen.keys() == expected.keys()
        for name, values in seen.items():
            assert values.shape == expected[name].shape
            assert reference.error(values, expected[name]) < TOLERANCE, name


@pytest.mark.parametrize("options", FAMILIES.values(), ids=FAMILIES.keys())
def test_gates_shown_under_each_others_names_are_noticed(options: dict[str, object]) -> None:
    spec = make_spec([{**options, "size": 17}], features=7)
    weights = random_weights(spec, 0)
    (done,) = _run(load(make_bundle(spec, weights)), TraceMode.FULL, (STEPS,))
    expected = _exact(reference.follow(spec, weights, random_rows(spec, STEPS, 0)))
    for name, values in parts_of(done.trace).items():
        for other in expected.keys() - {name}:
            assert reference.error(values, expected[other]) > MISTAKE_SHOWS, (name, other)


@pytest.mark.parametrize("spec", CASES.values(), ids=CASES.keys())
def test_a_summary_is_that_of_the_full_trace(spec: ModelSpec) -> None:
    loaded = load(make_bundle(spec, random_weights(spec, 0)), family=families(1)[-1])
    lengths = (20, 1, 7)
    full, short = (_run(loaded, mode, lengths) for mode in (TraceMode.FULL, TraceMode.SUMMARY))
    for whole, summary in zip(full, short, strict=True):
        assert summary.trace is not None
        assert summary.trace.mode is TraceMode.SUMMARY
        seen, expected = parts_of(summary.trace), parts_of(whole.trace)
        assert seen.keys() == expected.keys()
        for name, values in expected.items():
            if name == "attention":
                assert seen[name].tobytes() == values.tobytes(), "weights are never summarised"
            else:
                np.testing.assert_allclose(seen[name], _summary(values), rtol=1e-6, atol=1e-7)
                assert np.array_equal(seen[name][:, 1], values.min(axis=1))
                assert np.array_equal(seen[name][:, 2], values.max(axis=1))


def _summary(values: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    """mean, minimum, maximum, share below 0.1, share above 0.9"""
    low, high = np.float32(0.1), np.float32(0.9)
    rows = [
        (
            sum(map(float, row)) / len(row),
            min(row),
            max(row),
            sum(value < low for value in row) / len(row),
            sum(value > high for value in row) / len(row),
        )
        for row in values
    ]
    return np.array(rows, dtype=np.float64)


def test_only_those_are_traced_who_asked() -> None:
    spec = make_spec([5], features=2)
    loaded = load(make_bundle(spec, random_weights(spec, 0)))
    done = _run(loaded, TraceMode.NONE, (3, 1, 2))
    assert [each.trace for each in done] == [None, None, None]

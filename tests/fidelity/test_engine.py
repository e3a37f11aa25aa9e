"""The engine against the equations in float64: every family and option, alone and in a batch.

Error is norm(out - ref) / norm(ref) over 1,000 steps, with each kind of products there is. Over
three seeds of every case it was between 0.3e-7 and 9.1e-7: the worst is a bidirectional LSTM with
all options, whose forget gate follows its own c, next a reverse LSTM with peepholes at 6.1e-7;
without peepholes no more than 4.3e-7. In sessions of one unit and a few steps, where one number
near zero is the whole norm, it was up to 1.6e-6. The tolerance leaves a factor of two over that.
`test_mistakes` shows what a mistake makes: above 6e-4.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest
import torch

from conveyor_models import ModelSpec, load_bundle
from tests.fidelity import reference
from tests.fidelity.cases import (
    FAMILIES,
    MEMORY_ROWS,
    MISTAKE_SHOWS,
    PREDICTED,
    STEPS,
    STREAMED,
    TOLERANCE_FLOAT32,
)
from tests.fidelity.networks import (
    Rows,
    families,
    load,
    make_bundle,
    make_spec,
    random_memory,
    random_rows,
    random_weights,
)

ZOO: Final = Path(__file__).parents[2] / "models" / "zoo"
LENGTHS: Final = (STEPS, 1, 17, 100, 2, 99, 100)


def _memories(spec: ModelSpec, sessions: int) -> list[Rows | None]:
    if spec.attention is None:
        return [None] * sessions
    return [random_memory(spec, MEMORY_ROWS[-1 - n % 4], n) for n in range(sessions)]


@pytest.mark.parametrize("spec", STREAMED.values(), ids=STREAMED.keys())
def test_the_engine_computes_the_equations(spec: ModelSpec) -> None:
    for seed, family in enumerate(families(threads=1)):
        weights = random_weights(spec, seed)
        inputs = [random_rows(spec, steps, steps + seed) for steps in LENGTHS]
        memories = _memories(spec, len(inputs))
        loaded = load(make_bundle(spec, weights), family=family)
        expected = [
            reference.run(spec, weights, rows, memory)
            for rows, memory in zip(inputs, memories, strict=True)
        ]
        (alone,) = loaded.run_batch([inputs[0][:200]], memories[:1])
        assert reference.error(alone, expected[0][:200]) < TOLERANCE_FLOAT32, family.name
        for out, exact in zip(loaded.run_batch(inputs, memories), expected, strict=True):
            assert reference.error(out, exact) < TOLERANCE_FLOAT32, family.name


@pytest.mark.parametrize("spec", PREDICTED.values(), ids=PREDICTED.keys())
def test_a_whole_sequence_computes_the_equations(spec: ModelSpec) -> None:
    for seed, family in enumerate(families(threads=1)):
        weights = random_weights(spec, seed)
        loaded = load(make_bundle(spec, weights), family=family)
        for steps in (STEPS, 1, 2, 33):
            rows = random_rows(spec, steps, seed)
            expected = reference.run(spec, weights, rows)
            assert reference.error(loaded.predict(rows), expected) < TOLERANCE_FLOAT32


@pytest.mark.parametrize("name", ["letters", "temperature"])
def test_a_shipped_model_computes_the_equations(name: str) -> None:
    bundle = load_bundle(ZOO / name)
    rows = random_rows(bundle.spec, STEPS, 0)
    if name == "temperature":
        rows[:, 0] = 55 + 10 * rows[:, 0]  # degrees Fahrenheit
    (out,) = load(bundle).run_batch([rows])
    expected = reference.run(bundle.spec, bundle.weights, rows)
    assert reference.error(out, expected) < TOLERANCE_FLOAT32


def test_long_memory_keeps_its_precision() -> None:
    # Forget gates near 1 hold c for hundreds of steps, so that rounding errors add up.
    spec = make_spec([17], features=3)
    weights = random_weights(spec, 0)
    weights["layers.0.bias"][17:34] = 8.0
    rows = random_rows(spec, STEPS, 0)
    (out,) = load(make_bundle(spec, weights)).run_batch([rows])
    assert reference.error(out, reference.run(spec, weights, rows)) < 5 * TOLERANCE_FLOAT32


@pytest.mark.parametrize("options", FAMILIES.values(), ids=FAMILIES.keys())
def test_saturated_gates_stay_exact(options: dict[str, Any]) -> None:
    spec = make_spec([{**options, "size": 17}], features=3)
    weights = {name: 30 * tensor for name, tensor in random_weights(spec, 0).items()}
    rows = 100 * random_rows(spec, 5, 0)
    (out,) = load(make_bundle(spec, weights)).run_batch([rows])
    assert np.isfinite(out).all()
    assert reference.error(out, reference.run(spec, weights, rows)) < 5 * TOLERANCE_FLOAT32


# --- would a mistake in the engine be noticed? ---


ALL_WEIGHTS: Final = {
    name: STREAMED[name]
    for name in (
        "lstm with peepholes, everything",
        "gru, everything",
        "rnn, initial state",
        "projection under peepholes",
        "attention, tokens and everything",
    )
}


@pytest.mark.parametrize("spec", ALL_WEIGHTS.values(), ids=ALL_WEIGHTS.keys())
def test_a_single_wrong_weight_is_noticed(spec: ModelSpec) -> None:
    right = random_weights(spec, 0)
    rows = random_rows(spec, 100, 0)
    memories = _memories(spec, 1)
    expected = reference.run(spec, right, rows, memories[0])
    for name, tensor in right.items():
        wrong = tensor.clone()
        wrong.view(-1)[0] += 0.5
        loaded = load(make_bundle(spec, {**right, name: wrong}), family=families(1)[-1])
        (out,) = loaded.run_batch([rows], memories)
        assert reference.error(out, expected) > 10 * TOLERANCE_FLOAT32, name


@pytest.mark.parametrize("options", FAMILIES.values(), ids=FAMILIES.keys())
def test_gates_swapped_in_the_engine_are_noticed(options: dict[str, Any]) -> None:
    spec = make_spec([{**options, "size": 17}], features=7)
    right = random_weights(spec, 0)
    rows = random_rows(spec, 100, 0)
    expected = reference.run(spec, right, rows)
    blocks = len(spec.layers[0].gates)
    for one in range(blocks):
        for other in range(one + 1, blocks):
            order = list(range(blocks))
            order[one], order[other] = other, one
            wrong = dict(right)
            for name in ("weight_input", "weight_recurrent", "bias"):
                parts = right[f"layers.0.{name}"].chunk(blocks)
                wrong[f"layers.0.{name}"] = torch.cat([parts[number] for number in order])
            (out,) = load(make_bundle(spec, wrong), family=families(1)[-1]).run_batch([rows])
            assert reference.error(out, expected) > MISTAKE_SHOWS, order

"""A failing batch, a carry that overflows and a recycled slot change nobody else's bits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import numpy as np
import pytest
import torch

from conveyor_models import ModelSpec
from conveyor_server.core import TraceMode
from conveyor_server.engine import memories
from conveyor_server.engine.port import Done, Work
from conveyor_server.engine.products import ProductFamily
from conveyor_server.engine.runner import ModelRunner
from conveyor_server.errors import DeviceOutOfMemory, EngineFailed, SessionQuarantined
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

SPEC = make_spec([17, (33, 9)], features=3, head=5, activation="softmax")
STACKS: Final[dict[str, ModelSpec]] = {
    "lstm": SPEC,
    "peepholes and coupled": make_spec(
        [
            {"size": 17, "peepholes": ["input", "forget", "output"], "initial_state": True},
            {"size": 9, "coupled": True, "clip": 1.0},
        ],
        features=3,
    ),
    "gru and rnn": make_spec(
        [
            {"cell": "gru", "size": 33, "reset": "before"},
            {"cell": "gru", "size": 5},
            {"cell": "rnn", "size": 17, "nonlinearity": "relu"},
        ],
        features=3,
        head=2,
    ),
    "attention": make_spec(
        [{"cell": "gru", "size": 17}, 9],
        features=3,
        attention={"memory_size": 5, "size": 7, "gate": True, "head": True},
        head=4,
    ),
}
every_stack = pytest.mark.parametrize("spec", STACKS.values(), ids=STACKS.keys())


def _loaded(family: ProductFamily | None = None, slots: int = 16, spec: ModelSpec = SPEC) -> Loaded:
    return load(make_bundle(spec, random_weights(spec, 0)), family=family, slots=slots)


def _works(loaded: Loaded, slots: list[int], lengths: list[int]) -> list[Work]:
    """Memories of different lengths, a new one for each work."""
    spec = loaded.spec
    return [
        Work(
            slot,
            length,
            random_rows(spec, length, slot).tobytes(),
            length,
            0 if spec.attention is None else loaded.add_memory(random_memory(spec, 7 * slot, slot)),
            TraceMode.FULL if slot % 2 else TraceMode.NONE,
        )
        for slot, length in zip(slots, lengths, strict=True)
    ]


def _raise(error: Exception) -> Callable[..., Any]:
    def fail(*_: object, **__: object) -> Any:
        raise error

    return fail


@every_stack
@pytest.mark.parametrize("lengths", [[1, 1, 1], [3, 1, 2]])
@pytest.mark.parametrize(
    "part", ["_tap", "_inputs", "_run_layers", "_outputs", "_finite", "_split", "_add_traces"]
)
@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (RuntimeError("a kernel failed"), EngineFailed),
        (torch.OutOfMemoryError("no memory"), DeviceOutOfMemory),
    ],
)
def test_a_batch_that_fails_changes_no_carry(
    spec: ModelSpec,
    part: str,
    error: Exception,
    expected: type[Exception],
    lengths: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    loaded = _loaded(spec=spec)
    slots = [loaded.acquire() for _ in lengths]
    loaded.engine.run(loaded.key, _works(loaded, slots, [2] * len(slots)))
    before = [loaded.engine.read(loaded.key, slot) for slot in slots]
    works = _works(loaded, slots, lengths)
    with monkeypatch.context() as patch:
        patch.setattr(ModelRunner, part, _raise(error))
        with pytest.raises(expected):
            loaded.engine.run(loaded.key, works)
    assert [loaded.engine.read(loaded.key, slot) for slot in slots] == before
    control = _loaded(spec=spec)
    again = [control.acquire() for _ in lengths]
    control.engine.run(control.key, _works(control, again, [2] * len(again)))
    assert loaded.engine.run(loaded.key, works) == control.engine.run(
        control.key, _works(control, again, lengths)
    )


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (RuntimeError("a kernel failed"), EngineFailed),
        (torch.OutOfMemoryError("no memory"), DeviceOutOfMemory),
    ],
)
def test_a_memory_that_cannot_be_taken_changes_nothing(
    error: Exception, expected: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = _loaded(spec=STACKS["attention"])
    rows = random_memory(loaded.spec, 3, 0)
    first = loaded.add_memory(rows)
    with monkeypatch.context() as patch:
        patch.setattr(memories, "HeldMemory", _raise(error))
        with pytest.raises(expected):
            loaded.add_memory(rows)
    assert len(loaded.runner.memories) == 1
    loaded.engine.drop_memory(loaded.key, first)
    assert len(loaded.runner.memories) == 0


@every_stack
@pytest.mark.parametrize("family", families(1), ids=lambda family: family.name)
@pytest.mark.parametrize("lengths", [[1] * 9, [4, 1, 3, 9, 2, 9, 1, 5, 3]])
@pytest.mark.parametrize("position", [0, 4, 8])
def test_a_carry_that_turns_non_finite_harms_nobody_else(
    spec: ModelSpec, family: ProductFamily, lengths: list[int], position: int
) -> None:
    healthy = _run_nine(_loaded(family, spec=spec), lengths, position, None)
    values = _loaded(family, spec=spec).runner.pool.carry_bytes // 4
    sizes = [size for layer in spec.carry_shapes for (size,) in layer.values()]
    for first in [sum(sizes[:number]) for number in range(len(sizes))]:  # of h or c of a layer
        carry = np.zeros(values, dtype=np.float32)
        carry[first] = np.nan
        poisoned = _run_nine(_loaded(family, spec=spec), lengths, position, carry.tobytes())
        for number, (expected, found) in enumerate(zip(healthy, poisoned, strict=True)):
            if number == position:
                assert not found[0].finite
                assert found[1] == carry.tobytes()
            else:
                assert found == expected


@pytest.mark.parametrize("family", families(1), ids=lambda family: family.name)
def test_an_h_that_overflows_on_its_way_harms_nobody_else(family: ProductFamily) -> None:
    spec = make_spec([(8, 1), 17], features=1, head=2)
    weights = random_weights(spec, 0)
    for name in ("weight_input", "weight_recurrent", "bias"):
        weights[f"layers.0.{name}"].zero_()
    weights["layers.0.weight_input"][16:24] = 0.01  # the candidate follows the input
    weights["layers.0.bias"][8:16] = 10  # and nothing is forgotten
    weights["layers.0.weight_projection"][:] = 1e38
    rows = [np.full((6, 1), 0.001 * number, np.float32) for number in range(5)]
    wild = [*rows[:2], np.full((6, 1), 1000, np.float32), *rows[3:]]
    outcomes = list[list[tuple[Done, bytes]]]()
    for inputs in (rows, wild):
        loaded = load(make_bundle(spec, weights), family=family)
        slots = [loaded.acquire() for _ in inputs]
        works = [Work(slot, 6, x.tobytes(), 6) for slot, x in zip(slots, inputs, strict=True)]
        done = loaded.engine.run(loaded.key, works)
        carries = [loaded.engine.read(loaded.key, slot) for slot in slots]
        outcomes.append(list(zip(done, carries, strict=True)))
    calm, poisoned = outcomes
    assert [done.finite for done, _ in poisoned] == [True, True, False, True, True]
    assert not any(poisoned[2][1]), "its carry is as it was"
    for number in (0, 1, 3, 4):
        assert poisoned[number] == calm[number]


def _run_nine(
    loaded: Loaded, lengths: list[int], position: int, carry: bytes | None
) -> list[tuple[Done, bytes]]:
    slots = [loaded.acquire() for _ in lengths]
    if carry is not None:
        loaded.engine.write(loaded.key, slots[position], carry)
    done = loaded.engine.run(loaded.key, _works(loaded, slots, lengths))
    carries = [loaded.engine.read(loaded.key, slot) for slot in slots]
    return list(zip(done, carries, strict=True))


@pytest.mark.parametrize("size", [17, 32])
@pytest.mark.parametrize("family", families(1), ids=lambda family: family.name)
def test_a_relu_that_overflows_is_found_however_its_input_is_cut(
    family: ProductFamily, size: int
) -> None:
    # From the infinity the next steps are finite again, so that the last one tells nothing.
    spec = make_spec([{"cell": "rnn", "nonlinearity": "relu", "size": size}], features=1)
    weights = random_weights(spec, 0)
    weights["layers.0.weight_input"].zero_()[0] = 2e38
    weights["layers.0.weight_recurrent"][:] = -0.1
    weights["layers.0.bias"][:] = 1
    rows = np.array([[0], [3], [0], [0], [0]], np.float32)
    _overflows_at_second_step(load(make_bundle(spec, weights), family=family), rows)


@pytest.mark.parametrize("family", families(1), ids=lambda family: family.name)
def test_a_projection_that_overflows_is_found_however_its_input_is_cut(
    family: ProductFamily,
) -> None:
    spec = make_spec([(32, 1)], features=1)
    weights = {name: torch.zeros_like(each) for name, each in random_weights(spec, 0).items()}
    weights["layers.0.weight_input"][64:96] = 1  # the candidate follows the input
    weights["layers.0.weight_recurrent"][:] = -1  # an infinite h closes all gates
    weights["layers.0.weight_projection"][:] = 1e38
    rows = np.array([[0], [9], [0], [0], [0]], np.float32)
    _overflows_at_second_step(load(make_bundle(spec, weights), family=family), rows)


def _overflows_at_second_step(loaded: Loaded, rows: Rows) -> None:
    slot = loaded.acquire()
    finite: list[bool] = []
    for row in rows[:2]:
        (done,) = loaded.engine.run(loaded.key, [Work(slot, 1, row.tobytes(), 1)])
        finite.append(done.finite)
    assert finite == [True, False]
    for length in range(2, len(rows) + 1):
        slot = loaded.acquire()
        before = loaded.engine.read(loaded.key, slot)
        work = Work(slot, length, rows[:length].tobytes(), length)
        (done,) = loaded.engine.run(loaded.key, [work])
        assert not done.finite, length
        assert loaded.engine.read(loaded.key, slot) == before


def test_a_whole_sequence_that_overflows_is_refused() -> None:
    layer = {"cell": "rnn", "nonlinearity": "relu", "size": 32, "direction": "reverse"}
    spec = make_spec([layer], features=1)
    weights = random_weights(spec, 0)
    weights["layers.0.weight_input"].zero_()[0] = 2e38
    weights["layers.0.weight_recurrent"][:] = -0.1
    weights["layers.0.bias"][:] = 1
    loaded = load(make_bundle(spec, weights))
    rows = np.array([[0], [0], [3], [0]], np.float32)
    with pytest.raises(SessionQuarantined):
        loaded.predict(rows, 2)
    assert np.isfinite(loaded.predict(np.zeros_like(rows), 2)).all()


@pytest.mark.parametrize("direction", ["reverse", "bidirectional"])
def test_a_model_that_random_inputs_drive_to_infinity_is_loaded(direction: str) -> None:
    layer = {"cell": "rnn", "nonlinearity": "relu", "size": 32, "direction": direction}
    spec = make_spec([layer], features=1)
    weights = random_weights(spec, 0)
    for prefix in spec.layers[0].directions:
        weights[f"layers.0.{prefix}weight_recurrent"].fill_(1e10)
        weights[f"layers.0.{prefix}bias"].zero_()
    loaded = load(make_bundle(spec, weights))  # the probe overflows
    with pytest.raises(SessionQuarantined):
        loaded.predict(random_rows(spec, 9, 0))
    assert np.isfinite(loaded.predict(np.zeros((3, 1), np.float32))).all()


def test_large_carries_whose_sum_overflows_are_kept() -> None:
    loaded = _loaded()
    slots = [loaded.acquire() for _ in range(4)]
    for slot in slots[:2]:
        loaded.engine.write(loaded.key, slot, np.full(76, 3e38, dtype=np.float32).tobytes())
    before = [loaded.engine.read(loaded.key, slot) for slot in slots]
    done = loaded.engine.run(loaded.key, _works(loaded, slots, [1] * 4))
    assert all(each.finite for each in done)
    assert all(
        loaded.engine.read(loaded.key, slot) != carry
        for slot, carry in zip(slots, before, strict=True)
    )


@every_stack
def test_a_slot_is_scrubbed_before_the_next_one_gets_it(spec: ModelSpec) -> None:
    loaded = _loaded(slots=1, spec=spec)
    first = loaded.acquire()
    initial = loaded.engine.read(loaded.key, first)
    assert any(initial) == any(layer.initial_state for layer in spec.layers)
    memory = 0 if spec.attention is None else loaded.add_memory(random_memory(spec, 3, 0))
    fresh = loaded.run(first, random_rows(spec, 5, 0), memory)
    loaded.engine.release(loaded.key, first)
    assert not any(part[first].any() for part in loaded.runner.pool.parts)
    second = loaded.acquire()
    assert second == first
    assert loaded.engine.read(loaded.key, second) == initial
    assert np.array_equal(loaded.run(second, random_rows(spec, 5, 0), memory), fresh)
    loaded.engine.reset(loaded.key, second)
    assert loaded.engine.read(loaded.key, second) == initial
    assert loaded.engine.acquire(loaded.key) is None


@every_stack
def test_padding_columns_stay_zero_and_the_dummy_slot_too(spec: ModelSpec) -> None:
    loaded = _loaded(spec=spec)
    slots = [loaded.acquire() for _ in range(5)]
    for lengths in ([1] * 5, [3, 1, 4, 1, 5]):
        loaded.engine.run(loaded.key, _works(loaded, slots, lengths))
    sizes = [size for layer in spec.carry_shapes for (size,) in layer.values()]
    for part, size in zip(loaded.runner.pool.parts, sizes, strict=True):
        assert not part[0].any()
        assert not part[:, size:].any()
        assert part[1:6, :size].any()

"""A failing batch, a carry that overflows and a recycled slot change nobody else's bits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from conveyor_server.engine.port import Done, Work
from conveyor_server.engine.products import ProductFamily
from conveyor_server.engine.runner import ModelRunner
from conveyor_server.errors import DeviceOutOfMemory, EngineFailed
from tests.fidelity.networks import (
    Loaded,
    families,
    load,
    make_bundle,
    make_spec,
    random_rows,
    random_weights,
)

SPEC = make_spec([17, (33, 9)], features=3, head=5, activation="softmax")


def _loaded(family: ProductFamily | None = None, slots: int = 16) -> Loaded:
    return load(make_bundle(SPEC, random_weights(SPEC, 0)), family=family, slots=slots)


def _works(slots: list[int], lengths: list[int]) -> list[Work]:
    return [
        Work(slot, length, random_rows(SPEC, length, slot).tobytes(), length)
        for slot, length in zip(slots, lengths, strict=True)
    ]


def _raise(error: Exception) -> Callable[..., Any]:
    def fail(*_: object, **__: object) -> Any:
        raise error

    return fail


@pytest.mark.parametrize("lengths", [[1, 1, 1], [3, 1, 2]])
@pytest.mark.parametrize("part", ["_inputs", "_run_layers", "_outputs", "_finite", "_split"])
@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (RuntimeError("a kernel failed"), EngineFailed),
        (torch.OutOfMemoryError("no memory"), DeviceOutOfMemory),
    ],
)
def test_a_batch_that_fails_changes_no_carry(
    part: str,
    error: Exception,
    expected: type[Exception],
    lengths: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    loaded = _loaded()
    slots = [loaded.acquire() for _ in lengths]
    loaded.engine.run(loaded.key, _works(slots, [2] * len(slots)))
    before = [loaded.engine.read(loaded.key, slot) for slot in slots]
    works = _works(slots, lengths)
    with monkeypatch.context() as patch:
        patch.setattr(ModelRunner, part, _raise(error))
        with pytest.raises(expected):
            loaded.engine.run(loaded.key, works)
    assert [loaded.engine.read(loaded.key, slot) for slot in slots] == before
    control = _loaded()
    again = [control.acquire() for _ in lengths]
    control.engine.run(control.key, _works(again, [2] * len(again)))
    assert loaded.engine.run(loaded.key, works) == control.engine.run(control.key, works)


@pytest.mark.parametrize("family", families(1), ids=lambda family: family.name)
@pytest.mark.parametrize("lengths", [[1] * 9, [4, 1, 3, 9, 2, 9, 1, 5, 3]])
@pytest.mark.parametrize("position", [0, 4, 8])
@pytest.mark.parametrize("part", ["h", "c"])
def test_a_carry_that_turns_non_finite_harms_nobody_else(
    family: ProductFamily, lengths: list[int], position: int, part: str
) -> None:
    healthy, poisoned = _loaded(family), _loaded(family)
    expected = _run_nine(healthy, lengths, position, None)
    done, carries = _run_nine(poisoned, lengths, position, part)
    for number in range(9):
        if number == position:
            assert not done[number].finite
            assert carries[number] == _poisoned_carry(poisoned, part)
        else:
            assert done[number] == expected[0][number]
            assert carries[number] == expected[1][number]


def _poisoned_carry(loaded: Loaded, part: str) -> bytes:
    values = np.zeros(loaded.runner.pool.carry_bytes // 4, dtype=np.float32)
    values[0 if part == "h" else SPEC.layers[0].size] = np.nan  # of the first layer
    return values.tobytes()


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
    loaded: Loaded, lengths: list[int], position: int, part: str | None
) -> tuple[list[Done], list[bytes]]:
    slots = [loaded.acquire() for _ in lengths]
    if part is not None:
        loaded.engine.write(loaded.key, slots[position], _poisoned_carry(loaded, part))
    done = loaded.engine.run(loaded.key, _works(slots, lengths))
    return done, [loaded.engine.read(loaded.key, slot) for slot in slots]


def test_large_carries_whose_sum_overflows_are_kept() -> None:
    loaded = _loaded()
    slots = [loaded.acquire() for _ in range(4)]
    for slot in slots[:2]:
        loaded.engine.write(loaded.key, slot, np.full(76, 3e38, dtype=np.float32).tobytes())
    before = [loaded.engine.read(loaded.key, slot) for slot in slots]
    done = loaded.engine.run(loaded.key, _works(slots, [1] * 4))
    assert all(each.finite for each in done)
    assert all(
        loaded.engine.read(loaded.key, slot) != carry
        for slot, carry in zip(slots, before, strict=True)
    )


def test_a_slot_is_scrubbed_before_the_next_one_gets_it() -> None:
    loaded = _loaded(slots=1)
    first = loaded.acquire()
    fresh = loaded.run(first, random_rows(SPEC, 5, 0))
    loaded.engine.release(loaded.key, first)
    second = loaded.acquire()
    assert second == first
    assert not any(loaded.engine.read(loaded.key, second))
    assert np.array_equal(loaded.run(second, random_rows(SPEC, 5, 0)), fresh)
    assert loaded.engine.acquire(loaded.key) is None


def test_padding_columns_stay_zero_and_the_dummy_slot_too() -> None:
    loaded = _loaded()
    slots = [loaded.acquire() for _ in range(5)]
    for lengths in ([1] * 5, [3, 1, 4, 1, 5]):
        loaded.engine.run(loaded.key, _works(slots, lengths))
    sizes = [size for layer in SPEC.layers for size in (layer.output_size, layer.size)]
    for part, size in zip(loaded.runner.pool.parts, sizes, strict=True):
        assert not part[0].any()
        assert not part[:, size:].any()
        assert part[1:6, :size].any()

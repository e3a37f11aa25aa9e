"""Same bits whatever the batch, the chunking and the slot (see ``same_bits``), and mutants."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import Phase, find, settings
from torch import Tensor

from conveyor_models import load_bundle
from conveyor_server.core import TraceMode
from conveyor_server.engine import attention, packing, probe, trace
from conveyor_server.engine import engine as engine_module
from conveyor_server.engine.attention import Attention
from conveyor_server.engine.engine import SameBitsError, TorchEngine
from conveyor_server.engine.probe import batch_sizes, same_bits, same_bits_in_batches
from conveyor_server.engine.products import BlockedFamily, Product, ProductFamily
from conveyor_server.engine.trace import Tap
from tests.fidelity.cases import FAMILIES
from tests.fidelity.networks import (
    CPU,
    Loaded,
    families,
    load,
    make_bundle,
    make_spec,
    random_memory,
    random_rows,
    random_weights,
)
from tests.fidelity.same_bits import (
    SETTINGS,
    Scenario,
    Turn,
    difference,
    holds,
    holds_in_slices,
    scenarios,
)

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("family", families(1), ids=lambda family: family.name)
def test_bits_depend_on_the_session_alone(family: ProductFamily) -> None:
    holds(lambda: family, examples=120)


@pytest.mark.parametrize(("threads", "examples"), [(2, 20), (3, 6), (4, 6)])
def test_bits_depend_on_the_session_alone_with_threads(threads: int, examples: int) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.fidelity.same_bits", str(threads), str(examples)],
        cwd=ROOT,
        env={**os.environ, "OMP_WAIT_POLICY": "PASSIVE"},  # no spinning where others need the cores
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(f"same bits with {threads} threads") == len(families(threads))


@pytest.mark.parametrize("family", families(1), ids=lambda family: family.name)
def test_whole_sequences_have_the_same_bits_in_any_slices(family: ProductFamily) -> None:
    holds_in_slices(lambda: family, examples=60)


@pytest.mark.parametrize("name", ["letters", "temperature"])
@pytest.mark.parametrize("family", families(1), ids=lambda family: family.name)
def test_a_shipped_model_keeps_its_bits(name: str, family: ProductFamily) -> None:
    bundle = load_bundle(ROOT / "models" / "zoo" / name)
    loaded = load(bundle, family=family, slots=48)
    inputs = [random_rows(bundle.spec, 1 + 7 * (number % 9), number) for number in range(37)]
    together = loaded.run_batch(inputs)
    for rows, out in zip(inputs, together, strict=True):
        assert loaded.run_batch([rows])[0].tobytes() == out.tobytes()
        slot = loaded.acquire()
        steps = [loaded.run(slot, rows[t : t + 1]).tobytes() for t in range(len(rows))]
        assert b"".join(steps) == out.tobytes()
        loaded.engine.release(loaded.key, slot)


def _attentive() -> Loaded:
    spec = make_spec([17], features=3, attention={"memory_size": 5, "size": 40, "gate": True})
    return load(make_bundle(spec, random_weights(spec, 0)), slots=9)


def test_how_many_memories_are_taken_together_is_not_in_the_bits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    loaded = _attentive()
    inputs = [random_rows(loaded.spec, 1 + number % 4, number) for number in range(9)]
    memories = [random_memory(loaded.spec, 20 + 9 * (number % 3), number) for number in range(9)]
    together = loaded.run_works(inputs, memories, TraceMode.FULL)
    for works in (1, 2, 4):
        monkeypatch.setattr(attention, "GROUP_NUMBERS_MAX", works * 64 * 64)
        assert loaded.run_works(inputs, memories, TraceMode.FULL) == together


def test_a_large_memory_is_read_where_it_lies(monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch may have hundreds of them, and a copy of each would double what they take."""
    loaded = _attentive()
    stacked: list[torch.Size] = []
    stack = torch.stack

    def watched(tensors: list[Tensor]) -> Tensor:
        stacked.append(tensors[0].shape)
        return stack(tensors)

    monkeypatch.setattr(torch, "stack", watched)
    monkeypatch.setattr(attention, "GROUP_NUMBERS_MAX", 2 * 32 * 64)
    inputs = [random_rows(loaded.spec, 1, number) for number in range(6)]
    large = [random_memory(loaded.spec, 50, number) for number in range(3)]
    loaded.run_batch(inputs, [*large, *(random_memory(loaded.spec, 32, n) for n in range(3))])
    # Of the small ones two are laid together, and the third is alone.
    assert stacked == [torch.Size((32, 64)), torch.Size((32, 32))]


def test_the_probe_leaves_every_carry_as_it_was() -> None:
    spec = make_spec([17, (33, 9)], features=3)
    loaded = load(make_bundle(spec, random_weights(spec, 0)), slots=4)
    slot = loaded.acquire()
    loaded.run(slot, random_rows(spec, 5, 0))
    before = loaded.engine.read(loaded.key, slot)
    assert same_bits(loaded.runner, spec)
    assert loaded.engine.read(loaded.key, slot) == before
    assert loaded.engine.slots_used(loaded.key) == 1
    loaded.runner.pool.allocator.check()


# --- would a family that breaks the promise be noticed? ---


class ByShape:
    """A product that sums in an order chosen by the number of rows, as a BLAS may."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self._exact = BlockedFamily().product(weight, bias)
        self._backwards = BlockedFamily().product(weight.flip(1), bias)

    def linear(self, x: Tensor) -> Tensor:
        return self._exact.linear(x) if len(x) <= 32 else self._backwards.linear(x.flip(1))

    def accumulate(self, x: Tensor, y: Tensor) -> Tensor:
        if len(x) <= 32:
            return self._exact.accumulate(x, y)
        return self._backwards.accumulate(x.flip(1), y)


class ByShapeFamily:
    name = "by-shape"
    compiled = False
    rows_multiple = 32

    def product(self, weight: Tensor, bias: Tensor | None) -> Product:
        return ByShape(weight, bias)


class Plain:
    """The library's own product, its kernel chosen by the number of rows."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self._weight_t = weight.t()
        self._bias = weight.new_zeros(weight.shape[0]) if bias is None else bias

    def linear(self, x: Tensor) -> Tensor:
        return torch.addmm(self._bias, x, self._weight_t)

    def accumulate(self, x: Tensor, y: Tensor) -> Tensor:
        return torch.addmm(y, x, self._weight_t)


class PlainFamily:
    name = "plain"
    compiled = False
    rows_multiple = 1

    def product(self, weight: Tensor, bias: Tensor | None) -> Product:
        return Plain(weight, bias)


def _skip_unless_products_differ() -> None:
    x, w = torch.randn(64, 100), torch.randn(256, 100)
    product = Plain(w, None)
    if all(torch.equal(product.linear(x)[:n], product.linear(x[:n])) for n in range(1, 64)):
        pytest.skip("on this processor the library's own products do not depend on the rows")


def _skip_unless_remainders_differ() -> None:
    x = torch.randn(64)
    if all(torch.equal(x.sigmoid()[:n], x[:n].sigmoid()) for n in range(1, 64)):
        pytest.skip("on this processor vectors and their remainders are computed alike")


def _counterexample(family: ProductFamily) -> Scenario:
    return find(
        scenarios(),
        lambda scenario: difference(scenario, family) is not None,
        settings=settings(SETTINGS, max_examples=300, phases=[Phase.generate]),
    )


def test_sums_in_another_order_break_the_promise_and_the_property_finds_it() -> None:
    found = _counterexample(ByShapeFamily())
    assert difference(found, BlockedFamily()) is None


def test_a_plain_product_breaks_the_promise_and_the_property_finds_it() -> None:
    _skip_unless_products_differ()
    found = _counterexample(PlainFamily())
    assert difference(found, BlockedFamily()) is None


def test_a_plain_product_is_refused_by_the_probe() -> None:
    _skip_unless_products_differ()
    spec = make_spec([100, 64], features=17, head=33)
    loaded = load(make_bundle(spec, random_weights(spec, 0)), family=PlainFamily())
    assert not same_bits(loaded.runner, spec)


class _FromSomeRows(BlockedFamily):
    """Adds in another order in products of at least so many rows."""

    def __init__(self, rows: int) -> None:
        self.rows = rows

    def product(self, weight: Tensor, bias: Tensor | None) -> Product:
        made = super().product(weight, bias)
        backwards = super().product(weight.flip(1), bias)
        linear = made.linear
        made.linear = lambda x: (  # type: ignore[method-assign]
            linear(x) if len(x) < self.rows else backwards.linear(x.flip(1))
        )
        return made


@pytest.mark.parametrize("attention", [None, {"memory_size": 5, "size": 4}])
@pytest.mark.parametrize("rows", [64, 128, 256])
def test_kernels_for_larger_batches_are_refused_by_the_probe(
    rows: int, attention: dict[str, int] | None
) -> None:
    spec = make_spec([100], features=17, head=33, attention=attention)
    bundle = make_bundle(spec, random_weights(spec, 0))
    loaded = load(bundle, family=_FromSomeRows(rows), slots=256)
    loaded.acquire()
    assert same_bits(loaded.runner, spec)
    assert same_bits_in_batches(loaded.runner, spec, rows // 2)
    assert not same_bits_in_batches(loaded.runner, spec, rows)
    assert loaded.engine.slots_used(loaded.key) == 1
    loaded.runner.pool.allocator.check()
    assert same_bits_in_batches(load(bundle, family=BlockedFamily(), slots=rows).runner, spec, rows)


def test_a_model_is_loaded_with_kernels_that_keep_its_bits_in_the_largest_batch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    spec = make_spec([100], features=17)
    bundle = make_bundle(spec, random_weights(spec, 0))
    monkeypatch.setattr(TorchEngine, "_families", lambda _: [_FromSomeRows(128)])
    TorchEngine(CPU, cpu_threads=1, slots=200, batch_sessions_max=96).prepare(bundle)
    with pytest.raises(SameBitsError):
        TorchEngine(CPU, cpu_threads=1, slots=200, batch_sessions_max=97).prepare(bundle)


@pytest.mark.parametrize(
    ("sessions_max", "sizes"),
    [
        (1, []),
        (30, []),
        (31, [31]),
        (33, [31, 32, 33]),
        (64, [31, 32, 33, 64]),
        (100, [31, 32, 33, 64, 100]),
        (256, [31, 32, 33, 64, 128, 256]),
    ],
)
def test_every_size_at_which_other_kernels_may_come_in_is_probed(
    sessions_max: int, sizes: list[int]
) -> None:
    assert batch_sizes(sessions_max) == sizes


def test_a_probe_that_takes_too_long_says_what_it_left_out(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    spec = make_spec([100], features=17)
    loaded = load(make_bundle(spec, random_weights(spec, 0)), family=_FromSomeRows(64), slots=64)
    monkeypatch.setattr(probe, "BATCHES_SECONDS_MAX", 0.0)
    assert not same_bits_in_batches(loaded.runner, spec, 64), "33 rows are run in any case"
    loaded = load(make_bundle(spec, random_weights(spec, 0)), family=_FromSomeRows(65), slots=128)
    assert same_bits_in_batches(loaded.runner, spec, 128)
    (record,) = caplog.records
    assert record.__dict__["sessions"] == 64


def test_sizes_not_padded_break_the_promise_and_the_property_finds_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _skip_unless_remainders_differ()
    family = families(1)[-1]
    with monkeypatch.context() as patch:
        patch.setattr(packing, "LANE", 1)
        found = _counterexample(family)
    assert difference(found, family) is None


def test_the_property_finds_a_carry_that_is_lost() -> None:
    def forgetful(self: TorchEngine, key: object, slot: int, carry: bytes) -> None:
        pass

    scenario = Scenario(
        make_spec([3], features=2), 0, (4,), ((Turn(0, 2, 2, False),), (Turn(0, 2, 2, True),))
    )
    assert difference(scenario, BlockedFamily()) is None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TorchEngine, "write", forgetful)
        assert difference(scenario, BlockedFamily()) is not None


def test_scores_less_the_batchs_greatest_break_the_promise_and_the_property_finds_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def weigh(self: Attention, query: Tensor, keys: Tensor, absent: Tensor) -> Tensor:
        e = (query[:, None] + keys).sigmoid().mul(self._score).sum(2) + absent
        e = (e - e.amax()).exp()
        return e / e.sum(1, keepdim=True)

    with monkeypatch.context() as patch:
        patch.setattr(Attention, "weigh", weigh)
        found = _counterexample(BlockedFamily())
    assert difference(found, BlockedFamily()) is None


def test_a_trace_that_touches_what_it_sees_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    see = Tap.see

    def touch(self: Tap, **values: Tensor) -> None:
        see(self, **values)
        for value in values.values():
            value.mul_(1.0 + 2.0**-20)

    spec = make_spec([17], features=3)
    loaded = load(make_bundle(spec, random_weights(spec, 0)), family=BlockedFamily())
    with monkeypatch.context() as patch:
        patch.setattr(Tap, "see", touch)
        found = _counterexample(BlockedFamily())
        assert not same_bits(loaded.runner, spec)
    assert same_bits(loaded.runner, spec)
    assert difference(found, BlockedFamily()) is None


def test_a_trace_of_somebody_else_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(trace, "accumulate", lambda counts: [0] * len(counts))
        found = _counterexample(BlockedFamily())
    assert difference(found, BlockedFamily()) is None


def test_a_model_no_family_can_keep_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_module, "same_bits", lambda *_: False)
    spec = make_spec([5], features=2)
    engine = TorchEngine(CPU, cpu_threads=1, slots=8)
    with pytest.raises(SameBitsError, match="fixed-blocks"):
        engine.prepare(make_bundle(spec, random_weights(spec, 0)))


def test_slower_products_are_used_where_the_fast_ones_fail(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    spec = make_spec([5], features=2)
    engine = TorchEngine(CPU, cpu_threads=1, slots=8)
    monkeypatch.setattr(TorchEngine, "_families", lambda _: [ByShapeFamily(), BlockedFamily()])
    monkeypatch.setattr(
        engine_module, "same_bits", lambda runner, _: runner.family.name != ByShapeFamily.name
    )
    prepared = engine.prepare(make_bundle(spec, random_weights(spec, 0)))
    assert prepared.family.name == BlockedFamily.name


@pytest.mark.parametrize("outputs", [1, 2, 3, 5, 6, 7, 9, 31, 33])
@pytest.mark.parametrize("family", families(1), ids=lambda family: family.name)
def test_a_row_of_a_head_does_not_depend_on_its_place(family: ProductFamily, outputs: int) -> None:
    # A product with 5 to 7 columns gives a row other bits in another place of the same block.
    spec = make_spec([7], features=3, head=outputs)
    loaded = load(make_bundle(spec, random_weights(spec, 0)), family=family, slots=64)
    rows = random_rows(spec, 1, 0)
    together = loaded.run_batch([rows] * 40)
    assert len({out.tobytes() for out in together}) == 1


@pytest.mark.parametrize("options", FAMILIES.values(), ids=FAMILIES.keys())
def test_one_session_in_256_keeps_its_bits(options: dict[str, object]) -> None:
    spec = make_spec([{**options, "size": 65}], features=9)
    loaded = load(make_bundle(spec, random_weights(spec, 0)), slots=256)
    inputs = [random_rows(spec, 3, number) for number in range(256)]
    together = loaded.run_batch(inputs)
    for number in (0, 1, 31, 32, 100, 255):
        assert np.array_equal(loaded.run_batch([inputs[number]])[0], together[number])

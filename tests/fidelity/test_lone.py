"""A single row's own product gives the bits that the library's gives, whatever the sizes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from conveyor_server.engine import lone
from conveyor_server.engine.lone import CompiledFamily
from tests.fidelity.same_bits import SETTINGS

pytestmark = pytest.mark.skipif(
    not CompiledFamily.available(), reason="there are no prepacked products here"
)


def _operands(size: int, out: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(out, size, generator=generator)
    bias = torch.randn(out, generator=generator)
    return weight, bias, torch.randn(5, size, generator=generator)


@SETTINGS
@given(st.integers(1, 1400), st.integers(1, 10).map(lambda blocks: 32 * blocks), st.booleans())
def test_one_row_has_the_bits_it_has_among_others(size: int, out: int, biased: bool) -> None:
    weight, bias, rows = _operands(size, out, size)
    product = CompiledFamily(1).product(weight, bias if biased else None)
    together = product.linear(rows)
    added = product.accumulate(rows, together)
    for number in range(len(rows)):
        alone = product.linear(rows[number : number + 1])
        assert alone.equal(together[number : number + 1])
        assert product.accumulate(rows[number : number + 1], alone).equal(added[number][None])


@pytest.mark.parametrize("size", [1, 5, 100, 512, 513, 1024, 1030, 2048, 4096])
def test_the_librarys_order_of_adding_is_found(size: int) -> None:
    weight, bias, _ = _operands(size, 128, 0)
    assert CompiledFamily(1).product(weight, bias).has_lone_kernel


def test_where_it_is_not_found_one_row_is_computed_as_two(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lone, "_CHAINS", (3,))
    weight, bias, rows = _operands(200, 64, 0)
    product = CompiledFamily(1).product(weight, bias)
    assert not product.has_lone_kernel
    together = product.linear(rows)
    assert product.linear(rows[:1]).equal(together[:1])
    assert product.accumulate(rows[:1], together[:1]).equal(product.accumulate(rows, together)[:1])


def test_a_large_weight_is_not_packed_twice() -> None:
    weight = torch.zeros(2048, lone.WEIGHT_BYTES_MAX // 4 // 2048 + 1)
    assert not CompiledFamily(1).product(weight, None).has_lone_kernel

"""Arithmetic with lengths that are only known later, held to arithmetic with numbers."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conveyor_models import UnsupportedModuleError
from conveyor_models.importers.onnx_shapes import (
    ARITHMETIC,
    ENDLESS,
    Length,
    larger,
    same,
    smaller,
)

T, B = Length.unknown("t"), Length.unknown("b")


def value(length: Length, t: int, b: int) -> int:
    names = {"t": t, "b": b}
    total = 0
    for factors, number in length.terms:
        for name in factors:
            number *= names[name]  # noqa: PLW2901
        total += number
    return total


lengths = st.recursive(
    st.sampled_from([T, B]) | st.integers(-3, 5).map(Length.of),
    lambda inner: st.tuples(st.sampled_from(["Add", "Sub", "Mul"]), inner, inner).map(
        lambda each: ARITHMETIC[each[0]](each[1], each[2])
    ),
    max_leaves=4,
)


@given(first=lengths, second=lengths, t=st.integers(1, 9), b=st.integers(1, 9))
def test_what_is_known_before_is_so_whatever_the_lengths_are(
    first: Length, second: Length, t: int, b: int
) -> None:
    one, other = value(first, t, b), value(second, t, b)
    numbers = {"Add": one + other, "Sub": one - other, "Mul": one * other}
    for op, expected in numbers.items():
        found = ARITHMETIC[op](first, second)
        assert found is not None
        assert value(found, t, b) == expected
    for function, expected in ((larger, max(one, other)), (smaller, min(one, other))):
        found = function(first, second)
        assert found is None or value(found, t, b) == expected
    equal = same(first, second)
    assert equal is None or equal == (one == other)
    if other:
        quotient = first.over(second)
        rounded = abs(one) // abs(other) * (-1 if (one < 0) != (other < 0) else 1)
        assert quotient is None or value(quotient, t, b) == rounded
    assert first.known is None or first.known == one


def test_lengths_that_are_the_same_are_equal() -> None:
    assert T.plus(B) == B.plus(T)
    assert T.times(Length.of(24)).over(Length.of(24)) == T
    assert T.times(B).over(B) == T
    assert T.plus(Length.of(1)).minus(Length.of(1)) == T
    assert T.over(B) is None
    assert T.over(Length.of(2)) is None
    assert smaller(T, Length.of(ENDLESS)) == T
    assert larger(T, Length.of(1)) == T
    assert larger(T, Length.of(2)) is None


def squared(length: Length, times: int) -> Length:
    for _ in range(times):
        length = length.times(length)
    return length


def test_arithmetic_is_bounded() -> None:
    with pytest.raises(UnsupportedModuleError, match="8 factors"):
        squared(T, 60)
    with pytest.raises(UnsupportedModuleError, match="64 bits"):
        squared(Length.of(3), 60)

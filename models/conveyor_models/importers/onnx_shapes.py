"""Shapes in an ONNX graph, and arithmetic with them.

Exporters compute shapes while the graph runs: the length of the batch times the units, or one
length put between two others. A length that the file does not state has a name, and what is
computed from it stays a sum of products of such names, so that two lengths are equal if and only if
they are equal whatever the graph is given.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Final, TypeAlias

from conveyor_models.importers.common import refused

TERMS_MAX: Final = 8
FACTORS_MAX: Final = 8
NUMBER_MAX: Final = 2**64
ENDLESS: Final = 2**31 - 1
"""No axis is longer; exporters write it and what is beyond for "to the end"."""

Term: TypeAlias = tuple[tuple[str, ...], int]


@dataclass(frozen=True, slots=True)
class Length:
    """A sum of products of lengths that are known when the graph runs, and of whole numbers."""

    terms: tuple[Term, ...] = ()

    @staticmethod
    def of(number: int) -> Length:
        """A length that the file states."""
        return _length({(): number})

    @staticmethod
    def unknown(name: str) -> Length:
        """A length that is known when the graph runs; it is at least 1."""
        return Length((((name,), 1),))

    def plus(self, other: Length) -> Length:
        """Their sum."""
        found = dict(self.terms)
        for names, number in other.terms:
            found[names] = found.get(names, 0) + number
        return _length(found)

    def minus(self, other: Length) -> Length:
        """Their difference."""
        return self.plus(other.times(Length.of(-1)))

    def times(self, other: Length) -> Length:
        """Their product."""
        found: dict[tuple[str, ...], int] = {}
        for first, number in self.terms:
            for second, factor in other.terms:
                names = tuple(sorted(first + second))
                found[names] = found.get(names, 0) + number * factor
        return _length(found)

    def over(self, other: Length) -> Length | None:
        """Their quotient, if it is a length whatever the graph is given."""
        if self.known is not None and other.known:
            # ONNX rounds towards zero.
            sign = -1 if (self.known < 0) != (other.known < 0) else 1
            return Length.of(sign * (abs(self.known) // abs(other.known)))
        if len(other.terms) != 1:
            return None
        ((names, divisor),) = other.terms
        found: dict[tuple[str, ...], int] = {}
        for first, number in self.terms:
            left = list(first)
            for name in names:
                if name not in left:
                    return None
                left.remove(name)
            if number % divisor:
                return None
            found[tuple(left)] = number // divisor
        return _length(found)

    @property
    def known(self) -> int | None:
        """Its value, if the file says it."""
        if not self.terms:
            return 0
        (names, number), *more = self.terms
        return None if names or more else number

    @property
    def at_least(self) -> int | None:
        """The least that it can be, where that is plain to see."""
        if any(number < 0 for names, number in self.terms if names):
            return None
        return sum(number for _, number in self.terms)


def _length(found: Mapping[tuple[str, ...], int]) -> Length:
    terms = tuple(sorted((names, number) for names, number in found.items() if number))
    if (
        len(terms) > TERMS_MAX
        or any(len(names) > FACTORS_MAX for names, _ in terms)
        or any(abs(number) > NUMBER_MAX for _, number in terms)
    ):
        raise refused(
            "shapes",
            f"a length of more than {TERMS_MAX} terms, {FACTORS_MAX} factors or 64 bits",
        )
    return Length(terms)


ONE: Final = Length.of(1)


def product(lengths: Sequence[Length]) -> Length:
    """All of them multiplied."""
    return reduce(Length.times, lengths, ONE)


def larger(first: Length, second: Length) -> Length | None:
    """The larger of two, where it is always the same one."""
    for one, other in ((first, second), (second, first)):
        rest = one.minus(other).at_least
        if rest is not None and rest >= 0:
            return one
        if one.known is not None and one.known >= ENDLESS:
            return one
    return None


def smaller(first: Length, second: Length) -> Length | None:
    """The smaller of two, where it is always the same one."""
    found = larger(first, second)
    if found is None:
        return None
    return second if found is first else first


def same(first: Length, second: Length) -> bool | None:
    """Whether they are equal; None if that depends on what the graph is given."""
    if first == second:
        return True
    apart = [one.minus(other).at_least for one, other in ((first, second), (second, first))]
    return False if any(each is not None and each > 0 for each in apart) else None


ARITHMETIC: Final[Mapping[str, Callable[[Length, Length], Length | None]]] = {
    "Add": Length.plus,
    "Div": Length.over,
    "Max": larger,
    "Min": smaller,
    "Mul": Length.times,
    "Sub": Length.minus,
}
"""By operator; None where the result depends on what the graph is given."""


def whole_sizes(lengths: Sequence[Length]) -> list[int] | None:
    """All of them as numbers, if the file states all."""
    found = [each.known for each in lengths]
    plain = [each for each in found if each is not None]
    return plain if len(plain) == len(found) else None

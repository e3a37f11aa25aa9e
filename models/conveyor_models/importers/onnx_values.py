"""What the wires of an ONNX graph carry, as far as an importer has to know it.

A graph is not run but followed. A wire carries a known array; or a shape, some of whose lengths are
only known when it runs; or one array repeated along such lengths (an initial state made of zeros);
or what flows from the input to the output, of which it is known which axis is which; or the state
of a recurrent node.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from conveyor_models.importers.common import ImportedLayer, refused
from conveyor_models.spec import WEIGHT_VALUES_MAX

Array: TypeAlias = np.ndarray[Any, Any]


@dataclass(frozen=True, slots=True)
class Length:
    """A number times lengths that are known when the graph runs."""

    number: int = 1
    unknown: tuple[str, ...] = ()

    def times(self, other: Length) -> Length:
        """Their product."""
        return Length(self.number * other.number, tuple(sorted(self.unknown + other.unknown)))

    @property
    def known(self) -> int | None:
        """Its value, if the file says it."""
        return None if self.unknown else self.number


ONE = Length()


def product(lengths: Sequence[Length]) -> Length:
    """All of them multiplied."""
    total = ONE
    for each in lengths:
        total = total.times(each)
    return total


@dataclass(frozen=True, slots=True, eq=False)
class Known:
    """An array that the file holds."""

    array: Array


@dataclass(frozen=True, slots=True)
class Lengths:
    """A shape, or one length of it."""

    of: tuple[Length, ...]
    scalar: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class Repeated:
    """An array whose axes of length 1 are repeated."""

    array: Array
    lengths: tuple[Length, ...]


@dataclass(frozen=True, slots=True)
class Atom:
    """An axis that is never cut: one of the graph's input, the directions, or the units."""

    name: str
    length: Length


Axis: TypeAlias = tuple[Atom, ...]
"""An axis as a graph has it at some point: several merged, or none where its length is 1."""


def axis_length(axis: Axis) -> Length:
    """Its length."""
    return product([atom.length for atom in axis])


@dataclass(frozen=True, slots=True, eq=False)
class Stage:
    """How far on the way from input to output."""

    kind: str
    """input, embedding, layer, matrix, bias or activation"""
    node: str
    before: Stage | None = None
    content: ImportedLayer | Array | str | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Flow:
    """What goes from the input to the output."""

    stage: Stage
    axes: tuple[Axis, ...]
    features: Axis
    """What makes up one step's row, in the order of the bundle."""
    time: Atom | None = None
    """Known from the first recurrent node on."""
    tokens: bool = False
    last: bool = False
    """Whether it is only the last step's."""
    way: int | None = None
    """One direction's part of a bidirectional node."""

    @property
    def lengths(self) -> tuple[Length, ...]:
        """Of its axes."""
        return tuple(axis_length(axis) for axis in self.axes)


@dataclass(frozen=True, slots=True, eq=False)
class Carried:
    """State of a recurrent node, which is a session's carry: into it or out of it."""

    node: str
    rows: tuple[Flow | None, ...] = ()
    """Along the first axis: the last step's h of a layer that runs forward, or something else."""


Value: TypeAlias = Known | Lengths | Repeated | Flow | Carried


def known(node: str, what: str, value: Value | None) -> Array:
    """The array of an input that has to be one."""
    if not isinstance(value, Known):
        raise refused(node, f"{what} is not a constant")
    return value.array


def lengths_of(node: str, what: str, value: Value | None) -> tuple[Length, ...]:
    """An input that is a shape; a length of -1 or 0 keeps its meaning to the operator."""
    if isinstance(value, Lengths):
        return value.of
    array = known(node, what, value)
    if array.dtype.kind not in "iu" or array.ndim > 1 or array.size > 64:
        raise refused(node, f"{what} is not a shape")
    return tuple(Length(int(each)) for each in np.atleast_1d(array))


def integers(node: str, what: str, value: Value | None) -> list[int]:
    """An input of few whole numbers."""
    found = [each.known for each in lengths_of(node, what, value)]
    if any(each is None for each in found):
        raise refused(node, f"{what} is not a constant")
    return [each for each in found if each is not None]


def bounded(node: str, shape: Sequence[int]) -> None:
    """Refuses an array that is larger than any weight may be, before it is made."""
    if any(each < 0 for each in shape) or math.prod(shape) > WEIGHT_VALUES_MAX:
        raise refused(node, f"makes an array of shape {list(shape)[:8]}")


def axis_number(node: str, axis: int, rank: int) -> int:
    """An axis counted from 0."""
    if not -rank <= axis < rank:
        raise refused(node, f"axis {axis}, of {rank}")
    return axis % rank


def regrouped(node: str, flow: Flow, target: Sequence[Length], copies: bool) -> tuple[Axis, ...]:
    """The axes after a Reshape, which may only merge, part and drop what it had merged.

    Args:
        node: its name.
        flow: what is reshaped.
        target: the lengths; one may be -1.
        copies: whether a 0 stands for the length at the same place.
    """
    wanted = list(target)
    for place, length in enumerate(wanted):
        if length == Length(0):
            if not copies or place >= len(flow.axes):
                raise refused(node, "reshapes to a length of 0")
            wanted[place] = flow.lengths[place]
    open_places = [place for place, length in enumerate(wanted) if length == Length(-1)]
    if len(open_places) > 1:
        raise refused(node, "reshapes to two open lengths")
    atoms = [atom for axis in flow.axes for atom in axis]
    if not open_places:
        front = [_take(node, atoms, length, 0) for length in wanted]
        if any(atom.length != ONE for atom in atoms):
            raise refused(node, "reshapes to something that is not its axes merged or parted")
        return tuple(front)
    at = open_places[0]
    front = [_take(node, atoms, length, 0) for length in wanted[:at]]
    back = [_take(node, atoms, length, -1) for length in reversed(wanted[at + 1 :])]
    return (*front, tuple(atoms), *reversed(back))


def _take(node: str, atoms: list[Atom], length: Length, end: int) -> Axis:
    """Atoms from one end that come to the length; they are taken out of the list."""
    taken: list[Atom] = []
    if length == ONE and (not atoms or atoms[end].length != ONE):
        return ()
    while not taken or product([atom.length for atom in taken]) != length:
        if not atoms:
            raise refused(node, "reshapes to something that is not its axes merged or parted")
        taken.append(atoms.pop(end))
    return tuple(taken if end == 0 else reversed(taken))

"""What the wires of an ONNX graph carry, as far as an importer has to know it.

A graph is not run but followed. A wire carries a known array; a shape, some of whose lengths are
only known when it runs; one array or one length repeated along such lengths (an initial state of
zeros); the rows that flow from an input to the outputs; entries of inputs and of final states
that were moved and not changed; or something that is refused as soon as it matters.
"""

from __future__ import annotations

from collections.abc import Sequence as Several
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np

from conveyor_models.errors import UnsupportedModuleError
from conveyor_models.importers.common import ImportedLayer, refused
from conveyor_models.importers.folding import Affine
from conveyor_models.importers.onnx_shapes import ONE, Length, product
from conveyor_models.tables import SIZE_MAX

Array: TypeAlias = np.ndarray[Any, Any]
ROW_MAX = 64 * SIZE_MAX
"""Numbers in a row of what flows: several layers, both ways, side by side."""
LENGTHS_MAX = 64
"""Of a shape: numpy's arrays have no more axes."""


@dataclass(frozen=True, slots=True, eq=False)
class Known:
    """An array that the file holds, or that follows from those it holds."""

    array: Array


@dataclass(frozen=True, slots=True)
class Lengths:
    """A shape, or one length of it."""

    of: tuple[Length, ...]
    scalar: bool = False


@dataclass(frozen=True, slots=True)
class Counts:
    """One length over and over: the number of steps, for every sequence of a batch."""

    length: Length
    lengths: tuple[Length, ...]


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
"""An axis as a graph has it at some point: several merged, or none where its length is 1.

An axis of length 1 may stand anywhere, so no atom in an axis has that length."""

Row: TypeAlias = int | Literal["ends"]
"""One step's row, or where each direction of a layer ends.

A step is counted from 0 where the file states how many there are, or where it takes the step by its
number from the beginning; from the end, where the last is -1, otherwise."""


def axis_length(axis: Axis) -> Length:
    """Its length."""
    return product([atom.length for atom in axis])


@dataclass(frozen=True, slots=True, eq=False)
class Stage:
    """A part of the bundle that was passed on the way from an input to the outputs."""

    kind: Literal["input", "embedding", "layer"]
    node: str
    before: Stage | None = None
    affine: Affine | None = None
    """What the rows pass between `before` and this."""
    content: str | Array | tuple[ImportedLayer, ...] = ""
    """An input's type, an embedding's table, a layer for each direction with forward first."""

    @property
    def layers(self) -> tuple[ImportedLayer, ...]:
        """A layer for each direction; none of what is no layer."""
        return self.content if isinstance(self.content, tuple) else ()

    @property
    def names(self) -> frozenset[str]:
        """The recurrent nodes that it is."""
        return frozenset(layer.name for layer in self.layers)

    @property
    def origin(self) -> str:
        """The graph's input that the rows come from."""
        stage = self
        while stage.before is not None:
            stage = stage.before
        return stage.node


@dataclass(frozen=True, slots=True, eq=False)
class Flow:
    """The rows that go from an input to the outputs."""

    stage: Stage
    axes: tuple[Axis, ...]
    features: Axis
    """What makes up one step's row; the order of the atoms is that of its numbers."""
    affine: Affine | None = None
    """What the rows have passed since the stage."""
    maps: int = 0
    """How many maps that is."""
    biased: bool = False
    """Whether one of them adds something."""
    activation: str | None = None
    time: Atom | None = None
    """Known from the first recurrent node on."""
    flipped: frozenset[Atom] = frozenset()
    """Axes that run from their end."""
    tokens: bool = False
    row: Row | None = None
    """The one step's row that is left; None where every step's is."""
    steps: int | None = None
    """How many steps the graph is written out for, one by one; None where it is not."""
    final: bool = False
    """Whether it is the state that a recurrent node ended with, and nothing else."""
    computed: str | None = None
    """The first node that changed a number since the stage."""

    @property
    def lengths(self) -> tuple[Length, ...]:
        """Of its axes."""
        return tuple(axis_length(axis) for axis in self.axes)

    @property
    def size(self) -> int | None:
        """Numbers in a row, if the file says it.

        Raises:
            UnsupportedModuleError: they are more than any layers of a bundle have side by side.
        """
        found = axis_length(self.features).known
        if found is not None and found > ROW_MAX:
            raise refused(self.stage.node, f"rows of {found} numbers, expected at most {ROW_MAX}")
        return found

    @property
    def raw(self) -> bool:
        """Whether it is an input of which nothing but places has changed."""
        return self.stage.kind == "input" and self.computed is None and self.activation is None


@dataclass(frozen=True, slots=True, eq=False)
class Stacked:
    """Final states of several layers or directions laid together along the first axes."""

    lead: tuple[int, ...]
    parts: tuple[Flow, ...]

    @property
    def lengths(self) -> tuple[Length, ...]:
        """Of its axes."""
        return (*map(Length.of, self.lead), *self.parts[0].lengths)


@dataclass(frozen=True, slots=True, eq=False)
class Moved:
    """Entries of inputs and of final states, put elsewhere and not changed."""

    inputs: frozenset[str] = frozenset()
    states: frozenset[str] = frozenset()
    """The recurrent nodes that ended with them."""
    why: UnsupportedModuleError | None = None
    """Why it is not the rows that flow."""


@dataclass(frozen=True, slots=True, eq=False)
class Sequence:
    """What flows, taken apart along one axis."""

    flow: Flow
    axis: int
    drops: bool


@dataclass(frozen=True, slots=True, eq=False)
class Start:
    """A map of a constant state: what a first step adds to its row's map."""

    value: Known | Repeated
    state: Array
    """[H]"""
    affine: Affine


@dataclass(frozen=True, slots=True, eq=False)
class Mixed:
    """A map of one step's row and a map of the state before it, added."""

    parts: tuple[Flow, Flow | Start]
    why: UnsupportedModuleError | None = None
    """Why that is no map of one row."""


@dataclass(frozen=True, slots=True, eq=False)
class Term:
    """A part of a cell that is written out; `onnx_unrolled` knows what it may be a part of."""

    op: str
    node: str
    args: tuple[Value, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Refused:
    """What no bundle computes; an error once an output or a recurrent node depends on it."""

    error: UnsupportedModuleError


Value: TypeAlias = (
    Known
    | Lengths
    | Counts
    | Repeated
    | Flow
    | Stacked
    | Moved
    | Sequence
    | Start
    | Mixed
    | Term
    | Refused
)


def sources_of(value: Value) -> Moved | None:
    """Where the entries of a value come from, if they are those of inputs and final states."""
    match value:
        case Moved():
            return value
        case Flow() if value.raw:
            return Moved(inputs=frozenset({value.stage.node}))
        case Flow() if value.final:
            return Moved(states=value.stage.names)
        case Stacked():
            return Moved(states=frozenset[str]().union(*(part.stage.names for part in value.parts)))
        case _:
            return None


def known(node: str, what: str, value: Value | None) -> Array:
    """The array of an input that has to be one."""
    if isinstance(value, Lengths) and all(each.known is not None for each in value.of):
        found = np.array([each.known for each in value.of], np.int64)
        return found[0] if value.scalar else found
    if not isinstance(value, Known):
        raise refused(node, f"{what} is not a constant")
    return value.array


def lengths_of(node: str, what: str, value: Value | None) -> tuple[Length, ...]:
    """An input that is a shape; a length of -1 or 0 keeps its meaning to the operator."""
    if isinstance(value, Lengths):
        return value.of
    array = known(node, what, value)
    if array.dtype.kind not in "iu" or array.ndim > 1 or array.size > LENGTHS_MAX:
        raise refused(node, f"{what} is not a shape")
    return tuple(Length.of(int(each)) for each in np.atleast_1d(array))


def integers(node: str, what: str, value: Value | None) -> list[int]:
    """An input of few whole numbers."""
    found = [each.known for each in lengths_of(node, what, value)]
    if any(each is None for each in found):
        raise refused(node, f"{what} is not a constant")
    return [each for each in found if each is not None]


def last_row(time: Atom | None) -> int:
    """The last step's."""
    length = None if time is None else time.length.known
    return -1 if length is None else length - 1


def axis_number(node: str, axis: int, rank: int) -> int:
    """An axis counted from 0."""
    if not -rank <= axis < rank:
        raise refused(node, f"axis {axis}, of {rank}")
    return axis % rank


def axis_of(atom: Atom) -> Axis:
    """The axis that is this atom; one of length 1 has none, for it may stand anywhere."""
    return () if atom.length == ONE else (atom,)


def regrouped(node: str, flow: Flow, target: Several[Length], copies: bool) -> tuple[Axis, ...]:
    """The axes after a Reshape, which may only merge, part and drop what it had merged.

    Args:
        node: its name.
        flow: what is reshaped.
        target: the lengths; one may be -1.
        copies: whether a 0 stands for the length at the same place.
    """
    wanted = list(target)
    for place, length in enumerate(wanted):
        if length == Length.of(0):
            if not copies or place >= len(flow.axes):
                raise refused(node, "reshapes to a length of 0")
            wanted[place] = flow.lengths[place]
    open_places = [place for place, length in enumerate(wanted) if length == Length.of(-1)]
    if len(open_places) > 1:
        raise refused(node, "reshapes to two open lengths")
    atoms = [atom for axis in flow.axes for atom in axis]
    if not open_places:
        front = [_take(node, atoms, length, 0) for length in wanted]
        if atoms:
            raise refused(node, "reshapes to something that is not its axes merged or parted")
        return tuple(front)
    at = open_places[0]
    front = [_take(node, atoms, length, 0) for length in wanted[:at]]
    back = [_take(node, atoms, length, -1) for length in reversed(wanted[at + 1 :])]
    return (*front, tuple(atoms), *reversed(back))


def _take(node: str, atoms: list[Atom], length: Length, end: int) -> Axis:
    """Atoms from one end that come to the length; they are taken out of the list."""
    taken: list[Atom] = []
    while product([atom.length for atom in taken]) != length:
        if not atoms:
            raise refused(node, "reshapes to something that is not its axes merged or parted")
        taken.append(atoms.pop(end))
    return tuple(taken if end == 0 else reversed(taken))

"""The operators of ONNX that move numbers about and change none.

Exporters surround a recurrent node with them: axes exchanged and dropped, initial states of zeros
made to the measure of the batch, state of several layers laid together and cut apart.
Each function takes the node and its inputs and returns its outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np

from conveyor_models.importers.common import refused
from conveyor_models.importers.onnx_values import (
    ONE,
    Array,
    Carried,
    Flow,
    Known,
    Length,
    Lengths,
    Repeated,
    Value,
    axis_number,
    bounded,
    integers,
    known,
    lengths_of,
    regrouped,
)

TOKEN_BYTES: Final = 4
"""Of the tokens that a bundle takes; a narrower type would change large ones."""


@dataclass(frozen=True, slots=True)
class Node:
    """One node, with its attributes as Python values."""

    name: str
    op: str
    attributes: Mapping[str, Any]
    outputs: tuple[str, ...]
    opset: int

    def axis(self, rank: int, default: int = 0) -> int:
        """Its attribute `axis`, counted from 0."""
        return axis_number(self.name, int(self.attributes.get("axis", default)), rank)

    def refused(self, why: str) -> Exception:
        """The error that says so."""
        return refused(self.name, f"{self.op}: {why}")


Inputs = Sequence[Value | None]
Operator = Callable[[Node, Inputs], list[Value]]


def _at(inputs: Inputs, place: int) -> Value | None:
    return inputs[place] if place < len(inputs) else None


def _first(node: Node, inputs: Inputs) -> Value:
    value = _at(inputs, 0)
    if value is None:
        raise node.refused("has no input")
    return value


def _opaque(node: Node, value: Value) -> list[Value] | None:
    """State stays state whatever is done to it, and an input that is cut can only be state."""
    state = isinstance(value, Carried) or (
        isinstance(value, Flow) and value.stage.kind == "input" and not value.tokens
    )
    if not state:
        return None
    return [Carried(node.name) for _ in node.outputs]


def identity(node: Node, inputs: Inputs) -> list[Value]:
    """Also Dropout, which does nothing after training."""
    if node.op == "Dropout":
        mode = _at(inputs, 2)
        if mode is not None and known(node.name, "training_mode", mode).any():
            raise node.refused("drops out while the graph runs")
        if len(node.outputs) > 1 and node.outputs[1]:
            raise node.refused("its mask is used")
    return [_first(node, inputs)]


def shape(node: Node, inputs: Inputs) -> list[Value]:
    """The shape of what flows, some of whose lengths are not known yet."""
    value = _first(node, inputs)
    if isinstance(value, Known):
        found = tuple(Length(each) for each in value.array.shape)
    elif isinstance(value, Flow | Repeated):
        found = value.lengths
    else:
        raise node.refused("of something that has none")
    begin, end = node.attributes.get("start", 0), node.attributes.get("end")
    return [Lengths(found[begin:end])]


def constant_of_shape(node: Node, inputs: Inputs) -> list[Value]:
    """One number, over and over."""
    lengths = lengths_of(node.name, "the shape", _at(inputs, 0))
    filler = np.asarray(node.attributes.get("value", np.zeros(1, np.float32))).reshape(())
    return [_repeat(node, filler.reshape((1,) * len(lengths)), lengths)]


def expand(node: Node, inputs: Inputs) -> list[Value]:
    """An array repeated along axes where it has length 1."""
    array = known(node.name, "what it repeats", _at(inputs, 0))
    lengths = list(lengths_of(node.name, "the shape", _at(inputs, 1)))
    rank = max(array.ndim, len(lengths))
    array = array.reshape((1,) * (rank - array.ndim) + array.shape)
    lengths = [ONE] * (rank - len(lengths)) + lengths
    for place, (have, want) in enumerate(zip(array.shape, lengths, strict=True)):
        if want == ONE or have == want.known:
            lengths[place] = Length(have)
        elif have != 1:
            raise node.refused(f"from {have} to another length")
    return [_repeat(node, array, tuple(lengths))]


def _repeat(node: Node, array: Array, lengths: tuple[Length, ...]) -> Value:
    sizes = [each.known for each in lengths]
    plain = [each for each in sizes if each is not None]
    bounded(node.name, plain)
    if len(plain) == len(sizes):
        return Known(np.broadcast_to(array, plain))
    return Repeated(array, lengths)


def transpose(node: Node, inputs: Inputs) -> list[Value]:
    """Axes in another order."""
    value = _first(node, inputs)
    if isinstance(value, Carried | Lengths):
        return _opaque(node, value) or [value]
    rank = value.array.ndim if not isinstance(value, Flow) else len(value.axes)
    order = [int(each) for each in node.attributes.get("perm", range(rank)[::-1])]
    if sorted(order) != list(range(rank)):
        raise node.refused(f"perm {order}, of {rank} axes")
    if isinstance(value, Flow):
        return [replace(value, axes=tuple(value.axes[each] for each in order))]
    array = value.array.transpose(order)
    if isinstance(value, Known):
        return [Known(array)]
    return [Repeated(array, tuple(value.lengths[each] for each in order))]


def squeeze(node: Node, inputs: Inputs) -> list[Value]:
    """Axes of length 1 dropped."""
    value = _first(node, inputs)
    axes = _axes(node, inputs)
    if isinstance(value, Carried):
        if axes == [0] and len(value.rows) == 1 and value.rows[0] is not None:
            return [value.rows[0]]
        return [Carried(node.name)]
    if isinstance(value, Lengths):
        if len(value.of) != 1:
            raise node.refused("a shape of several lengths")
        return [Lengths(value.of, scalar=True)]
    lengths = value.lengths if not isinstance(value, Known) else _lengths(value.array)
    rank = len(lengths)
    if axes is None:
        places = [place for place, each in enumerate(lengths) if each == ONE]
    else:
        places = [axis_number(node.name, each, rank) for each in axes]
    if any(lengths[place] != ONE for place in places):
        raise node.refused("drops an axis that is not known to have length 1")
    kept = [place for place in range(rank) if place not in places]
    if isinstance(value, Flow):
        return [replace(value, axes=tuple(value.axes[place] for place in kept))]
    array = value.array.reshape([value.array.shape[place] for place in kept])
    if isinstance(value, Known):
        return [Known(array)]
    return [Repeated(array, tuple(lengths[place] for place in kept))]


def _lengths(array: Array) -> tuple[Length, ...]:
    return tuple(Length(each) for each in array.shape)


def unsqueeze(node: Node, inputs: Inputs) -> list[Value]:
    """Axes of length 1 put in."""
    value = _first(node, inputs)
    axes = _axes(node, inputs)
    if isinstance(value, Carried):
        return [Carried(node.name)]
    if axes is None:
        raise node.refused("has no axes")
    if isinstance(value, Lengths):
        if not value.scalar or axes not in ([0], [-1]):
            raise node.refused("a shape that has an axis already")
        return [Lengths(value.of)]
    before = value.axes if isinstance(value, Flow) else value.array.shape
    rank = len(before) + len(axes)
    places = sorted(axis_number(node.name, each, rank) for each in axes)
    if len(set(places)) != len(places):
        raise node.refused("an axis twice")
    if isinstance(value, Flow):
        grown = list(value.axes)
        for place in places:
            grown.insert(place, ())
        return [replace(value, axes=tuple(grown))]
    array = np.expand_dims(value.array, tuple(places))
    if isinstance(value, Known):
        return [Known(array)]
    lengths = list(value.lengths)
    for place in places:
        lengths.insert(place, ONE)
    return [Repeated(array, tuple(lengths))]


def _axes(node: Node, inputs: Inputs) -> list[int] | None:
    """An attribute before opset 13, then an input."""
    if "axes" in node.attributes:
        return [int(each) for each in node.attributes["axes"]]
    given = _at(inputs, 1)
    return None if given is None else integers(node.name, "axes", given)


def reshape(node: Node, inputs: Inputs) -> list[Value]:
    """Axes merged and parted."""
    value = _first(node, inputs)
    target = lengths_of(node.name, "the shape", _at(inputs, 1))
    copies = not node.attributes.get("allowzero", 0)
    if isinstance(value, Flow):
        return [replace(value, axes=regrouped(node.name, value, target, copies))]
    opaque = _opaque(node, value)
    if opaque is not None:
        return opaque
    array = known(node.name, "what it reshapes", value)
    sizes = [each.known for each in target]
    if any(each is None for each in sizes):
        raise node.refused("a constant, to a shape that is not")
    whole = [each for each in sizes if each is not None]
    if copies:
        whole = [array.shape[place] if each == 0 else each for place, each in enumerate(whole)]
    return [Known(array.reshape(whole))]


def concat(node: Node, inputs: Inputs) -> list[Value]:
    """Arrays, shapes or states laid together; `onnx_graph` sees to what flows."""
    values = [each for each in inputs if each is not None]
    axis = int(node.attributes.get("axis", 0))
    if any(isinstance(each, Carried) for each in values):
        rows: list[Flow | None] = []
        for each in values:
            rows += each.rows if isinstance(each, Carried) and axis == 0 else ()
        return [Carried(node.name, tuple(rows))]
    if any(isinstance(each, Lengths) for each in values):
        found: list[Length] = []
        for each in values:
            found += lengths_of(node.name, "a part", each)
        return [Lengths(tuple(found))]
    arrays = [known(node.name, "a part", each) for each in values]
    sizes = list(arrays[0].shape)
    sizes[axis_number(node.name, axis, arrays[0].ndim)] *= len(arrays)
    bounded(node.name, sizes)
    return [Known(np.concatenate(arrays, axis))]


def cast(node: Node, inputs: Inputs) -> list[Value]:
    """Another type; of what flows, only tokens may become others."""
    value = _first(node, inputs)
    target = np.dtype(node.attributes["to"])
    if isinstance(value, Known):
        if target.kind not in "fiub":
            raise node.refused(f"to {target}")
        return [Known(value.array.astype(target))]
    if isinstance(value, Flow):
        if target.kind in "iu" and value.stage.kind == "input":
            if target.itemsize < TOKEN_BYTES:
                raise node.refused(f"tokens, to {target}, which does not hold all of them")
            return [replace(value, tokens=True)]
        if target != np.float32:
            raise node.refused(f"what flows, to {target}")
        return [replace(value, tokens=False)]
    if isinstance(value, Repeated):
        return [Repeated(value.array.astype(target), value.lengths)]
    return [value]


def gather(node: Node, inputs: Inputs) -> list[Value]:
    """Entries of arrays, shapes and states; `onnx_graph` sees to what flows."""
    value = _first(node, inputs)
    places = known(node.name, "indices", _at(inputs, 1))
    if isinstance(value, Lengths):
        found = [value.of[axis_number(node.name, int(each), len(value.of))] for each in places.flat]
        return [Lengths(tuple(found), scalar=places.ndim == 0)]
    if isinstance(value, Carried):
        if node.attributes.get("axis", 0) == 0 and places.ndim == 0 and value.rows:
            row = value.rows[axis_number(node.name, int(places), len(value.rows))]
            return [Carried(node.name) if row is None else row]
        return [Carried(node.name)]
    opaque = _opaque(node, value)
    if opaque is not None:
        return opaque
    array = known(node.name, "what it takes from", value)
    axis = node.axis(array.ndim)
    rest = array.shape[:axis] + array.shape[axis + 1 :]
    bounded(node.name, (*rest, places.size))
    return [Known(np.take(array, places, axis))]


def slice_(node: Node, inputs: Inputs) -> list[Value]:
    """A range of arrays, shapes and states; `onnx_graph` sees to what flows."""
    value = _first(node, inputs)
    opaque = _opaque(node, value)
    if opaque is not None:
        return opaque
    ranges = slice_ranges(node, inputs)
    if isinstance(value, Lengths):
        if [axis for axis, _ in ranges] not in ([0], [-1]):
            raise node.refused("a shape along no axis that it has")
        return [Lengths(value.of[ranges[0][1]])]
    if not isinstance(value, Known | Repeated):
        raise node.refused("what flows")
    array = value.array
    lengths = list(value.lengths if isinstance(value, Repeated) else _lengths(array))
    for given, part in ranges:
        axis = axis_number(node.name, given, array.ndim)
        size = lengths[axis].known
        if size is None:
            raise node.refused("along an axis whose length is not known")
        lengths[axis] = Length(len(range(*part.indices(size))))
        if array.shape[axis] == size:
            array = array[(slice(None),) * axis + (part,)]
    return [Known(array) if isinstance(value, Known) else Repeated(array, tuple(lengths))]


def slice_ranges(node: Node, inputs: Inputs) -> list[tuple[int, slice]]:
    """Axis and range, of each axis that is cut."""
    if "starts" in node.attributes:
        starts, ends = list(node.attributes["starts"]), list(node.attributes["ends"])
        axes, steps = node.attributes.get("axes"), None
    else:
        starts = integers(node.name, "starts", _at(inputs, 1))
        ends = integers(node.name, "ends", _at(inputs, 2))
        given = _at(inputs, 3), _at(inputs, 4)
        axes = None if given[0] is None else integers(node.name, "axes", given[0])
        steps = None if given[1] is None else integers(node.name, "steps", given[1])
    axes = list(range(len(starts))) if axes is None else list(axes)
    steps = [1] * len(starts) if steps is None else steps
    if not len(starts) == len(ends) == len(axes) == len(steps) or 0 in steps:
        raise node.refused("its starts, ends, axes and steps do not fit")
    ranges: list[tuple[int, slice]] = []
    for axis, start, end, step in zip(axes, starts, ends, steps, strict=True):
        if step < 0:
            raise node.refused("backwards")
        ranges.append((axis, slice(start, end, step)))
    return ranges


def split(node: Node, inputs: Inputs) -> list[Value]:
    """Equal or stated parts of an array; states; `onnx_graph` sees to what flows."""
    value = _first(node, inputs)
    opaque = _opaque(node, value)
    if opaque is not None:
        return opaque
    array = known(node.name, "what it splits", value)
    axis = node.axis(array.ndim)
    sizes = node.attributes.get("split")
    if _at(inputs, 1) is not None:
        sizes = integers(node.name, "split", _at(inputs, 1))
    if sizes is None:
        each = -(-array.shape[axis] // len(node.outputs))
        sizes = [each] * (len(node.outputs) - 1)
        sizes.append(array.shape[axis] - sum(sizes))
    if len(sizes) != len(node.outputs) or sum(sizes) != array.shape[axis] or min(sizes) < 0:
        raise node.refused(f"into {list(sizes)}")
    return [Known(part) for part in np.split(array, np.cumsum(sizes)[:-1], axis)]


PLUMBING: Final[Mapping[str, Operator]] = {
    "Cast": cast,
    "Concat": concat,
    "ConstantOfShape": constant_of_shape,
    "Dropout": identity,
    "Expand": expand,
    "Gather": gather,
    "Identity": identity,
    "Reshape": reshape,
    "Shape": shape,
    "Slice": slice_,
    "Split": split,
    "Squeeze": squeeze,
    "Transpose": transpose,
    "Unsqueeze": unsqueeze,
}

"""The operators of ONNX that move numbers about, on constants and on shapes.

Exporters surround a recurrent node with them: initial states of zeros made to the measure of the
batch, shapes taken apart and put together. Each function takes the node and its inputs and returns
its outputs. What flows is `onnx_moves`'s.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import numpy as np

from conveyor_models.importers.common import kind_of
from conveyor_models.importers.onnx_node import (
    Inputs,
    Node,
    Operator,
    at,
    axes_of,
    first,
    split_sizes,
)
from conveyor_models.importers.onnx_ranges import plain_range, slice_ranges, whole_range
from conveyor_models.importers.onnx_shapes import ONE, Length, whole_sizes
from conveyor_models.importers.onnx_values import (
    LENGTHS_MAX,
    Array,
    Counts,
    Flow,
    Known,
    Lengths,
    Repeated,
    Stacked,
    Value,
    axis_number,
    known,
    lengths_of,
)


def identity(node: Node, inputs: Inputs) -> list[Value]:
    """Also Dropout, which does nothing after training."""
    if node.op == "Dropout":
        mode = at(inputs, 2)
        if mode is not None and known(node.name, "training_mode", mode).any():
            raise node.refused("drops out while the graph runs")
        if len(node.outputs) > 1 and node.outputs[1]:
            raise node.refused("its mask is used")
    return [first(node, inputs)]


def shape(node: Node, inputs: Inputs) -> list[Value]:
    """The shape of a value, some of whose lengths are not known yet."""
    value = first(node, inputs)
    match value:
        case Known():
            found = array_lengths(value.array)
        case Flow() | Repeated() | Counts() | Stacked():
            found = value.lengths
        case Lengths():
            found = () if value.scalar else (Length.of(len(value.of)),)
        case _:
            raise node.refused("of something whose shape is not known")
    begin, end = node.attributes.get("start", 0), node.attributes.get("end")
    return [Lengths(found[begin:end])]


def constant_of_shape(node: Node, inputs: Inputs) -> list[Value]:
    """One number, over and over."""
    lengths = lengths_of(node.name, "the shape", at(inputs, 0))
    filler = np.asarray(node.attributes.get("value", np.zeros(1, np.float32))).reshape(())
    return [_repeat(node, filler.reshape((1,) * len(lengths)), lengths)]


def expand(node: Node, inputs: Inputs) -> list[Value]:
    """An array repeated along axes where it has length 1, or one length over and over."""
    value = first(node, inputs)
    lengths = list(lengths_of(node.name, "the shape", at(inputs, 1)))
    if isinstance(value, Lengths) and whole_sizes(value.of) is None:
        if len(value.of) != 1 or len(lengths) > 1:
            raise node.refused("a shape of several lengths")
        return [Counts(value.of[0], tuple(lengths))]
    if isinstance(value, Repeated):
        array, have = value.array, list(value.lengths)
    else:
        array = known(node.name, "what it repeats", value)
        have = list(array_lengths(array))
    rank = max(len(have), len(lengths))
    array = array.reshape((1,) * (rank - array.ndim) + array.shape)
    have = [ONE] * (rank - len(have)) + have
    lengths = [ONE] * (rank - len(lengths)) + lengths
    for place, (old, new) in enumerate(zip(have, lengths, strict=True)):
        if new in (ONE, old):
            lengths[place] = old
        elif old != ONE:
            raise node.refused("from one length to another")
    return [_repeat(node, array, tuple(lengths))]


def tile(node: Node, inputs: Inputs) -> list[Value]:
    """Expand, where only axes of length 1 are repeated."""
    value = first(node, inputs)
    times = lengths_of(node.name, "the repeats", at(inputs, 1))
    if isinstance(value, Lengths) and len(value.of) == 1 and whole_sizes(value.of) is None:
        return [Counts(value.of[0], times)]
    have = (
        value.lengths
        if isinstance(value, Repeated)
        else array_lengths(known(node.name, "what it repeats", value))
    )
    if len(have) != len(times):
        raise node.refused(f"{len(times)} repeats of {len(have)} axes")
    if any(ONE not in (old, new) for old, new in zip(have, times, strict=True)):
        raise node.refused("repeats an axis that is longer than 1")
    target = tuple(old.times(new) for old, new in zip(have, times, strict=True))
    return expand(node, [value, Lengths(target)])


def _repeat(node: Node, array: Array, lengths: tuple[Length, ...]) -> Value:
    plain = [each.known for each in lengths if each.known is not None]
    node.bounded(plain)
    if len(plain) == len(lengths):
        return Known(np.broadcast_to(array, plain))
    return Repeated(array, lengths)


def transpose(node: Node, inputs: Inputs) -> list[Value]:
    """Axes in another order."""
    value = first(node, inputs)
    if isinstance(value, Lengths | Counts):
        return [value]
    if not isinstance(value, Known | Repeated):
        raise node.refused("of something that is neither a constant nor what flows")
    order = order_of(node, value.array.ndim)
    array = value.array.transpose(order)
    if isinstance(value, Known):
        return [Known(array)]
    return [Repeated(array, tuple(value.lengths[each] for each in order))]


def order_of(node: Node, rank: int) -> list[int]:
    """The axes of a Transpose, in their new order."""
    order = [int(each) for each in node.attributes.get("perm", range(rank)[::-1])]
    if sorted(order) != list(range(rank)):
        raise node.refused(f"perm {order[:8]}, of {rank} axes")
    return order


def squeeze(node: Node, inputs: Inputs) -> list[Value]:
    """Axes of length 1 dropped."""
    value = first(node, inputs)
    if isinstance(value, Lengths):
        if len(value.of) != 1:
            raise node.refused("a shape of several lengths")
        return [Lengths(value.of, scalar=True)]
    if not isinstance(value, Known | Repeated):
        raise node.refused("of something that is neither a constant nor what flows")
    lengths = value.lengths if isinstance(value, Repeated) else array_lengths(value.array)
    kept = kept_places(node, inputs, lengths)
    array = value.array.reshape([value.array.shape[place] for place in kept])
    if isinstance(value, Known):
        return [Known(array)]
    return [Repeated(array, tuple(lengths[place] for place in kept))]


def kept_places(node: Node, inputs: Inputs, lengths: tuple[Length, ...]) -> list[int]:
    """The axes that a Squeeze leaves."""
    axes = axes_of(node, inputs)
    rank = len(lengths)
    if axes is None:
        places = [place for place, each in enumerate(lengths) if each == ONE]
    else:
        places = [axis_number(node.name, each, rank) for each in axes]
    if any(lengths[place] != ONE for place in places):
        raise node.refused("drops an axis that is not known to have length 1")
    return [place for place in range(rank) if place not in places]


def unsqueeze(node: Node, inputs: Inputs) -> list[Value]:
    """Axes of length 1 put in."""
    value = first(node, inputs)
    if isinstance(value, Lengths):
        if not value.scalar or axes_of(node, inputs) not in ([0], [-1]):
            raise node.refused("a shape that has an axis already")
        return [Lengths(value.of)]
    if not isinstance(value, Known | Repeated):
        raise node.refused("of something that is neither a constant nor what flows")
    places = new_places(node, inputs, value.array.ndim)
    array = np.expand_dims(value.array, tuple(places))
    if isinstance(value, Known):
        return [Known(array)]
    lengths = list(value.lengths)
    for place in places:
        lengths.insert(place, ONE)
    return [Repeated(array, tuple(lengths))]


def new_places(node: Node, inputs: Inputs, rank: int) -> list[int]:
    """Where an Unsqueeze puts its axes, in order."""
    axes = axes_of(node, inputs)
    if axes is None:
        raise node.refused("has no axes")
    whole = rank + len(axes)
    if whole > LENGTHS_MAX:
        raise node.refused(f"to {whole} axes, expected at most {LENGTHS_MAX}")
    places = sorted(axis_number(node.name, each, whole) for each in axes)
    if len(set(places)) != len(places):
        raise node.refused("an axis twice")
    return places


def reshape(node: Node, inputs: Inputs) -> list[Value]:
    """Axes merged and parted."""
    value = first(node, inputs)
    target = lengths_of(node.name, "the shape", at(inputs, 1))
    copies = not node.attributes.get("allowzero", 0)
    if isinstance(value, Lengths):
        sizes = whole_sizes(target)
        if sizes not in ([], [-1], [len(value.of)]) or (not target and len(value.of) != 1):
            raise node.refused("a shape to something that is none")
        return [Lengths(value.of, scalar=not target)]
    if isinstance(value, Repeated):
        return [_reshaped(node, value, target, copies)]
    array = known(node.name, "what it reshapes", value)
    sizes = whole_sizes(target)
    if sizes is None:
        raise node.refused("a constant, to a shape that is not")
    if copies:
        sizes = [array.shape[place] if each == 0 else each for place, each in enumerate(sizes)]
    node.spend(array.shape)
    return [Known(array.reshape(sizes))]


def _reshaped(node: Node, value: Repeated, target: tuple[Length, ...], copies: bool) -> Repeated:
    """Only of one number over and over: the others have an order."""
    lengths = list(target)
    for place, each in enumerate(lengths):
        if each == Length.of(0) and copies and place < len(value.lengths):
            lengths[place] = value.lengths[place]
    if value.array.size != 1 or any((each.at_least or 0) < 1 for each in lengths):
        raise node.refused("a constant that is repeated, to another shape")
    return Repeated(value.array.reshape((1,) * len(lengths)), tuple(lengths))


def concat(node: Node, inputs: Inputs) -> list[Value]:
    """Arrays or shapes laid together."""
    values = [each for each in inputs if each is not None]
    axis = int(node.attributes.get("axis", 0))
    if any(isinstance(each, Lengths) for each in values):
        found: list[Length] = []
        for each in values:
            found += lengths_of(node.name, "a part", each)
        if len(found) > LENGTHS_MAX:
            raise node.refused(f"{len(found)} lengths, expected at most {LENGTHS_MAX}")
        return [Lengths(tuple(found))]
    if any(isinstance(each, Repeated) for each in values):
        return [_repeated_parts(node, values, axis)]
    arrays = [known(node.name, "a part", each) for each in values]
    sizes = list(arrays[0].shape)
    place = axis_number(node.name, axis, arrays[0].ndim)
    sizes[place] = sum(each.shape[place] for each in arrays if each.ndim == len(sizes))
    node.spend(sizes)
    return [Known(np.concatenate(arrays, axis))]


def _repeated_parts(node: Node, values: list[Value], axis: int) -> Repeated:
    """States of several layers, each repeated along the batch."""
    parts = [each for each in values if isinstance(each, Repeated)]
    if len(parts) != len(values):
        raise node.refused("a constant that is repeated, and something else")
    rank = len(parts[0].lengths)
    place = axis_number(node.name, axis, rank)
    lengths = [each.lengths[place].known for each in parts]
    known_lengths = [each for each in lengths if each is not None]
    apart = any(
        each.lengths[:place] + each.lengths[place + 1 :]
        != parts[0].lengths[:place] + parts[0].lengths[place + 1 :]
        for each in parts
    )
    if apart or len(known_lengths) != len(parts):
        raise node.refused("constants that are repeated along other axes")
    rest = [max(each.array.shape[at] for each in parts) for at in range(rank)]
    whole: list[Array] = []
    for each, length in zip(parts, known_lengths, strict=True):
        size = (*rest[:place], length, *rest[place + 1 :])
        node.spend(size)
        whole.append(np.broadcast_to(each.array, size))
    array = np.concatenate(whole, place)
    lengths_now = list(parts[0].lengths)
    lengths_now[place] = Length.of(sum(known_lengths))
    return Repeated(array, tuple(lengths_now))


def cast(node: Node, inputs: Inputs) -> list[Value]:
    """Another type."""
    value = first(node, inputs)
    target = np.dtype(node.attributes["to"])
    if isinstance(value, Lengths | Counts):
        if target.kind not in "iu" or target.itemsize < 4:
            raise node.refused(f"a shape, to {kind_of(target)}")
        return [value]
    if not isinstance(value, Known | Repeated):
        raise node.refused("of something that is neither a constant nor what flows")
    if target.kind not in "fiub":
        raise node.refused(f"to {kind_of(target)}")
    if isinstance(value, Repeated):
        return [Repeated(value.array.astype(target), value.lengths)]
    if value.array.dtype == target:
        return [value]
    node.spend(value.array.shape)
    return [Known(value.array.astype(target))]


def gather(node: Node, inputs: Inputs) -> list[Value]:
    """Entries of arrays and shapes."""
    value = first(node, inputs)
    places = known(node.name, "indices", at(inputs, 1))
    if isinstance(value, Lengths) and not value.scalar:
        if places.ndim > 1 or places.size > LENGTHS_MAX:
            raise node.refused("a shape, by indices that are none")
        found = [value.of[axis_number(node.name, int(each), len(value.of))] for each in places.flat]
        return [Lengths(tuple(found), scalar=places.ndim == 0)]
    if isinstance(value, Repeated):
        return [_gathered(node, value, places)]
    array = known(node.name, "what it takes from", value)
    axis = node.axis(array.ndim)
    rest = array.shape[:axis] + array.shape[axis + 1 :]
    node.spend((*rest, *places.shape))
    return [Known(np.take(array, places, axis))]


def _gathered(node: Node, value: Repeated, places: Array) -> Repeated:
    """One entry along an axis that is not repeated any number of times."""
    axis = node.axis(len(value.lengths))
    size = value.lengths[axis].known
    if places.ndim != 0 or size is None:
        raise node.refused("several entries of a constant that is repeated")
    place = axis_number(node.name, int(places), size) if value.array.shape[axis] == size else 0
    lengths = value.lengths[:axis] + value.lengths[axis + 1 :]
    return Repeated(np.take(value.array, place, axis), lengths)


def slice_(node: Node, inputs: Inputs) -> list[Value]:
    """A range of arrays and shapes."""
    value = first(node, inputs)
    ranges = slice_ranges(node, inputs)
    if isinstance(value, Lengths):
        if [each[0] for each in ranges] not in ([0], [-1]) or value.scalar:
            raise node.refused("a shape along no axis that it has")
        return [Lengths(value.of[plain_range(node, *ranges[0][1:])])]
    if not isinstance(value, Known | Repeated):
        raise node.refused("of something that is neither a constant nor what flows")
    array = value.array
    lengths = list(value.lengths if isinstance(value, Repeated) else array_lengths(array))
    for given, start, end, step in ranges:
        axis = axis_number(node.name, given, array.ndim)
        if whole_range(lengths[axis], start, end, step):
            continue
        size = lengths[axis].known
        part = plain_range(node, start, end, step)
        if size is None:
            raise node.refused("along an axis whose length is not known")
        lengths[axis] = Length.of(len(range(*part.indices(size))))
        if array.shape[axis] == size:
            array = array[(slice(None),) * axis + (part,)]
    return [Known(array) if isinstance(value, Known) else Repeated(array, tuple(lengths))]


def split(node: Node, inputs: Inputs) -> list[Value]:
    """Equal or stated parts of an array or a shape."""
    value = first(node, inputs)
    if isinstance(value, Lengths) and not value.scalar:
        sizes = split_sizes(node, inputs, len(value.of))
        ends = np.cumsum(sizes).tolist()
        return [Lengths(value.of[end - size : end]) for size, end in zip(sizes, ends, strict=True)]
    if isinstance(value, Repeated):
        return _split_repeated(node, inputs, value)
    array = known(node.name, "what it splits", value)
    axis = node.axis(array.ndim)
    sizes = split_sizes(node, inputs, array.shape[axis])
    return [Known(part) for part in np.split(array, np.cumsum(sizes)[:-1], axis)]


def _split_repeated(node: Node, inputs: Inputs, value: Repeated) -> list[Value]:
    axis = node.axis(len(value.lengths))
    sizes = split_sizes(node, inputs, value.lengths[axis].known)
    found: list[Value] = []
    for size, end in zip(sizes, np.cumsum(sizes).tolist(), strict=True):
        array = value.array
        if array.shape[axis] != 1:
            array = array[(slice(None),) * axis + (slice(end - size, end),)]
        lengths = (*value.lengths[:axis], Length.of(size), *value.lengths[axis + 1 :])
        found.append(Repeated(array, lengths))
    return found


def array_lengths(array: Array) -> tuple[Length, ...]:
    """The shape of an array."""
    return tuple(Length.of(each) for each in array.shape)


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
    "Tile": tile,
    "Transpose": transpose,
    "Unsqueeze": unsqueeze,
}

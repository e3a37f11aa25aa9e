"""The operators of ONNX that move numbers about, on what flows and on states.

What flows keeps its rows, of which it is known along which axis the features and the steps lie.
Where an operator takes an input or a final state apart in another way, all that is kept is where
the numbers come from: it may still be an initial state that is given from outside.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Several
from dataclasses import replace
from typing import Final, TypeAlias

import numpy as np

from conveyor_models.errors import UnsupportedModuleError
from conveyor_models.importers.onnx_maps import joined, of_one_input, selected
from conveyor_models.importers.onnx_node import Inputs, Node, at, first, split_sizes
from conveyor_models.importers.onnx_plumbing import (
    identity,
    kept_places,
    new_places,
    order_of,
)
from conveyor_models.importers.onnx_ranges import (
    Range,
    backward_range,
    last_range,
    plain_range,
    slice_ranges,
    whole_range,
)
from conveyor_models.importers.onnx_shapes import ONE, Length
from conveyor_models.importers.onnx_stacks import (
    cast_flow,
    stacked_states,
    steps_joined,
    taken_apart,
)
from conveyor_models.importers.onnx_values import (
    Atom,
    Axis,
    Flow,
    Known,
    Moved,
    Row,
    Sequence,
    Stacked,
    Value,
    axis_number,
    axis_of,
    known,
    lengths_of,
    regrouped,
    sources_of,
)

Move: TypeAlias = Callable[[Node, Flow, Inputs], list[Value]]


def moved(node: Node, inputs: Inputs) -> list[Value]:
    """A shape operator on what flows, on states and on inputs."""
    try:
        return _moved(node, inputs)
    except UnsupportedModuleError as error:
        sources = [sources_of(value) for value in _what_moves(node, inputs)]
        if any(each is None for each in sources):
            raise
        found = [each for each in sources if each is not None]
        every = Moved(
            inputs=frozenset[str]().union(*(each.inputs for each in found)),
            states=frozenset[str]().union(*(each.states for each in found)),
            why=next((each.why for each in found if each.why is not None), error),
        )
        return [every] * len(node.outputs)


def _what_moves(node: Node, inputs: Inputs) -> list[Value]:
    """The operands, without the arguments that say how."""
    chosen = inputs if node.op == "Concat" else inputs[:1]
    if any(isinstance(value, Flow | Moved | Stacked) for value in inputs[len(chosen) :]):
        raise node.refused("by indices or a shape that the graph computes from its rows")
    return [value for value in chosen if value is not None]


def _moved(node: Node, inputs: Inputs) -> list[Value]:
    if node.op == "Concat":
        return [_concat(node, inputs)]
    value = first(node, inputs)
    if isinstance(value, Stacked):
        return [taken_apart(node, value, inputs)]
    if not isinstance(value, Flow):
        raise node.refused("of something that is not the rows that flow from the input")
    return MOVES[node.op](node, value, inputs)


# --- Axes ----------------------------------------------------------------------------------------


def _transpose(node: Node, flow: Flow, inputs: Inputs) -> list[Value]:
    del inputs
    return [replace(flow, axes=tuple(flow.axes[at] for at in order_of(node, len(flow.axes))))]


def _squeeze(node: Node, flow: Flow, inputs: Inputs) -> list[Value]:
    kept = kept_places(node, inputs, flow.lengths)
    return [replace(flow, axes=tuple(flow.axes[place] for place in kept))]


def _unsqueeze(node: Node, flow: Flow, inputs: Inputs) -> list[Value]:
    grown = list(flow.axes)
    for place in new_places(node, inputs, len(grown)):
        grown.insert(place, ())
    return [replace(flow, axes=tuple(grown))]


def _reshape(node: Node, flow: Flow, inputs: Inputs) -> list[Value]:
    target = lengths_of(node.name, "the shape", at(inputs, 1))
    copies = not node.attributes.get("allowzero", 0)
    return [replace(flow, axes=regrouped(node.name, flow, target, copies))]


def _flatten(node: Node, flow: Flow, inputs: Inputs) -> list[Value]:
    del inputs
    given = int(node.attributes.get("axis", 1))
    place = given + len(flow.axes) if given < 0 else given
    if not 0 <= place <= len(flow.axes):
        raise node.refused(f"axis {given}, of {len(flow.axes)}")
    merged = tuple(sum(part, ()) for part in (flow.axes[:place], flow.axes[place:]))
    return [replace(flow, axes=merged)]


def _expand(node: Node, flow: Flow, inputs: Inputs) -> list[Value]:
    """Only to the lengths that it has."""
    target = lengths_of(node.name, "the shape", at(inputs, 1))
    rank = max(len(target), len(flow.axes))
    axes = ((),) * (rank - len(flow.axes)) + flow.axes
    wanted = (ONE,) * (rank - len(target)) + target
    lengths = (ONE,) * (rank - len(flow.axes)) + flow.lengths
    if any(new not in (ONE, old) for old, new in zip(lengths, wanted, strict=True)):
        raise node.refused("repeats what flows")
    return [replace(flow, axes=axes)]


def _tile(node: Node, flow: Flow, inputs: Inputs) -> list[Value]:
    if any(each != ONE for each in lengths_of(node.name, "the repeats", at(inputs, 1))):
        raise node.refused("repeats what flows")
    return [flow]


# --- Parts ---------------------------------------------------------------------------------------


def _gather(node: Node, flow: Flow, inputs: Inputs) -> list[Value]:
    axis = node.axis(len(flow.axes))
    array = known(node.name, "indices", at(inputs, 1))
    if array.ndim > 1:
        raise node.refused(f"by indices of shape {list(array.shape)[:8]}")
    return [_taken(node, flow, axis, [int(each) for each in array.flat], array.ndim == 0)]


def _taken(node: Node, flow: Flow, axis: int, wanted: Several[int], drops: bool) -> Flow:
    """Entries along one axis."""
    node.spend((len(wanted),))
    kept: tuple[Axis, ...] = () if drops else ((),)
    own, length = flow.axes[axis], flow.lengths[axis].known
    rest = (*flow.axes[:axis], *kept, *flow.axes[axis + 1 :])
    # A row of one number has no axis that is its own; the last one is as good as any.
    single = not own and not flow.features and axis == len(flow.axes) - 1 and len(wanted) != 1
    if (own and own in (flow.features, flow.features[:1])) or (single and not flow.tokens):
        if length is None:
            raise node.refused("of features whose number the file does not state")
        places = [axis_number(node.name, each, length) for each in wanted]
        return _features_taken(node, flow, axis, places, rest)
    if length is not None and len(own) == 1 and len(wanted) == length and not drops:
        places = [axis_number(node.name, each, length) for each in wanted]
        if places == list(range(length)):
            return flow
        if places == list(range(length))[::-1]:
            return replace(flow, flipped=flow.flipped ^ {own[0]})
    if len(wanted) != 1:
        raise node.refused(f"{len(wanted)} entries along an axis that is not that of the features")
    if not own:
        axis_number(node.name, wanted[0], 1)
        return replace(flow, axes=rest)
    return _step_taken(node, flow, own, wanted[0], rest)


def _features_taken(
    node: Node, flow: Flow, axis: int, places: list[int], rest: tuple[Axis, ...]
) -> Flow:
    """Some numbers of each row, or one direction of both."""
    own = flow.axes[axis]
    inner = flow.features[1:] if own != flow.features else ()
    size = math.prod(atom.length.known or 0 for atom in inner)
    node.spend((len(places), size))
    entries = [place * size + each for place in places for each in range(size)]
    found = selected(node, flow, entries)
    new = axis_of(Atom(f"{node.name}.chosen", Length.of(len(places))))
    axes = rest if len(rest) < len(flow.axes) else (*rest[:axis], new, *rest[axis + 1 :])
    if inner and any(flow.axes.count((atom,)) != 1 for atom in inner):
        raise node.refused("of directions that are merged with something else")
    return replace(found, axes=axes, features=(*new, *inner))


def _step_taken(node: Node, flow: Flow, own: Axis, wanted: int, rest: tuple[Axis, ...]) -> Flow:
    """One step's row."""
    if len(own) != 1 or flow.row is not None:
        raise node.refused("one entry along an axis that is neither that of steps nor of features")
    (steps,) = own
    if flow.time not in (None, steps):
        raise node.refused("one entry along an axis that is neither that of steps nor of features")
    row = _row_of(node, flow, steps, wanted)
    return replace(flow, axes=rest, row=row, time=steps, flipped=flow.flipped - {steps})


def _row_of(node: Node, flow: Flow, steps: Atom, wanted: int) -> Row:
    length = steps.length.known
    if length is None:
        return -1 - wanted if steps in flow.flipped else wanted
    wanted = axis_number(node.name, wanted, length)
    return length - 1 - wanted if steps in flow.flipped else wanted


def _split_to_sequence(node: Node, flow: Flow, inputs: Inputs) -> list[Value]:
    """Into entries, which a graph takes out one by one."""
    if at(inputs, 1) is not None:
        raise node.refused("into parts of stated lengths")
    drops = not node.attributes.get("keepdims", 1)
    return [Sequence(flow, node.axis(len(flow.axes)), drops)]


def sequence_at(node: Node, inputs: Inputs) -> list[Value]:
    """One entry of what was taken apart."""
    value, places = first(node, inputs), known(node.name, "its place", at(inputs, 1))
    if not isinstance(value, Sequence) or places.size != 1:
        raise node.refused("of something that is not what flows, taken apart")
    return [_taken(node, value.flow, value.axis, [int(places.reshape(()))], value.drops)]


def _slice(node: Node, flow: Flow, inputs: Inputs) -> list[Value]:
    for each in slice_ranges(node, inputs):
        flow = _range_taken(node, flow, each)
    return [flow]


def _range_taken(node: Node, flow: Flow, wanted: Range) -> Flow:
    given, start, end, step = wanted
    axis = axis_number(node.name, given, len(flow.axes))
    length, own = flow.lengths[axis], flow.axes[axis]
    if whole_range(length, start, end, step):
        return flow
    if length.known is not None:
        part = range(length.known)[plain_range(node, start, end, step)]
        return _taken(node, flow, axis, part, drops=False)
    if backward_range(length, start, end, step) and len(own) == 1:
        return replace(flow, flipped=flow.flipped ^ {own[0]})
    if last_range(length, start, end, step):
        return _taken(node, flow, axis, [-1], drops=False)
    one = start.known is not None and start.known >= 0 and end == start.plus(ONE)
    if one and step >= 1:
        return _taken(node, flow, axis, [start.known or 0], drops=False)
    raise node.refused("takes a part of an axis whose length the file does not state")


def _split(node: Node, flow: Flow, inputs: Inputs) -> list[Value]:
    axis = node.axis(len(flow.axes))
    sizes = split_sizes(node, inputs, flow.lengths[axis].known)
    ends = np.cumsum(sizes).tolist()
    return [
        _taken(node, flow, axis, range(end - size, end), drops=False)
        for size, end in zip(sizes, ends, strict=True)
    ]


def _concat(node: Node, inputs: Inputs) -> Value:
    """Rows laid side by side, steps laid one after the other, or states of several layers."""
    values = [value for value in inputs if value is not None]
    if len(values) == 1:
        return values[0]
    if any(isinstance(value, Known) for value in values):
        raise node.refused("of a constant and what flows")
    flows = [value for value in values if isinstance(value, Flow)]
    if len(flows) != len(values):
        return stacked_states(node, values)
    ranks = {len(flow.axes) for flow in flows}
    if len(ranks) != 1:
        raise node.refused("of values with different numbers of axes")
    of_one_input(node.name, flows)
    axis = node.axis(ranks.pop())
    if any(flow.features for flow in flows) and all(
        flow.axes[axis] == flow.features for flow in flows
    ):
        return _side_by_side(node, flows, axis)
    written = len({flow.stage for flow in flows}) == 1 and len({flow.row for flow in flows}) > 1
    if all(flow.final for flow in flows) and axis == 0 and not written:
        return stacked_states(node, values)
    if len({flow.row for flow in flows}) == 1 and not any(flow.axes[axis] for flow in flows):
        return _side_by_side(node, flows, axis)
    return steps_joined(node, flows, axis)


def _side_by_side(node: Node, flows: Several[Flow], axis: int) -> Flow:
    rest = [flow.axes[:axis] + flow.axes[axis + 1 :] for flow in flows]
    if any(each != rest[0] for each in rest) or any(
        flow.features != flow.axes[axis] for flow in flows
    ):
        raise node.refused("of rows that lie along other axes")
    found = joined(node, flows)
    return replace(found, axes=(*rest[0][:axis], found.features, *rest[0][axis:]))


MOVES: Final[Mapping[str, Move]] = {
    "Cast": cast_flow,
    "Dropout": lambda node, flow, inputs: identity(node, [flow, *inputs[1:]]),
    "Expand": _expand,
    "Flatten": _flatten,
    "Gather": _gather,
    "Identity": lambda node, flow, inputs: identity(node, [flow, *inputs[1:]]),
    "Reshape": _reshape,
    "Slice": _slice,
    "Split": _split,
    "SplitToSequence": _split_to_sequence,
    "Squeeze": _squeeze,
    "Tile": _tile,
    "Transpose": _transpose,
    "Unsqueeze": _unsqueeze,
}
MOVING: Final = frozenset({*MOVES, "Concat"})

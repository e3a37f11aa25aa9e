"""Final states of several layers laid together, and steps laid one after the other."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Final

import numpy as np
import torch

from conveyor_models.importers.common import kind_of
from conveyor_models.importers.folding import Affine
from conveyor_models.importers.onnx_maps import joined, selected
from conveyor_models.importers.onnx_node import Inputs, Node, at
from conveyor_models.importers.onnx_plumbing import kept_places, new_places
from conveyor_models.importers.onnx_ranges import plain_range, slice_ranges
from conveyor_models.importers.onnx_shapes import Length, product
from conveyor_models.importers.onnx_values import (
    Array,
    Flow,
    Stacked,
    Stage,
    Value,
    axis_number,
    known,
    lengths_of,
)
from conveyor_models.spec import LAYERS_MAX

TOKEN_BYTES: Final = 4
"""Of the tokens that a bundle takes; a narrower type would change large ones."""
PARTS_MAX: Final = 2 * LAYERS_MAX
"""A state for each direction of each layer."""


def cast_flow(node: Node, flow: Flow, inputs: Inputs) -> list[Value]:
    """Another type; of what flows, only tokens may become others."""
    del inputs
    target = np.dtype(node.attributes["to"])
    if target.kind in "iu" and flow.raw and flow.affine is None:
        if target.itemsize < TOKEN_BYTES:
            raise node.refused(f"tokens, to {kind_of(target)}, which cannot hold all of them")
        return [replace(flow, tokens=True, features=())]
    if target != np.float32:
        raise node.refused(f"what flows, to {kind_of(target)}; expected 32-bit floats")
    if flow.tokens and np.dtype(str(flow.stage.content)).kind == "f":
        raise node.refused("whole numbers made of floats, back to floats: that rounds")
    return [replace(flow, tokens=False)]


# --- States of several layers --------------------------------------------------------------------


def stacked_states(node: Node, values: Sequence[Value]) -> Value:
    """Final states one after the other along the first axis."""
    parts: list[Flow] = []
    if node.attributes.get("axis", 0) != 0:
        raise node.refused("of states, along another axis than the first")
    for value in values:
        parts += _parts(node, value)
    if len(parts) > PARTS_MAX:
        raise node.refused(f"{len(parts)} states, expected at most {PARTS_MAX}")
    return _normal((len(parts),), parts, node)


def _parts(node: Node, value: Value) -> Sequence[Flow]:
    """What a value is along its first axis, which the parts have no more."""
    if isinstance(value, Stacked) and len(value.lead) == 1:
        return value.parts
    if not isinstance(value, Flow) or not value.final or not value.axes:
        raise node.refused("of something that is neither the rows that flow nor final states")
    if not value.axes[0]:
        return [replace(value, axes=value.axes[1:])]
    if value.axes[0] == value.features[:1] and len(value.stage.layers) == 2:
        return [_way(node, value, way) for way in range(2)]
    raise node.refused("of states that are merged with something else")


def _way(node: Node, flow: Flow, way: int) -> Flow:
    """The state of one direction, of a node that has both along its first axis."""
    size = (flow.size or 0) // 2
    found = selected(node, flow, range(way * size, (way + 1) * size))
    return replace(found, axes=flow.axes[1:], features=flow.features[1:])


def _normal(lead: tuple[int, ...], parts: Sequence[Flow], node: Node) -> Value:
    """One state is a flow again, and so are both directions of a layer."""
    if len(parts) == 1:
        return replace(parts[0], axes=((),) * len(lead) + parts[0].axes)
    if lead == (2,) and _both_ways(parts):
        both = joined(node, parts)
        return replace(both, axes=(both.features[:1], *parts[0].axes))
    return Stacked(lead, tuple(parts))


def _both_ways(parts: Sequence[Flow]) -> bool:
    stages = [part.stage for part in parts]
    directions = [
        [layer.table.get("direction", "forward") for layer in stage.layers] for stage in stages
    ]
    same = stages[0].before is stages[1].before and stages[0].affine is stages[1].affine
    return same and directions == [["forward"], ["reverse"]]


def taken_apart(node: Node, value: Stacked, inputs: Inputs) -> Value:
    """One of several states, or some of them."""
    places = np.arange(len(value.parts)).reshape(value.lead)
    match node.op:
        case "Identity" | "Dropout" | "Cast":
            return value
        case "Gather":
            chosen = _gathered(node, value, inputs, places)
        case "Slice":
            chosen = _sliced(node, value, inputs, places)
        case "Reshape":
            target = lengths_of(node.name, "the shape", at(inputs, 1))
            chosen = places.reshape(_lead(node, value, target))
        case "Squeeze":
            kept = kept_places(node, inputs, value.lengths)
            rank = len(value.lead)
            if [place for place in kept if place >= rank] != [*range(rank, len(value.lengths))]:
                raise node.refused("of states, along an axis of each")
            chosen = places.reshape([value.lead[place] for place in kept if place < rank])
        case "Unsqueeze":
            new = new_places(node, inputs, len(value.lengths))
            if any(place >= len(value.lead) + len(new) for place in new):
                raise node.refused("of states, along an axis of each")
            chosen = np.expand_dims(places, tuple(new))
        case _:
            raise node.refused("of the states of several layers")
    if chosen.size == 0:
        raise node.refused("takes no state")
    return _normal(chosen.shape, [value.parts[each] for each in chosen.flat], node)


def _gathered(node: Node, value: Stacked, inputs: Inputs, places: Array) -> Array:
    array = known(node.name, "indices", at(inputs, 1))
    axis = node.axis(len(value.lengths))
    if array.ndim > 1 or axis >= len(value.lead):
        raise node.refused("of states, along an axis of each")
    return np.asarray(places.take(array, axis))


def _sliced(node: Node, value: Stacked, inputs: Inputs, places: Array) -> Array:
    for given, start, end, step in slice_ranges(node, inputs):
        axis = axis_number(node.name, given, len(value.lengths))
        if axis >= len(value.lead):
            raise node.refused("of states, along an axis of each")
        places = places[(slice(None),) * axis + (plain_range(node, start, end, step),)]
    return places


def _lead(node: Node, value: Stacked, target: tuple[Length, ...]) -> list[int]:
    """The first axes after a Reshape that leaves each state as it is."""
    inner = value.parts[0].lengths
    rank = len(target) - len(inner)
    lead = [each.known for each in target[:rank]]
    tail = target[rank:]
    if rank < 1 or any(
        new not in (old, Length.of(-1)) for old, new in zip(inner, tail, strict=True)
    ):
        raise node.refused("of states, to something that is not some of them")
    whole = [each for each in lead if each is not None]
    if len(whole) != len(lead) or 0 in whole:
        raise node.refused("of states, to something that is not some of them")
    if -1 in whole:
        others = product([Length.of(each) for each in whole if each != -1]).known or 1
        whole[whole.index(-1)] = len(value.parts) // others
    if math.prod(whole) != len(value.parts):
        raise node.refused("of states, to something that is not some of them")
    return whole


# --- Steps one after the other -------------------------------------------------------------------


def steps_joined(node: Node, flows: Sequence[Flow], axis: int) -> Flow:
    """The rows of all steps, that a graph computes one by one and lays together."""
    start = flows[0]
    rows = [flow.row for flow in flows]
    count = len(flows)
    orders = [list(range(count)), list(range(-count, 0))]
    if any(flow.axes[axis] for flow in flows) or rows not in orders:
        raise node.refused("of what flows, that is neither all steps nor features side by side")
    if any(not alike(flow, start) for flow in flows) or start.time is None:
        raise node.refused("of steps that do not all pass the same")
    length = start.time.length.known
    if length != count and (length is not None or start.steps is None):
        raise node.refused(f"of {count} steps, which are not all of the input's")
    axes = (*start.axes[:axis], (start.time,), *start.axes[axis + 1 :])
    steps = None if start.steps is None else count
    return replace(start, axes=axes, row=None, final=False, steps=steps)


def alike(first: Flow, second: Flow) -> bool:
    """Whether two rows differ in nothing but their step."""
    return (
        _named(first) == _named(second)
        and first.time == second.time
        and first.activation == second.activation
        and first.tokens == second.tokens
        and first.flipped == second.flipped
        and _same_map(first.affine, second.affine)
        and same_stage(first.stage, second.stage)
    )


def _named(flow: Flow) -> list[list[tuple[str, Length]]]:
    """The axes, with the features under the same names in every flow."""
    names = {atom: f"features[{place}]" for place, atom in enumerate(flow.features)}
    return [[(names.get(atom, atom.name), atom.length) for atom in axis] for axis in flow.axes]


def _same_map(first: Affine | None, second: Affine | None) -> bool:
    if first is None or second is None or first is second:
        return first is second
    weights, biases = (first.weight, second.weight), (first.bias, second.bias)
    return weights[0].shape == weights[1].shape and all(
        torch.equal(*each) for each in (weights, biases)
    )


def same_stage(first: Stage, second: Stage) -> bool:
    """Whether two stages are the same part of a bundle."""
    if first is second:
        return True
    if first.kind != second.kind or first.before is None or second.before is None:
        return False
    return (
        _same_content(first, second)
        and _same_map(first.affine, second.affine)
        and same_stage(first.before, second.before)
    )


def _same_content(first: Stage, second: Stage) -> bool:
    one, other = first.content, second.content
    if isinstance(one, np.ndarray) and isinstance(other, np.ndarray):
        return one is other or bool(np.array_equal(one, other))
    layers = list(zip(first.layers, second.layers, strict=False))
    same = len(first.layers) == len(second.layers) and all(a is b for a, b in layers)
    return same and bool(layers)

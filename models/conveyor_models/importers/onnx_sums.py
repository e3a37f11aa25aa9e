"""A map of a row and a map of the state before it, added: what goes into a function of a cell.

In the first step of a written-out layer the state is a constant, and its map one as well.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from conveyor_models.errors import UnsupportedModuleError
from conveyor_models.importers import folding
from conveyor_models.importers.common import tensor_of
from conveyor_models.importers.onnx_flows import elementwise
from conveyor_models.importers.onnx_maps import selected, short
from conveyor_models.importers.onnx_node import Inputs, Node, at, split_sizes
from conveyor_models.importers.onnx_ranges import plain_range, slice_ranges
from conveyor_models.importers.onnx_shapes import ONE, Length
from conveyor_models.importers.onnx_values import (
    Array,
    Atom,
    Flow,
    Known,
    Mixed,
    Repeated,
    Start,
    Value,
    axis_number,
    axis_of,
    known,
)


def sum_of_two(node: Node, values: list[Value]) -> list[Value] | None:
    """A map of a row and one of a state, where they are not of the same row."""
    left, right = values
    if node.op != "Add" or not (isinstance(left, Flow) and isinstance(right, Flow)):
        return None
    try:
        return elementwise(node, values)
    except UnsupportedModuleError as error:
        if left.affine is None or right.affine is None or left.activation or right.activation:
            raise
        if not all(isinstance(each.row, int) or _one_step(each) for each in (left, right)):
            raise
        return [Mixed(_alike_axes(node, left, right), error)]


def _one_step(flow: Flow) -> bool:
    return flow.row is None and (
        flow.stage.kind == "input" or (flow.time is not None and flow.time.length == ONE)
    )


def _alike_axes(node: Node, left: Flow, right: Flow) -> tuple[Flow, Flow]:
    rank = max(len(left.axes), len(right.axes))
    found = [
        replace(flow, axes=((),) * (rank - len(flow.axes)) + flow.axes) for flow in (left, right)
    ]
    if left.size != right.size or any(flow.axes[-1] != flow.features for flow in found):
        raise node.refused("of rows that differ in length, or lie along other axes")
    return found[0], found[1]


def sum_with(node: Node, left: Value, right: Value) -> list[Value] | None:
    """A state's map and a row's, or a bias on either."""
    for one, other in ((left, right), (right, left)):
        match one, other:
            case Start(), Flow():
                size = one.affine.output_size
                if other.affine is None or other.size != size:
                    raise node.refused("of rows that differ in length")
                return [Mixed((_padded(other, one), one))]
            case Mixed(), Known():
                (row,) = elementwise(node, [one.parts[0], other])
                assert isinstance(row, Flow)
                return [Mixed((row, one.parts[1]), one.why)]
            case Start(), Known() if _is_row(other.array, one.affine.output_size):
                bias = folding.scale(
                    short(node.name),
                    torch.ones(other.array.size),
                    tensor_of(node.name, other.array.reshape(-1)),
                )
                added = one.value.array + other.array
                value = replace(one.value, array=added)
                return [Start(value, one.state, bias.after(one.affine))]
            case _:
                continue
    return None


def _padded(flow: Flow, start: Start) -> Flow:
    rank = max(len(flow.axes), start.value.array.ndim)
    return replace(flow, axes=((),) * (rank - len(flow.axes)) + flow.axes)


def started(node: Node, inputs: Inputs) -> list[Value] | None:
    """A linear layer on a constant state, whose rows are all alike."""
    state, matrix = inputs[0], at(inputs, 1)
    if not isinstance(state, Known | Repeated) or not isinstance(matrix, Known):
        return None
    weight = matrix.array if node.attributes.get("transB", 0) else matrix.array.T
    if weight.ndim != 2 or state.array.ndim < 2 or state.array.dtype.kind != "f":
        return None
    row = constant_row(state, weight.shape[1])
    plain = all(node.attributes.get(name, 1) == 1 for name in ("alpha", "beta"))
    if row is None or not plain or node.attributes.get("transA", 0):
        return None
    node.multiply(weight.size)
    node.spend((weight.shape[0],))
    bias = at(inputs, 2)
    offset = None if bias is None else known(node.name, "its bias", bias)
    if offset is not None:
        if not _is_row(offset, weight.shape[0]):
            raise node.refused(f"with a bias of shape {list(offset.shape)[:8]}")
        offset = offset.reshape(-1)
    affine = folding.linear(
        short(node.name),
        tensor_of(node.name, weight),
        None if offset is None else tensor_of(node.name, offset),
    )
    found = weight @ row if offset is None else weight @ row + offset
    array = found.astype(np.float32).reshape((1,) * (state.array.ndim - 1) + (-1,))
    if isinstance(state, Repeated):
        value = Repeated(array, (*state.lengths[:-1], Length.of(array.size)))
    else:
        value = Known(np.broadcast_to(array, (*state.array.shape[:-1], array.size)))
    return [Start(value, row, affine)]


def constant_row(value: Known | Repeated, size: int) -> Array | None:
    """[size], if every row of the array is that one."""
    array = value.array
    if isinstance(value, Repeated) and value.lengths and value.lengths[-1].known != size:
        return None
    if array.ndim == 0 or array.shape[-1] not in (1, size) or array.size == 0:
        return None
    flat = array.reshape(-1, array.shape[-1])
    if not (flat == flat[0]).all():
        return None
    return np.array(np.broadcast_to(flat[0], (size,)))


def _is_row(array: Array, size: int) -> bool:
    """Whether it is one number for each feature, and not one for each row of the batch."""
    return array.size == size and array.shape[-1:] == (size,)


def gates_apart(node: Node, value: Mixed | Start, inputs: Inputs) -> list[Value]:
    """Ranges of the last axis, which the gates lie along."""
    if isinstance(value, Start):
        size, rank = value.affine.output_size, value.value.array.ndim
    else:
        size, rank = value.parts[0].size, len(value.parts[0].axes)
    if size is None:
        raise node.refused("of features whose number the file does not state")
    if node.op == "Split":
        if node.axis(rank) != rank - 1:
            raise node.refused("along another axis than that of the gates")
        ends = np.cumsum(split_sizes(node, inputs, size)).tolist()
        ranges = [range(begin, end) for begin, end in zip([0, *ends], ends, strict=False)]
    else:
        whole = slice_ranges(node, inputs)
        if len(whole) != 1 or axis_number(node.name, whole[0][0], rank) != rank - 1:
            raise node.refused("along another axis than that of the gates")
        ranges = [range(size)[plain_range(node, *whole[0][1:])]]
    return [_entries(node, value, places) for places in ranges]


def _entries(node: Node, value: Mixed | Start, places: range) -> Value:
    if isinstance(value, Start):
        chosen = folding.selection(short(node.name), places, value.affine.output_size)
        array = value.value.array[..., list(places)]
        lengths = {}
        if isinstance(value.value, Repeated):
            lengths = {"lengths": (*value.value.lengths[:-1], Length.of(len(places)))}
        kept = replace(value.value, array=array, **lengths)
        return Start(kept, value.state, chosen.after(value.affine))
    parts: list[Flow | Start] = []
    for part in value.parts:
        if isinstance(part, Start):
            found = _entries(node, part, places)
            assert isinstance(found, Start)
        else:
            features = axis_of(Atom(f"{node.name}.gate", Length.of(len(places))))
            found = selected(node, part, places)
            found = replace(found, features=features, axes=(*part.axes[:-1], features))
        parts.append(found)
    row, state = parts
    assert isinstance(row, Flow)
    return Mixed((row, state), value.why)

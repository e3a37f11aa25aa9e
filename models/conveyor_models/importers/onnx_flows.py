"""The operators of ONNX on what flows from the input to the output.

Each returns what flows on, at its next stage, or refuses by name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Final, cast

import numpy as np

from conveyor_models.importers.common import ImportedLayer, refused, two_ways
from conveyor_models.importers.onnx_plumbing import Node, slice_ranges
from conveyor_models.importers.onnx_values import (
    Array,
    Atom,
    Axis,
    Carried,
    Flow,
    Known,
    Length,
    Stage,
    Value,
    axis_number,
    integers,
    known,
)

ACTIVATIONS: Final = {"Softmax": "softmax", "LogSoftmax": "log_softmax", "Sigmoid": "sigmoid"}


def constant(node: Node) -> Known:
    """The array of a Constant node."""
    for name in ("value", "value_float", "value_floats", "value_int", "value_ints"):
        if name in node.attributes:
            value = node.attributes[name]
            dtype = np.int64 if "int" in name else np.float32
            return Known(value if name == "value" else np.asarray(value, dtype))
    raise refused(node.name, "a constant that is neither numbers nor a tensor")


def flow_of(node: Node, inputs: list[Value | None], place: int = 0) -> Flow:
    """The input that has to be what flows."""
    value = inputs[place] if place < len(inputs) else None
    if not isinstance(value, Flow) or value.way is not None:
        raise refused(node.name, f"{node.op} on something that is not what flows from the input")
    return value


def activation(node: Node, flow: Flow) -> Flow:
    """Softmax, LogSoftmax or Sigmoid."""
    if node.op != "Sigmoid":
        # Before opset 13 everything from the axis on is one; along the last axis that is the same.
        axis = node.axis(len(flow.axes), default=-1 if node.opset >= 13 else 1)
        if axis != len(flow.axes) - 1 or flow.axes[-1] != flow.features:
            raise refused(node.name, f"{node.op} along another axis than that of the features")
    return replace(flow, stage=Stage("activation", node.name, flow.stage, ACTIVATIONS[node.op]))


def _times(node: Node, flow: Flow, matrix: Array) -> Flow:
    """The matrix is [O, K]."""
    if matrix.ndim != 2 or not flow.axes or flow.axes[-1] != flow.features:
        raise refused(node.name, f"{node.op} along another axis than that of the features")
    features = (Atom(f"{node.name}.outputs", Length(matrix.shape[0])),)
    stage = Stage("matrix", node.name, flow.stage, matrix)
    return replace(flow, stage=stage, features=features, axes=(*flow.axes[:-1], features))


def _plus(node: Node, flow: Flow, bias: Array) -> Flow:
    size = flow.stage.content.shape[0] if isinstance(flow.stage.content, np.ndarray) else -1
    fits = bias.shape in ((), (1,)) or (bias.size == size and bias.shape[-1] == size)
    if flow.stage.kind != "matrix" or flow.axes[-1] != flow.features or not fits:
        raise refused(node.name, f"{node.op} of {list(bias.shape)} that is no bias of a head")
    whole = np.broadcast_to(bias.reshape(-1), (size,))
    return replace(flow, stage=Stage("bias", node.name, flow.stage, whole))


def _matmul(node: Node, inputs: list[Value | None]) -> list[Value]:
    return [_times(node, flow_of(node, inputs), known(node.name, "its matrix", inputs[1]).T)]


def _gemm(node: Node, inputs: list[Value | None]) -> list[Value]:
    given = node.attributes
    if given.get("alpha", 1.0) != 1 or given.get("beta", 1.0) != 1 or given.get("transA", 0):
        raise refused(node.name, "Gemm with alpha, beta or transA")
    flow = flow_of(node, inputs)
    matrix = known(node.name, "its matrix", inputs[1])
    flow = _times(node, flow, matrix if given.get("transB", 0) else matrix.T)
    if len(inputs) > 2 and inputs[2] is not None:
        flow = _plus(node, flow, known(node.name, "its bias", inputs[2]))
    return [flow]


def _add(node: Node, inputs: list[Value | None]) -> list[Value]:
    place = 0 if isinstance(inputs[0], Flow) else 1
    bias = known(node.name, "one of what it adds", inputs[1 - place])
    return [_plus(node, flow_of(node, inputs, place), bias)]


def _gather(node: Node, inputs: list[Value | None]) -> list[Value] | None:
    """An embedding, the last step, or one direction."""
    table, places = inputs[0], inputs[1]
    if isinstance(places, Flow):
        rows = known(node.name, "its table", table)
        if rows.ndim != 2 or node.axis(2) != 0 or not places.tokens:
            raise refused(node.name, "Gather that is no embedding of whole numbers")
        features = (Atom(f"{node.name}.features", Length(rows.shape[1])),)
        stage = Stage("embedding", node.name, places.stage, rows)
        return [Flow(stage, (*places.axes, features), features)]
    flow = cast("Flow", table)
    if flow.stage.kind == "input":
        return None
    axis, wanted = node.axis(len(flow.axes)), integers(node.name, "indices", places)
    scalar = known(node.name, "indices", places).ndim == 0
    rest = (*flow.axes[:axis], *(() if scalar else ((),)), *flow.axes[axis + 1 :])
    if len(wanted) != 1:
        raise refused(node.name, "Gather of several")
    if flow.axes[axis] == (flow.time,):
        end = flow.time.length.known if flow.time is not None else None
        if wanted[0] not in (-1, None if end is None else end - 1):
            raise refused(node.name, "Gather of a step that is not the last")
        return [replace(flow, axes=rest, last=True)]
    return [_one_way(node, flow, axis, wanted[0], rest)]


def _one_way(node: Node, flow: Flow, axis: int, wanted: int, rest: tuple[Axis, ...]) -> Flow:
    """One direction's part of a bidirectional node's output."""
    if len(flow.features) != 2 or flow.axes[axis] != flow.features[:1] or flow.way is not None:
        raise refused(node.name, f"{node.op} along an axis that is neither time nor direction")
    way = axis_number(node.name, wanted, 2)
    return replace(flow, axes=rest, features=flow.features[1:], way=way)


def _slice(node: Node, inputs: list[Value | None]) -> list[Value] | None:
    flow = inputs[0]
    if not isinstance(flow, Flow) or flow.stage.kind == "input":
        return None
    ranges = slice_ranges(node, inputs)
    if len(ranges) != 1:
        raise refused(node.name, "Slice along several axes")
    axis = axis_number(node.name, ranges[0][0], len(flow.axes))
    wanted = list(range(2))[ranges[0][1]]
    if len(wanted) != 1:
        raise refused(node.name, "Slice of what flows, that is not one direction")
    rest = (*flow.axes[:axis], (), *flow.axes[axis + 1 :])
    return [_one_way(node, flow, axis, wanted[0], rest)]


def _split(node: Node, inputs: list[Value | None]) -> list[Value] | None:
    flow = inputs[0]
    if not isinstance(flow, Flow) or flow.stage.kind == "input":
        return None
    axis = node.axis(len(flow.axes))
    given = inputs[1] if len(inputs) > 1 else None
    sizes = node.attributes.get("split") if given is None else integers(node.name, "split", given)
    if len(node.outputs) != 2 or (sizes is not None and list(sizes) != [1, 1]):
        raise refused(node.name, "Split of what flows, that is not into its directions")
    rest = (*flow.axes[:axis], (), *flow.axes[axis + 1 :])
    return [_one_way(node, flow, axis, way, rest) for way in range(2)]


def _concat(node: Node, inputs: list[Value | None]) -> list[Value] | None:
    """Two directions side by side, of one node or of two."""
    flows = [each for each in inputs if isinstance(each, Flow)]
    if all(each.last or each.stage.kind == "input" for each in flows):
        return [Carried(node.name)]
    if len(flows) != 2 or len(inputs) != 2:
        raise refused(node.name, "Concat of what flows, that is not of two directions")
    first, second = flows
    axis = node.axis(len(first.axes))
    apart = (
        axis != len(first.axes) - 1
        or first.axes[:-1] != second.axes[:-1]
        or any(each.axes[-1] != each.features or each.last for each in flows)
    )
    if apart:
        raise refused(node.name, "Concat along another axis than that of the features")
    if (first.way, second.way) == (0, 1) and first.stage is second.stage:
        ways = Atom(f"{node.name}.ways", Length(2))
        features = (ways, *first.features)
        return [replace(first, axes=(*first.axes[:-1], features), features=features, way=None)]
    layers = [each.stage.content for each in flows]
    same = first.stage.before is second.stage.before and first.way is second.way is None
    if not same or not all(isinstance(each, ImportedLayer) for each in layers):
        raise refused(node.name, "Concat of what flows, that is not of two directions")
    forward, reverse = cast("list[ImportedLayer]", layers)
    if "direction" in forward.table or reverse.table.get("direction") != "reverse":
        raise refused(node.name, "Concat that is not of forward and then reverse")
    both = two_ways(forward, reverse, name=node.name)
    features = (Atom(f"{node.name}.ways", Length(2)), *first.features)
    stage = Stage("layer", node.name, first.stage.before, both)
    axes = (*first.axes[:-1], features)
    return [replace(first, stage=stage, axes=axes, features=features)]


FLOWS: Final[Mapping[str, Callable[[Node, list[Value | None]], list[Value] | None]]] = {
    "Add": _add,
    "Concat": _concat,
    "Gather": _gather,
    "Gemm": _gemm,
    "MatMul": _matmul,
    "Slice": _slice,
    "Split": _split,
}
"""On what flows; None where what flows is only state, which `onnx_plumbing` sees to."""

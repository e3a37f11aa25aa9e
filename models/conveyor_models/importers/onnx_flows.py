"""The operators of ONNX that compute with what flows from the input to the outputs.

Each returns what flows on, or refuses by name. What is linear in a row becomes one affine map, for
`onnx_maps`; everything else a bundle has only at its ends.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Final

import numpy as np
import torch

from conveyor_models.importers import folding
from conveyor_models.importers.common import tensor_of
from conveyor_models.importers.onnx_maps import added, mapped, short, with_features
from conveyor_models.importers.onnx_node import Inputs, Node, Operator, at, first
from conveyor_models.importers.onnx_shapes import Length
from conveyor_models.importers.onnx_states import full_length
from conveyor_models.importers.onnx_values import (
    Array,
    Atom,
    Axis,
    Flow,
    Known,
    Stage,
    Value,
    axis_number,
    axis_of,
    known,
)

ACTIVATIONS: Final = {"Softmax": "softmax", "LogSoftmax": "log_softmax", "Sigmoid": "sigmoid"}


def flow_of(node: Node, inputs: Inputs, place: int = 0) -> Flow:
    """The input that has to be what flows."""
    value = at(inputs, place)
    if not isinstance(value, Flow):
        why = getattr(value, "why", None)
        raise why or node.refused("on something that is not what flows from the input")
    return value


# --- Ends ----------------------------------------------------------------------------------------


def embedding(node: Node, inputs: Inputs) -> list[Value]:
    """Gather of rows of a constant, by what flows."""
    rows, places = known(node.name, "its table", first(node, inputs)), flow_of(node, inputs, 1)
    if rows.ndim != 2 or node.axis(2) != 0 or not places.tokens:
        raise node.refused("that is no embedding of whole numbers")
    features = axis_of(Atom(f"{node.name}.features", Length.of(rows.shape[1])))
    stage = Stage("embedding", node.name, places.stage, None, rows)
    return [
        replace(
            places,
            stage=stage,
            axes=(*places.axes, features),
            features=features,
            tokens=False,
        )
    ]


def activation(node: Node, inputs: Inputs) -> list[Value]:
    """Softmax, LogSoftmax or Sigmoid."""
    flow = flow_of(node, inputs)
    if flow.activation is not None:
        raise node.refused(f"after {flow.activation}, with which a bundle ends")
    if node.op != "Sigmoid":
        # Before opset 13 everything from the axis on is one; along the last axis that is the same.
        axis = node.axis(len(flow.axes), default=-1 if node.opset >= 13 else 1)
        place = axis == len(flow.axes) - 1 or node.opset >= 13
        if not place or flow.axes[axis] != flow.features:
            raise node.refused("along another axis than that of the features")
    found = replace(flow, activation=ACTIVATIONS[node.op], final=False)
    return [replace(found, computed=flow.computed or node.name)]


# --- Maps ----------------------------------------------------------------------------------------


def _times(node: Node, flow: Flow, matrix: Array, bias: Array | None = None) -> Flow:
    """The matrix is [O, K]; the bias [O], or none."""
    if not flow.axes:
        raise node.refused("of something without axes")
    flow = with_features(node, flow, len(flow.axes) - 1)
    weight = tensor_of(node.name, matrix)
    added_bias = None if bias is None else tensor_of(node.name, bias)
    affine = folding.linear(short(node.name), weight, added_bias)
    found = mapped(node, flow, affine, biased=bias is not None)
    features: Axis = axis_of(Atom(f"{node.name}.outputs", Length.of(matrix.shape[0])))
    return replace(found, features=features, axes=(*flow.axes[:-1], features))


def mat_mul(node: Node, inputs: Inputs) -> list[Value]:
    """A matrix on the right is a linear layer."""
    flow = flow_of(node, inputs)
    matrix = known(node.name, "its matrix", at(inputs, 1))
    if matrix.ndim > 2 and set(matrix.shape[:-2]) == {1} and matrix.ndim <= len(flow.axes):
        matrix = matrix.reshape(matrix.shape[-2:])
    if matrix.ndim != 2:
        raise node.refused(f"by an array of shape {list(matrix.shape)[:8]}")
    return [_times(node, flow, matrix.T)]


def gemm(node: Node, inputs: Inputs) -> list[Value]:
    """A linear layer on rows that lie along two axes."""
    flow = flow_of(node, inputs)
    matrix = known(node.name, "its matrix", at(inputs, 1))
    if node.attributes.get("transA", 0) or len(flow.axes) != 2 or matrix.ndim != 2:
        raise node.refused("with transA, or of more than two axes")
    matrix = matrix if node.attributes.get("transB", 0) else matrix.T
    node.spend(matrix.shape)
    alpha, beta = (float(node.attributes.get(name, 1.0)) for name in ("alpha", "beta"))
    bias = at(inputs, 2)
    found = None if bias is None else known(node.name, "its bias", bias)
    if found is not None:
        size = matrix.shape[0]
        # One number for each row of the batch, [size, 1], would be of the right size as well.
        if found.ndim > 2 or (found.size != 1 and found.shape not in ((size,), (1, size))):
            raise node.refused(f"with a bias of shape {list(found.shape)[:8]}")
        found = np.broadcast_to(_scaled(found.reshape(-1), beta), (size,))
    return [_times(node, flow, _scaled(matrix, alpha), found)]


def _scaled(array: Array, factor: float) -> Array:
    return array if factor == 1 else (array * np.float32(factor)).astype(array.dtype)


def elementwise(node: Node, inputs: Inputs) -> list[Value]:
    """Add, Sub, Mul or Div of what flows and a constant, or a sum of two maps of the same row."""
    flows = [value for value in inputs if isinstance(value, Flow)]
    if len(inputs) != 2:
        raise node.refused(f"of {len(inputs)} operands")
    if len(flows) == 2:
        return [_of_two(node, *flows)]
    place = 0 if isinstance(inputs[0], Flow) else 1
    flow = flow_of(node, inputs, place)
    array = known(node.name, "one of its operands", at(inputs, 1 - place))
    flow, values = _along_features(node, flow, array)
    constant = tensor_of(node.name, values).double()
    one, zero = torch.ones_like(constant), torch.zeros_like(constant)
    match node.op, place:
        case "Add", _:
            factor, offset = one, constant
        case "Sub", 0:
            factor, offset = one, -constant
        case "Sub", _:
            factor, offset = -one, constant
        case "Mul", _:
            factor, offset = constant, zero
        case "Div", 0:
            if not bool(constant.all()):
                raise node.refused("divides by 0")
            factor, offset = one / constant, zero
        case _:
            raise node.refused("of a constant by what flows, which is not linear")
    affine = folding.scale(short(node.name), factor, offset)
    return [mapped(node, flow, affine, biased=node.op in ("Add", "Sub"))]


def _of_two(node: Node, left: Flow, right: Flow) -> Flow:
    """Only where both are maps of the same row, so that their sum is one as well."""
    if node.op == "Sub":
        right = _negated(node, right)
    if node.op not in ("Add", "Sub"):
        raise node.refused("of two paths that flow: a bundle has no place for it")
    return added(node, (left, right))


def _negated(node: Node, flow: Flow) -> Flow:
    if flow.size is None:
        raise node.refused("of features whose number the file does not state")
    ones = torch.ones(flow.size)
    return mapped(node, flow, folding.scale(short(node.name), -ones, torch.zeros_like(ones)))


def negative(node: Node, inputs: Inputs) -> list[Value]:
    """Neg of what flows."""
    return [_negated(node, flow_of(node, inputs))]


def _along_features(node: Node, flow: Flow, array: Array) -> tuple[Flow, Array]:
    """The constant as one number for each feature, where it does not differ along other axes."""
    more = array.ndim - len(flow.axes)
    if more > 0:
        flow = replace(flow, axes=((),) * more + flow.axes)
    array = array.reshape((1,) * -more + array.shape)
    for place, length in enumerate(flow.lengths):
        # A constant may be written out along the batch.
        first_of = array.take([0], place) if array.shape[place] else array
        written = flow.axes[place] != flow.features and array.shape[place] == length.known
        if written and (array == first_of).all():
            array = first_of
    long = [place for place, size in enumerate(array.shape) if size != 1]
    if len(long) > 1 or any(not flow.axes[place] for place in long):
        raise node.refused(
            f"of a constant of shape {list(array.shape)[:8]}, which differs from step to step or"
            " within the batch"
        )
    if long:
        flow = with_features(node, flow, long[0])
    size = flow.size if flow.size is not None else array.size if long else None
    if size is None:
        raise node.refused("of features whose number the file does not state")
    if array.size not in (1, size):
        raise node.refused(f"of {array.size} numbers and rows of {size}")
    return flow, np.broadcast_to(array.reshape(-1), (size,))


def batch_normalization(node: Node, inputs: Inputs) -> list[Value]:
    """With the means and variances of its training."""
    flow = flow_of(node, inputs)
    if node.attributes.get("training_mode", 0) or any(node.outputs[1:]):
        raise node.refused("in training mode")
    if node.attributes.get("spatial", 1) != 1 or len(flow.axes) < 2:
        raise node.refused("of each place by itself")
    flow = with_features(node, flow, 1)
    names = ("scale", "bias", "mean", "variance")
    parts = [
        tensor_of(f"{node.name}: {name}", known(node.name, name, at(inputs, place)))
        for place, name in enumerate(names, 1)
    ]
    gamma, beta, mean, variance = parts
    size = flow.size if flow.size is not None else mean.numel()
    if any(each.shape != (size,) for each in parts):
        raise node.refused(f"of {mean.numel()} features and rows of {size}")
    epsilon = float(node.attributes.get("epsilon", 1e-5))
    affine = folding.batch_norm(short(node.name), mean, variance, epsilon, gamma, beta)
    return [mapped(node, flow, affine, biased=True)]


def reverse_sequence(node: Node, inputs: Inputs) -> list[Value]:
    """A flip of an axis, where every sequence is as long as it."""
    flow = flow_of(node, inputs)
    axis = axis_number(node.name, int(node.attributes.get("time_axis", 0)), len(flow.axes))
    own = flow.axes[axis]
    if not full_length(at(inputs, 1), flow.lengths[axis]):
        raise node.refused("its sequence_lens are not known to be those of whole sequences")
    if len(own) != 1 or own == flow.features:
        raise node.refused("along an axis that is not that of steps")
    return [replace(flow, flipped=flow.flipped ^ {own[0]})]


def constant(node: Node) -> Known:
    """The array of a Constant node."""
    for name in ("value", "value_float", "value_floats", "value_int", "value_ints"):
        if name in node.attributes:
            value = node.attributes[name]
            dtype = np.int64 if "int" in name else np.float32
            return Known(value if name == "value" else np.asarray(value, dtype))
    raise node.refused("a constant that is neither numbers nor a tensor")


FLOWS: Final[Mapping[str, Operator]] = {
    "Add": elementwise,
    "BatchNormalization": batch_normalization,
    "Div": elementwise,
    "Gemm": gemm,
    "MatMul": mat_mul,
    "Mul": elementwise,
    "Neg": negative,
    "ReverseSequence": reverse_sequence,
    "Sub": elementwise,
} | dict.fromkeys(ACTIVATIONS, activation)

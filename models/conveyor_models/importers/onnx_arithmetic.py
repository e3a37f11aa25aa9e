"""Arithmetic of an ONNX graph that does not touch what flows: on constants and on shapes.

Constants are computed as ONNX computes them, in their own type. Of shapes, see `onnx_shapes`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

import numpy as np

from conveyor_models.importers.common import kind_of
from conveyor_models.importers.onnx_node import Inputs, Node, Operator, at, first
from conveyor_models.importers.onnx_shapes import ARITHMETIC, ONE, Length, product, same
from conveyor_models.importers.onnx_values import (
    LENGTHS_MAX,
    Array,
    Counts,
    Known,
    Lengths,
    Repeated,
    Value,
    known,
    lengths_of,
)

_BINARY: Final[Mapping[str, Callable[[Any, Any], Any]]] = {
    "Add": np.add,
    "Div": np.divide,
    "Max": np.maximum,
    "Min": np.minimum,
    "Mul": np.multiply,
    "Pow": np.power,
    "Sub": np.subtract,
}
_UNARY: Final[Mapping[str, Callable[[Any], Any]]] = {
    "Abs": np.abs,
    "Exp": np.exp,
    "Log": np.log,
    "Neg": np.negative,
    "Reciprocal": np.reciprocal,
    "Sqrt": np.sqrt,
    "Tanh": np.tanh,
}


def binary(node: Node, inputs: Inputs) -> list[Value]:
    """Two constants, two shapes, or a repeated number and another."""
    left, right = first(node, inputs), at(inputs, 1)
    if right is None:
        return [left]
    if len(inputs) > 2:
        raise node.refused("of more than two")
    pair = (left, right)
    if any(isinstance(each, Counts) for each in pair) or _counting(pair):
        return [_counts(node, left, right)]
    if any(isinstance(each, Lengths) for each in pair):
        return [_of_shapes(node, left, right)]
    if any(isinstance(each, Repeated) for each in pair):
        return [_of_repeated(node, left, right)]
    return [Known(_of_arrays(node, known_side(node, left), known_side(node, right)))]


def known_side(node: Node, value: Value) -> Array:
    """An operand that has to be a constant."""
    if not isinstance(value, Known | Lengths):
        raise node.refused("of something that is neither a constant nor what flows")
    return known(node.name, "an operand", value)


def _of_arrays(node: Node, left: Array, right: Array) -> Array:
    if node.op not in _BINARY or left.dtype.kind not in "fiu" or right.dtype.kind not in "fiu":
        raise node.refused(f"of {kind_of(left.dtype)} and {kind_of(right.dtype)}")
    node.spend(np.broadcast_shapes(left.shape, right.shape))
    if node.op == "Div" and left.dtype.kind in "iu":
        if not right.all():
            raise node.refused("divides by 0")
        found = np.sign(left) * np.sign(right) * (np.abs(left) // np.abs(right))
        return np.asarray(found)
    with np.errstate(all="ignore"):  # infinities are refused where they become weights
        return np.asarray(_BINARY[node.op](left, right), left.dtype)


def _of_shapes(node: Node, left: Value, right: Value) -> Lengths:
    (first_side, scalar), (second_side, also) = _lengths(node, left), _lengths(node, right)
    size = max(len(first_side), len(second_side))
    sides = [each * size if len(each) == 1 else each for each in (first_side, second_side)]
    if node.op not in ARITHMETIC or len(sides[0]) != len(sides[1]) or size > LENGTHS_MAX:
        raise node.refused("of shapes that do not fit")
    found = [_combined(node, a, b) for a, b in zip(*sides, strict=True)]
    return Lengths(tuple(found), scalar=scalar and also)


def _combined(node: Node, left: Length, right: Length) -> Length:
    found = ARITHMETIC[node.op](left, right) if node.op in ARITHMETIC else None
    if found is None:
        raise node.refused("of lengths that are only known when the graph runs")
    return found


def _lengths(node: Node, value: Value) -> tuple[tuple[Length, ...], bool]:
    """The lengths, and whether they are one number without an axis."""
    if isinstance(value, Lengths):
        return value.of, value.scalar
    array = known_side(node, value)
    if array.dtype.kind not in "iu" or array.ndim > 1 or array.size > LENGTHS_MAX:
        raise node.refused("of a shape and something that is none")
    return tuple(Length.of(int(each)) for each in np.atleast_1d(array)), array.ndim == 0


def _counting(pair: tuple[Value, Value]) -> bool:
    """Whether one is a repeated whole number, and the other a length."""
    whole = [isinstance(each, Repeated) and each.array.dtype.kind in "iu" for each in pair]
    return any(whole) and any(isinstance(each, Lengths) for each in pair)


def _counts(node: Node, left: Value, right: Value) -> Counts:
    sides: list[tuple[Length, tuple[Length, ...]]] = []
    for each in (left, right):
        match each:
            case Counts():
                sides.append((each.length, each.lengths))
            case Repeated() if each.array.size == 1 and each.array.dtype.kind in "iu":
                sides.append((Length.of(int(each.array.reshape(()))), each.lengths))
            case _:
                lengths, _ = _lengths(node, each)
                if len(lengths) != 1:
                    raise node.refused("of a repeated length and several others")
                sides.append((lengths[0], ()))
    shapes = [shape for _, shape in sides if product(shape) != ONE]
    if len(set(shapes)) > 1:
        raise node.refused("of lengths that are repeated in two ways")
    length = _combined(node, sides[0][0], sides[1][0])
    return Counts(length, shapes[0] if shapes else ())


def _of_repeated(node: Node, left: Value, right: Value) -> Repeated:
    """A repeated array and one number, or one that is repeated alike."""
    pair = (left, right)
    repeated = next(each for each in pair if isinstance(each, Repeated))
    arrays: list[Array] = []
    for each in pair:
        if isinstance(each, Repeated):
            if each.lengths != repeated.lengths:
                raise node.refused("of constants that are repeated in two ways")
            arrays.append(each.array)
        else:
            array = known_side(node, each)
            if array.size != 1 or array.ndim > repeated.array.ndim:
                raise node.refused("of a constant that is repeated, and another")
            arrays.append(array)
    return Repeated(_of_arrays(node, arrays[0], arrays[1]), repeated.lengths)


def unary(node: Node, inputs: Inputs) -> list[Value]:
    """A function of a constant."""
    value = first(node, inputs)
    if isinstance(value, Lengths) and node.op == "Neg":
        return [Lengths(tuple(each.times(Length.of(-1)) for each in value.of), value.scalar)]
    array = value.array if isinstance(value, Repeated) else known_side(node, value)
    if array.dtype.kind != "f" and not (node.op in ("Neg", "Abs") and array.dtype.kind == "i"):
        raise node.refused(f"of {kind_of(array.dtype)}")
    node.spend(array.shape)
    with np.errstate(all="ignore"):
        found = np.asarray(_UNARY[node.op](array))
    return [Repeated(found, value.lengths) if isinstance(value, Repeated) else Known(found)]


def reduce_prod(node: Node, inputs: Inputs) -> list[Value]:
    """All lengths of a shape multiplied."""
    value = first(node, inputs)
    lengths, _ = _lengths(node, value)
    axes = node.attributes.get("axes")
    if len(inputs) > 1 and inputs[1] is not None:
        axes = known(node.name, "axes", inputs[1]).tolist()
    if axes not in (None, [0], [-1]):
        raise node.refused("along no axis that a shape has")
    return [Lengths((product(lengths),), scalar=not node.attributes.get("keepdims", 1))]


def mat_mul(node: Node, inputs: Inputs) -> list[Value]:
    """Two constants multiplied: weights that were left in two factors."""
    arrays = [known_side(node, value) for value in inputs if value is not None]
    if len(arrays) != 2 or any(each.ndim != 2 for each in arrays):
        raise node.refused("of constants that are no matrices")
    left, right = arrays
    node.multiply(left.shape[0] * left.shape[1] * right.shape[-1])
    node.spend((left.shape[0], right.shape[1]))
    return [Known(left @ right)]


def where(node: Node, inputs: Inputs) -> list[Value]:
    """One of two shapes or arrays, place by place, as a constant says."""
    chosen = known(node.name, "its condition", first(node, inputs))
    pair = at(inputs, 1), at(inputs, 2)
    if any(isinstance(each, Lengths) for each in pair):
        yes, no = (lengths_of(node.name, "a side", each) for each in pair)
        size = max(len(yes), len(no), chosen.size)
        sides = [(each * size if len(each) == 1 else each) for each in (yes, no)]
        flags = np.broadcast_to(chosen.reshape(-1), (size,)).tolist()
        if any(len(each) != size for each in sides):
            raise node.refused("of shapes that differ in length")
        picked = tuple(a if flag else b for flag, a, b in zip(flags, *sides, strict=True))
        return [Lengths(picked, scalar=size == 1 and chosen.ndim == 0)]
    arrays = [known(node.name, "a side", each) for each in pair]
    node.spend(np.broadcast_shapes(chosen.shape, *(each.shape for each in arrays)))
    return [Known(np.where(chosen, *arrays))]


def equal(node: Node, inputs: Inputs) -> list[Value]:
    """Whether lengths or numbers are the same."""
    pair = first(node, inputs), at(inputs, 1)
    if any(isinstance(each, Lengths) for each in pair):
        left, right = (lengths_of(node.name, "a side", each) for each in pair)
        size = max(len(left), len(right))
        sides = [(each * size if len(each) == 1 else each) for each in (left, right)]
        found = [same(a, b) for a, b in zip(*sides, strict=True)]
        if None in found:
            raise node.refused("of lengths that are not known")
        return [Known(np.array(found, np.bool_))]
    arrays = [known(node.name, "a side", each) for each in pair]
    node.spend(np.broadcast_shapes(*(each.shape for each in arrays)))
    return [Known(np.equal(*arrays))]


CONSTANTS: Final[Mapping[str, Operator]] = (
    dict.fromkeys(_BINARY, binary)
    | dict.fromkeys(_UNARY, unary)
    | {"Equal": equal, "MatMul": mat_mul, "ReduceProd": reduce_prod, "Where": where}
)

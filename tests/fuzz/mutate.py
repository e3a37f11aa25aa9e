"""Changes to inputs that keep their outer form, so that more than the parser is reached."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any, Final

import onnx
from onnx import TensorProto

OPERATORS: Final = (
    "Add", "Concat", "Constant", "ConstantOfShape", "Div", "Expand", "Flatten", "GRU", "Gather",
    "Gemm", "Identity", "LSTM", "MatMul", "Mul", "Pad", "RNN", "Range", "ReduceProd", "Reshape",
    "ReverseSequence", "Shape", "Slice", "Softmax", "Split", "Squeeze", "Sub", "Sum", "Tile",
    "Transpose", "Unsqueeze", "Where",
)  # fmt: skip
NUMBERS: Final = (-(2**63), -(2**31), -1, 0, 1, 2, 3, 5, 255, 2**16, 2**31 - 1, 2**40, 2**63 - 1)
CHANGES_MAX: Final = 4
Mutate = Callable[[bytes, int], bytes]


def onnx_graph(data: bytes, size_max: int, seed: int, other: Mutate) -> bytes:
    """Nodes, names, attributes, shapes and values of a graph, or any bytes of the file."""
    dice = random.Random(seed)
    model = onnx.ModelProto()
    try:
        model.ParseFromString(data)
        if not model.graph.node or dice.random() < 0.1:
            return other(data, size_max)
        for _ in range(dice.randint(1, CHANGES_MAX)):
            _change_graph(model.graph, dice)
        changed = model.SerializeToString()
    except Exception:  # noqa: BLE001 - of protobuf, where a name is not UTF-8 for instance
        return other(data, size_max)
    return changed if len(changed) <= size_max else data


def _change_graph(graph: Any, dice: random.Random) -> None:
    names = [name for each in graph.node for name in each.output]
    names += [each.name for each in (*graph.initializer, *graph.input)] + [""]
    if not graph.node:
        return
    node = dice.choice(graph.node)
    match dice.randrange(10):
        case 0:
            node.op_type = dice.choice(OPERATORS)
        case 1 if node.input:
            node.input[dice.randrange(len(node.input))] = dice.choice(names)
        case 2:
            node.input.append(dice.choice(names))
        case 3 if node.input:
            del node.input[dice.randrange(len(node.input))]
        case 4:
            graph.node.add().CopyFrom(node)
            graph.node[-1].output[:] = [f"{name}_" for name in node.output]
            dice.choice(graph.output).name = dice.choice(names)
        case 5:
            del graph.node[dice.randrange(len(graph.node))]
        case 6 | 7 if node.attribute:
            _change_attribute(dice.choice(node.attribute), dice)
        case 8 if graph.initializer:
            _change_tensor(dice.choice(graph.initializer), dice)
        case _ if graph.input:
            dims = dice.choice(graph.input).type.tensor_type.shape.dim
            if dims:
                dice.choice(dims).dim_value = dice.choice(NUMBERS)


def _change_attribute(attribute: Any, dice: random.Random) -> None:
    if attribute.HasField("t"):
        _change_tensor(attribute.t, dice)
    elif attribute.ints and dice.random() < 0.7:
        attribute.ints[dice.randrange(len(attribute.ints))] = dice.choice(NUMBERS)
    elif attribute.strings:
        attribute.strings[0] = dice.choice((b"Relu", b"reverse", b"", b"\xff"))
    elif dice.random() < 0.2:
        attribute.type = dice.randrange(12)
    else:
        attribute.i = dice.choice(NUMBERS)


def _change_tensor(tensor: Any, dice: random.Random) -> None:
    match dice.randrange(5):
        case 0 if tensor.dims:
            tensor.dims[dice.randrange(len(tensor.dims))] = dice.choice(NUMBERS)
        case 1:
            tensor.data_type = dice.randrange(24)
        case 2 if tensor.raw_data:
            data = bytearray(tensor.raw_data)
            at = dice.randrange(len(data))
            data[at : at + 8] = dice.choice(NUMBERS).to_bytes(8, "little", signed=True)
            tensor.raw_data = bytes(data[: len(tensor.raw_data)])
        case 3 if tensor.dims:
            del tensor.dims[-1]
        case _:
            tensor.data_location = TensorProto.EXTERNAL
            tensor.external_data.add(
                key="location", value=dice.choice(("../x", "x", "/", "model.onnx"))
            )


def json_tree(data: bytes, size_max: int, seed: int, other: Mutate) -> bytes:
    """Values and keys of a JSON document, or any bytes of it."""
    dice = random.Random(seed)
    try:
        tree = json.loads(data)
    except (ValueError, RecursionError):
        return other(data, size_max)
    if not isinstance(tree, dict | list) or dice.random() < 0.1:
        return other(data, size_max)
    for _ in range(dice.randint(1, CHANGES_MAX)):
        places = list(_places(tree))
        if places:
            _change_tree(*dice.choice(places), places, dice)
    changed = json.dumps(tree).encode()
    return changed if len(changed) <= size_max else data


def _places(tree: Any) -> Any:
    """Every container with each of its keys."""
    keys = tree.keys() if isinstance(tree, dict) else range(len(tree))
    for key in list(keys):
        yield tree, key
        if isinstance(tree[key], dict | list):
            yield from _places(tree[key])


def _change_tree(holder: Any, key: Any, places: list[tuple[Any, Any]], dice: random.Random) -> None:
    values = (None, True, False, "", "tanh", "LSTM", [], {}, 1.5, float("nan"), 10**400, *NUMBERS)
    match dice.randrange(4):
        case 0:
            del holder[key]
        case 1:
            other, its_key = dice.choice(places)
            if its_key in other if isinstance(other, dict) else its_key < len(other):
                holder[key] = json.loads(json.dumps(other[its_key]))
        case 2 if isinstance(holder, list) and len(holder) < 100:
            holder.append(json.loads(json.dumps(holder[key])))
        case _:
            holder[key] = dice.choice(values)

"""A layer as an ONNX graph, written from the documentation of the operators, and who runs it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from torch import Tensor

from conveyor_models import ModelSpec
from conveyor_models.layers import GatedLayer, GruLayer, LstmLayer, RecurrentLayer, RnnLayer
from tests.fidelity.networks import Rows

GATES = {"lstm": "iofg", "gru": "zrn", "rnn": "h"}
"""Our letters in their order."""
OPERATORS = {"lstm": "LSTM", "gru": "GRU", "rnn": "RNN"}


def make_model(spec: ModelSpec, weights: Mapping[str, Tensor], dtype: Any) -> onnx.ModelProto:
    """The graph of a model that is one layer: X [T, 1, I] -> Y [T, directions, 1, H]."""
    (layer,) = spec.layers
    w = {name: each.numpy().astype(dtype) for name, each in weights.items()}
    directions = [_direction(layer, w, f"layers.0.{prefix}") for prefix in layer.directions]
    parts = {name: np.stack([each[name] for each in directions]) for name in directions[0]}
    for name in {"initial_h", "initial_c"} & parts.keys():
        parts[name] = parts[name][:, None]  # [directions, 1, H]
    names = ["W", "R", "B", "", "initial_h", "initial_c", "P"]
    inputs = ["X", *(name if name in parts else "" for name in names)]
    while not inputs[-1]:
        inputs.pop()
    node = helper.make_node(
        OPERATORS[layer.cell],
        inputs,
        ["Y"],
        hidden_size=layer.size,
        direction=layer.direction,
        **_attributes(layer),
    )
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    assert kind in {TensorProto.FLOAT, TensorProto.DOUBLE}
    graph = helper.make_graph(
        [node],
        "layer",
        [helper.make_tensor_value_info("X", kind, [None, 1, spec.input_size])],
        [helper.make_tensor_value_info("Y", kind, [None, len(directions), 1, layer.size])],
        [numpy_helper.from_array(each, name) for name, each in parts.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 22)], ir_version=10)
    onnx.checker.check_model(model)
    return model


def _direction(layer: RecurrentLayer, w: Mapping[str, Rows], start: str) -> dict[str, Rows]:
    found = {
        "W": _gates(layer, w[f"{start}weight_input"]),
        "R": _gates(layer, w[f"{start}weight_recurrent"]),
    }
    bias = _gates(layer, w[f"{start}bias"])
    recurrent = np.zeros_like(bias)
    if isinstance(layer, GruLayer) and layer.reset == "after":
        recurrent[2 * layer.size :] = w[f"{start}bias_recurrent"]
    elif isinstance(layer, LstmLayer | RnnLayer):
        bias = recurrent = bias / 2  # two of them are added
    found["B"] = np.concatenate((bias, recurrent))
    if layer.initial_state:
        found |= {f"initial_{name}": w[f"{start}initial_{name}"] for name in layer.carry_names}
    if isinstance(layer, LstmLayer) and layer.peepholes:
        p = {
            gate: w.get(f"{start}peephole_{gate}", np.zeros(layer.size, bias.dtype))
            for gate in ("input", "output", "forget")
        }
        if layer.coupled:  # see `_gates`
            p["input"], p["forget"] = -p["forget"], np.zeros_like(p["forget"])
        found["P"] = np.concatenate([p["input"], p["output"], p["forget"]])
    return found


def _gates(layer: RecurrentLayer, weight: Rows) -> Rows:
    """Blocks of rows in ONNX's order.

    A coupled layer of ours computes f, and i = 1 - f; one of ONNX's computes i, and f = 1 - i. As
    1 - s(a) = s(-a) the one's f is the other's i with all signs changed.
    """
    blocks = dict(zip(layer.gates, np.split(weight, len(layer.gates)), strict=True))
    if isinstance(layer, LstmLayer) and layer.coupled:
        blocks["i"], blocks["f"] = -blocks["f"], np.zeros_like(blocks["f"])
    return np.concatenate([blocks[gate] for gate in GATES[layer.cell]])


def _attributes(layer: RecurrentLayer) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if layer.clip is not None:
        found["clip"] = layer.clip
    match layer:
        case RnnLayer():
            found["activations"] = ["Relu" if layer.nonlinearity == "relu" else "Tanh"]
        case LstmLayer():
            found["activations"] = ["Sigmoid", "Tanh", "Tanh"]
            if layer.coupled:
                found["input_forget"] = 1
        case GruLayer():
            found["activations"] = ["Sigmoid", "Tanh"]
            found["linear_before_reset"] = int(layer.reset == "after")
        case _:
            raise AssertionError(layer)
    directions = len(layer.directions)
    if isinstance(layer, GatedLayer) and layer.gate_activation == "hard_sigmoid":
        found["activations"][0] = "HardSigmoid"
        found["activation_alpha"] = [layer.hard_sigmoid_slope] * directions
        found["activation_beta"] = [0.5] * directions
    return found | {"activations": found["activations"] * directions}


def run_onnxruntime(model: onnx.ModelProto, rows: Rows) -> Rows:
    """ONNX Runtime's outputs [T, directions * H], float32."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    (y,) = session.run(None, {"X": rows[:, None]})
    return np.asarray(y).reshape(len(rows), -1)


def run_evaluator(model: onnx.ModelProto, rows: Rows) -> Rows:
    """The outputs of the onnx package's own evaluator, in the graph's type."""
    (y,) = ReferenceEvaluator(model).run(None, {"X": rows[:, None]})
    return np.asarray(y).reshape(len(rows), -1)

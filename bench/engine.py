"""The engine alone, in this process and on one thread, beside other ways to run the same layer.

All of them carry the state from call to call and compute the same numbers, which is checked first.
What is not the same favours the others: the engine is given and gives back bytes, finds each
session's carry by its slot and looks for values that are not finite; the others are given ready
arrays and check nothing.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx
import onnxruntime
import torch

from bench.contenders import Contender, Rows, conveyor, measure, random_input
from bench.model import SIZE
from bench.result import Line
from conveyor_models import Bundle, load_bundle
from conveyor_server.engine.products import PrepackedFamily

SHAPES: Final = ((1, 1), (32, 1), (256, 1), (1, 64), (32, 64))
"""Sessions and steps in a call."""
_ONNX_GATES: Final = (0, 3, 1, 2)
"""Where each of ONNX's gates i, o, f, c stands in ours, which are i, f, g, o."""


def run(
    bundle_folder: Path, *, rounds: int, seconds: float, say: Callable[[str], None]
) -> list[Line]:
    """Measures every shape; each round of each contender takes a tenth of ``seconds``."""
    bundle = load_bundle(bundle_folder)
    lines: list[Line] = []
    with torch.inference_mode():
        for sessions, steps in SHAPES:
            name = f"engine alone, {sessions} x {steps} step{'s' if steps > 1 else ''}"
            say(name)
            lines += _measure(name, bundle, sessions, steps, rounds, seconds / 10)
    return lines


def _measure(
    name: str, bundle: Bundle, sessions: int, steps: int, rounds: int, seconds: float
) -> list[Line]:
    x = random_input(steps, sessions, SIZE)
    makers = (_conveyor, _onnx_runtime, _torch_lstm, _product)
    contenders = [make(bundle, x) for make in makers]
    return measure(name, contenders, sessions * steps, rounds=rounds, seconds=seconds)


def _conveyor(bundle: Bundle, x: Rows) -> Contender:
    return conveyor(bundle, x, torch.device("cpu"))


def _onnx_runtime(bundle: Bundle, x: Rows) -> Contender:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    model = _onnx_model(bundle).SerializeToString()
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    h = c = np.zeros((1, x.shape[1], SIZE), dtype=np.float32)

    def run() -> Any:
        nonlocal h, c
        y, h, c = session.run(None, {"x": x, "h": h, "c": c})
        return y

    return Contender("ONNX Runtime", run, lambda y: y[:, 0])


def _onnx_model(bundle: Bundle) -> onnx.ModelProto:
    helper, real = onnx.helper, onnx.TensorProto.FLOAT
    weights = {
        "w": _onnx_order(bundle.weights["layers.0.weight_input"]),
        "r": _onnx_order(bundle.weights["layers.0.weight_recurrent"]),
        # ONNX has a bias of the input's product and one of the recurrent product.
        "b": np.pad(_onnx_order(bundle.weights["layers.0.bias"]), ((0, 0), (0, 4 * SIZE))),
    }
    node = helper.make_node(
        "LSTM", ["x", "w", "r", "b", "", "h", "c"], ["y", "yh", "yc"], hidden_size=SIZE
    )
    state = [1, "sessions", SIZE]
    graph = helper.make_graph(
        [node],
        "lstm",
        [
            helper.make_tensor_value_info("x", real, ["steps", "sessions", SIZE]),
            helper.make_tensor_value_info("h", real, state),
            helper.make_tensor_value_info("c", real, state),
        ],
        [
            helper.make_tensor_value_info("y", real, ["steps", 1, "sessions", SIZE]),
            helper.make_tensor_value_info("yh", real, state),
            helper.make_tensor_value_info("yc", real, state),
        ],
        [onnx.numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


def _onnx_order(weight: torch.Tensor) -> Rows:
    """[4 cells, ...] in our order of gates -> [1, 4 cells, ...] in ONNX's."""
    by_gate = weight.unflatten(0, (4, SIZE))
    return by_gate[list(_ONNX_GATES)].flatten(0, 1).unsqueeze(0).numpy()


def _torch_lstm(bundle: Bundle, x: Rows) -> Contender:
    lstm = torch.nn.LSTM(SIZE, SIZE)
    lstm.load_state_dict(
        {
            "weight_ih_l0": bundle.weights["layers.0.weight_input"],
            "weight_hh_l0": bundle.weights["layers.0.weight_recurrent"],
            "bias_ih_l0": bundle.weights["layers.0.bias"],
            "bias_hh_l0": torch.zeros(4 * SIZE),
        }
    )
    rows = torch.from_numpy(x)
    carry = (torch.zeros(1, x.shape[1], SIZE), torch.zeros(1, x.shape[1], SIZE))

    def run() -> torch.Tensor:
        nonlocal carry
        y, carry = lstm(rows, carry)
        return y

    return Contender("nn.LSTM", run, torch.Tensor.numpy)


def _product(bundle: Bundle, x: Rows) -> Contender:
    """The floor: the products of these steps and nothing else, weights packed beforehand."""
    steps, sessions, _ = x.shape
    name = "bare product"
    family = PrepackedFamily(1)
    w, r = bundle.weights["layers.0.weight_input"], bundle.weights["layers.0.weight_recurrent"]
    bias = bundle.weights["layers.0.bias"]
    rows = max(sessions, family.rows_multiple)
    if steps == 1:
        both = family.product(torch.cat((w, r), dim=1), bias)
        x_and_h = torch.randn(rows, 2 * SIZE)
        return Contender(name, lambda: both.linear(x_and_h), None)
    of_input, recurrent = family.product(w, bias), family.product(r, None)
    inputs, h = torch.from_numpy(x).flatten(0, 1), torch.randn(rows, SIZE)

    def run() -> None:
        gates = of_input.linear(inputs)
        for step in range(steps):
            start = min(step * sessions, len(gates) - rows)
            recurrent.accumulate(h, gates[start : start + rows])

    return Contender(name, run, None)

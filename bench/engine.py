"""The engine alone, in this process and on one thread, beside other ways to run the same layer.

All of them carry the state from call to call and compute the same numbers, which is checked first.
What is not the same favours the others: the engine is given and gives back bytes, finds each
session's carry by its slot and looks for values that are not finite; the others are given ready
arrays and check nothing.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter, process_time
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
import torch

from bench.model import SIZE
from bench.result import Line, Measured
from conveyor_models import Bundle, load_bundle
from conveyor_server.core import ModelKey
from conveyor_server.engine.engine import TorchEngine
from conveyor_server.engine.port import Done, Work
from conveyor_server.engine.products import PrepackedFamily

SHAPES: Final = ((1, 1), (32, 1), (256, 1), (1, 64), (32, 64))
"""Sessions and steps in a call."""
CALLS_WARM: Final = 5
_ONNX_GATES: Final = (0, 3, 1, 2)
"""Where each of ONNX's gates i, o, f, c stands in ours, which are i, f, g, o."""

Rows = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class _Contender:
    name: str
    run: Callable[[], Any]
    """What is timed: one call."""
    output: Callable[[Any], Rows] | None
    """What ``run`` returned -> outputs [steps, sessions, size]; None if it computes no outputs."""


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
    shape = (steps, sessions, SIZE)
    x = np.random.default_rng(2).standard_normal(shape, dtype=np.float32)
    contenders = [make(bundle, x) for make in (_conveyor, _onnx_runtime, _torch_lstm, _product)]
    _check_equal(contenders)
    measured: list[list[Measured]] = [[] for _ in contenders]
    for _ in range(rounds):
        for contender, found in zip(contenders, measured, strict=True):
            found.append(measured_round(contender.run, sessions * steps, seconds))
    return [
        Line(name, contenders[0].name, contender.name, measured[0], found)
        for contender, found in zip(contenders[1:], measured[1:], strict=True)
    ]


def measured_round(run: Callable[[], Any], steps: int, seconds: float) -> Measured:
    """Calls ``run``, which does ``steps`` steps, for so long."""
    for _ in range(CALLS_WARM):
        run()
    times: list[float] = []
    busy = process_time()
    started = perf_counter()
    end = started + seconds
    while started < end:
        run()
        ended = perf_counter()
        times.append(ended - started)
        started = ended
    # By processor time, which other programs on the machine take nothing of.
    busy = process_time() - busy
    p50, p99 = (float(each) * 1e3 for each in np.percentile(times, (50, 99)))
    done = steps * len(times)
    return Measured(done / busy, p50, p99, step_cpu_us=busy / done * 1e6)


def _check_equal(contenders: list[_Contender]) -> None:
    """Two calls of each, so that a carry that is not carried shows."""
    outputs: list[Rows] = []
    for contender in contenders:
        contender.run()
        raw = contender.run()
        if contender.output is not None:
            outputs.append(contender.output(raw))
            np.testing.assert_allclose(
                outputs[-1], outputs[0], rtol=1e-4, atol=1e-5, err_msg=contender.name
            )


def _conveyor(bundle: Bundle, x: Rows) -> _Contender:
    steps, sessions, _ = x.shape
    engine = TorchEngine(torch.device("cpu"), cpu_threads=1, slots=sessions)
    key = ModelKey(bundle.spec.name, bundle.spec.version)
    engine.add(key, engine.prepare(bundle))
    works: list[Work] = []
    for session in range(sessions):
        slot = engine.acquire(key)
        assert slot is not None
        works.append(Work(slot, steps, x[:, session].tobytes(), steps))

    def output(done: list[Done]) -> Rows:
        each = [np.frombuffer(one.rows, np.float32).reshape(steps, SIZE) for one in done]
        return np.stack(each, axis=1)

    return _Contender("conveyor", lambda: engine.run(key, works), output)


def _onnx_runtime(bundle: Bundle, x: Rows) -> _Contender:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    model = _onnx_model(bundle).SerializeToString()
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    h = c = np.zeros((1, x.shape[1], SIZE), dtype=np.float32)

    def run() -> Any:
        nonlocal h, c
        y, h, c = session.run(None, {"x": x, "h": h, "c": c})
        return y

    return _Contender("ONNX Runtime", run, lambda y: y[:, 0])


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


def _torch_lstm(bundle: Bundle, x: Rows) -> _Contender:
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

    return _Contender("nn.LSTM", run, torch.Tensor.numpy)


def _product(bundle: Bundle, x: Rows) -> _Contender:
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
        return _Contender(name, lambda: both.linear(x_and_h), None)
    of_input, recurrent = family.product(w, bias), family.product(r, None)
    inputs, h = torch.from_numpy(x).flatten(0, 1), torch.randn(rows, SIZE)

    def run() -> None:
        gates = of_input.linear(inputs)
        for step in range(steps):
            start = min(step * sessions, len(gates) - rows)
            recurrent.accumulate(h, gates[start : start + rows])

    return _Contender(name, run, None)

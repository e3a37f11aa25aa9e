"""ONNX graphs for tests, and who runs them."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from conveyor_models.importers import ImportedModel, import_model
from tests.unit.models.importing import FLOAT32_ERROR_MAX, error, network_of

GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}


def weights(op: str, size: int, reads: int, ways: int = 1, seed: int = 0) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    rows = GATES[op] * size
    shapes = {"W": (ways, rows, reads), "R": (ways, rows, size), "B": (ways, 2 * rows)}
    return {name: rng.normal(0, 0.7, shape).astype(np.float32) for name, shape in shapes.items()}


def cell_model(
    op: str,
    given: dict[str, Any],
    *,
    layout: int = 0,
    outputs: Sequence[str] = ("y",),
    tail: Sequence[Any] = (),
    extra: dict[str, Any] | None = None,
    result: str = "y",
    opset: int = 17,
    **attributes: Any,
) -> onnx.ModelProto:
    """A graph of one recurrent node, its optional inputs by name, and what comes after it."""
    places = ["W", "R", "B", "sequence_lens", "initial_h", "initial_c", "P"]
    names = [name if name in given else "" for name in places]
    while not names[-1]:
        names.pop()
    size = given["R"].shape[2]
    if layout:
        attributes["layout"] = layout
    node = helper.make_node(
        op, ["x", *names], list(outputs), name="cell", hidden_size=size, **attributes
    )
    reads = given["W"].shape[2]
    constants = {**given, **(extra or {})}
    return graph_model(
        [node, *tail],
        [("x", TensorProto.FLOAT, ["a", "b", reads])],
        [result],
        constants,
        opset,
    )


def graph_model(
    nodes: Sequence[Any],
    inputs: Sequence[tuple[str, int, list[Any]]],
    outputs: Sequence[str],
    constants: dict[str, Any],
    opset: int = 17,
) -> onnx.ModelProto:
    graph = helper.make_graph(
        list(nodes),
        "graph",
        [helper.make_tensor_value_info(*each) for each in inputs],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs],
        [numpy_helper.from_array(np.asarray(each), name) for name, each in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


def imported(model: onnx.ModelProto, folder: Path) -> ImportedModel:
    file = folder / "model.onnx"
    file.write_bytes(model.SerializeToString())
    return import_model(file)


def runtime(model: onnx.ModelProto, x: Any) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return session.run(None, {session.get_inputs()[0].name: x})[0]


def evaluated(model: onnx.ModelProto, x: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return ReferenceEvaluator(model).run(None, {model.graph.input[0].name: x})[0]


def laid_out(y: Any) -> Any:
    """Y [T, D, B, H] -> [T, B, D * H]."""
    steps, ways, batch, size = y.shape
    return y.transpose(0, 2, 1, 3).reshape(steps, batch, ways * size)


def judged(model: onnx.ModelProto, feeds: Mapping[str, Any]) -> dict[str, Any]:
    """All outputs of ONNX Runtime, by name."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4  # a graph that does not hold together raises
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    names = [each.name for each in session.get_outputs()]
    return dict(zip(names, session.run(names, dict(feeds)), strict=True))


def normal(*shape: int, seed: int = 0) -> Any:
    return np.random.default_rng(seed).normal(0, 1, shape).astype(np.float32)


def served(found: ImportedModel, x: Any) -> Any:
    """The rows [T, B, O] of a bundle for x [T, B, F]: whole, step by step and in chunks."""
    network = network_of(found)
    given = torch.from_numpy(np.ascontiguousarray(x))
    rows = network.predict(given).numpy()
    if network.spec.streamable:
        for chunk in (1, 3):
            carry, parts = None, []
            for start in range(0, len(x), chunk):
                carry, part = network.run(given[start : start + chunk], carry)
                parts.append(part.numpy())
            assert error(np.concatenate(parts), rows) < FLOAT32_ERROR_MAX
    return rows


def said(found: ImportedModel, text: str) -> bool:
    """Whether one of the notes has the text."""
    return any(text in note for note in found.notes)

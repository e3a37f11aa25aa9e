"""ONNX files: read with care, then followed from input to output.

The graph is data from outside: only the operators in `onnx_graph` and `onnx_plumbing` are looked
at, by code of ours. Weights kept in other files are read from inside the model's own folder only.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

from conveyor_models.errors import BundleError, ImportFileError
from conveyor_models.importers.common import (
    ImportedModel,
    checked_values,
    read_file,
    reader_module,
    refused,
)
from conveyor_models.importers.onnx_graph import Graph
from conveyor_models.importers.onnx_tensors import array_of
from conveyor_models.importers.onnx_values import Array

NODES_MAX: Final = 16_384
TENSORS_MAX: Final = 2 * NODES_MAX
"""Initializers: a node reads a few."""
OPSET_MIN: Final = 7
"""Before it, the recurrent operators and Gemm had another form."""
OPSET_MAX: Final = 26


def import_onnx(path: Path) -> ImportedModel:
    """The recurrent network that an ONNX graph is."""
    onnx = reader_module("onnx")
    data = read_file(path)
    model: Any = onnx.ModelProto()
    try:
        model.ParseFromString(data)
    except Exception as error:  # protobuf's DecodeError
        raise ImportFileError(
            "is not an ONNX file, or damaged; is the download complete?", path=path
        ) from error
    graph = model.graph
    if not graph.node or not graph.output:
        raise ImportFileError("holds no graph", path=path)
    if len(graph.node) > NODES_MAX:
        raise ImportFileError(f"{len(graph.node)} nodes, expected at most {NODES_MAX}", path=path)
    if len(graph.initializer) > TENSORS_MAX:
        raise ImportFileError(
            f"{len(graph.initializer)} initializers, expected at most {TENSORS_MAX}", path=path
        )
    for part in ("functions", "training_info"):
        if getattr(model, part):
            raise refused(part, "are not supported")
    opset = _opset(model)
    try:
        constants = _constants(onnx, path, graph)
        return Graph(onnx, graph, opset, constants, model.producer_name).model()
    except BundleError:
        raise
    except (
        ArithmeticError,
        LookupError,
        MemoryError,
        RuntimeError,
        TypeError,
        ValueError,
    ) as error:
        # A graph that contradicts itself; ONNX's own checker would not find all of these either.
        raise ImportFileError(
            "its graph contradicts itself: check the file with onnx.checker.check_model, and export"
            " it again",
            path=path,
        ) from error


def _opset(model: Any) -> int:
    for each in model.opset_import:
        if each.domain in ("", "ai.onnx"):
            if not OPSET_MIN <= each.version <= OPSET_MAX:
                raise refused(f"opset {each.version}", f"expected {OPSET_MIN} to {OPSET_MAX}")
            return int(each.version)
    raise refused("opset", "the file imports none of ONNX's own")


def _constants(onnx: Any, path: Path, graph: Any) -> dict[str, Array]:
    """The initializers."""
    if graph.sparse_initializer:
        raise refused(graph.sparse_initializer[0].values.name, "is a sparse tensor")
    checked_values(path, {each.name: list(each.dims) for each in graph.initializer})
    files: dict[str, bytes] = {}
    return {each.name: array_of(onnx, each, path, files) for each in graph.initializer}

"""Graphs with a wire moved: each is refused, or what it computes is what the bundle computes."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import helper
from onnxruntime.capi import onnxruntime_pybind11_state as errors

from conveyor_models import BundleError
from conveyor_models.importers import ImportedModel
from tests.unit.models.importing import FLOAT32_ERROR_MAX, error
from tests.unit.models.onnx_files import imported, judged, normal, said, served

FILES = sorted((Path(__file__).parent / "files").glob("*.onnx"))
STEPS = 5
INVALID = (
    errors.Fail,
    errors.InvalidArgument,
    errors.InvalidGraph,
    errors.NotImplemented,
    errors.RuntimeException,
)
"""What ONNX Runtime raises for a graph that does not hold together."""


def shown(found: ImportedModel, x: Any) -> Iterator[Any]:
    """What an output may be of the rows: all, the last, the first, or the halves of these two."""
    rows = served(found, x)
    size = rows.shape[-1]
    for start, end in itertools.combinations(range(size + 1), 2):
        part = rows[..., start:end]
        yield part
        yield part[-1]
        yield part[0]
        half = (end - start) // 2
        yield np.concatenate((part[-1][:, :half], part[0][:, half:]), -1)


def computes(found: ImportedModel, x: Any, expected: Any) -> bool:
    """Whether the numbers are those of the bundle, in whatever order an output lays them."""
    wanted = np.sort(expected.ravel())
    return any(
        part.size == wanted.size and error(np.sort(part.ravel()), wanted) < 5 * FLOAT32_ERROR_MAX
        for part in shown(found, x)
    )


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_moved_wire_is_refused_or_followed(
    file: Path, data: st.DataObject, tmp_path: Path
) -> None:
    model = onnx.load(file)
    graph = model.graph
    made = [name for node in graph.node for name in node.output if name]
    names = made + [each.name for each in graph.initializer] + ["x"]
    for _ in range(data.draw(st.integers(1, 2))):
        if data.draw(st.integers(0, 4)) == 0:
            output = data.draw(st.sampled_from(made))
            del graph.output[:]
            graph.output.append(helper.make_tensor_value_info(output, onnx.TensorProto.FLOAT, None))
            continue
        node = data.draw(st.sampled_from(graph.node))
        if node.input:
            place = data.draw(st.integers(0, len(node.input) - 1))
            node.input[place] = data.draw(st.sampled_from(names))
    try:
        found = imported(model, tmp_path)
        found.spec("model")
    except BundleError:
        return
    x = normal(STEPS, 2, 6)
    with contextlib.suppress(*INVALID):
        for name, expected in judged(model, {"x": x.swapaxes(0, 1)}).items():
            # Steps that are written out may be fewer by now, from either end.
            fewer = [
                steps for steps in range(1, STEPS) if said(found, f"written out for {steps} steps")
            ]
            read = [x] + [part for steps in fewer for part in (x[:steps], x[-steps:])]
            carry = said(found, f"{name} is a final state")
            assert carry or any(computes(found, part, expected) for part in read)

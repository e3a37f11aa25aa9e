"""The engine against ONNX's LSTM, GRU and RNN, as ONNX Runtime and the onnx package compute them.

ONNX Runtime knows peepholes, coupling, clipping and the hard sigmoid, in float32; its own error is
in the figure. The evaluator of the onnx package knows peepholes and both resets, in float64; it
ignores the other options, so it is not asked about them.

Error is norm(out - judged) / norm(judged) over 1,000 steps. Against ONNX Runtime it was at most
4.6e-7 and against the evaluator 1.0e-6.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import pytest

from conveyor_models import ModelSpec
from conveyor_models.layers import GatedLayer, LstmLayer, RnnLayer
from tests.fidelity import reference
from tests.fidelity.cases import CELLS, MISTAKE_SHOWS, PREDICTED, STEPS, TOLERANCE_FLOAT32
from tests.fidelity.mistakes import applicable
from tests.fidelity.networks import Loaded, Rows, load, make_bundle, random_rows, random_weights
from tests.fidelity.onnx_judges import make_model, run_evaluator, run_onnxruntime

TOLERANCE_TWO_FLOAT32: Final = 2 * TOLERANCE_FLOAT32


def _is_operator(spec: ModelSpec) -> bool:
    return (
        len(spec.layers) == 1
        and spec.embedding is None
        and spec.attention is None
        and spec.head is None
        and not spec.layers[0].projection_size
    )


def _known_to_evaluator(spec: ModelSpec) -> bool:
    (layer,) = spec.layers
    match layer:
        case RnnLayer():
            plain = layer.nonlinearity == "tanh"
        case LstmLayer():
            plain = not layer.coupled and layer.gate_activation == "sigmoid"
        case GatedLayer():
            plain = layer.gate_activation == "sigmoid"
    return plain and layer.clip is None


OPERATORS: Final = {name: spec for name, spec in (CELLS | PREDICTED).items() if _is_operator(spec)}
PLAIN: Final = {name: spec for name, spec in OPERATORS.items() if _known_to_evaluator(spec)}
SMALL: Final = {name: spec for name, spec in OPERATORS.items() if spec.layers[0].size == 17}


def _run(loaded: Loaded, rows: Rows) -> Rows:
    return loaded.run_batch([rows])[0] if loaded.spec.streamable else loaded.predict(rows)


@pytest.mark.parametrize("spec", OPERATORS.values(), ids=OPERATORS.keys())
def test_the_engine_agrees_with_onnxruntime(spec: ModelSpec) -> None:
    weights = random_weights(spec, 5)
    rows = random_rows(spec, STEPS, 5)
    judged = run_onnxruntime(make_model(spec, weights, np.float32), rows)
    out = _run(load(make_bundle(spec, weights)), rows)
    assert reference.error(out, judged.astype(np.float64)) < TOLERANCE_TWO_FLOAT32


@pytest.mark.parametrize("spec", PLAIN.values(), ids=PLAIN.keys())
def test_the_engine_agrees_with_the_onnx_package(spec: ModelSpec) -> None:
    weights = random_weights(spec, 6)
    rows = random_rows(spec, STEPS, 6)
    judged = run_evaluator(make_model(spec, weights, np.float64), rows.astype(np.float64))
    out = _run(load(make_bundle(spec, weights)), rows)
    assert reference.error(out, judged) < TOLERANCE_FLOAT32


@pytest.mark.parametrize("spec", SMALL.values(), ids=SMALL.keys())
def test_the_judge_contradicts_every_mistake(spec: ModelSpec) -> None:
    weights = random_weights(spec, 0)
    rows = random_rows(spec, 100, 0)
    judged = run_onnxruntime(make_model(spec, weights, np.float32), rows)
    assert reference.error(judged, reference.run(spec, weights, rows)) < TOLERANCE_TWO_FLOAT32
    for mistake in applicable(spec):
        wrong = reference.run(spec, weights, rows, mistake=mistake)
        assert reference.error(judged, wrong) > MISTAKE_SHOWS, mistake

"""The engine against ``torch.nn``: modules that others wrote, run in float64.

They begin with weights so small that outputs have a root mean square of 0.02 to 0.1. The engine
computes tanh(x) as 2 s(2x) - 1, whose absolute error is that of float32 but whose relative error
grows as x falls: there it was between 0.4e-7 and 1.3e-6, and that of the modules themselves in
float32 about 1e-7.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from conveyor_models import ModelSpec, weights_from_torch
from tests.fidelity import reference
from tests.fidelity.cases import MISTAKE_SHOWS, STEPS, TOLERANCE_FLOAT32
from tests.fidelity.networks import Rows, load, make_bundle, make_spec, random_rows

Module = nn.LSTM | nn.GRU | nn.RNN
MODULES: Final[dict[str, tuple[type[Module], dict[str, Any], dict[str, Any]]]] = {
    "lstm": (nn.LSTM, {}, {"cell": "lstm"}),
    "gru": (nn.GRU, {}, {"cell": "gru"}),
    "rnn": (nn.RNN, {}, {"cell": "rnn"}),
    "rnn of relu": (nn.RNN, {"nonlinearity": "relu"}, {"cell": "rnn", "nonlinearity": "relu"}),
}
SHAPES: Final = [(1, 1, 0), (3, 2, 0), (17, 3, 0), (100, 2, 0), (512, 1, 0)]
"""Units, layers, projection."""
PROJECTED: Final = [(3, 1, 1), (17, 2, 5), (100, 2, 40)]


def weights_of(module: Module) -> dict[str, Tensor]:
    """The weights under the bundle's names, as PyTorch's documentation defines them."""
    state = {name: each.detach() for name, each in module.named_parameters()}
    weights: dict[str, Tensor] = {}
    for number in range(module.num_layers):
        for suffix, prefix in (("", ""), ("_reverse", "reverse."))[: 1 + module.bidirectional]:
            start, end = f"layers.{number}.{prefix}", f"_l{number}{suffix}"
            b_input, b_recurrent = state[f"bias_ih{end}"], state[f"bias_hh{end}"].clone()
            weights[f"{start}weight_input"] = state[f"weight_ih{end}"]
            weights[f"{start}weight_recurrent"] = state[f"weight_hh{end}"]
            if isinstance(module, nn.GRU):  # r scales the candidate's recurrent bias as well
                weights[f"{start}bias_recurrent"] = b_recurrent[2 * module.hidden_size :].clone()
                b_recurrent[2 * module.hidden_size :] = 0
            weights[f"{start}bias"] = b_input + b_recurrent
            if module.proj_size:
                weights[f"{start}weight_projection"] = state[f"weight_hr{end}"]
    return {name: each.float() for name, each in weights.items()}


def _judged(module: Module, rows: Rows) -> Rows:
    with torch.no_grad():
        return module.double()(torch.from_numpy(rows).double())[0].numpy()


def _spec(
    options: dict[str, Any], size: int, layers: int, projection: int, **more: Any
) -> ModelSpec:
    layer = {**options, "size": size, **more}
    if projection:
        layer["projection"] = projection
    return make_spec([layer] * layers, features=6)


@pytest.mark.parametrize(
    ("name", "size", "layers", "projection"),
    [(name, *shape) for name in MODULES for shape in SHAPES]
    + [("lstm", *shape) for shape in PROJECTED],
)
def test_the_engine_agrees_with_torch(name: str, size: int, layers: int, projection: int) -> None:
    kind, arguments, options = MODULES[name]
    if projection:
        arguments = {**arguments, "proj_size": projection}
    torch.manual_seed(size)
    module = kind(6, size, num_layers=layers, **arguments)
    spec = _spec(options, size, layers, projection)
    rows = random_rows(spec, STEPS, size)
    (out,) = load(make_bundle(spec, weights_of(module))).run_batch([rows])
    assert reference.error(out, _judged(module, rows)) < TOLERANCE_FLOAT32


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize(("size", "layers"), [(1, 1), (17, 2), (100, 1)])
def test_whole_sequences_agree_with_torch(name: str, size: int, layers: int) -> None:
    kind, arguments, options = MODULES[name]
    torch.manual_seed(size)
    module = kind(6, size, num_layers=layers, bidirectional=True, **arguments)
    spec = _spec(options, size, layers, 0, direction="bidirectional")
    rows = random_rows(spec, STEPS, size)
    out = load(make_bundle(spec, weights_of(module))).predict(rows)
    assert reference.error(out, _judged(module, rows)) < TOLERANCE_FLOAT32


def test_the_engine_agrees_with_a_torch_model_of_tokens() -> None:
    torch.manual_seed(0)
    embedding, module, head = nn.Embedding(31, 9), nn.LSTM(9, 17, num_layers=2), nn.Linear(17, 31)
    spec = make_spec([17, 17], tokens=31, embedding=9, head=31, activation="log_softmax")
    weights = weights_from_torch(module, embedding=embedding, head=head)
    rows = random_rows(spec, STEPS, 0)
    (out,) = load(make_bundle(spec, weights)).run_batch([rows])
    with torch.no_grad():
        hidden, _ = module.double()(embedding.double()(torch.from_numpy(rows).long()))
        judged = head.double()(hidden).log_softmax(dim=-1).numpy()
    assert reference.error(out, judged) < TOLERANCE_FLOAT32


@pytest.mark.parametrize("name", MODULES)
def test_a_judge_notices_gates_in_another_order(name: str) -> None:
    kind, arguments, options = MODULES[name]
    torch.manual_seed(0)
    module = kind(6, 17, **arguments)
    spec = _spec(options, 17, 1, 0)
    rows = random_rows(spec, STEPS, 0)
    judged = _judged(module, rows)
    right = weights_of(module)
    for part in ("weight_input", "weight_recurrent", "bias"):
        wrong = {**right, f"layers.0.{part}": right[f"layers.0.{part}"].roll(1, 0)}
        (out,) = load(make_bundle(spec, wrong)).run_batch([rows])
        assert reference.error(out, judged) > MISTAKE_SHOWS, part
        assert np.isfinite(out).all()

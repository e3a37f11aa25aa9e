"""The reference cells against plain numpy and against `nn.LSTM`, and mutations of them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from conveyor_models import (
    LstmCarry,
    LstmWeights,
    ModelSpec,
    Network,
    UnsupportedModuleError,
    lstm_cell,
    weights_from_torch,
)

Floats = npt.NDArray[np.float64]

FLOAT64_ERROR_MAX = 1e-12
"""Both sides compute in float64; only the order of additions differs."""
FLOAT32_ERROR_MAX = 2e-5
"""Both sides compute in float32; 30 steps let rounding grow a little."""
MUTATION_ERROR_MIN = 1e-3
"""A wrong cell is off by much more than any tolerance."""


def _relative(found: Tensor | Floats, expected: Floats) -> float:
    difference = np.linalg.norm(np.asarray(found, dtype=np.float64) - expected)
    return float(difference / np.linalg.norm(expected))


def _weights(seed: int, input_size: int, size: int, projection: int | None) -> LstmWeights:
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64) / shape[-1] ** 0.5

    width = size if projection is None else projection
    return LstmWeights(
        input=random(4 * size, input_size),
        recurrent=random(4 * size, width),
        bias=random(4 * size),
        projection=None if projection is None else random(projection, size),
    )


def _sigmoid(x: Floats) -> Floats:
    return 1 / (1 + np.exp(-x))


def _by_hand(weights: LstmWeights, x: Floats) -> Floats:
    """The equations gate by gate and row by row, with nothing shared with the cell. [T, B, P]."""
    parts = [part.numpy() for part in (weights.input, weights.recurrent, weights.bias)]
    size = len(parts[2]) // 4
    blocks = [[part[gate * size : (gate + 1) * size] for part in parts] for gate in range(4)]
    (wxi, whi, bi), (wxf, whf, bf), (wxg, whg, bg), (wxo, who, bo) = blocks
    rows = np.zeros((*x.shape[:2], whi.shape[1]))
    for session in range(x.shape[1]):
        h, c = np.zeros(whi.shape[1]), np.zeros(size)
        for step in range(x.shape[0]):
            now = x[step, session]
            f = _sigmoid(wxf @ now + whf @ h + bf)
            i = _sigmoid(wxi @ now + whi @ h + bi)
            g = np.tanh(wxg @ now + whg @ h + bg)
            c = f * c + i * g
            o = _sigmoid(wxo @ now + who @ h + bo)
            h = o * np.tanh(c)
            if weights.projection is not None:
                h = weights.projection.numpy() @ h
            rows[step, session] = h
    return rows


def _run(cell: Any, weights: LstmWeights, x: Floats) -> Floats:
    batch, size = x.shape[1], len(weights.bias) // 4
    width = weights.recurrent.shape[1]
    carry = LstmCarry(
        torch.zeros(batch, width, dtype=torch.float64),
        torch.zeros(batch, size, dtype=torch.float64),
    )
    rows = []
    for row in torch.from_numpy(x):
        carry, y = cell(weights, carry, row)
        rows.append(y)
    return torch.stack(rows).numpy()


SIZES = st.sampled_from([1, 2, 3, 5, 8, 17, 33])


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    input_size=SIZES,
    size=SIZES,
    projected=st.booleans(),
    batch=st.integers(1, 4),
    steps=st.integers(1, 30),
)
def test_the_cell_is_its_equations(
    seed: int, input_size: int, size: int, projected: bool, batch: int, steps: int
) -> None:
    projection = size // 2 if projected and size > 1 else None
    weights = _weights(seed, input_size, size, projection)
    x = np.random.default_rng(seed).standard_normal((steps, batch, input_size))
    error = _relative(_run(lstm_cell, weights, x), _by_hand(weights, x))
    assert error < FLOAT64_ERROR_MAX


def test_the_cell_keeps_the_dtype_it_is_given() -> None:
    double = _weights(0, 3, 4, 2)
    single = LstmWeights(double.input.float(), double.recurrent.float(), double.bias.float(), None)
    carry, y = lstm_cell(
        replace(single, projection=None, recurrent=torch.ones(16, 4)),
        LstmCarry(torch.zeros(2, 4), torch.zeros(2, 4)),
        torch.ones(2, 3),
    )
    assert (y.dtype, carry.c.dtype) == (torch.float32, torch.float32)
    assert carry.h is y


def _order(*gates: int) -> Any:
    """A cell that takes the blocks of gates in another order."""

    def swapped(part: Tensor) -> Tensor:
        blocks = part.chunk(4)
        return torch.cat([blocks[gate] for gate in gates])

    def cell(weights: LstmWeights, carry: LstmCarry, x: Tensor) -> tuple[LstmCarry, Tensor]:
        wrong = LstmWeights(
            swapped(weights.input),
            swapped(weights.recurrent),
            swapped(weights.bias),
            weights.projection,
        )
        return lstm_cell(wrong, carry, x)

    return cell


def _old_cell_state_shown(
    weights: LstmWeights, carry: LstmCarry, x: Tensor
) -> tuple[LstmCarry, Tensor]:
    after, _ = lstm_cell(weights, carry, x)
    gates = x @ weights.input.T + carry.h @ weights.recurrent.T + weights.bias
    h = gates.chunk(4, dim=-1)[3].sigmoid() * torch.tanh(carry.c)
    if weights.projection is not None:
        h = h @ weights.projection.T
    return LstmCarry(h, after.c), h


def _h_not_carried(weights: LstmWeights, carry: LstmCarry, x: Tensor) -> tuple[LstmCarry, Tensor]:
    return lstm_cell(weights, LstmCarry(torch.zeros_like(carry.h), carry.c), x)


def _c_not_carried(weights: LstmWeights, carry: LstmCarry, x: Tensor) -> tuple[LstmCarry, Tensor]:
    return lstm_cell(weights, LstmCarry(carry.h, torch.zeros_like(carry.c)), x)


def _bias_twice(weights: LstmWeights, carry: LstmCarry, x: Tensor) -> tuple[LstmCarry, Tensor]:
    return lstm_cell(replace(weights, bias=2 * weights.bias), carry, x)


MUTATIONS = {
    "input and forget gate swapped": _order(1, 0, 2, 3),
    "order of ONNX": _order(0, 3, 1, 2),
    "candidate and output gate swapped": _order(0, 1, 3, 2),
    "the old c shown": _old_cell_state_shown,
    "h not carried": _h_not_carried,
    "c not carried": _c_not_carried,
    "bias counted twice": _bias_twice,
}


@pytest.mark.parametrize("projection", [None, 3])
@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_wrong_cell_is_noticed(mutation: str, projection: int | None) -> None:
    weights = _weights(1, 4, 6, projection)
    x = np.random.default_rng(1).standard_normal((5, 2, 4))
    error = _relative(_run(MUTATIONS[mutation], weights, x), _by_hand(weights, x))
    assert error > MUTATION_ERROR_MIN


def _spec(input_size: int, layers: list[dict[str, Any]], **more: Any) -> ModelSpec:
    return ModelSpec.model_validate(
        {
            "schema": 1,
            "name": "test",
            "input": {"kind": "features", "size": input_size},
            "layers": [{"cell": "lstm"} | layer for layer in layers],
        }
        | more
    )


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    input_size=SIZES,
    size=SIZES,
    layers=st.integers(1, 3),
    projected=st.booleans(),
    bias=st.booleans(),
)
@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
def test_the_network_is_nn_lstm(
    seed: int, input_size: int, size: int, layers: int, projected: bool, bias: bool
) -> None:
    torch.manual_seed(seed)
    projection = size // 2 if projected and size > 1 else 0
    module = nn.LSTM(input_size, size, layers, bias=bias, proj_size=projection)
    layer = {"size": size} | ({"projection": projection} if projection else {})
    spec = _spec(input_size, [layer] * layers)
    weights = weights_from_torch(module)
    assert {name: tuple(tensor.shape) for name, tensor in weights.items()} == spec.weight_shapes
    x = torch.randn(30, 3, input_size)
    with torch.no_grad():
        expected, (h, c) = module(x)
    carry, found = Network(spec, weights).run(x)
    assert _relative(found, expected.double().numpy()) < FLOAT32_ERROR_MAX
    for index, part in enumerate(carry):
        torch.testing.assert_close(part.h, h[index], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(part.c, c[index], rtol=1e-4, atol=1e-5)
    double = module.double()
    with torch.no_grad():
        expected, _ = double(x.double())
    _, found = Network(spec, weights, torch.float64).run(x)
    assert _relative(found, expected.numpy()) < FLOAT32_ERROR_MAX


def test_a_stack_of_modules_with_embedding_and_head() -> None:
    torch.manual_seed(3)
    stack = [nn.LSTM(4, 6), nn.LSTM(6, 3)]
    embedding, head = nn.Embedding(9, 4), nn.Linear(3, 5)
    spec = _spec(
        9,
        [{"size": 6}, {"size": 3}],
        input={"kind": "tokens", "size": 9},
        embedding={"size": 4},
        head={"size": 5},
        output={"activation": "softmax"},
    )
    weights = weights_from_torch(stack, embedding=embedding, head=head)
    tokens = torch.randint(9, (12, 2))
    with torch.no_grad():
        expected = head(stack[1](stack[0](embedding(tokens))[0])[0]).softmax(-1)
    _, found = Network(spec, weights).run(tokens)
    assert _relative(found, expected.double().numpy()) < FLOAT32_ERROR_MAX
    torch.testing.assert_close(found.sum(-1), torch.ones(12, 2))


def test_weights_are_copied_from_the_module() -> None:
    module = nn.LSTM(2, 3)
    weights = weights_from_torch(module)
    before = weights["layers.0.weight_input"].clone()
    with torch.no_grad():
        module.weight_ih_l0.zero_()
    assert torch.equal(weights["layers.0.weight_input"], before)


def test_modules_that_cannot_be_expressed_are_refused() -> None:
    with pytest.raises(UnsupportedModuleError, match="max_norm"):
        weights_from_torch(nn.LSTM(2, 3), embedding=nn.Embedding(4, 2, max_norm=1.0))


@pytest.mark.parametrize("cut", [1, 2, 9])
def test_a_run_may_be_cut_anywhere(cut: int) -> None:
    torch.manual_seed(4)
    network = Network(
        _spec(3, [{"size": 5, "projection": 2}]),
        weights_from_torch(nn.LSTM(3, 5, proj_size=2)),
        torch.float64,
    )
    x = torch.randn(10, 2, 3)
    carry, whole = network.run(x)
    middle, first = network.run(x[:cut])
    last, second = network.run(x[cut:], middle)
    assert torch.equal(torch.cat([first, second]), whole)
    assert torch.equal(last[0].c, carry[0].c)


@pytest.mark.parametrize("activation", ["none", "softmax", "log_softmax", "sigmoid"])
def test_activations(activation: str) -> None:
    torch.manual_seed(5)
    weights = weights_from_torch(nn.LSTM(2, 4))
    plain = Network(_spec(2, [{"size": 4}]), weights, torch.float64)
    other = Network(
        _spec(2, [{"size": 4}], output={"activation": activation}), weights, torch.float64
    )
    x = torch.randn(3, 2, 2)
    y = plain.run(x)[1].numpy()
    powers = np.exp(y)
    shares = powers / powers.sum(-1, keepdims=True)
    expected = {
        "none": y,
        "softmax": shares,
        "log_softmax": np.log(shares),
        "sigmoid": 1 / (1 + np.exp(-y)),
    }
    assert _relative(other.run(x)[1], expected[activation]) < FLOAT64_ERROR_MAX

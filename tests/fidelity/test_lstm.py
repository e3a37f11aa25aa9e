"""The engine's LSTM against its equations in float64 and against ``torch.nn.LSTM``.

Error is norm(out - ref) / norm(ref) over 1,000 steps. Over three seeds of every case below the
engine's error was between 0.7e-7 and 4.2e-7 in float32 (one unit, three seeds, is the worst; the
plain float32 network is at 0.5e-7 to 2e-7), and that of the plain network in float64 at most 4e-16.
The tolerances leave a factor of two and of ten. A mistake in an equation shows as an error above
1e-3: each is tried below.

The engine computes tanh(x) as 2 s(2x) - 1, whose absolute error is that of float32 but whose
relative error grows as x falls. ``nn.LSTM`` begins with weights so small that its outputs have a
root mean square of 0.02 to 0.1: there the engine's error was 1.2e-7 to 1.2e-6, the largest with 512
units, and that of ``nn.LSTM`` itself in float32 about 1e-7.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest
import torch
from torch import nn

from conveyor_models import ModelSpec, load_bundle, save_bundle, weights_from_torch
from tests.fidelity import reference
from tests.fidelity.networks import (
    families,
    load,
    make_bundle,
    make_spec,
    random_rows,
    random_weights,
)

TOLERANCE_FLOAT32: Final = 1e-6
TOLERANCE_FLOAT32_SMALL: Final = 3e-6
"""For outputs far below 1, as said above."""
TOLERANCE_FLOAT64: Final = 5e-15
MISTAKE_SHOWS: Final = 1000 * TOLERANCE_FLOAT32
STEPS: Final = 1000
ZOO: Final = Path(__file__).parents[2] / "models" / "zoo"

SPECS: Final[dict[str, ModelSpec]] = {
    **{f"one layer of {size}": make_spec([size], features=7) for size in (1, 3, 17, 100, 512)},
    "one feature": make_spec([17], features=1),
    "three layers of one size": make_spec([100, 100, 100], features=5),
    "layers of mixed sizes": make_spec([17, 3, 100, 1], features=5),
    "projections": make_spec([(17, 5), (100, 33)], features=5),
    "projection to one": make_spec([(3, 1), 17], features=2),
    "projection below a wide layer": make_spec([(100, 3), 64], features=2),
    "tokens": make_spec([17], tokens=11, embedding=3, head=11),
    "tokens, wide embedding": make_spec([17], tokens=5, embedding=100),
    "head": make_spec([17], features=3, head=1),
    "head without bias": make_spec([17], features=3, head=100, head_bias=False),
    "softmax": make_spec([17], features=3, head=19, activation="softmax"),
    "log_softmax": make_spec([17], tokens=19, embedding=8, head=19, activation="log_softmax"),
    "sigmoid": make_spec([17], features=3, head=5, activation="sigmoid"),
    "sigmoid without head": make_spec([17], features=3, activation="sigmoid"),
    "softmax without head": make_spec([(17, 9)], features=3, activation="softmax"),
    "everything": make_spec(
        [(100, 17), 31, (33, 32)], tokens=29, embedding=13, head=29, activation="log_softmax"
    ),
}


@pytest.fixture(params=SPECS.values(), ids=SPECS.keys())
def spec(request: pytest.FixtureRequest) -> ModelSpec:
    return request.param


def test_the_engine_computes_the_equations(spec: ModelSpec) -> None:
    weights = random_weights(spec, 1)
    rows = random_rows(spec, STEPS, 1)
    expected = reference.run(spec, weights, rows)
    for family in families(threads=1):
        (out,) = load(make_bundle(spec, weights), family=family).run_batch([rows])
        assert reference.error(out, expected) < TOLERANCE_FLOAT32, family.name


def test_the_engine_in_a_batch_computes_the_equations(spec: ModelSpec) -> None:
    weights = random_weights(spec, 2)
    inputs = [random_rows(spec, steps, steps) for steps in (STEPS, 1, 17, 400, 2, 399, 400)]
    outputs = load(make_bundle(spec, weights)).run_batch(inputs)
    for rows, out in zip(inputs, outputs, strict=True):
        assert reference.error(out, reference.run(spec, weights, rows)) < TOLERANCE_FLOAT32


def test_the_readable_network_computes_the_equations(spec: ModelSpec) -> None:
    weights = random_weights(spec, 3)
    rows = random_rows(spec, STEPS, 3)
    _, out = make_bundle(spec, weights).network(torch.float64).run(torch.from_numpy(rows)[:, None])
    expected = reference.run(spec, weights, rows)
    assert reference.error(out[:, 0].numpy(), expected) < TOLERANCE_FLOAT64


@pytest.mark.parametrize("name", ["letters", "temperature"])
def test_a_shipped_model_computes_the_equations(name: str) -> None:
    bundle = load_bundle(ZOO / name)
    rows = random_rows(bundle.spec, STEPS, 0)
    if name == "temperature":
        rows[:, 0] = 55 + 10 * rows[:, 0]  # degrees Fahrenheit
    (out,) = load(bundle).run_batch([rows])
    expected = reference.run(bundle.spec, bundle.weights, rows)
    assert reference.error(out, expected) < TOLERANCE_FLOAT32


def test_long_memory_keeps_its_precision() -> None:
    # Forget gates near 1 hold c for hundreds of steps, so that rounding errors add up.
    spec = make_spec([17], features=3)
    weights = random_weights(spec, 0)
    weights["layers.0.bias"][17:34] = 8.0
    rows = random_rows(spec, STEPS, 0)
    (out,) = load(make_bundle(spec, weights)).run_batch([rows])
    assert reference.error(out, reference.run(spec, weights, rows)) < 10 * TOLERANCE_FLOAT32


def test_saturated_gates_stay_exact() -> None:
    spec = make_spec([17], features=3)
    weights = {name: 30 * tensor for name, tensor in random_weights(spec, 0).items()}
    rows = 100 * random_rows(spec, 5, 0)
    (out,) = load(make_bundle(spec, weights)).run_batch([rows])
    assert np.isfinite(out).all()
    assert reference.error(out, reference.run(spec, weights, rows)) < 10 * TOLERANCE_FLOAT32


# -- against torch.nn.LSTM ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "layers", "projection"),
    [
        (1, 1, 0),
        (3, 2, 0),
        (17, 3, 0),
        (100, 2, 0),
        (512, 1, 0),
        (3, 1, 1),
        (17, 2, 5),
        (100, 2, 40),
    ],
)
def test_the_engine_agrees_with_nn_lstm(
    size: int, layers: int, projection: int, tmp_path: Path
) -> None:
    torch.manual_seed(size)
    module = nn.LSTM(6, size, num_layers=layers, proj_size=projection)
    spec = make_spec([(size, projection) if projection else size] * layers, features=6)
    bundle = save_bundle(tmp_path / "random", spec, weights_from_torch(module))
    rows = random_rows(spec, STEPS, size)
    (out,) = load(bundle).run_batch([rows])
    with torch.no_grad():
        judged, _ = module.double()(torch.from_numpy(rows).double())
    assert reference.error(out, judged.numpy()) < TOLERANCE_FLOAT32_SMALL


def test_the_engine_agrees_with_an_nn_model_of_tokens(tmp_path: Path) -> None:
    torch.manual_seed(0)
    embedding, module, head = nn.Embedding(31, 9), nn.LSTM(9, 17, num_layers=2), nn.Linear(17, 31)
    spec = make_spec([17, 17], tokens=31, embedding=9, head=31, activation="log_softmax")
    weights = weights_from_torch(module, embedding=embedding, head=head)
    rows = random_rows(spec, STEPS, 0)
    (out,) = load(save_bundle(tmp_path / "random", spec, weights)).run_batch([rows])
    with torch.no_grad():
        hidden, _ = module.double()(embedding.double()(torch.from_numpy(rows).long()))
        judged = head.double()(hidden).log_softmax(dim=-1)
    assert reference.error(out, judged.numpy()) < TOLERANCE_FLOAT32


# --- would a mistake be noticed? ---

PLAIN = make_spec([17], features=7)
PROJECTED = make_spec([(17, 5)], features=7)
STACKED = make_spec([17, 17], features=17)


@pytest.mark.parametrize(
    ("mistake", "spec"),
    [
        ("gates i and f swapped", PLAIN),
        ("candidate without tanh", PLAIN),
        ("candidate of half the slope", PLAIN),
        ("old c shown", PLAIN),
        ("forget bias dropped", PLAIN),
        ("carry forgotten", PLAIN),
        ("projection transposed", PROJECTED),
        ("projection omitted", PROJECTED),
        ("layer order swapped", STACKED),
    ],
)
def test_a_mistake_in_an_equation_is_noticed(mistake: reference.Mistake, spec: ModelSpec) -> None:
    weights = random_weights(spec, 0)
    rows = random_rows(spec, STEPS, 0)
    (out,) = load(make_bundle(spec, weights)).run_batch([rows])
    assert reference.error(out, reference.run(spec, weights, rows)) < TOLERANCE_FLOAT32
    assert reference.error(out, reference.run(spec, weights, rows, mistake)) > MISTAKE_SHOWS


def _swap_gates(weights: dict[str, Any], one: int, other: int, size: int) -> None:
    for name in ("weight_input", "weight_recurrent", "bias"):
        tensor = weights[f"layers.0.{name}"]
        kept = tensor[one * size : (one + 1) * size].clone()
        tensor[one * size : (one + 1) * size] = tensor[other * size : (other + 1) * size]
        tensor[other * size : (other + 1) * size] = kept


@pytest.mark.parametrize(("one", "other"), [(0, 1), (1, 2), (2, 3), (0, 3), (0, 2), (1, 3)])
def test_gates_swapped_in_the_engine_are_noticed(one: int, other: int) -> None:
    weights = random_weights(PLAIN, 0)
    rows = random_rows(PLAIN, STEPS, 0)
    expected = reference.run(PLAIN, weights, rows)
    _swap_gates(weights, one, other, 17)
    (out,) = load(make_bundle(PLAIN, weights)).run_batch([rows])
    assert reference.error(out, expected) > MISTAKE_SHOWS


@pytest.mark.parametrize("name", ["bias", "weight_input", "weight_recurrent"])
def test_a_single_wrong_weight_in_the_engine_is_noticed(name: str) -> None:
    weights = random_weights(PLAIN, 0)
    rows = random_rows(PLAIN, STEPS, 0)
    expected = reference.run(PLAIN, weights, rows)
    weights[f"layers.0.{name}"].view(-1)[5] += 0.01
    (out,) = load(make_bundle(PLAIN, weights)).run_batch([rows])
    assert reference.error(out, expected) > 10 * TOLERANCE_FLOAT32

"""The readable network in float64 against the equations, every family and option.

Error is norm(out - ref) / norm(ref) over 1,000 steps. It was at most 2.8e-15 over four seeds
of every case, and below 1e-15 for 99 of 100; the tolerance leaves a factor of two.
"""

from __future__ import annotations

import pytest
import torch

from conveyor_models import ModelSpec
from tests.fidelity import reference
from tests.fidelity.cases import ALL, ATTENTION, MEMORY_ROWS, STEPS, TOLERANCE_FLOAT64
from tests.fidelity.networks import (
    exact_outputs,
    make_bundle,
    random_memory,
    random_rows,
    random_weights,
)


@pytest.mark.parametrize("spec", ALL.values(), ids=ALL.keys())
def test_the_network_computes_the_equations(spec: ModelSpec) -> None:
    weights = random_weights(spec, 3)
    rows = random_rows(spec, STEPS, 3)
    memory = None if spec.attention is None else random_memory(spec, 17, 3)
    out = exact_outputs(make_bundle(spec, weights), rows, memory)
    expected = reference.run(spec, weights, rows, memory)
    assert reference.error(out, expected) < TOLERANCE_FLOAT64


@pytest.mark.parametrize("spec", ATTENTION.values(), ids=ATTENTION.keys())
def test_memories_of_several_lengths_are_read_each_by_itself(spec: ModelSpec) -> None:
    weights = random_weights(spec, 4)
    network = make_bundle(spec, weights).network(torch.float64)
    inputs = [random_rows(spec, 50, number) for number in range(len(MEMORY_ROWS))]
    memories = [random_memory(spec, rows, rows) for rows in MEMORY_ROWS]
    padded = torch.randn(len(memories), max(MEMORY_ROWS), memories[0].shape[1])
    for number, memory in enumerate(memories):
        padded[number, : len(memory)] = torch.from_numpy(memory)
    held = network.memory(padded, torch.tensor(MEMORY_ROWS))
    _, out = network.run(torch.stack([torch.from_numpy(rows) for rows in inputs], 1), memory=held)
    for number, (rows, memory) in enumerate(zip(inputs, memories, strict=True)):
        expected = reference.run(spec, weights, rows, memory)
        assert reference.error(out[:, number].numpy(), expected) < TOLERANCE_FLOAT64

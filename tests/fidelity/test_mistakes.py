"""Would a mistake in an equation be noticed? Each is made in every model in which it can be.

The outputs are compared as everywhere else, over the first 100 steps, or 20 of the largest models:
what shows there by 100 tolerances shows over 1,000 steps by 10 at least, whatever comes after. The
least error that one of these 1,900 mistakes made was 6e-4.
"""

from __future__ import annotations

from typing import Final

import pytest

from conveyor_models import ModelSpec
from tests.fidelity import reference
from tests.fidelity.cases import ALL, MISTAKE_SHOWS, SIZES, TOLERANCE_FLOAT64
from tests.fidelity.mistakes import applicable
from tests.fidelity.networks import (
    exact_outputs,
    make_bundle,
    random_memory,
    random_rows,
    random_weights,
)

STEPS: Final = 100


@pytest.mark.parametrize("spec", ALL.values(), ids=ALL.keys())
def test_a_mistake_in_an_equation_is_noticed(spec: ModelSpec) -> None:
    weights = random_weights(spec, 0)
    steps = STEPS // 5 if spec.layers[0].size == max(SIZES) else STEPS
    rows = random_rows(spec, steps, 0)
    memory = None if spec.attention is None else random_memory(spec, 17, 0)
    out = exact_outputs(make_bundle(spec, weights), rows, memory)
    assert reference.error(out, reference.run(spec, weights, rows, memory)) < TOLERANCE_FLOAT64
    for mistake in applicable(spec):
        wrong = reference.run(spec, weights, rows, memory, mistake)
        assert reference.error(out, wrong) > MISTAKE_SHOWS, mistake

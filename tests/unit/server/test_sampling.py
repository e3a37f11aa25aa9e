"""Drawing tokens."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from conveyor_server.scheduler.sampling import Sampling, uniform

PROBABILITIES = np.array([0.5, 0.25, 0.15, 0.1])
LOGITS = np.log(PROBABILITIES).astype("<f4").tobytes()
DRAWS = 4_000


def shares(sampling: Sampling, row: bytes = LOGITS, activation: str = "log_softmax") -> list[float]:
    """How often each token is drawn over many steps."""
    counts = Counter(sampling.draw(row, activation, step) for step in range(1, DRAWS + 1))
    return [counts[token] / DRAWS for token in range(4)]


def test_temperature_zero_takes_the_most_probable() -> None:
    assert {Sampling(seed=7).draw(LOGITS, "log_softmax", step) for step in range(50)} == {0}
    tied = np.array([1, 3, 3, 2], dtype="<f4").tobytes()
    assert Sampling().draw(tied, "linear", 1) == 1


def test_temperature_one_draws_the_models_own_distribution() -> None:
    # Four standard deviations of a share over so many draws are at most 0.032.
    assert shares(Sampling(1.0, seed=1)) == pytest.approx(PROBABILITIES.tolist(), abs=0.032)


def test_probabilities_and_their_logarithms_draw_the_same() -> None:
    row = PROBABILITIES.astype("<f4").tobytes()
    sampling = Sampling(0.8, seed=3)
    for step in range(200):
        assert sampling.draw(row, "softmax", step) == sampling.draw(LOGITS, "log_softmax", step)


def test_a_probability_of_zero_is_never_drawn() -> None:
    row = np.array([0, 0.5, 0, 0.5], dtype="<f4").tobytes()
    drawn = shares(Sampling(100.0, seed=2), row, "softmax")
    assert drawn[0] == drawn[2] == 0
    assert min(drawn[1], drawn[3]) > 0.4


def test_a_higher_temperature_evens_out_and_a_lower_one_sharpens() -> None:
    assert shares(Sampling(100.0, seed=4)) == pytest.approx([0.25] * 4, abs=0.032)
    assert shares(Sampling(0.05, seed=4))[0] > 0.99


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_top_k_draws_among_the_most_probable(top_k: int) -> None:
    kept = PROBABILITIES[:top_k] / PROBABILITIES[:top_k].sum()
    drawn = shares(Sampling(1.0, top_k, seed=5))
    assert drawn[:top_k] == pytest.approx(kept.tolist(), abs=0.032)
    assert sum(drawn[top_k:]) == 0


def test_top_k_breaks_ties_by_the_lower_token() -> None:
    tied = np.zeros(4, dtype="<f4").tobytes()
    drawn = shares(Sampling(1.0, 2, seed=6), tied)
    assert drawn[2:] == [0, 0]
    assert min(drawn[:2]) > 0.4


def test_top_k_above_the_vocabulary_means_all() -> None:
    for step in range(100):
        few, many = Sampling(1.0, 0, 9), Sampling(1.0, 1000, 9)
        assert few.draw(LOGITS, "linear", step) == many.draw(LOGITS, "linear", step)


@given(
    seed=st.integers(0, 2**64 - 1),
    step=st.integers(1, 2**62),
    temperature=st.floats(0, 100),
    top_k=st.integers(0, 8),
)
def test_a_draw_depends_on_seed_and_step_alone(
    seed: int, step: int, temperature: float, top_k: int
) -> None:
    sampling = Sampling(temperature, top_k, seed)
    token = sampling.draw(LOGITS, "log_softmax", step)
    assert 0 <= token < 4
    sampling.draw(LOGITS, "log_softmax", step + 1)
    assert Sampling(temperature, top_k, seed).draw(LOGITS, "log_softmax", step) == token


@given(st.floats(1e-45, 1e-3))
def test_a_temperature_near_zero_takes_the_most_probable(temperature: float) -> None:
    large = np.array([-3e38, 1e30, 2e38, 0], dtype="<f4").tobytes()
    assert Sampling(temperature, 0, 1).draw(large, "linear", 1) == 2


def test_the_random_numbers_are_even_and_of_seed_and_step() -> None:
    numbers = [uniform(seed, step) for seed in range(20) for step in range(100)]
    assert len(set(numbers)) == len(numbers)
    assert min(numbers) >= 0
    assert max(numbers) < 1
    histogram, _ = np.histogram(numbers, bins=10, range=(0, 1))
    assert histogram.min() > 140  # of 200 expected: four standard deviations are 54
    assert histogram.max() < 260

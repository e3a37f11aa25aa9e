"""The shipped bundle that times heart beats: its card says what is measured again here."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from types import ModuleType

import numpy as np
import pytest
import torch

from conveyor_models import Network, load_bundle
from conveyor_models.layers import PEEPHOLES, LstmLayer
from tests.support.zoo import ZOO, card, script

TOLERANCE = 0.01
"""The card is rounded to 0.001; another processor may round a little differently."""


@pytest.fixture(scope="module")
def train() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        yield script("pulse", "train", patch)


def test_the_card(train: ModuleType) -> None:
    said = {row[0]: row[1] for row in card("pulse") if len(row) == 2}
    scores = train.scores(load_bundle(ZOO / "pulse"))
    for name, bits in scores.items():
        assert bits == pytest.approx(float(said[name]), abs=TOLERANCE)
    assert scores["pulse"] < min(bits for name, bits in scores.items() if name != "pulse")


def test_train_makes_this_model(train: ModuleType) -> None:
    spec = load_bundle(ZOO / "pulse").spec
    assert spec == train.SPEC
    assert isinstance(spec.layers[0], LstmLayer)
    assert spec.layers[0].peepholes == PEEPHOLES


def test_what_is_trained_is_what_is_served(train: ModuleType) -> None:
    torch.manual_seed(0)
    stack = train.Stack(2)
    stack.peepholes.normal_()
    beats = torch.from_numpy(train.parts()[2])[:60, None]
    odds = stack.run(beats)
    for number in (2, 3):
        _, chances = Network(train.SPEC, stack.weights(number)).run(beats)
        torch.testing.assert_close(chances[..., 0], odds[:, number].sigmoid())
    stack.peepholes.zero_()
    same = stack.run(beats)
    assert (same[:, :2] == odds[:, :2]).all(), "the first half has no peepholes"
    assert not torch.allclose(same[:, 2:], odds[:, 2:])


def test_bits_are_those_of_the_beats(train: ModuleType) -> None:
    beats = np.zeros((201, 1), dtype=np.float32)
    beats[110::10] = 1
    sure = np.full((201, 1), 1e-12)
    sure[109::10] = 0.5
    assert train.bits(sure, beats) == pytest.approx(1, abs=1e-4)
    assert train.bits(np.full((201, 1), 0.5), beats) == pytest.approx(10, abs=1e-6)


def test_beats_lie_apart_as_those_of_a_heart(train: ModuleType) -> None:
    seconds = train.data.beat_seconds()
    assert len(seconds) == train.data.series().sum() == 1_097
    intervals = np.diff(seconds)
    assert intervals.min() >= 0.4
    assert 0.55 < np.median(intervals) < 0.65
    learned, validated, tested = train.parts()
    assert len(learned) + len(validated) + len(tested) == len(train.data.series())


def test_data_needs_no_torch_and_no_plots() -> None:
    code = (
        "import sys, data; data.series();"
        " assert not {'torch', 'matplotlib', 'heartpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ZOO / "pulse", check=True, timeout=60)

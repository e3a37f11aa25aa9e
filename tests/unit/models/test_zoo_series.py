"""The shipped bundles of real series: their cards say what is measured again here."""

from __future__ import annotations

import subprocess
import sys
from types import ModuleType

import numpy as np
import pytest

from conveyor_models import load_bundle
from conveyor_models.layers import GruLayer, LstmLayer, RnnLayer
from tests.support.zoo import ZOO, card, script

SERIES = ("co2", "rain", "sunspots")
BEATEN = {
    "co2": ("as a year ago", "no change"),
    "rain": ("logistic regression", "rain today or not", "always the same"),
    "sunspots": ("same as this year",),
}
"""Baselines that the card claims to be ahead of, by the first figure, of which less is better."""
TOLERANCE = 0.01
"""The cards are rounded to 0.001; another processor may round a little differently."""


@pytest.fixture(params=SERIES)
def model(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def train(model: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return script(model, "train", monkeypatch)


def test_the_card(model: str, train: ModuleType) -> None:
    network = load_bundle(ZOO / model).network()
    scores = train.scores(network, train.data.HELD_OUT_YEAR)
    said = {row[0]: row[1:] for row in card(model)}
    for name, figures in scores.items():
        written = [float(cell) for cell in said[name]]
        assert np.atleast_1d(figures) == pytest.approx(written, abs=TOLERANCE)
    for baseline in BEATEN[model]:
        assert np.atleast_1d(scores[model])[0] < np.atleast_1d(scores[baseline])[0]


def test_train_makes_this_model(model: str, train: ModuleType) -> None:
    assert load_bundle(ZOO / model).spec == train.SPEC


def test_targets_are_the_steps_they_claim(model: str, train: ModuleType) -> None:
    features, targets, years = train.data.series()
    assert len(features) == len(targets) == len(years)
    assert features.dtype == targets.dtype == np.float32
    assert (np.diff(years) >= 0).all()
    if model == "co2":  # the change in 4 weeks is what has changed since 4 weeks, 4 weeks later
        assert targets[:-4, 0] == pytest.approx(features[4:, 1])
    elif model == "rain":
        assert (targets[:-1] == (features[1:, :1] > 0)).all()
    else:
        assert (targets[:-1] == features[1:]).all()


def test_training_never_reads_what_compares_or_is_held_out(
    model: str, train: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    features, targets, years = map(np.copy, train.data.series())
    learned = years < train.data.VALIDATION_YEAR
    features[~learned], targets[~learned] = np.nan, np.nan
    last = 13 if model == "co2" else 1
    targets[np.flatnonzero(learned)[-last:]] = np.nan  # these lie beyond
    monkeypatch.setattr(train.data, "series", lambda: (features, targets, years))
    monkeypatch.setattr(train, "ITERATIONS", 20)
    assert all(bool(each.isfinite().all()) for each in train.train().values())


def test_their_cells() -> None:
    gated, coupled, plain = (load_bundle(ZOO / name).spec.layers[0] for name in SERIES)
    assert isinstance(gated, GruLayer)
    assert gated.reset == "after"
    assert isinstance(coupled, LstmLayer)
    assert coupled.coupled
    assert isinstance(plain, RnnLayer)
    assert plain.nonlinearity == "tanh"


def test_data_needs_no_torch(model: str) -> None:
    code = "import sys, data; data.series(); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ZOO / model, check=True, timeout=60)

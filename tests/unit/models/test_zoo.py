"""The shipped bundles: they load, and their cards say what is measured again here."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from conveyor_models import Bundle, load_bundle, scan
from tests.support.zoo import ZOO, card, script

MODELS = ("co2", "letters", "pulse", "rain", "spell", "sunspots", "temperature")
WEIGHTS_BYTES_MAX = 3_000_000
TEMPERATURE_TOLERANCE_F = 0.002
"""The card is rounded to 0.001; another processor may round a little differently."""
LETTERS_TOLERANCE_BITS = 0.1
"""A sample of the held-out text, and that of another Python version, differ by less."""


@pytest.fixture(scope="module")
def letters_train() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        yield script("letters", "train", patch)


@pytest.fixture(scope="module")
def corpus(letters_train: ModuleType) -> tuple[str, str]:
    learned, held_out = letters_train.text.corpus()
    return learned, held_out


@pytest.fixture(scope="module")
def temperature_train() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        yield script("temperature", "train", patch)


@pytest.fixture(scope="module")
def data(temperature_train: ModuleType) -> ModuleType:
    return temperature_train.data


@pytest.fixture(scope="module")
def letters() -> Bundle:
    return load_bundle(ZOO / "letters")


@pytest.fixture(scope="module")
def temperature() -> Bundle:
    return load_bundle(ZOO / "temperature")


def test_the_zoo_is_a_repository() -> None:
    listing = scan(ZOO)
    assert listing.problems == ()
    assert listing.names == MODELS


@pytest.mark.parametrize("model", MODELS)
def test_shipped_bundles_are_small_and_described(model: str) -> None:
    bundle = load_bundle(ZOO / model)
    assert (ZOO / model / "weights.safetensors").stat().st_size < WEIGHTS_BYTES_MAX
    assert bundle.spec.description
    assert bundle.digest in (ZOO / model / "CARD.md").read_text()


def test_the_two_models_use_every_option_of_a_layer(letters: Bundle, temperature: Bundle) -> None:
    assert len(letters.spec.layers) == 2
    assert temperature.spec.layers[0].projection is not None


def test_the_card_of_temperature(temperature: Bundle, temperature_train: ModuleType) -> None:
    train = temperature_train
    said = {(row[0], row[1]): row[2:] for row in card("temperature") if len(row) == 5}
    for station in train.data.STATIONS:
        scores = train.scores(temperature, station)
        for name, errors in scores.items():
            written = [float(cell) for cell in said[station, name]]
            assert errors == pytest.approx(written, abs=TEMPERATURE_TOLERANCE_F)
        for baseline in ("persistence", "same hour yesterday"):
            assert (scores["temperature"] < scores[baseline]).all(), "the card claims so"


def test_the_card_of_letters(
    letters: Bundle, letters_train: ModuleType, corpus: tuple[str, str]
) -> None:
    train = letters_train
    labels = letters.spec.input.labels
    assert labels is not None
    _, held_out = corpus
    tokens = train.text.encode(held_out, labels)
    streams = [tokens[at : at + 500] for at in range(0, len(tokens) - 500, 5_000)]
    sample = [token for stream in streams for token in stream]
    bits = train.bits_per_character(letters, sample, streams=len(streams))
    said = {row[0]: float(row[1]) for row in card("letters") if row[0] in _MODELS}
    assert bits == pytest.approx(said["letters"], abs=LETTERS_TOLERANCE_BITS)
    assert said["letters"] < said["interpolated 5-gram"] < said["unigram"]
    assert train.unigram_bits(tokens, sample, len(labels)) == pytest.approx(
        said["unigram"], abs=LETTERS_TOLERANCE_BITS
    )


_MODELS = ("co2", "letters", "interpolated 5-gram", "unigram")


def test_the_ngram_baseline_is_a_distribution(letters_train: ModuleType) -> None:
    train = letters_train
    learned = [0, 1, 2, 0, 1, 2, 0, 1, 1]
    context = [0, 1, 2, 0]
    before = train.ngram_bits(learned, context, 3) * len(context)
    total = 0.0
    for token in range(3):
        bits = train.ngram_bits(learned, [*context, token], 3) * (len(context) + 1) - before
        total += 2**-bits
    assert total == pytest.approx(1)


def test_letters_writes_words_it_has_read(
    letters: Bundle, letters_train: ModuleType, corpus: tuple[str, str]
) -> None:
    train = letters_train
    written = train.sample(letters, "The function returns ", 300)
    assert written.startswith("The function returns ")
    known = set(" ".join(corpus).split())
    words = written.split()[3:-1]
    assert sum(word in known for word in words) > 0.6 * len(words), written


def test_every_character_has_a_token(letters: Bundle, letters_train: ModuleType) -> None:
    text = letters_train.text
    labels = letters.spec.input.labels
    assert labels is not None
    assert labels == letters.spec.output.labels
    assert [labels[token] for token in text.encode("a\nЖ", labels)] == ["a", "\n", "\ufffd"]


def test_no_paragraph_is_learned_and_held_out(corpus: tuple[str, str]) -> None:
    learned, held_out = corpus
    assert len(held_out) > 50_000
    assert set(learned.split("\n\n")).isdisjoint(held_out.split("\n\n"))


def test_training_never_sees_the_held_out_weeks(data: ModuleType) -> None:
    for station in data.STATIONS:
        learned = data.training(station)
        features, targets, timestamps = data.held_out(station)
        assert learned.timestamps[-1] < timestamps[0]
        assert len(features) == len(targets) == data.HELD_OUT_HOURS
        for column, hours in enumerate(data.HORIZONS_HOURS):
            assert np.isnan(learned.targets[-hours:, column]).all()
            assert not np.isnan(learned.targets[:-hours, column]).any()


def test_targets_and_baselines_are_the_hours_they_claim(data: ModuleType) -> None:
    features, targets, timestamps = data.held_out()
    assert (np.diff(timestamps) == np.timedelta64(1, "h")).all()
    assert features.dtype == targets.dtype == np.float32
    yesterday = data.same_hour_yesterday(features)
    for column, hours in enumerate(data.HORIZONS_HOURS):
        assert targets[100, column] == features[100 + hours, 0]
        assert yesterday[100, column] == features[100 + hours - 24, 0]
        assert data.persistence(features)[100, column] == features[100, 0]


def test_windows_are_many_different_and_complete(data: ModuleType) -> None:
    windows = data.windows(200, 72)
    assert len({(window.station, window.timestamps[0]) for window in windows}) == 200
    for window in windows:
        assert window.features.shape == (72, len(data.FEATURES))
        assert np.isfinite(window.targets).all()
    most = 2 * (data.HELD_OUT_HOURS - 24 - 72 + 1)
    assert len(data.windows(most, 72)) == most
    for count, steps in [(most + 1, 72), (0, 72), (1, 0), (1, data.HELD_OUT_HOURS)]:
        with pytest.raises(ValueError, match="cannot cut"):
            data.windows(count, steps)


def test_data_needs_no_torch() -> None:
    code = "import sys, data; assert 'torch' not in sys.modules; print(len(data.held_out()[0]))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ZOO / "temperature",
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert int(done.stdout) == 6 * 7 * 24


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
def test_normalisation_is_folded_into_the_weights(
    tmp_path: Path, temperature_train: ModuleType
) -> None:
    train = temperature_train
    torch.manual_seed(0)
    network = train.Forecaster()
    bundle = train.export(network, tmp_path / "temperature")
    features = torch.from_numpy(train.data.held_out()[0])[:50, None]
    normalised = features.clone()
    normalised[..., 0] = (normalised[..., 0] - train.CENTRE_F) / train.SCALE_F
    with torch.no_grad():
        expected = network(normalised) * train.SCALE_F + train.CENTRE_F
    torch.testing.assert_close(bundle.network().run(features)[1], expected, rtol=0, atol=1e-3)

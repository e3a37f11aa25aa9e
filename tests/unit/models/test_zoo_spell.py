"""The shipped bundle that spells digits: its card says what is measured again here."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from types import ModuleType

import numpy as np
import pytest

from conveyor_models import Bundle, load_bundle
from tests.support.zoo import ZOO, card, script

WORDS_TOLERANCE = 2
"""Another processor may round a close call the other way."""


@pytest.fixture(scope="module")
def train() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        yield script("spell", "train", patch)


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    return load_bundle(ZOO / "spell")


def test_the_card(bundle: Bundle, train: ModuleType) -> None:
    said = {row[0]: row[1] for row in card("spell") if " of " in row[1]}
    scores = train.scores(bundle)
    assert said.keys() >= scores.keys()
    for name, right in scores.items():
        written, _, count = said[name].partition(" of ")
        assert int(count) == 360
        assert right == pytest.approx(int(written), abs=WORDS_TOLERANCE)
    assert scores["spell"] > scores["logistic regression"] > scores["most frequent name"]


def test_train_makes_this_model(bundle: Bundle, train: ModuleType) -> None:
    assert bundle.spec == train.SPEC


def test_it_looks_at_ink(bundle: Bundle, train: ModuleType) -> None:
    images, _ = train.data.digits(train.data.HELD_OUT)
    _, looked = train.spelled(bundle.network(), bundle.weights, images)
    assert looked.sum(axis=-1) == pytest.approx(1, abs=1e-5)
    ink = images.reshape(-1, 4, 2, 4, 2).mean(axis=(2, 4)).reshape(-1, 1, 16)
    seen = (looked * ink).sum(axis=-1)[:, :5].mean()
    assert seen > 2 * ink.mean(), "the card claims so"


def test_what_it_sees_decides_the_word(bundle: Bundle, train: ModuleType) -> None:
    data = train.data
    images, shown = data.digits(data.HELD_OUT)
    tokens, _ = train.spelled(bundle.network(), bundle.weights, np.roll(images, 1, axis=0))
    right = np.mean([data.word(t) == data.NAMES[d] for t, d in zip(tokens, shown, strict=True)])
    assert right < 0.2, "another digit's image gives another digit's name"


def test_a_row_of_memory_is_a_patch_and_its_place(train: ModuleType) -> None:
    data = train.data
    images, _ = data.digits(data.HELD_OUT)
    memory = data.memories(images)
    assert memory.shape == (len(images), 16, 32)
    assert memory.dtype == np.float32
    pixels, places = memory[..., :16].reshape(-1, 16, 4, 4), memory[..., 16:]
    assert (places == np.eye(16)).all()
    assert (pixels[:, 5] == images[:, 1:5, 1:5]).all()
    assert (pixels[:, 0, 1:, 1:] == images[:, :3, :3]).all()
    assert not pixels[:, 0, 0].any(), "outside the image there is paper"
    assert not pixels[:, 15, -1].any()


def test_the_splits_do_not_overlap(train: ModuleType) -> None:
    parts = [train.data.TRAINING, train.data.VALIDATION, train.data.HELD_OUT]
    assert [part.stop for part in parts] == [part.start for part in parts[1:]] + [1_797]


def test_words_and_drawings(train: ModuleType) -> None:
    data = train.data
    tokens = data.spelling(3)
    assert "".join(data.VOCABULARY[token] for token in tokens) == "····three."
    assert data.word([*tokens, data.VOCABULARY.index("x")]) == "three"
    images, _ = data.digits(slice(0, 1))
    drawn = data.drawing(images[0], tokens[:9], np.eye(16, dtype=np.float32)[:9])
    assert "".join(drawn.split("██")).count("·") == 4
    assert max(map(len, drawn.splitlines())) <= 80
    assert all(letter in drawn for letter in "three")


def test_data_needs_no_torch() -> None:
    code = (
        "import sys, data; assert 'torch' not in sys.modules;"
        " print(len(data.digits(data.HELD_OUT)[0]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ZOO / "spell",
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert int(done.stdout) == 360

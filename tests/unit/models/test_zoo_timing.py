"""The shipped timer with peepholes: its card says what is measured again here."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from conveyor_models import Network, load_bundle
from conveyor_models.cells import LstmCarry
from conveyor_models.layers import PEEPHOLES, LstmLayer
from tests.support.zoo import ZOO, card, script

SHARE_TOLERANCE = 0.01
OUTPUT_TOLERANCE = 0.005
"""The card is rounded to 0.001; another processor may round a little differently."""


@pytest.fixture(scope="module")
def train() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        yield script("timing", "train", patch)


def test_the_card(train: ModuleType) -> None:
    said = {row[0]: row[1:] for row in card("timing") if len(row) == 4}
    scores = train.scores(load_bundle(ZOO / "timing"))
    for name, (right, rarer, loudest) in scores.items():
        shares = [float(cell.rstrip("%")) / 100 for cell in said[name][:2]]
        assert [right, rarer] == pytest.approx(shares, abs=SHARE_TOLERANCE)
        assert loudest == pytest.approx(float(said[name][2]), abs=OUTPUT_TOLERANCE)
    assert scores["timing"][2] < scores["best plain"][2] / 3, "only the plain one has to ramp"
    assert train.share_at_random() == pytest.approx(0.017, abs=SHARE_TOLERANCE)


def test_the_count_goes_on_behind_a_shut_gate(train: ModuleType) -> None:
    rows = {row[0]: row[1:] for row in card("timing") if len(row) == 12}
    starts = torch.zeros(60, 1, 1)
    starts[8] = 1
    for name, network in (
        ("timing", load_bundle(ZOO / "timing").network()),
        ("best plain", train.best_plain()),
    ):
        cells = zip(rows[""], rows[f"{name}, c"], rows[f"{name}, h"], strict=True)
        for after, c, h in cells:
            carry, output = network.run(starts[: 9 + int(after)])
            assert isinstance(carry[0], LstmCarry)
            assert carry[0].c.item() == pytest.approx(float(c), abs=0.02)
            assert output[-1].item() == pytest.approx(float(h), abs=0.02)


def test_means_of_the_card_are_those_of_its_seeds(train: ModuleType) -> None:
    rows = {row[0]: [float(cell) for cell in row[1:]] for row in card("timing") if row[0] in KINDS}
    assert tuple(rows) == tuple(train.KINDS) == KINDS
    for *shares, mean, spread in rows.values():
        assert len(shares) == train.SEEDS
        assert [np.mean(shares), np.std(shares)] == pytest.approx([mean, spread], abs=0.2)


KINDS = ("plain, 1", "plain, 5", "peepholes, 1", "peepholes, 5")


def test_train_makes_this_model(train: ModuleType) -> None:
    spec = load_bundle(ZOO / "timing").spec
    assert spec == train.SPEC
    assert isinstance(spec.layers[0], LstmLayer)
    assert spec.layers[0].peepholes == PEEPHOLES
    assert spec.head is None
    assert train.PLAIN.layers[0].peepholes == ()
    assert train.PLAIN.layers[0].size == spec.layers[0].size


def test_what_is_trained_is_what_is_served(train: ModuleType) -> None:
    torch.manual_seed(0)
    stack = train.Stack(2)
    stack.peepholes.normal_()
    starts = torch.from_numpy(train.data.held_out()[0])[:60]
    output = stack.run(starts)
    for number in range(len(KINDS) * 2):
        spec = train.PLAIN if number < 4 else train.SPEC
        _, rows = Network(spec, stack.weights(number)).run(starts[..., None])
        torch.testing.assert_close(rows[..., 0], output[:, number])
    assert not torch.allclose(output[:, :4], output[:, 4:])


def test_kinds_begin_with_the_same_weights(train: ModuleType) -> None:
    torch.manual_seed(0)
    stack = train.Stack(3)
    starts = torch.from_numpy(train.data.held_out()[0])[:60]
    output = stack.run(starts)
    first, second, *seeing = (output[:, stack.of_kind(kind)] for kind in KINDS)
    assert torch.equal(first, seeing[0]), "peepholes begin at 0"
    assert torch.equal(second, seeing[1])
    assert not torch.allclose(first, second)


def test_a_short_training_lowers_the_error(
    train: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    starts, due = map(torch.from_numpy, train.data.validation())
    torch.manual_seed(train.SEED)
    before = train.losses(train.Stack(1).run(starts[:200]), due[:200])
    monkeypatch.setattr(train, "ITERATIONS", 30)
    threads = torch.get_num_threads()
    stack = train.train(1)
    torch.set_num_threads(threads)
    after = train.losses(stack.run(starts[:200]), due[:200])
    assert after.mean() < before.mean()
    assert not stack.peepholes[:2].any(), "the plain ones have none"
    assert stack.peepholes[2:].all()


def test_training_writes_the_best_of_each_kind(
    train: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    torch.manual_seed(1)
    stack = train.Stack(2)
    stack.peepholes.normal_()
    shares = np.array([0.0, 0.1, 0.0, 0.9, 1.0, 0.9, 0.0, 1.0])
    monkeypatch.setattr(train, "train", lambda: stack)
    monkeypatch.setattr(train, "stack_scores", lambda *_: shares)
    monkeypatch.setattr(sys, "argv", ["train.py", "--out", str(tmp_path / "timing")])
    train.main()
    written = load_bundle(tmp_path / "timing").weights
    for name, each in stack.weights(4).items():  # of `peepholes, 1`, which is better on average
        assert torch.equal(written[name], each)
    plain = json.loads((tmp_path / "timing" / "plain.json").read_text())
    assert plain == {name: each.tolist() for name, each in stack.weights(3).items()}


def test_right_is_on_time_and_never_else(train: ModuleType) -> None:
    data = train.data
    starts = np.zeros((180, 1), dtype=np.float32)
    starts[[5, 55, 120]] = 1  # two whole intervals
    output = np.zeros_like(starts)
    assert data.share_right(output, starts) == 0
    output[5 + data.DELAY_STEPS] = 1
    assert data.share_right(output, starts) == 0.5
    output[55 + data.DELAY_STEPS - 1] = 1
    assert data.share_right(output, starts) == 1
    output[[20, 55 + data.DELAY_STEPS + 2], 0] = 0.4, 0.6
    assert data.share_right(output, starts) == 0.5, "two steps late is wrong, 0.4 is silence"
    assert data.loudest_wait(output, starts) == pytest.approx(0.4)


def test_streams_are_due_after_each_start(train: ModuleType) -> None:
    data = train.data
    for starts, due in (data.validation(), data.held_out()):
        assert (starts[: -data.DELAY_STEPS] == due[data.DELAY_STEPS :]).all()
        assert not due[: data.DELAY_STEPS].any()
        rests = {
            int(gap) - data.DELAY_STEPS
            for stream in starts.T
            for gap in np.diff(np.flatnonzero(stream))
        }
        assert rests == set(range(data.REST_STEPS[0], data.REST_STEPS[1] + 1))
    assert not (data.validation()[0] == data.held_out()[0]).all()


def test_data_needs_no_torch() -> None:
    code = "import sys, data; data.held_out(); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ZOO / "timing", check=True, timeout=60)

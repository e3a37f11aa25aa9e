"""Every model on a CUDA device that is not there: nothing is on the wrong side, and what goes from
one side to the other is what is written here and no more.

A crossing costs more than a kernel, and one that is waited for costs the whole queue before it. So
the number of each kind is exact: whoever adds one has to add it here, and say what it is for.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, Final

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DynamicOutputShapeException

from conveyor_models import Bundle, ModelSpec
from conveyor_server.core import TraceMode
from conveyor_server.engine.packing import LANE
from conveyor_server.engine.port import Work
from conveyor_server.engine.prediction import SequenceRunner
from conveyor_server.engine.products import BlockedFamily
from conveyor_server.engine.readout import Readout
from conveyor_server.engine.runner import ModelRunner
from tests.fidelity.cases import PREDICTED, STREAMED
from tests.fidelity.fake_cuda import (
    CUDA,
    SCALAR,
    TO_DEVICE,
    TO_HOST,
    WAIT,
    Crossings,
    fake_cuda,
)
from tests.fidelity.networks import (
    make_bundle,
    make_spec,
    random_memory,
    random_rows,
    random_weights,
)

# Steps of each session of a tick, and how many of the first one's outputs nobody wants.
TICKS: Final[dict[str, tuple[list[int], int]]] = {
    "one session": ([1], 0),
    "two sessions": ([1, 1], 0),
    "two blocks of sessions": ([1] * 33, 0),
    "not every output": ([1, 1, 1], 1),
    "a chunk": ([2], 0),
    "chunks": ([2, 1, 3], 2),
}
SESSIONS_MAX: Final = 33
MEMORY_LENGTHS: Final = (3, 40, 5)
MEMORY_WIDTHS: Final = (32, 64, 32)


class Fake:
    """A model on a device that is not there; to be used inside of `fake_cuda`."""

    def __init__(self, bundle: Bundle, crossings: Crossings) -> None:
        spec = bundle.spec
        self.spec = spec
        self.runner = ModelRunner(bundle, SESSIONS_MAX, CUDA, BlockedFamily())
        self._crossings = crossings
        self._memories = [0] * len(MEMORY_LENGTHS)
        if spec.attention is not None:
            rows = [random_memory(spec, length, length) for length in MEMORY_LENGTHS]
            self._memories = [self.runner.memories.add(each.tobytes()) for each in rows]

    def tick(
        self, lengths: Sequence[int], unwanted: int = 0, trace: TraceMode = TraceMode.NONE
    ) -> Counter[str]:
        """What one tick of sessions crosses."""
        works = [
            Work(
                number + 1,
                length,
                random_rows(self.spec, length, number).tobytes(),
                length if number else length - unwanted,
                self._memories[number % len(MEMORY_LENGTHS)],
                trace,
            )
            for number, length in enumerate(lengths)
        ]
        return self.counted(lambda: self.runner.run(works))

    def counted(self, call: Callable[[], object]) -> Counter[str]:
        """What a call crosses."""
        self._crossings.seen.clear()
        call()
        return +self._crossings.seen


def _allowed(
    spec: ModelSpec, lengths: Sequence[int], unwanted: int = 0, *, traced: bool = False
) -> Counter[str]:
    """What one tick may cross."""
    ragged = max(lengths) > 1
    to_device = {
        "the input rows": 1,
        "the slots that are read": 1,
        "the slots that are written": len(lengths) > 1,
        "the order of the rows": ragged,
        "the rows that are wanted": ragged or unwanted > 0,
        "the works that are traced": traced,
        # Of the memories of one width: whose they are and how long each is.
        "memories": 2 * len(set(MEMORY_WIDTHS[: len(lengths)])) * (spec.attention is not None),
    }
    to_host = {
        "the output rows": 1,
        "traces of gates": traced * sum(len(layer.traced) for layer in spec.layers),
        "traces of attention": traced * len(lengths) * (spec.attention is not None),
    }
    return +Counter(
        {
            TO_DEVICE: sum(to_device.values()),
            TO_HOST: sum(to_host.values()),
            SCALAR: len(spec.layers),  # whether h of each is finite
            WAIT: 1,  # for the pool's writes
        }
    )


@pytest.mark.parametrize("spec", STREAMED.values(), ids=STREAMED.keys())
def test_a_model_crosses_what_it_may_and_no_more(spec: ModelSpec) -> None:
    bundle = make_bundle(spec, random_weights(spec, 0))
    with fake_cuda() as crossings, torch.no_grad():
        fake = Fake(bundle, crossings)
        for name, (lengths, unwanted) in TICKS.items():
            assert fake.tick(lengths, unwanted) == _allowed(spec, lengths, unwanted), name
        for mode in (TraceMode.SUMMARY, TraceMode.FULL):
            found = fake.tick([2, 1, 3], trace=mode)
            assert found == _allowed(spec, [2, 1, 3], traced=True), mode
        _slots_are_moved_in_one_copy_and_cleared_without_any(fake)


def _slots_are_moved_in_one_copy_and_cleared_without_any(fake: Fake) -> None:
    pool = fake.runner.pool
    assert {part.device for part in pool.parts} == {CUDA}
    assert not fake.counted(pool.acquire)
    assert fake.counted(lambda: pool.read(1)) == {TO_HOST: 1}
    assert fake.counted(lambda: pool.write(1, bytes(pool.carry_bytes))) == {TO_DEVICE: 1}
    assert not fake.counted(lambda: pool.reset(1))
    assert not fake.counted(lambda: pool.release(1))
    if fake.spec.attention is not None:
        rows = random_memory(fake.spec, 3, 0).tobytes()
        assert fake.counted(lambda: fake.runner.memories.add(rows)) == {TO_DEVICE: 1}


@pytest.mark.parametrize("spec", PREDICTED.values(), ids=PREDICTED.keys())
def test_a_whole_sequence_crosses_twice_however_it_is_cut(spec: ModelSpec) -> None:
    bundle = make_bundle(spec, random_weights(spec, 0))
    with fake_cuda() as crossings, torch.no_grad():
        runner = SequenceRunner(bundle, CUDA, BlockedFamily(), torch.no_grad)
        rows = random_rows(spec, 5, 0).tobytes()
        passes = sum(len(layer.directions) for layer in spec.layers)
        for slice_steps in (2, 1_000_000):
            crossings.seen.clear()
            prediction = runner.begin(rows, 5, 5)
            while prediction.advance(slice_steps) is None:
                pass
            assert +crossings.seen == {TO_DEVICE: 1, TO_HOST: 1, SCALAR: passes}


@pytest.mark.parametrize("activation", ["softmax", "log_softmax"])
@pytest.mark.parametrize("head", [0, 9_217])
def test_a_softmax_reads_whole_lanes(
    activation: str, head: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    widths: list[int] = []
    with monkeypatch.context() as patch:
        for name in ("softmax", "log_softmax"):
            function = getattr(Tensor, name)

            def seen(self: Tensor, dim: int, function: Any = function) -> Tensor:
                widths.append(self.shape[1])
                assert self.is_contiguous()
                return function(self, dim)

            patch.setattr(Tensor, name, seen)
        _tick(make_spec([17], features=3, head=head, activation=activation))
    assert widths == [-(-(head or 17) // LANE) * LANE]


def _tick(spec: ModelSpec) -> Counter[str]:
    bundle = make_bundle(spec, random_weights(spec, 0))
    with fake_cuda() as crossings, torch.no_grad():
        return Fake(bundle, crossings).tick([1, 1])


# --- mutants: each adds a crossing where every model passes by ---

SPEC: Final = make_spec([17, 9], features=3, head=5)
MUTANTS: Final[dict[str, tuple[Callable[[Tensor], object], str]]] = {
    "item": (lambda y: y.sum().item(), SCALAR),
    "float": (lambda y: float(y.sum()), SCALAR),
    "bool": (lambda y: bool(y.isfinite().all()), SCALAR),
    "int": (lambda y: int(y.argmax()), SCALAR),
    "cpu": (lambda y: y.cpu(), TO_HOST),
    "to": (lambda y: y.to("cpu"), TO_HOST),
    "to, not waited for": (lambda y: y.to("cpu", non_blocking=True), TO_HOST),
    "copy_": (lambda y: torch.empty(y.shape).copy_(y), TO_HOST),
    "tolist": (lambda y: y.tolist(), SCALAR),
    "numpy": (lambda y: y.numpy(force=True), TO_HOST),
    "a list": (lambda y: torch.tensor([1, 2], device=y.device), TO_DEVICE),
    "a tensor": (lambda y: torch.zeros(3).to(y.device), TO_DEVICE),
    "an index": (lambda y: y[:, torch.tensor([0, 1], device=y.device)], TO_DEVICE),
}
REFUSED: Final[dict[str, tuple[Callable[[Tensor], object], str]]] = {
    "a tensor of the host": (lambda y: y + torch.zeros(y.shape), "at least two devices"),
    "nonzero": (lambda y: y.nonzero(), "nonzero"),
    "rows by a mask": (
        lambda y: y[y.isfinite().all(dim=1)],
        "nonzero|not linked with support for cuda",
    ),
    "masked_select": (lambda y: y.masked_select(y > 0), "masked_select"),
    "numpy without force": (lambda y: y.numpy(), "on the device"),
}


def _mutate(patch: pytest.MonkeyPatch, extra: Callable[[Tensor], object]) -> None:
    read = Readout.__call__

    def call(self: Readout, rows: Tensor) -> Tensor:
        y = read(self, rows)
        extra(y)
        return y

    patch.setattr(Readout, "__call__", call)


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_crossing_that_somebody_adds_is_counted(
    mutant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    extra, kind = MUTANTS[mutant]
    _mutate(monkeypatch, extra)
    assert set(_tick(SPEC) - _allowed(SPEC, [1, 1])) == {kind}


@pytest.mark.parametrize("mutant", REFUSED)
def test_what_a_device_would_refuse_is_refused(
    mutant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    extra, says = REFUSED[mutant]
    _mutate(monkeypatch, extra)
    refused = (RuntimeError, DynamicOutputShapeException, AssertionError)
    with pytest.raises(refused, match=says):
        _tick(SPEC)

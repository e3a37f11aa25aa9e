"""Ways to run the same layer in this process, checked to compute the same and timed in turns."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import perf_counter, process_time
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch

from bench.result import Line, Measured
from conveyor_models import Bundle
from conveyor_server.core import ModelKey
from conveyor_server.engine.engine import TorchEngine
from conveyor_server.engine.port import Done, Work

CALLS_WARM: Final = 5

Rows = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Contender:
    name: str
    run: Callable[[], Any]
    """What is timed: one call."""
    output: Callable[[Any], Rows] | None
    """What ``run`` returned -> outputs [steps, sessions, size]; None if it computes no outputs."""


def random_input(steps: int, sessions: int, size: int) -> Rows:
    """What every contender is given, [steps, sessions, size]."""
    shape = (steps, sessions, size)
    return np.random.default_rng(2).standard_normal(shape, dtype=np.float32)


def measure(
    name: str,
    contenders: Sequence[Contender],
    steps: int,
    *,
    rounds: int,
    seconds: float,
    by_clock: bool = False,
) -> list[Line]:
    """The first contender beside each of the others; a call does so many steps in all."""
    _check_equal(contenders)
    measured: list[list[Measured]] = [[] for _ in contenders]
    for _ in range(rounds):
        for contender, found in zip(contenders, measured, strict=True):
            found.append(measured_round(contender.run, steps, seconds, by_clock=by_clock))
    return [
        Line(name, contenders[0].name, contender.name, measured[0], found)
        for contender, found in zip(contenders[1:], measured[1:], strict=True)
    ]


def measured_round(
    run: Callable[[], Any], steps: int, seconds: float, *, by_clock: bool = False
) -> Measured:
    """Calls ``run``, which does ``steps`` steps, for so long.

    Steps are counted by processor time, which other programs on the machine take nothing of. Where
    a device does the work, ``by_clock``.
    """
    for _ in range(CALLS_WARM):
        run()
    times: list[float] = []
    busy = process_time()
    began = started = perf_counter()
    end = started + seconds
    while started < end:
        run()
        ended = perf_counter()
        times.append(ended - started)
        started = ended
    busy = process_time() - busy
    p50, p99 = (float(each) * 1e3 for each in np.percentile(times, (50, 99)))
    done = steps * len(times)
    taken = started - began if by_clock else busy
    return Measured(done / taken, p50, p99, step_cpu_us=busy / done * 1e6)


def _check_equal(contenders: Sequence[Contender]) -> None:
    """Two calls of each, so that a carry that is not carried shows."""
    outputs: list[Rows] = []
    for contender in contenders:
        contender.run()
        raw = contender.run()
        if contender.output is not None:
            outputs.append(contender.output(raw))
            np.testing.assert_allclose(
                outputs[-1], outputs[0], rtol=1e-4, atol=1e-5, err_msg=contender.name
            )


def conveyor(bundle: Bundle, x: Rows, device: torch.device) -> Contender:
    """The engine, bytes to bytes."""
    steps, sessions, size = x.shape
    engine = TorchEngine(device, cpu_threads=1, slots=sessions)
    key = ModelKey(bundle.spec.name, bundle.spec.version)
    engine.add(key, engine.prepare(bundle))
    works: list[Work] = []
    for session in range(sessions):
        slot = engine.acquire(key)
        assert slot is not None
        works.append(Work(slot, steps, x[:, session].tobytes(), steps))

    def output(done: list[Done]) -> Rows:
        each = [np.frombuffer(one.rows, np.float32).reshape(steps, size) for one in done]
        return np.stack(each, axis=1)

    return Contender("conveyor", lambda: engine.run(key, works), output)

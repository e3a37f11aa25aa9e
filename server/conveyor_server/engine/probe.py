"""Whether a runner keeps the promise "same bits whatever the batch" on this machine.

Which kernels a library picks depends on the processor, the library's version and the shapes, so the
promise is checked where it is made: at load, with the model's own weights, before the first
session.
"""

from collections.abc import Sequence

import numpy as np
import torch

from conveyor_models import ModelSpec
from conveyor_server.core import TraceMode
from conveyor_server.engine.port import Prediction, Work
from conveyor_server.engine.prediction import SequenceRunner
from conveyor_server.engine.runner import ModelRunner

_LENGTHS = (3, 1, 5, 1, 2, 1, 4)
"""Works of the probing batch.

More than one vector's worth of rows, odd in number, and at no two times the same number of them.
"""
_MEMORY_LENGTHS = (3, 40, 1, 33, 3, 100, 17)
"""Rows of what each of them attends over, where the model does."""
_SEQUENCE_STEPS = 9


@torch.inference_mode()
def same_bits(runner: ModelRunner, spec: ModelSpec) -> bool:
    """Runs sessions in one ragged batch, then each alone and step by step, and compares every bit.

    Every other one of those steps is traced, for which compiled cells have another loop.

    Args:
        runner: Needs a free slot; its carries are left as they were.
        spec: Of the runner's model.
    """
    slots = [slot for _ in _LENGTHS if (slot := runner.pool.acquire()) is not None]
    lengths = _LENGTHS[: len(slots)]
    memories = [_add_memory(runner, spec, number) for number in range(len(slots))]
    try:
        works = [
            Work(slot, length, _rows(spec, length, number), length, memories[number])
            for number, (slot, length) in enumerate(zip(slots, lengths, strict=True))
        ]
        together = _run_together(runner, works)
        for slot in slots:
            runner.pool.reset(slot)
        return together == _run_alone(runner, works)
    finally:
        for slot in slots:
            runner.pool.release(slot)
        for memory in filter(None, memories):
            runner.memories.drop(memory)


def same_bits_in_slices(runner: SequenceRunner, spec: ModelSpec) -> bool:
    """Runs a whole sequence at once and step by step, and compares every bit."""
    rows = _rows(spec, _SEQUENCE_STEPS, 0)
    whole = runner.begin(rows, _SEQUENCE_STEPS, _SEQUENCE_STEPS)
    steps = runner.begin(rows, _SEQUENCE_STEPS, _SEQUENCE_STEPS)
    return _finished(whole, 1_000_000) == _finished(steps, 1)


def _finished(prediction: Prediction, steps_max: int) -> bytes:
    while (rows := prediction.advance(steps_max)) is None:
        pass
    return rows


def _rows(spec: ModelSpec, length: int, seed: int) -> bytes:
    random = np.random.default_rng(seed)
    if spec.vocabulary_size is not None:
        return random.integers(0, spec.vocabulary_size, length, dtype=np.int32).tobytes()
    return random.standard_normal((length, spec.input_size), dtype=np.float32).tobytes()


def _add_memory(runner: ModelRunner, spec: ModelSpec, number: int) -> int:
    if spec.attention is None:
        return 0
    random = np.random.default_rng(number)
    shape = (_MEMORY_LENGTHS[number], spec.attention.memory_size)
    return runner.memories.add(random.standard_normal(shape, dtype=np.float32).tobytes())


def _run_together(runner: ModelRunner, works: Sequence[Work]) -> list[tuple[bytes, bytes]]:
    done = runner.run(works)
    return [
        (each.rows, runner.pool.read(work.slot)) for each, work in zip(done, works, strict=True)
    ]


def _run_alone(runner: ModelRunner, works: Sequence[Work]) -> list[tuple[bytes, bytes]]:
    results: list[tuple[bytes, bytes]] = []
    for number, work in enumerate(works):
        row_bytes = len(work.rows) // work.length
        steps = [
            Work(
                work.slot,
                1,
                work.rows[step * row_bytes : (step + 1) * row_bytes],
                1,
                work.memory,
                TraceMode.FULL if (number + step) % 2 else TraceMode.NONE,
            )
            for step in range(work.length)
        ]
        outputs = [runner.run([step])[0].rows for step in steps]
        results.append((b"".join(outputs), runner.pool.read(work.slot)))
    return results

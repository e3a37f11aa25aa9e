"""Whether a runner keeps the promise "same bits whatever the batch" on this machine.

Which kernels a library picks depends on the processor, the library's version and the shapes, so the
promise is checked where it is made: at load, with the model's own weights, before the first
session.
"""

from collections.abc import Sequence

import numpy as np

from conveyor_models import ModelSpec
from conveyor_server.engine.port import Work
from conveyor_server.engine.runner import ModelRunner

_LENGTHS = (3, 1, 5, 1, 2, 1, 4)
"""Works of the probing batch.

More than one vector's worth of rows, odd in number, and at no two times the same number of them.
"""


def same_bits(runner: ModelRunner, spec: ModelSpec) -> bool:
    """Runs sessions in one ragged batch, then each alone and step by step, and compares every bit.

    Args:
        runner: Needs a free slot; its carries are left as they were.
        spec: Of the runner's model.
    """
    slots = [slot for _ in _LENGTHS if (slot := runner.pool.acquire()) is not None]
    try:
        lengths = _LENGTHS[: len(slots)]
        inputs = [_rows(spec, length, seed) for seed, length in enumerate(lengths)]
        together = _run_together(runner, slots, inputs, lengths)
        for slot in slots:
            runner.pool.reset(slot)
        return together == _run_alone(runner, slots, inputs, lengths)
    finally:
        for slot in slots:
            runner.pool.release(slot)


def _rows(spec: ModelSpec, length: int, seed: int) -> bytes:
    random = np.random.default_rng(seed)
    if spec.vocabulary_size is not None:
        return random.integers(0, spec.vocabulary_size, length, dtype=np.int32).tobytes()
    return random.standard_normal((length, spec.input_size), dtype=np.float32).tobytes()


def _run_together(
    runner: ModelRunner, slots: Sequence[int], inputs: Sequence[bytes], lengths: Sequence[int]
) -> list[tuple[bytes, bytes]]:
    works = [
        Work(slot, length, rows, length)
        for slot, rows, length in zip(slots, inputs, lengths, strict=True)
    ]
    done = runner.run(works)
    return [(each.rows, runner.pool.read(slot)) for each, slot in zip(done, slots, strict=True)]


def _run_alone(
    runner: ModelRunner, slots: Sequence[int], inputs: Sequence[bytes], lengths: Sequence[int]
) -> list[tuple[bytes, bytes]]:
    results: list[tuple[bytes, bytes]] = []
    for slot, rows, length in zip(slots, inputs, lengths, strict=True):
        row_bytes = len(rows) // length
        steps = [rows[start : start + row_bytes] for start in range(0, len(rows), row_bytes)]
        outputs = [runner.run([Work(slot, 1, step, 1)])[0].rows for step in steps]
        results.append((b"".join(outputs), runner.pool.read(slot)))
    return results

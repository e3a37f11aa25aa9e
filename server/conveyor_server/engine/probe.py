"""Whether a runner keeps the promise "same bits whatever the batch" on this machine.

Which kernels a library picks depends on the processor, the library's version and the shapes, so the
promise is checked where it is made: at load, with the model's own weights, before the first
session.

Two probes: a small ragged batch against its sessions alone and step by step, traced and not; and
single steps of batches of every size at which other kernels may come in (see `batch_sizes`).
"""

import logging
import time
from collections.abc import Sequence
from typing import Final

import numpy as np
import torch

from conveyor_models import ModelSpec
from conveyor_server.core import TraceMode
from conveyor_server.engine.port import Work
from conveyor_server.engine.prediction import SequenceRunner
from conveyor_server.engine.products import BLOCK_ROWS
from conveyor_server.engine.runner import ModelRunner
from conveyor_server.errors import SessionQuarantined

_LENGTHS = (3, 1, 5, 1, 2, 1, 4)
"""Works of the probing batch.

More than one vector's worth of rows, odd in number, and at no two times the same number of them.
"""
_MEMORY_LENGTHS = (3, 40, 1, 33, 3, 100, 17)
"""Rows of what each of them attends over, where the model does."""
_SEQUENCES_STEPS: Final = (9, 33)
"""Of the sequences that are cut; the longer one is more than a block of rows for the readout."""
_PATTERNS: Final = 3
"""Different sessions in a large batch; each stands in many of its places."""
_PATTERN_STEPS: Final = 2
"""Of each, one after another, so that the second begins with a carry."""
BATCHES_SECONDS_MAX: Final = 5.0
"""After so long no larger batch is begun; those around one block of rows are run in any case."""

_log = logging.getLogger(__name__)


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


def batch_sizes(sessions_max: int) -> list[int]:
    """Around one block of rows, then doubled up to the largest batch, which is the last one."""
    doubled = [BLOCK_ROWS << n for n in range(1, sessions_max.bit_length())]
    sizes = {BLOCK_ROWS - 1, BLOCK_ROWS, BLOCK_ROWS + 1, *doubled, sessions_max}
    return sorted(size for size in sizes if BLOCK_ROWS - 1 <= size <= sessions_max)


@torch.inference_mode()
def same_bits_in_batches(runner: ModelRunner, spec: ModelSpec, sessions_max: int) -> bool:
    """Runs single steps in batches of every size in `batch_sizes`, and compares every bit.

    A batch holds a few different sessions again and again. So all of its rows are compared, and few
    have to be run alone. A batch that no clock allows is named in the log.

    Args:
        runner: Its free slots bound the batches; its carries are left as they were.
        spec: Of the runner's model.
        sessions_max: The largest batch that will be run.
    """
    free = runner.pool.allocator.total - runner.pool.allocator.used
    sizes = batch_sizes(min(sessions_max, free))
    if not sizes:
        return True  # `same_bits` has run as many as there can be, or nearly
    began = time.monotonic()
    slots = [slot for _ in range(sizes[-1]) if (slot := runner.pool.acquire()) is not None]
    memories = [_add_memory(runner, spec, number) for number in range(_PATTERNS)]
    try:
        alone = [
            _pattern(runner, spec, slots[n : n + 1], memories[n : n + 1], n)
            for n in range(_PATTERNS)
        ]
        expected = [results[0] for results in alone]
        for size in sizes:
            if size > BLOCK_ROWS + 1 and time.monotonic() - began > BATCHES_SECONDS_MAX:
                _log.warning(
                    "larger batches were not probed, as it takes too long",
                    extra={"model": spec.name, "sessions": size, "seconds": BATCHES_SECONDS_MAX},
                )
                break
            found = _pattern(runner, spec, slots[:size], memories, 0)
            if any(each != expected[place % _PATTERNS] for place, each in enumerate(found)):
                return False
        return True
    finally:
        for slot in reversed(slots):
            runner.pool.release(slot)
        for memory in filter(None, memories):
            runner.memories.drop(memory)


def _pattern(
    runner: ModelRunner,
    spec: ModelSpec,
    slots: Sequence[int],
    memories: Sequence[int],
    first: int,
) -> list[tuple[bytes, bytes]]:
    """Steps new sessions on these slots, the patterns in turn: all outputs and the last carry."""
    inputs = [
        [_rows(spec, 1, _PATTERN_STEPS * number + step) for number in range(_PATTERNS)]
        for step in range(_PATTERN_STEPS)
    ]
    outputs = [b""] * len(slots)
    for slot in slots:
        runner.pool.reset(slot)
    for rows in inputs:
        done = runner.run(
            [
                Work(slot, 1, rows[(first + n) % _PATTERNS], 1, memories[n % len(memories)])
                for n, slot in enumerate(slots)
            ]
        )
        outputs = [before + each.rows for before, each in zip(outputs, done, strict=True)]
    carries = [runner.pool.read(slot) for slot in slots]
    return list(zip(outputs, carries, strict=True))


def same_bits_in_slices(runner: SequenceRunner, spec: ModelSpec) -> bool:
    """Runs whole sequences at once and step by step, and compares every bit."""
    return all(
        _predict(runner, spec, steps, 1_000_000) == _predict(runner, spec, steps, 1)
        for steps in _SEQUENCES_STEPS
    )


def _predict(runner: SequenceRunner, spec: ModelSpec, steps: int, steps_max: int) -> bytes | None:
    """All output rows; None if these random inputs drive the model to NaN or infinity."""
    prediction = runner.begin(_rows(spec, steps, 0), steps, steps)
    try:
        while (rows := prediction.advance(steps_max)) is None:
            pass
    except SessionQuarantined:
        return None
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

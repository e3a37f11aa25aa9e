"""How fast a model is stepped on a device, measured."""

import time
from typing import Final

import torch

from conveyor_models import Bundle
from conveyor_server.core import ELEMENT_BYTES, ModelKey
from conveyor_server.engine.engine import TorchEngine
from conveyor_server.engine.port import Work

CALLS_WARM: Final = 3
MEMORY_ROWS: Final = 32
"""Of what each session attends over, where the model does."""


def steps_per_second(
    bundle: Bundle, device: torch.device, *, cpu_threads: int, sessions: int, seconds: float
) -> float:
    """Steps a second, by the clock, of so many sessions that are stepped together.

    Args:
        bundle: Of a model that can be streamed.
        device: Where.
        cpu_threads: For each call, on a CPU.
        sessions: At once, each with a single step a call.
        seconds: How long is measured; loading and the first calls come on top.
    """
    engine = TorchEngine(device, cpu_threads=cpu_threads, slots=sessions, verify_same_bits=False)
    key, spec = ModelKey(bundle.spec.name, bundle.spec.version), bundle.spec
    engine.add(key, engine.prepare(bundle))
    memory = 0
    if spec.attention is not None:
        size = MEMORY_ROWS * spec.attention.memory_size * ELEMENT_BYTES
        memory = engine.add_memory(key, bytes(size))
    # Zeros, or the first token; what a row holds makes no step faster.
    row = bytes(ELEMENT_BYTES * (1 if spec.vocabulary_size is not None else spec.input_size))
    slots = [slot for _ in range(sessions) if (slot := engine.acquire(key)) is not None]
    works = [Work(slot, 1, row, 1, memory) for slot in slots]
    for _ in range(CALLS_WARM):
        engine.run(key, works)
    calls, began = 0, time.perf_counter()
    while (taken := time.perf_counter() - began) < seconds or not calls:
        engine.run(key, works)
        calls += 1
    return calls * sessions / taken

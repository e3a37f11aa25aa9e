"""An engine without arithmetic: what it computes depends on every byte and on the order of steps.

A carry is a chain of hashes over the input rows and what is attended over, and an output row is
made from the carry after its step. So a step that is lost, repeated, reordered, run on another
session's carry or with another memory changes every output from there on, and tests can tell by
comparing bytes. What a trace shows is made from the same chain.
"""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import replace

from conveyor_server.core import (
    ELEMENT_BYTES,
    SUMMARY_VALUES,
    GateTrace,
    LayerTrace,
    ModelInfo,
    ModelKey,
    Trace,
    TraceMode,
)
from conveyor_server.engine.port import Done, Prediction, Work
from conveyor_server.engine.slots import SlotAllocator
from conveyor_server.errors import ConveyorError

HASH_BYTES = 32
_FINITE = int.from_bytes(b"\xff\xff\xff\xbf" * (HASH_BYTES // 4), "big")
"""Clears the highest bit of every float32's exponent: any hash becomes a row of finite numbers."""


class FakeEngine:
    """Implements `engine.port.Engine`.

    Attributes:
        fail_next: Errors that the next runs fail with, one each; nothing is changed then.
        fail_next_memory: Errors that the next memories are refused with, one each.
        poisoned: Input rows after which a carry is not finite.
        poisoned_slots: Slots whose carry is not finite after their next run.
        runs: What was run: the model and its works.
        memories: What can be attended over, by its number.
        slices: What was run of whole sequences: the model, and how many steps of one layer.
    """

    def __init__(self, models: Iterable[ModelInfo], slots: int) -> None:
        self._models = {model.key: model for model in models}
        self.allocators = {key: SlotAllocator(slots) for key in self._models}
        self._carries: dict[ModelKey, dict[int, bytes]] = {key: {} for key in self._models}
        self.memories: dict[ModelKey, dict[int, bytes]] = {key: {} for key in self._models}
        self._memories_made = 0
        self.fail_next: list[Exception] = []
        self.fail_next_memory: list[ConveyorError] = []
        self.poisoned: set[bytes] = set()
        self.poisoned_slots: set[int] = set()
        self.runs: list[tuple[ModelKey, list[Work]]] = []
        self.slices: list[tuple[ModelKey, int]] = []

    def run(self, key: ModelKey, works: Sequence[Work]) -> list[Done]:
        assert works, "an empty batch"
        assert len({work.slot for work in works}) == len(works), "a slot twice in a batch"
        for work in works:
            self._check(key, work)
        self.runs.append((key, [replace(work) for work in works]))
        if self.fail_next:
            raise self.fail_next.pop(0)
        return [self._advance(key, work) for work in works]

    def predict(self, key: ModelKey, rows: bytes, length: int, outputs: int) -> Prediction:
        model = self._models[key]
        assert not model.streamable
        assert length >= 1
        assert 0 <= outputs <= length
        assert len(rows) == length * model.input_row_bytes
        return FakePrediction(self, model, rows, outputs)

    def acquire(self, key: ModelKey) -> int | None:
        slot = self.allocators[key].acquire()
        if slot is not None:
            self._carries[key][slot] = bytes(self._models[key].carry_bytes)
        return slot

    def release(self, key: ModelKey, slot: int) -> None:
        self.allocators[key].release(slot)
        del self._carries[key][slot]

    def reset(self, key: ModelKey, slot: int) -> None:
        assert slot in self._carries[key]
        self._carries[key][slot] = bytes(self._models[key].carry_bytes)

    def read(self, key: ModelKey, slot: int) -> bytes:
        return self._carries[key][slot]

    def write(self, key: ModelKey, slot: int, carry: bytes) -> None:
        assert slot in self._carries[key]
        assert len(carry) == self._models[key].carry_bytes
        self._carries[key][slot] = carry

    def add_memory(self, key: ModelKey, rows: bytes) -> int:
        assert rows
        assert len(rows) % self._models[key].memory_row_bytes == 0
        if self.fail_next_memory:
            raise self.fail_next_memory.pop(0)
        self._memories_made += 1
        self.memories[key][self._memories_made] = rows
        return self._memories_made

    def drop_memory(self, key: ModelKey, memory: int) -> None:
        del self.memories[key][memory]

    def slots_used(self, key: ModelKey) -> int:
        return self.allocators[key].used

    def slots_total(self, key: ModelKey) -> int:
        return self.allocators[key].total

    def _check(self, key: ModelKey, work: Work) -> None:
        assert work.slot != 0, "the dummy slot was used"
        assert work.slot in self._carries[key], f"slot {work.slot} is not taken"
        assert work.length >= 1
        assert 0 <= work.outputs <= work.length
        model = self._models[key]
        assert len(work.rows) == work.length * model.input_row_bytes
        assert bool(work.memory) == bool(model.memory_row_size), "a memory too many or too few"
        assert not work.memory or work.memory in self.memories[key], "a memory that was dropped"

    def _advance(self, key: ModelKey, work: Work) -> Done:
        model, rows = self._models[key], bytes(work.rows)
        before = self._carries[key][work.slot]
        memory = self.memories[key][work.memory] if work.memory else b""
        outputs, carry = straight_through(model, rows, before, memory)
        wanted = b"".join(outputs[work.length - work.outputs :])
        if work.slot in self.poisoned_slots or self.poisoned & set(split(model, rows)):
            self.poisoned_slots.discard(work.slot)
            return Done(wanted, finite=False)
        self._carries[key][work.slot] = carry
        if work.trace is TraceMode.NONE:
            return Done(wanted)
        return Done(wanted, trace=trace_of(model, outputs, memory, work.trace))


class FakePrediction:
    """Implements `port.Prediction`: each layer takes each step once."""

    def __init__(self, engine: FakeEngine, model: ModelInfo, rows: bytes, outputs: int) -> None:
        self._engine = engine
        self._model = model
        self._rows = rows
        self._outputs = outputs
        self._left = len(split(model, rows)) * len(model.layers)
        self._over = False

    def advance(self, steps_max: int) -> bytes | None:
        assert steps_max >= 1
        assert not self._over, "run on after its end"
        self._engine.slices.append((self._model.key, min(steps_max, self._left)))
        if self._engine.fail_next:
            self._over = True
            raise self._engine.fail_next.pop(0)
        self._left -= min(steps_max, self._left)
        if self._left:
            return None
        self._over = True
        outputs = whole(self._model, self._rows)
        return b"".join(outputs[len(outputs) - self._outputs :])


def straight_through(
    model: ModelInfo, rows: bytes, carry: bytes | None = None, memory: bytes = b""
) -> tuple[list[bytes], bytes]:
    """What the fake computes, without any batch: the output row of each step, and the carry."""
    carry = bytes(model.carry_bytes) if carry is None else carry
    outputs: list[bytes] = []
    for row in split(model, rows):
        carry = _finite(carry + row + memory, model.carry_bytes)
        outputs.append(_finite(b"output" + carry, model.output_row_bytes))
    return outputs, carry


def whole(model: ModelInfo, rows: bytes) -> list[bytes]:
    """What the fake predicts: an output row for each step, all of them from all input rows."""
    return [
        _finite(b"whole" + step.to_bytes(4, "little") + rows, model.output_row_bytes)
        for step in range(len(split(model, rows)))
    ]


def trace_of(model: ModelInfo, outputs: Sequence[bytes], memory: bytes, mode: TraceMode) -> Trace:
    """What the fake shows of steps with these output rows."""

    def rows(what: str, columns: int) -> bytes:
        size = columns * ELEMENT_BYTES
        return b"".join(_finite(what.encode() + output, size) for output in outputs)

    layers = tuple(
        LayerTrace(
            number,
            layer.cell,
            tuple(
                GateTrace(
                    name,
                    units,
                    rows(f"{number} {name}", units if mode is TraceMode.FULL else SUMMARY_VALUES),
                )
                for name, units in layer.traced
            ),
        )
        for number, layer in enumerate(model.layers)
    )
    columns = len(memory) // model.memory_row_bytes if memory else 0
    return Trace(mode, len(outputs), layers, rows("attention", columns), columns)


def split(model: ModelInfo, rows: bytes) -> list[bytes]:
    """Input rows, one by one."""
    size = model.input_row_bytes
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def _finite(data: bytes, size: int) -> bytes:
    """So many bytes made from all of `data`, each four of them a finite float32."""
    digest = hashlib.blake2b(data, digest_size=HASH_BYTES).digest()
    made = (int.from_bytes(digest, "big") & _FINITE).to_bytes(HASH_BYTES, "big")
    return (made * (size // HASH_BYTES + 1))[:size]

"""An engine without arithmetic: what it computes depends on every byte and on the order of steps.

A carry is a chain of hashes over the input rows, and an output row is made from the carry after its
step. So a step that is lost, repeated, reordered or run on another session's carry changes every
output from there on, and tests can tell by comparing bytes.
"""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import replace

from conveyor_server.core import ModelInfo, ModelKey
from conveyor_server.engine.port import Done, Work
from conveyor_server.engine.slots import SlotAllocator
from conveyor_server.errors import ConveyorError

HASH_BYTES = 32
_FINITE = int.from_bytes(b"\xff\xff\xff\xbf" * (HASH_BYTES // 4), "big")
"""Clears the highest bit of every float32's exponent: any hash becomes a row of finite numbers."""


class FakeEngine:
    """Implements `engine.port.Engine`.

    Attributes:
        fail_next: Errors that the next runs fail with, one each; nothing is changed then.
        poisoned: Input rows after which a carry is not finite.
        poisoned_slots: Slots whose carry is not finite after their next run.
        runs: What was run: the model and its works.
        memories: What can be attended over, by its number.
    """

    def __init__(self, models: Iterable[ModelInfo], slots: int) -> None:
        self._models = {model.key: model for model in models}
        self.allocators = {key: SlotAllocator(slots) for key in self._models}
        self._carries: dict[ModelKey, dict[int, bytes]] = {key: {} for key in self._models}
        self.memories: dict[ModelKey, dict[int, bytes]] = {key: {} for key in self._models}
        self._memories_made = 0
        self.fail_next: list[ConveyorError] = []
        self.poisoned: set[bytes] = set()
        self.poisoned_slots: set[int] = set()
        self.runs: list[tuple[ModelKey, list[Work]]] = []

    def run(self, key: ModelKey, works: Sequence[Work]) -> list[Done]:
        assert works, "an empty batch"
        assert len({work.slot for work in works}) == len(works), "a slot twice in a batch"
        for work in works:
            self._check(key, work)
        self.runs.append((key, [replace(work) for work in works]))
        if self.fail_next:
            raise self.fail_next.pop(0)
        return [self._advance(key, work) for work in works]

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
        self._memories_made += 1
        self.memories[key][self._memories_made] = rows
        return self._memories_made

    def read_memory(self, key: ModelKey, memory: int) -> bytes:
        return self.memories[key][memory]

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
        assert len(work.rows) == work.length * self._models[key].input_row_bytes

    def _advance(self, key: ModelKey, work: Work) -> Done:
        model, rows = self._models[key], bytes(work.rows)
        outputs, carry = straight_through(model, rows, self._carries[key][work.slot])
        wanted = b"".join(outputs[work.length - work.outputs :])
        if work.slot in self.poisoned_slots or self.poisoned & set(split(model, rows)):
            self.poisoned_slots.discard(work.slot)
            return Done(wanted, finite=False)
        self._carries[key][work.slot] = carry
        return Done(wanted)


def straight_through(
    model: ModelInfo, rows: bytes, carry: bytes | None = None
) -> tuple[list[bytes], bytes]:
    """What the fake computes, without any batch: the output row of each step, and the carry."""
    carry = bytes(model.carry_bytes) if carry is None else carry
    outputs: list[bytes] = []
    for row in split(model, rows):
        carry = _finite(carry + row, model.carry_bytes)
        outputs.append(_finite(b"output" + carry, model.output_row_bytes))
    return outputs, carry


def split(model: ModelInfo, rows: bytes) -> list[bytes]:
    """Input rows, one by one."""
    size = model.input_row_bytes
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def _finite(data: bytes, size: int) -> bytes:
    """So many bytes made from all of `data`, each four of them a finite float32."""
    digest = hashlib.blake2b(data, digest_size=HASH_BYTES).digest()
    made = (int.from_bytes(digest, "big") & _FINITE).to_bytes(HASH_BYTES, "big")
    return (made * (size // HASH_BYTES + 1))[:size]

"""What the scheduler asks of an engine. No torch here, so that a fake engine needs none."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from conveyor_server.core import ModelKey, Trace, TraceMode


@dataclass(slots=True)
class Work:
    """One session's part of a batch: consecutive steps on one slot."""

    slot: int
    length: int
    rows: bytes | memoryview
    """The input rows, packed."""
    outputs: int
    """How many of the last steps' output rows are wanted: 0 to `length`."""
    memory: int = 0
    """What the session attends over, from `Engine.add_memory`; 0 for a model without attention."""
    trace: TraceMode = TraceMode.NONE
    """Whether `Done.trace` is wanted, for all steps."""


@dataclass(slots=True)
class Done:
    """What became of one `Work`."""

    rows: bytes
    """The wanted output rows, packed, float32."""
    finite: bool = True
    """False: the new carry has a NaN or an infinity and was not kept."""
    trace: Trace | None = None
    """If it was wanted."""


class Prediction(Protocol):
    """A whole sequence on its way through a model that cannot be streamed, a slice at a time."""

    def advance(self, steps_max: int) -> bytes | None:
        """Runs the next slice.

        Args:
            steps_max: At most so many steps of one layer in one direction are run.

        Returns:
            The wanted output rows, packed, float32, once all is done; None before.

        Raises:
            EngineFailed, DeviceOutOfMemory: The prediction is lost; drop it.
            SessionQuarantined: The same: the sequence drives a carry to NaN or infinity.
        """
        ...


class Engine(Protocol):
    """Runs batches and keeps carries by slot. Not thread-safe: one caller at a time."""

    def run(self, key: ModelKey, works: Sequence[Work]) -> list[Done]:
        """Advances every work's carry by its steps.

        Args:
            key: The model.
            works: At least one; no slot twice.

        Returns:
            One result for each work, in order. Bits depend on a work's own carry and rows alone.

        Raises:
            EngineFailed: Nothing was changed: every carry is as it was.
            DeviceOutOfMemory: Likewise.
        """
        ...

    def predict(self, key: ModelKey, rows: bytes, length: int, outputs: int) -> Prediction:
        """Begins a whole sequence on a model that cannot be streamed; computes nothing yet.

        Args:
            key: The model, with a reverse or bidirectional layer.
            rows: The packed input rows, `length` of them.
            length: Steps, at least 1.
            outputs: How many of the last steps' output rows are wanted.
        """
        ...

    def acquire(self, key: ModelKey) -> int | None:
        """Takes a slot, its carry initial; None if all are taken."""
        ...

    def release(self, key: ModelKey, slot: int) -> None:
        """Gives a slot back."""
        ...

    def reset(self, key: ModelKey, slot: int) -> None:
        """Makes a slot's carry the initial one."""
        ...

    def read(self, key: ModelKey, slot: int) -> bytes:
        """A slot's carry: for each layer h, then c where there is one; float32, little-endian."""
        ...

    def write(self, key: ModelKey, slot: int, carry: bytes) -> None:
        """The opposite of `read`."""
        ...

    def add_memory(self, key: ModelKey, rows: bytes) -> int:
        """Takes the rows that sessions attend over, float32; at least one row.

        Returns:
            A number above 0 for `Work.memory`. Any number of works of a batch may have the same.

        Raises:
            DeviceOutOfMemory, EngineFailed: Nothing was changed.
        """
        ...

    def drop_memory(self, key: ModelKey, memory: int) -> None:
        """Forgets a memory that no session attends over any more."""
        ...

    def slots_used(self, key: ModelKey) -> int:
        """Slots taken."""
        ...

    def slots_total(self, key: ModelKey) -> int:
        """Slots there are, the dummy not counted."""
        ...

"""What a session attends over, shared by all that were forked from one another."""

from dataclasses import dataclass

from conveyor_server.core import MemoryRows, ModelInfo, ModelKey
from conveyor_server.errors import InvalidMemory, InvalidShape, MemoryTooLarge


@dataclass(slots=True, eq=False)
class SharedMemory:
    """One memory. It never changes; the last session that attends over it takes it along."""

    model: ModelKey
    length: int
    """Rows."""
    rows: bytes
    """Packed, float32."""
    sessions: int = 0
    """That attend over it."""
    resident: int = 0
    """Those of them with a slot."""
    number: int = 0
    """The engine's name for it; 0 while it is not on the device."""


def check_memory(model: ModelInfo, memory: MemoryRows | None) -> None:
    """Checks what a new session is to attend over.

    Raises:
        InvalidMemory: It is missing, has no row, or the model takes none.
        MemoryTooLarge: It has more rows than the model takes here.
        InvalidShape: Its bytes are not those of its rows.
    """
    name = model.key.name
    if memory is None:
        if model.memory_row_size:
            raise InvalidMemory(f"model {name!r} attends over a memory, and the request has none")
        return
    if not model.memory_row_size:
        raise InvalidMemory(f"model {name!r} has no attention, so leave the memory out")
    if memory.length < 1:
        raise InvalidMemory(f"the memory has {memory.length} rows; expected at least 1")
    check_memory_rows(model, memory.length)
    if len(memory.rows) != memory.length * model.memory_row_bytes:
        raise InvalidShape(
            f"got {len(memory.rows):,} bytes of memory; model {name!r} takes"
            f" {memory.length * model.memory_row_bytes:,} for {memory.length:,} x"
            f" {model.memory_row_size} values of 4 bytes"
        )


def check_memory_rows(model: ModelInfo, length: int) -> None:
    """Raises `MemoryTooLarge` for more rows than the model takes here."""
    if length > model.memory_rows_max:
        limit = model.memory_rows_limit
        raise MemoryTooLarge(
            f"the memory has {length:,} rows; model {model.key.name!r} takes at most"
            f" {model.memory_rows_max:,} here",
            limit=limit.setting,
            maximum=limit.value or model.memory_rows_max,
            model=limit.model,
        )

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
            raise InvalidMemory(f"model {name!r} attends over a memory; give one")
        return
    if not model.memory_row_size:
        raise InvalidMemory(f"model {name!r} has no attention, so it takes no memory")
    if memory.length < 1:
        raise InvalidMemory("the memory has no row")
    check_memory_rows(model, memory.length)
    if len(memory.rows) != memory.length * model.memory_row_bytes:
        raise InvalidShape(
            f"{memory.length} rows of model {name!r}'s memory take"
            f" {memory.length * model.memory_row_bytes} bytes"
            f" ({model.memory_row_size} x 4 each), not {len(memory.rows)}"
        )


def check_memory_rows(model: ModelInfo, length: int) -> None:
    """Raises `MemoryTooLarge` for more rows than the model takes here."""
    if length > model.memory_rows_max:
        raise MemoryTooLarge(
            f"the memory has {length} rows, at most {model.memory_rows_max} are taken",
            limit="limits.memory_rows_max",
            maximum=model.memory_rows_max,
        )

"""The checks of rows: how many there are, their bytes, and every value in them."""

from typing import Final

import numpy as np

from conveyor_server.core import ELEMENT_BYTES, InputKind, MemoryRows, ModelInfo
from conveyor_server.errors import (
    ChunkTooLong,
    EmptyChunk,
    InvalidShape,
    NonFiniteInput,
    TokenOutOfRange,
)

_FLOAT32: Final = np.dtype("<f4")
_UINT32: Final = np.dtype("<u4")


def check_length(length: int, steps_max: int) -> None:
    """Raises `EmptyChunk` or `ChunkTooLong` unless there are 1 to `steps_max` steps."""
    if length < 1:
        raise EmptyChunk("the chunk has no step")
    if length > steps_max:
        raise ChunkTooLong(f"{length} steps, at most {steps_max} are taken", maximum=steps_max)


def check_size(model: ModelInfo, rows: bytes, length: int) -> None:
    """Raises `InvalidShape` unless the rows have the bytes that so many steps take."""
    if len(rows) != length * model.input_row_bytes:
        raise InvalidShape(
            f"{length} steps of model {model.key.name!r} take"
            f" {length * model.input_row_bytes} bytes"
            f" ({model.input_size} x 4 each), not {len(rows)}"
        )


def check_values(model: ModelInfo, rows: bytes) -> None:
    """Raises `NonFiniteInput` or `TokenOutOfRange` if a value cannot be an input of the model."""
    if model.input_kind is InputKind.FEATURES:
        # Looking for a zero among the flags' bytes is twice as fast as reducing them.
        if b"\0" in np.isfinite(np.frombuffer(rows, dtype=_FLOAT32)).tobytes():
            raise NonFiniteInput("a feature is NaN or infinite")
    elif rows:
        # As unsigned numbers, negative tokens are larger than any vocabulary.
        largest = int(np.frombuffer(rows, dtype=_UINT32).max())
        if largest >= model.vocabulary_size:
            raise TokenOutOfRange(
                f"a token is outside 0 .. {model.vocabulary_size - 1}",
                vocabulary_size=model.vocabulary_size,
            )


def check_memory_values(memory: MemoryRows) -> None:
    """Raises `NonFiniteInput` if a number of what is attended over is NaN or infinite."""
    whole = len(memory.rows) // ELEMENT_BYTES
    if not np.isfinite(np.frombuffer(memory.rows, dtype=_FLOAT32, count=whole)).all():
        raise NonFiniteInput("a number of the memory is NaN or infinite")

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
_INT32: Final = np.dtype("<i4")
_UINT32: Final = np.dtype("<u4")


def check_length(length: int, steps_max: int, limit: str, model: str = "") -> None:
    """Raises `EmptyChunk` or `ChunkTooLong` unless there are 1 to `steps_max` steps.

    Args:
        length: Steps.
        steps_max: The limit's value.
        limit: The setting it comes from.
        model: The model whose own `[limits]` set it; empty where the server's settings did.
    """
    if length < 1:
        raise EmptyChunk(f"the input has {length} steps; expected at least 1")
    if length > steps_max:
        raise ChunkTooLong(
            f"{length:,} steps in one request; send fewer at a time",
            limit=limit,
            maximum=steps_max,
            model=model,
        )


def check_size(model: ModelInfo, rows: bytes, length: int) -> None:
    """Raises `InvalidShape` unless the rows have the bytes that so many steps take."""
    if len(rows) != length * model.input_row_bytes:
        raise InvalidShape(
            f"got {len(rows):,} bytes of input; model {model.key.name!r} takes"
            f" {length * model.input_row_bytes:,} for {length:,} x {model.input_size} values of 4"
            " bytes"
        )


def check_values(model: ModelInfo, rows: bytes) -> None:
    """Raises `NonFiniteInput` or `TokenOutOfRange` if a value cannot be an input of the model."""
    if model.input_kind is InputKind.FEATURES:
        # Looking for a zero among the flags' bytes is twice as fast as reducing them.
        if b"\0" in np.isfinite(np.frombuffer(rows, dtype=_FLOAT32)).tobytes():
            raise _non_finite("input", rows, model.input_size)
    elif rows:
        # As unsigned numbers, negative tokens are larger than any vocabulary.
        largest = int(np.frombuffer(rows, dtype=_UINT32).max())
        if largest >= model.vocabulary_size:
            raise _token_out_of_range(model, rows)


def check_memory_values(memory: MemoryRows) -> None:
    """Raises `NonFiniteInput` if a number of what is attended over is NaN or infinite."""
    whole = len(memory.rows) // ELEMENT_BYTES
    if not np.isfinite(np.frombuffer(memory.rows, dtype=_FLOAT32, count=whole)).all():
        raise _non_finite("memory", memory.rows, whole // max(memory.length, 1))


def _non_finite(what: str, rows: bytes, columns: int) -> NonFiniteInput:
    """Names the first value that is not finite."""
    values = np.frombuffer(rows, dtype=_FLOAT32, count=len(rows) // ELEMENT_BYTES)
    index = int(np.argmin(np.isfinite(values)))
    row, column = divmod(index, max(columns, 1))
    found = "NaN" if np.isnan(values[index]) else "infinite"
    return NonFiniteInput(
        f"{what}[{row}, {column}] is {found}; expected a finite float32 number", row=row
    )


def _token_out_of_range(model: ModelInfo, rows: bytes) -> TokenOutOfRange:
    """Names the first token that is not in the vocabulary."""
    outside = np.frombuffer(rows, dtype=_UINT32) >= model.vocabulary_size
    row = int(np.argmax(outside))
    token = int(np.frombuffer(rows, dtype=_INT32)[row])
    return TokenOutOfRange(
        f"input[{row}] is token {token}; expected 0 to {model.vocabulary_size - 1:,}",
        vocabulary_size=model.vocabulary_size,
        row=row,
    )

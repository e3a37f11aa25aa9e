"""Arrays to packed rows and back. No element is ever touched in Python."""

import numpy as np
import numpy.typing as npt

from conveyor.v1 import session_pb2
from conveyor_client._errors import (
    EmptyChunk,
    InvalidMemory,
    InvalidShape,
    NonFiniteInput,
    TokenOutOfRange,
)
from conveyor_client._nouns import FloatArray, ModelInfo

_FLOAT32 = np.dtype("<f4")
_INT32 = np.dtype("<i4")
_KINDS = {
    "f": "floats",
    "i": "integers",
    "u": "integers",
    "b": "booleans",
    "c": "complex numbers",
    "U": "text",
    "S": "bytes",
    "M": "dates",
    "m": "time spans",
}


class RowCodec:
    """Packs inputs and unpacks outputs of one model.

    The rule of shapes: one step is a scalar for a model that takes tokens and a vector of
    `row_elements` features for any other; one dimension more is a chunk of K steps. What comes back
    has one row (`output_elements`,) for a step and (K, `output_elements`) for a chunk.
    """

    __slots__ = ("_dtype", "_row_elements", "_step_ndim", "output_elements", "row_bytes")

    def __init__(self, model: ModelInfo) -> None:
        tokens = model.input.is_tokens
        self._dtype = _INT32 if tokens else _FLOAT32
        self._step_ndim = 0 if tokens else 1
        self._row_elements = model.input.row_elements
        self.row_bytes = model.input.row_bytes
        self.output_elements = model.output.row_elements

    def encode(self, inputs: npt.ArrayLike) -> tuple[bytes, int, bool]:
        """Packs one step or one chunk.

        Args:
            inputs: As the class describes. Features are converted to float32; tokens must be
                integers.

        Returns:
            The packed rows, their number, and whether it was a single step.

        Raises:
            InvalidShape: Wrong number of dimensions, features or type.
            TokenOutOfRange: A token does not fit 32 bits.
            EmptyChunk: There is no row.
        """
        array = np.asarray(inputs)
        if not array.size:
            raise EmptyChunk("the input has no steps; expected at least 1", reason="EMPTY_CHUNK")
        if array.dtype != self._dtype:
            array = self._convert(array)
        single = array.ndim == self._step_ndim
        if not single and array.ndim != self._step_ndim + 1:
            raise self._wrong_shape(array)
        if self._step_ndim and array.shape[-1] != self._row_elements:
            raise self._wrong_shape(array)
        length = 1 if single else array.shape[0]
        return array.tobytes(), length, single

    def decode(self, rows: bytes, single: bool) -> FloatArray:
        """Unpacks output rows into an array of its own.

        Args:
            rows: Packed float32.
            single: Whether one row without the leading dimension is wanted.

        Returns:
            float32, (`output_elements`,) if single, else (rows, `output_elements`). Writable.
        """
        array: FloatArray = np.frombuffer(rows, dtype=_FLOAT32).copy()
        return array if single else array.reshape(-1, self.output_elements)

    def _convert(self, array: npt.NDArray[np.generic]) -> npt.NDArray[np.generic]:
        if self._dtype is _FLOAT32:
            if array.dtype.kind not in "fiub":
                raise self._wrong_shape(array)
            with np.errstate(over="ignore"):  # an overflow becomes infinite, which is refused
                return array.astype(_FLOAT32)
        if array.dtype.kind not in "iu":
            raise self._wrong_shape(array)
        narrow = array.astype(_INT32)
        if not np.array_equal(narrow, array):
            wrong = array[narrow != array].flat[0]
            raise TokenOutOfRange(
                f"token {wrong} does not fit into 32 bits", reason="TOKEN_OUT_OF_RANGE"
            )
        return narrow

    def _wrong_shape(self, array: npt.NDArray[np.generic]) -> InvalidShape:
        if self._step_ndim == 0:
            wanted = "one integer for a step, or integers of shape (K,) for K steps"
        else:
            size = self._row_elements
            wanted = f"numbers of shape ({size},) for a step, or (K, {size}) for K steps"
        return InvalidShape(
            f"got {_described(array)}; this model takes {wanted}", reason="INVALID_SHAPE"
        )


def pack_memory(memory: npt.ArrayLike) -> session_pb2.Memory:
    """Packs what a model attends over.

    Whether the model attends over anything, and over rows of this length, the server says.

    Args:
        memory: Numbers, shape (M, memory row elements), at least one row; they are converted to
            float32.

    Returns:
        The message.

    Raises:
        InvalidMemory: It has another number of dimensions, no row, or is not of real numbers.
        NonFiniteInput: It has a NaN or an infinity, or a number that float32 cannot hold.
    """
    try:
        array = np.asarray(memory)
    except ValueError as error:  # rows of different lengths
        raise _invalid_memory("the rows of the memory have different lengths") from error
    if array.dtype.kind not in "fiub" or array.ndim != 2 or not array.size:
        raise _invalid_memory(
            f"got {_described(array)}; a memory is real numbers of shape (rows, elements), at least"
            " one of each"
        )
    with np.errstate(over="ignore"):
        packed = array.astype(_FLOAT32)
    if not np.isfinite(packed).all():
        row = int(np.argmin(np.isfinite(packed).all(axis=1)))
        raise NonFiniteInput(
            f"row {row} of the memory has a value that is not a finite float32 number",
            reason="NON_FINITE_INPUT",
        )
    return session_pb2.Memory(length=packed.shape[0], rows=packed.tobytes())


def _described(array: npt.NDArray[np.generic]) -> str:
    """An array in words, as in "text of shape (2, 3)"."""
    what = _KINDS.get(array.dtype.kind, "values that are not numbers")
    return f"{what} of shape {array.shape}" if array.ndim else f"{what}, a single value"


def _invalid_memory(message: str) -> InvalidMemory:
    return InvalidMemory(message, reason="INVALID_MEMORY")

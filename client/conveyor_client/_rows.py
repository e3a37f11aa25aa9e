"""Arrays to packed rows and back. No element is ever touched in Python."""

from collections.abc import Sequence
from typing import Any, cast

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
from conveyor_client._named import Named, has_named_items, is_table, listed, match, named
from conveyor_client._nouns import FloatArray, ModelInfo, Rows

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

    The rule of names: where inputs name their values (see `named`), the names are the model's
    labels, each once and no other, in any order; for a model of tokens the one name is `token`. A
    model without labels takes no names, since nothing could tell a wrong order.
    """

    __slots__ = (
        "_dtype",
        "_labels",
        "_model_name",
        "_row_elements",
        "_step_ndim",
        "output_elements",
        "row_bytes",
    )

    def __init__(self, model: ModelInfo) -> None:
        tokens = model.input.is_tokens
        self._model_name = model.name
        self._labels = input_names(model)
        self._dtype = _INT32 if tokens else _FLOAT32
        self._step_ndim = 0 if tokens else 1
        self._row_elements = model.input.row_elements
        self.row_bytes = model.input.row_bytes
        self.output_elements = model.output.row_elements

    def encode(self, inputs: Rows) -> tuple[bytes, int, bool]:
        """Packs one step or one chunk.

        Args:
            inputs: As the class describes. Features are converted to float32; tokens must be
                integers.

        Returns:
            The packed rows, their number, and whether it was a single step.

        Raises:
            InvalidShape: Wrong number of dimensions, features, type or names.
            TokenOutOfRange: A token does not fit 32 bits.
            EmptyChunk: There is no row.
        """
        array = self._array(inputs)
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

    def items(self, inputs: Any) -> Any:
        """What a stream walks through: the rows of a table, anything else as it is.

        Walking through a table itself gives names, or columns.

        Raises:
            InvalidShape: The table's names are not the model's.
        """
        if not is_table(inputs):
            return inputs
        array = self._array(inputs)
        return array.reshape(1, *array.shape) if array.ndim == self._step_ndim else array

    def _array(self, inputs: Rows) -> npt.NDArray[np.generic]:
        """The inputs as one array, their values in the model's order."""
        kind, tokens = type(inputs), self._step_ndim == 0
        if kind is np.ndarray and cast("npt.NDArray[Any]", inputs).dtype.names is None:
            return cast("npt.NDArray[Any]", inputs)
        if kind is list or kind is tuple:
            if not tokens and has_named_items(inputs):
                inputs = [self._array(item) for item in cast("Sequence[Rows]", inputs)]
        elif (is_table(inputs) or not tokens) and (found := named(inputs)) is not None:
            return self._in_order(found)
        _check_mask(inputs, "inputs")
        try:
            array = np.asarray(cast("npt.ArrayLike", inputs))
        except ValueError as error:  # rows of different lengths
            raise InvalidShape(
                f"{self._model_name} takes rows of one length each, not a mixture",
                reason="INVALID_SHAPE",
            ) from error
        # What only NumPy knows how to read may have had names all the same.
        return array if array.dtype.names is None else self._array(array)

    def _in_order(self, inputs: Named) -> npt.NDArray[np.generic]:
        if not self._labels:
            raise InvalidShape(
                f"{self._model_name} has no labels for its inputs, so {inputs.noun}s named"
                f" {listed(inputs.names)} cannot be matched: pass an array in the model's order, or"
                " add labels to [input] of its model.toml",
                reason="INVALID_SHAPE",
            )
        positions = self._positions(inputs)
        columns = [self._column(inputs, position) for position in positions]
        if len({column.shape for column in columns}) != 1:
            lengths = listed(f"{column.shape}" for column in columns)
            raise InvalidShape(
                f"{inputs.noun}s of different lengths: {lengths}", reason="INVALID_SHAPE"
            )
        return columns[0] if self._step_ndim == 0 else np.stack(columns, axis=-1)

    def _positions(self, inputs: Named) -> list[int]:
        found = match(inputs.names, self._labels)
        said: list[str] = []
        if found.unknown:
            said.append(f"unknown {inputs.noun}: {listed(found.unknown)}")
        if found.missing:
            said.append(f"missing {inputs.noun}: {listed(found.missing)}")
        if found.duplicate:
            said.append(f"duplicate {inputs.noun}: {listed(found.duplicate)}")
        if said:
            raise InvalidShape(
                f"{'; '.join(said)}; {self._model_name} takes {listed(self._labels)}, in any order",
                reason="INVALID_SHAPE",
            )
        return found.positions

    def _column(self, inputs: Named, position: int) -> npt.NDArray[np.generic]:
        """One number, or the numbers of one column; features as float32."""
        name = str(inputs.names[position])
        try:
            column = np.asarray(cast("npt.ArrayLike", inputs.value(position)))
        except (TypeError, ValueError) as error:
            raise InvalidShape(
                f"{inputs.noun} {name!r} is not an array of numbers", reason="INVALID_SHAPE"
            ) from error
        if column.ndim > 1 or column.dtype.kind not in ("fiub" if self._step_ndim else "iu"):
            what = "numbers" if self._step_ndim else "integers"
            raise InvalidShape(
                f"{inputs.noun} {name!r} does not hold {what}, one for each step",
                reason="INVALID_SHAPE",
            )
        return self._convert(column) if column.dtype != self._dtype else column

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


def input_names(model: ModelInfo) -> tuple[str, ...]:
    """What the values of a row are called: the labels, `token` where tokens are taken."""
    return ("token",) if model.input.is_tokens else model.input.labels


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
        if is_table(memory):
            raise _invalid_memory(
                "the columns of a memory have no names to be matched by: pass an array in the"
                " model's order"
            )
        _check_mask(memory, "memory")
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


def _check_mask(values: object, what: str) -> None:
    """Refuses masked values: an array made of them would hold what the mask hides."""
    if np.ma.is_masked(values):
        raise NonFiniteInput(
            f"there are masked values in the {what}; fill them first", reason="NON_FINITE_INPUT"
        )


def _invalid_memory(message: str) -> InvalidMemory:
    return InvalidMemory(message, reason="INVALID_MEMORY")

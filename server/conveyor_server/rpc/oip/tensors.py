"""Tensors of this protocol and rows of ours.

A model's own element type passes through as it is. Other numeric types are converted, so that a
program written for another model of the same purpose need not be changed.
"""

import struct
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from conveyor.oip import inference_pb2
from conveyor_server.admission.admission import Admission
from conveyor_server.core import InputKind, MemoryRows, ModelInfo
from conveyor_server.errors import InvalidShape, NotSupported, TokenOutOfRange
from conveyor_server.rpc.oip.refusals import Refusal, no_shared_memory, shown
from conveyor_server.sessions.memory import check_memory

INPUT: Final = "INPUT"
MEMORY: Final = "MEMORY"
"""What a model with attention looks at: given with the START of a sequence."""
OUTPUT: Final = "OUTPUT"
DATATYPES: Final = {InputKind.FEATURES: "FP32", InputKind.TOKENS: "INT32"}
_RAW: Final = {
    "BOOL": np.dtype("?"),
    "INT8": np.dtype("<i1"),
    "INT16": np.dtype("<i2"),
    "INT32": np.dtype("<i4"),
    "INT64": np.dtype("<i8"),
    "UINT8": np.dtype("<u1"),
    "UINT16": np.dtype("<u2"),
    "UINT32": np.dtype("<u4"),
    "UINT64": np.dtype("<u8"),
    "FP16": np.dtype("<f2"),
    "FP32": np.dtype("<f4"),
    "FP64": np.dtype("<f8"),
}
_TYPED: Final = {
    "BOOL": "bool_contents",
    **dict.fromkeys(("INT8", "INT16", "INT32"), "int_contents"),
    "INT64": "int64_contents",
    **dict.fromkeys(("UINT8", "UINT16", "UINT32"), "uint_contents"),
    "UINT64": "uint64_contents",
    "FP32": "fp32_contents",
    "FP64": "fp64_contents",
    "BYTES": "bytes_contents",
}
_FLOAT32: Final = np.dtype("<f4")
_LENGTH: Final = struct.Struct("<I")

Tensor = inference_pb2.ModelInferRequest.InferInputTensor


@dataclass(slots=True)
class Steps:
    """The input of a request."""

    length: int
    rows: bytes
    stacked: bool
    """Whether the tensor has a dimension for steps; without one it is one step."""
    memory: MemoryRows | None = None
    """What the sequence is to attend over."""


def read_steps(
    message: inference_pb2.ModelInferRequest, model: ModelInfo, admission: Admission
) -> Steps:
    """Reads a request's inputs.

    Raises:
        Refusal: An input too many, too few or of a wrong name, shape or type.
        InvalidShape, InvalidMemory, MemoryTooLarge, TokenOutOfRange, NonFiniteInput,
        MessageTooLarge, NotSupported.
    """
    position, memory_position = _positions(message, model)
    tensor = message.inputs[position]
    length, stacked = _steps(tensor, model)
    payload = _payload(message, position, model)
    memory = None
    if memory_position is not None:
        memory = _memory(message, memory_position, model)
        admission.memory(memory, payload or b"")
    if payload is None:
        rows = _converted(_typed_values(tensor, model), model, length)
    elif tensor.datatype == DATATYPES[model.input_kind]:
        admission.message(payload)
        rows = payload
    else:
        admission.message(payload)
        rows = _converted(_raw_values(tensor, payload, model), model, length)
    return Steps(length, rows, stacked, memory)


def check_outputs(message: inference_pb2.ModelInferRequest, model: ModelInfo) -> None:
    """Checks which outputs are wanted: of the one there is, all or nothing.

    Raises:
        Refusal: An unknown name.
        NotSupported: Shared memory, or classes instead of values.
    """
    for output in message.outputs:
        if output.name != OUTPUT:
            raise Refusal(
                "outputs",
                f"unexpected inference output '{shown(output.name)}' for model '{model.key.name}'",
            )
        if output.parameters:
            if "shared_memory_region" in output.parameters:
                raise no_shared_memory(OUTPUT)
            if "classification" in output.parameters:
                raise NotSupported(
                    f"output '{OUTPUT}': this server does not support classification; leave it out"
                )


def _positions(
    message: inference_pb2.ModelInferRequest, model: ModelInfo
) -> tuple[int, int | None]:
    """Where among the inputs stand the steps, and the memory if there is one."""
    inputs = message.inputs
    if len(inputs) == 1 and inputs[0].name == INPUT and not inputs[0].parameters:
        return 0, None
    positions: dict[str, int] = {}
    names = (INPUT, MEMORY) if model.memory_row_size else (INPUT,)
    for position, tensor in enumerate(inputs):
        if tensor.name not in names or tensor.name in positions:
            raise Refusal(
                "inputs",
                f"unexpected inference input '{shown(tensor.name)}' for model '{model.key.name}'",
            )
        if tensor.parameters and "shared_memory_region" in tensor.parameters:
            raise no_shared_memory(tensor.name)
        positions[tensor.name] = position
    if INPUT not in positions:
        raise Refusal("inputs", f"input '{INPUT}' of model '{model.key.name}' is missing")
    return positions[INPUT], positions.get(MEMORY)


def _payload(
    message: inference_pb2.ModelInferRequest, position: int, model: ModelInfo
) -> bytes | None:
    """An input's raw elements; None: they are typed."""
    raw, tensor = message.raw_input_contents, message.inputs[position]
    if not raw:
        return None
    if len(raw) != len(message.inputs) or tensor.HasField("contents"):
        raise Refusal(
            "raw_input_contents",
            f"input '{tensor.name}' of model '{model.key.name}' must have either contents or one"
            " entry of raw_input_contents",
        )
    return raw[position]


def _memory(
    message: inference_pb2.ModelInferRequest, position: int, model: ModelInfo
) -> MemoryRows:
    """What a sequence is to attend over: [1, rows, row's size] or, of one row, [1, row's size]."""
    tensor, size = message.inputs[position], model.memory_row_size
    shape = tuple(tensor.shape)
    if len(shape) not in (2, 3) or shape[0] != 1 or shape[-1] != size or min(shape) < 0:
        raise InvalidShape(
            f"unexpected shape for input '{MEMORY}' for model '{model.key.name}'. Expected"
            f" [1,-1,{size}], got [{shown(','.join(map(str, shape)))}]"
        )
    payload = _payload(message, position, model)
    if payload is None:
        rows = _as_floats(_typed_values(tensor, model))
    elif tensor.datatype == "FP32":
        rows = payload
    else:
        rows = _as_floats(_raw_values(tensor, payload, model))
    memory = MemoryRows(shape[1] if len(shape) == 3 else 1, rows)
    check_memory(model, memory)
    return memory


def _steps(tensor: Tensor, model: ModelInfo) -> tuple[int, bool]:
    """How many steps a tensor holds, and whether its shape has a dimension for them."""
    dimensions = tensor.shape
    if len(dimensions) == 3:
        batch, length, size = dimensions
        if batch == 1 and length > 0 and size == model.input_size:
            return length, True
    shape = tuple(dimensions)
    if len(shape) not in (2, 3) or shape[-1] != model.input_size or min(shape) < 0:
        raise InvalidShape(
            f"unexpected shape for input '{INPUT}' for model '{model.key.name}'. Expected"
            f" [1,-1,{model.input_size}], got [{shown(','.join(map(str, shape)))}]"
        )
    if shape[0] != 1:
        raise InvalidShape(
            f"inference request batch-size must be 1 for a sequence, got {shape[0]} for model"
            f" '{model.key.name}'"
        )
    return (shape[1], True) if len(shape) == 3 else (1, False)


def _typed_values(tensor: Tensor, model: ModelInfo) -> npt.NDArray[Any]:
    field = _TYPED.get(tensor.datatype)
    if field is None or (tensor.datatype == "BYTES" and not _takes_labels(tensor, model)):
        raise _wrong_type(tensor, model)
    values: Any = getattr(tensor.contents, field)
    if tensor.datatype == "BYTES":
        return _labelled(list(values), model)
    try:
        return np.array(list(values), dtype=_RAW[tensor.datatype])
    except OverflowError as error:  # int_contents hold more than an INT8 does
        raise Refusal(
            "contents",
            f"input '{tensor.name}' holds a value that does not fit its datatype {tensor.datatype}",
        ) from error


def _raw_values(tensor: Tensor, payload: bytes, model: ModelInfo) -> npt.NDArray[Any]:
    if tensor.datatype == "BYTES" and _takes_labels(tensor, model):
        return _labelled(_elements(payload), model)
    halved = tensor.datatype == "BF16"  # the upper half of an FP32
    dtype = _RAW["UINT16"] if halved else _RAW.get(tensor.datatype)
    if dtype is None:
        raise _wrong_type(tensor, model)
    if len(payload) % dtype.itemsize:
        raise InvalidShape(
            f"input '{tensor.name}' has {len(payload):,} bytes, not a multiple of the size of"
            f" {tensor.datatype}"
        )
    values = np.frombuffer(payload, dtype=dtype)
    return (values.astype("<u4") << 16).view(_FLOAT32) if halved else values


def _converted(values: npt.NDArray[Any], model: ModelInfo, length: int) -> bytes:
    if len(values) != length * model.input_size:
        raise InvalidShape(
            f"input '{INPUT}' got unexpected element count {len(values)}, expected"
            f" {length * model.input_size}"
        )
    if model.input_kind is InputKind.FEATURES:
        return _as_floats(values)
    if values.dtype.kind not in "iu":
        raise Refusal(
            "inputs",
            f"inference input '{INPUT}' data-type is not of integers, but model"
            f" '{model.key.name}' expects 'INT32'",
        )
    if length and not 0 <= int(values.min()) <= int(values.max()) < model.vocabulary_size:
        outside = (values < 0) | (values >= model.vocabulary_size)
        index = int(np.argmax(outside))
        raise TokenOutOfRange(
            f"{INPUT}[{index}] is token {values[index]}; expected 0 to"
            f" {model.vocabulary_size - 1:,}",
            vocabulary_size=model.vocabulary_size,
        )
    return values.astype("<i4").tobytes()


def _as_floats(values: npt.NDArray[Any]) -> bytes:
    with np.errstate(over="ignore", invalid="ignore"):  # admission refuses what is not finite
        return values.astype(_FLOAT32).tobytes()


def _elements(payload: bytes) -> list[bytes]:
    """The elements of a BYTES tensor: each behind its length in 4 bytes."""
    elements: list[bytes] = []
    offset = 0
    while offset < len(payload):
        begin = offset + _LENGTH.size
        if begin > len(payload):
            raise InvalidShape(f"input '{INPUT}': the bytes end within the length of an element")
        offset = begin + _LENGTH.unpack_from(payload, offset)[0]
        if offset > len(payload):
            raise InvalidShape(f"input '{INPUT}': the bytes end within an element")
        elements.append(payload[begin:offset])
    return elements


def _takes_labels(tensor: Tensor, model: ModelInfo) -> bool:
    return tensor.name == INPUT and bool(model.vocabulary_size and model.input_labels)


def _labelled(elements: list[bytes], model: ModelInfo) -> npt.NDArray[Any]:
    """Tokens by their labels."""
    tokens = {label.encode(): token for token, label in enumerate(model.input_labels)}
    try:
        return np.array([tokens[element] for element in elements], dtype="<i4")
    except KeyError as error:
        raise TokenOutOfRange(
            f"an element of input '{INPUT}' is not a label of model '{model.key.name}'",
            vocabulary_size=model.vocabulary_size,
        ) from error


def _wrong_type(tensor: Tensor, model: ModelInfo) -> Refusal:
    expected = DATATYPES[model.input_kind] if tensor.name == INPUT else "FP32"
    return Refusal(
        "inputs",
        f"inference input '{tensor.name}' data-type is '{shown(tensor.datatype)}', but model"
        f" '{model.key.name}' expects '{expected}'",
    )


def output_shape(model: ModelInfo, length: int, *, stacked: bool) -> tuple[int, ...]:
    """The output has the dimensions that the input has."""
    return (1, length, model.output_size) if stacked else (1, model.output_size)

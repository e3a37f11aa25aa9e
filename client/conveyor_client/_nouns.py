"""The nouns of the contract as plain, typed Python values."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from types import MappingProxyType
from typing import Literal, NoReturn, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt
from google.protobuf.timestamp_pb2 import Timestamp

from conveyor.v1 import model_pb2, session_pb2
from conveyor_client._errors import InvalidField, TokenOutOfRange

FloatArray = npt.NDArray[np.float32]
Int32Array = npt.NDArray[np.int32]
Rows: TypeAlias = (
    npt.ArrayLike | Mapping[str, npt.ArrayLike] | Sequence[Mapping[str, npt.ArrayLike]]
)
"""One step or a chunk: an array, a table whose columns are the model's labels, or mappings."""

Output = Literal["all", "last", "none"]
Durability = Literal["default", "none", "async", "sync"]
OpenMode = Literal["either", "create", "resume"]
TraceMode = Literal["summary", "full"]

OutputValue: TypeAlias = "session_pb2.OutputMode.ValueType"
DurabilityValue: TypeAlias = "session_pb2.Durability.ValueType"
OpenModeValue: TypeAlias = "session_pb2.OpenMode.ValueType"
TraceValue: TypeAlias = "session_pb2.TraceMode.ValueType"

_Word = TypeVar("_Word", bound=str)
_Number = TypeVar("_Number", bound=int)

_OUTPUT_MODES: dict[Output, OutputValue] = {
    "all": session_pb2.OUTPUT_MODE_ALL,
    "last": session_pb2.OUTPUT_MODE_LAST,
    "none": session_pb2.OUTPUT_MODE_NONE,
}
_DURABILITIES: dict[Durability, DurabilityValue] = {
    "default": session_pb2.DURABILITY_UNSPECIFIED,
    "none": session_pb2.DURABILITY_NONE,
    "async": session_pb2.DURABILITY_ASYNC,
    "sync": session_pb2.DURABILITY_SYNC,
}
_OPEN_MODES: dict[OpenMode, OpenModeValue] = {
    "either": session_pb2.OPEN_MODE_UNSPECIFIED,
    "create": session_pb2.OPEN_MODE_CREATE,
    "resume": session_pb2.OPEN_MODE_RESUME,
}
_TRACE_MODES: dict[TraceMode, TraceValue] = {
    "summary": session_pb2.TRACE_MODE_SUMMARY,
    "full": session_pb2.TRACE_MODE_FULL,
}


class _Words(dict[_Word, _Number]):
    """What the words of a parameter stand for; any other word is refused."""

    def __init__(self, parameter: str, words: dict[_Word, _Number]) -> None:
        super().__init__(words)
        self._parameter = parameter

    def __missing__(self, word: object) -> NoReturn:
        expected = ", ".join(map(repr, self))
        raise InvalidField(
            f"{self._parameter} is {word!r}; expected one of {expected}",
            metadata={"field": self._parameter},
        )


OUTPUT_MODES = MappingProxyType(_Words("output", _OUTPUT_MODES))
DURABILITIES = MappingProxyType(_Words("durability", _DURABILITIES))
OPEN_MODES = MappingProxyType(_Words("mode", _OPEN_MODES))
TRACE_MODES = MappingProxyType(_Words("trace", _TRACE_MODES))


@dataclass(frozen=True, slots=True)
class TensorSignature:
    """One side of a model: what a row holds.

    Attributes:
        element_type: "float32" or "int32"; int32 rows are tokens.
        row_elements: Elements in a row.
        row_bytes: Bytes in a row.
        vocabulary_size: Tokens are 0 to vocabulary_size - 1; 0 for features.
        labels: A name for each feature, token or output; empty if the bundle gives none.
    """

    element_type: Literal["float32", "int32"]
    row_elements: int
    row_bytes: int
    vocabulary_size: int
    labels: tuple[str, ...]

    @property
    def is_tokens(self) -> bool:
        """Whether rows are tokens."""
        return self.element_type == "int32"

    def encode(self, text: str) -> Int32Array:
        """Maps text to tokens, one for each character, by the labels.

        Where the vocabulary has the replacement character U+FFFD, it stands for any character that
        is not in it.

        Args:
            text: Any text.

        Returns:
            int32, shape (len(text),).

        Raises:
            TokenOutOfRange: A character is not in the vocabulary.
        """
        index = {label: token for token, label in enumerate(self.labels)}
        other = index.get("\ufffd", -1)
        tokens = np.array([index.get(character, other) for character in text], dtype=np.int32)
        if (tokens < 0).any():
            unknown = text[int(np.argmin(tokens))]
            raise TokenOutOfRange(
                f"{unknown!r} is not in the model's vocabulary", reason="TOKEN_OUT_OF_RANGE"
            )
        return tokens

    def decode(self, tokens: npt.ArrayLike) -> str:
        """Maps tokens back to text by the labels.

        Args:
            tokens: One token or a sequence of them.

        Returns:
            The labels, joined.
        """
        indices = np.asarray(tokens, dtype=np.int32).reshape(-1)
        return "".join(self.labels[int(token)] for token in indices)


@dataclass(frozen=True, slots=True)
class ModelLimits:
    """What a server takes for a model; the names are the contract's, times in seconds."""

    chunk_steps_max: int
    predict_steps_max: int
    generate_steps_max: int
    message_bytes_max: int
    steps_in_flight_max: int
    stream_sessions_max: int
    memory_rows_max: int
    idle_seconds_max: float
    idle_seconds_default: float


@dataclass(frozen=True, slots=True)
class LayerInfo:
    """One recurrent layer: its cell, its size, its projection (0 without), its other options."""

    cell: str
    size: int
    projection: int
    options: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """One loaded model version, as `Client.model` and `Client.models` describe it."""

    name: str
    version: int
    digest: str
    description: str
    input: TensorSignature
    output: TensorSignature
    output_activation: str
    memory: TensorSignature | None
    embedding_size: int
    layers: tuple[LayerInfo, ...]
    generative: bool
    streamable: bool
    carry_bytes: int
    parameters: int
    sessions: int
    slots: int
    device: str
    newest: bool
    limits: ModelLimits


@dataclass(frozen=True, slots=True)
class SessionInfo:
    """One session, as the server describes it; times are aware datetimes in UTC.

    Attributes:
        state: "idle", "active" or "quarantined".
        tier: Where the carry lies: "device", "host", "store", or "none" before the first step.
        epoch: How many times ownership of the session was claimed.
        applied_step: The number of the last step applied; 0 before the first.
        durable_step: The step of the newest checkpoint; 0 where there is none.
    """

    session_id: str
    model: str
    version: int
    model_digest: str
    state: str
    tier: str
    epoch: int
    applied_step: int
    durable_step: int
    durability: str
    state_bytes: int
    memory_rows: int
    create_time: datetime | None
    active_time: datetime | None
    expire_time: datetime | None
    idle_seconds: float
    labels: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class OpenedSession:
    """The answer of `Client.open_session`: a claim on a session without a stream."""

    info: SessionInfo
    resumed: bool
    token: str


def tensor_from_proto(message: model_pb2.TensorSignature) -> TensorSignature:
    """Converts one side of a signature."""
    tokens = message.element_type == model_pb2.ELEMENT_TYPE_INT32
    return TensorSignature(
        element_type="int32" if tokens else "float32",
        row_elements=message.row_elements,
        row_bytes=message.row_bytes,
        vocabulary_size=message.vocabulary_size,
        labels=tuple(message.labels),
    )


def model_from_proto(message: model_pb2.Model) -> ModelInfo:
    """Converts a model."""
    signature, limits = message.signature, message.limits
    return ModelInfo(
        name=message.name,
        version=message.version,
        digest=message.digest,
        description=message.description,
        input=tensor_from_proto(signature.input),
        output=tensor_from_proto(signature.output),
        output_activation=signature.output_activation,
        memory=tensor_from_proto(signature.memory) if signature.HasField("memory") else None,
        embedding_size=message.embedding_size,
        layers=tuple(
            LayerInfo(layer.cell, layer.size, layer.projection, dict(layer.options))
            for layer in message.layers
        ),
        generative=message.generative,
        streamable=message.streamable,
        carry_bytes=message.carry_bytes,
        parameters=message.parameters,
        sessions=message.sessions,
        slots=message.slots,
        device=message.device,
        newest=message.newest,
        limits=ModelLimits(
            chunk_steps_max=limits.chunk_steps_max,
            predict_steps_max=limits.predict_steps_max,
            generate_steps_max=limits.generate_steps_max,
            message_bytes_max=limits.message_bytes_max,
            steps_in_flight_max=limits.steps_in_flight_max,
            stream_sessions_max=limits.stream_sessions_max,
            memory_rows_max=limits.memory_rows_max,
            idle_seconds_max=limits.idle_ttl_max.ToTimedelta().total_seconds(),
            idle_seconds_default=limits.idle_ttl_default.ToTimedelta().total_seconds(),
        ),
    )


def session_from_proto(message: session_pb2.Session) -> SessionInfo:
    """Converts a session."""
    state = session_pb2.SessionState.Name(message.state).removeprefix("SESSION_STATE_").lower()
    tier = session_pb2.StateTier.Name(message.tier).removeprefix("STATE_TIER_").lower()
    durability = session_pb2.Durability.Name(message.durability).removeprefix("DURABILITY_").lower()
    return SessionInfo(
        session_id=message.session_id,
        model=message.model,
        version=message.version,
        model_digest=message.model_digest,
        state=state,
        tier="none" if tier == "unspecified" else tier,
        epoch=message.epoch,
        applied_step=message.applied_step,
        durable_step=message.durable_step,
        durability=durability,
        state_bytes=message.state_bytes,
        memory_rows=message.memory_rows,
        create_time=_time(message.create_time) if message.HasField("create_time") else None,
        active_time=_time(message.active_time) if message.HasField("active_time") else None,
        expire_time=_time(message.expire_time) if message.HasField("expire_time") else None,
        idle_seconds=message.idle_ttl.ToTimedelta().total_seconds(),
        labels=dict(message.labels),
    )


def _time(stamp: Timestamp) -> datetime:
    return stamp.ToDatetime(tzinfo=UTC)

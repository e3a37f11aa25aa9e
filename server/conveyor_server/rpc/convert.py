"""Between protobuf messages and core nouns, both ways. Payloads pass through as they are."""

from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp

from conveyor.v1 import model_pb2, session_pb2
from conveyor_server.admission.admission import Admission
from conveyor_server.config import LimitsConfig
from conveyor_server.core import (
    InputKind,
    MemoryRows,
    ModelInfo,
    Opened,
    OpenRequest,
    SessionState,
    SessionView,
    Tier,
)

_STATES = {
    SessionState.IDLE: session_pb2.SESSION_STATE_IDLE,
    SessionState.ACTIVE: session_pb2.SESSION_STATE_ACTIVE,
    SessionState.QUARANTINED: session_pb2.SESSION_STATE_QUARANTINED,
}
_TIERS = {
    Tier.UNSET: session_pb2.STATE_TIER_UNSPECIFIED,
    Tier.DEVICE: session_pb2.STATE_TIER_DEVICE,
    Tier.HOST: session_pb2.STATE_TIER_HOST,
    Tier.STORE: session_pb2.STATE_TIER_STORE,
}


def session_message(view: SessionView) -> session_pb2.Session:
    """A session, described."""
    return session_pb2.Session(
        session_id=view.session_id,
        model=view.model.key.name,
        version=view.model.key.version,
        model_digest=view.model.digest,
        state=_STATES[view.state],
        tier=_TIERS[view.tier],
        epoch=view.epoch,
        applied_step=view.applied_step,
        durable_step=view.durable_step,
        durability=session_pb2.Durability.ValueType(view.durability),
        state_bytes=view.state_bytes,
        memory_rows=view.memory_rows,
        create_time=timestamp(view.create_seconds),
        active_time=timestamp(view.active_seconds),
        expire_time=timestamp(view.expire_seconds),
        idle_ttl=duration(view.idle_seconds),
        labels=dict(view.labels),
    )


def open_request(
    admission: Admission, caller: str, request: session_pb2.OpenSessionRequest
) -> OpenRequest:
    """Converts and checks OpenSession."""
    return admission.open(
        principal=caller,
        model=request.model,
        version=request.version,
        session_id=request.session_id,
        mode=request.mode,
        durability=request.durability,
        idle_seconds=seconds(request, "idle_ttl"),
        memory=memory_rows(request),
        labels=request.labels,
        token=request.token,
    )


def memory_rows(
    request: session_pb2.OpenSessionRequest
    | session_pb2.GenerateRequest
    | session_pb2.PredictRequest,
) -> MemoryRows | None:
    """What a session is to attend over, if that is given."""
    if not request.HasField("memory"):
        return None
    return MemoryRows(request.memory.length, request.memory.rows)


def opened_message(opened: Opened, limits: LimitsConfig) -> session_pb2.OpenSessionResponse:
    """The answer to an open."""
    return session_pb2.OpenSessionResponse(
        session=session_message(opened.view),
        resumed=opened.resumed,
        token=opened.token,
        replay_window=session_pb2.ReplayWindow(
            steps_max=limits.replay_steps_max, bytes_max=limits.replay_bytes_max
        ),
        held_results_steps=limits.held_results_steps_max,
    )


def model_message(
    info: ModelInfo, *, sessions: int, slots: int, newest: bool, device: str, limits: LimitsConfig
) -> model_pb2.Model:
    """A model, described."""
    return model_pb2.Model(
        name=info.key.name,
        version=info.key.version,
        digest=info.digest,
        description=info.description,
        signature=_signature(info),
        embedding_size=info.embedding_size,
        layers=[
            model_pb2.Layer(
                cell=layer.cell,
                size=layer.size,
                projection=layer.projection,
                options=dict(layer.options),
            )
            for layer in info.layers
        ],
        generative=info.generative,
        streamable=info.streamable,
        carry_bytes=info.carry_bytes,
        parameters=info.parameters,
        sessions=sessions,
        slots=slots,
        device=device,
        newest=newest,
        limits=_limits(info, limits),
    )


def seconds(message: Message, field: str) -> float | None:
    """A Duration field in seconds, or None if it is absent."""
    if not message.HasField(field):
        return None
    value: Duration = getattr(message, field)
    return value.seconds + value.nanos / 1e9


def duration(seconds_: float) -> Duration:
    """Seconds as a Duration."""
    message = Duration()
    message.FromMicroseconds(round(seconds_ * 1e6))
    return message


def timestamp(seconds_: float) -> Timestamp:
    """Seconds since the Unix epoch as a Timestamp."""
    message = Timestamp()
    message.FromMicroseconds(round(seconds_ * 1e6))
    return message


def _signature(info: ModelInfo) -> model_pb2.Signature:
    tokens = info.input_kind is InputKind.TOKENS
    return model_pb2.Signature(
        input=model_pb2.TensorSignature(
            element_type=model_pb2.ELEMENT_TYPE_INT32 if tokens else model_pb2.ELEMENT_TYPE_FLOAT32,
            row_elements=info.input_size,
            row_bytes=info.input_row_bytes,
            vocabulary_size=info.vocabulary_size,
            labels=info.input_labels,
        ),
        output=model_pb2.TensorSignature(
            element_type=model_pb2.ELEMENT_TYPE_FLOAT32,
            row_elements=info.output_size,
            row_bytes=info.output_row_bytes,
            labels=info.output_labels,
        ),
        output_activation=info.activation,
        memory=_memory_signature(info),
    )


def _memory_signature(info: ModelInfo) -> model_pb2.TensorSignature | None:
    if not info.memory_row_size:
        return None
    return model_pb2.TensorSignature(
        element_type=model_pb2.ELEMENT_TYPE_FLOAT32,
        row_elements=info.memory_row_size,
        row_bytes=info.memory_row_bytes,
    )


def _limits(info: ModelInfo, limits: LimitsConfig) -> model_pb2.Limits:
    return model_pb2.Limits(
        chunk_steps_max=min(info.chunk_steps_max, limits.chunk_steps_max),
        predict_steps_max=limits.predict_steps_max,
        generate_steps_max=limits.generate_steps_max,
        message_bytes_max=limits.message_bytes_max,
        steps_in_flight_max=limits.steps_in_flight_max,
        stream_sessions_max=limits.stream_sessions_max,
        memory_rows_max=info.memory_rows_max,
        idle_ttl_max=duration(limits.idle_seconds_max),
        idle_ttl_default=duration(limits.idle_seconds_default),
    )

"""From statuses to exceptions: one table for reasons, one for plain codes."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import cast

import grpc
import grpc.aio
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from conveyor_client import _errors as e
from conveyor_client._transport import call_message

ERROR_DOMAIN = "conveyor"

# Every reason of the contract, without its prefix ERROR_REASON_.
CLASS_OF_REASON: Mapping[str, type[e.ConveyorError]] = MappingProxyType(
    {
        "MODEL_NOT_FOUND": e.ModelNotFound,
        "MODEL_NOT_STREAMABLE": e.ModelNotStreamable,
        "MODEL_NOT_GENERATIVE": e.ModelNotGenerative,
        "SESSION_NOT_FOUND": e.SessionNotFound,
        "SESSION_EXPIRED": e.SessionEnded,
        "SESSION_CLOSED": e.SessionEnded,
        "SESSION_EVICTED": e.SessionEnded,
        "SESSION_FENCED": e.SessionFenced,
        "SESSION_MOVED": e.SessionMoved,
        "SESSION_EXISTS": e.SessionExists,
        "SESSION_SUPERSEDED": e.SessionSuperseded,
        "SESSION_QUARANTINED": e.SessionQuarantined,
        "SESSION_MISMATCH": e.SessionMismatch,
        "INVALID_FIELD": e.InvalidField,
        "INVALID_SHAPE": e.InvalidShape,
        "NON_FINITE_INPUT": e.NonFiniteInput,
        "TOKEN_OUT_OF_RANGE": e.TokenOutOfRange,
        "EMPTY_CHUNK": e.EmptyChunk,
        "CHUNK_TOO_LONG": e.ChunkTooLong,
        "UNKNOWN_HANDLE": e.InvalidInput,
        "INVALID_MEMORY": e.InvalidMemory,
        "MESSAGE_TOO_LARGE": e.MessageTooLarge,
        "STEP_GAP": e.StepGap,
        "STEP_CONFLICT": e.StepConflict,
        "STEP_RESULT_NOT_HELD": e.StepResultNotHeld,
        "SESSIONS_LIMIT": e.LimitExceeded,
        "PRINCIPAL_SESSIONS_LIMIT": e.LimitExceeded,
        "STREAM_SESSIONS_LIMIT": e.LimitExceeded,
        "STEPS_IN_FLIGHT_LIMIT": e.LimitExceeded,
        "INBOX_FULL": e.LimitExceeded,
        "STREAMS_LIMIT": e.LimitExceeded,
        "MEMORY_TOO_LARGE": e.InvalidMemory,
        "SLOW_READER": e.LimitExceeded,
        "DEVICE_OUT_OF_MEMORY": e.LimitExceeded,
        "CALLS_LIMIT": e.LimitExceeded,
        "DEADLINE_EXCEEDED": e.DeadlineExceeded,
        "SERVER_DRAINING": e.ServerDraining,
        "ENGINE_FAILED": e.EngineFailed,
        "INTERNAL": e.ServerError,
        "NOT_SUPPORTED": e.NotSupported,
        "SNAPSHOT_CORRUPT": e.SnapshotCorrupt,
        "SNAPSHOT_INCOMPATIBLE": e.SnapshotIncompatible,
        "CHECKPOINT_NOT_RETAINED": e.CheckpointNotRetained,
        "STORE_UNAVAILABLE": e.StoreUnavailable,
        "STORE_LOST_WRITES": e.StoreLostWrites,
        "INVALID_TOKEN": e.InvalidToken,
        "SERVER_RESTARTED": e.ServerRestarted,
        "UNAUTHENTICATED": e.Unauthenticated,
    }
)

# A status without a reason comes from the transport, a proxy or another service. A server that died
# behind a proxy shows as INTERNAL with an RST_STREAM text once headers were sent, as UNAVAILABLE
# before; a stream reset by a middleman as CANCELLED or UNKNOWN. All of these are a broken
# connection.
CLASS_OF_CODE: Mapping[grpc.StatusCode, type[e.ConveyorError]] = MappingProxyType(
    {
        grpc.StatusCode.UNAVAILABLE: e.TransportError,
        grpc.StatusCode.INTERNAL: e.TransportError,
        grpc.StatusCode.CANCELLED: e.TransportError,
        grpc.StatusCode.UNKNOWN: e.TransportError,
        grpc.StatusCode.DEADLINE_EXCEEDED: e.DeadlineExceeded,
        grpc.StatusCode.RESOURCE_EXHAUSTED: e.LimitExceeded,
        grpc.StatusCode.UNIMPLEMENTED: e.NotSupported,
        grpc.StatusCode.UNAUTHENTICATED: e.Unauthenticated,
        grpc.StatusCode.PERMISSION_DENIED: e.Unauthenticated,
        grpc.StatusCode.INVALID_ARGUMENT: e.InvalidInput,
        grpc.StatusCode.OUT_OF_RANGE: e.InvalidInput,
        grpc.StatusCode.NOT_FOUND: e.NotFound,
        grpc.StatusCode.DATA_LOSS: e.DataLoss,
    }
)

_CODES: Mapping[int, grpc.StatusCode] = MappingProxyType(
    {code.value[0]: code for code in grpc.StatusCode}
)


def error_from_status(status: status_pb2.Status) -> e.ConveyorError:
    """Translates a google.rpc.Status, as frames and rich errors carry it.

    Args:
        status: A status that is not OK.

    Returns:
        The exception to raise; of class `ConveyorError` itself only for codes no table knows.
    """
    code = _CODES.get(status.code, grpc.StatusCode.UNKNOWN)
    reason, metadata, retry_after_seconds = _read_details(status)
    if reason is None:
        return _error_without_reason(code, status.message, "", retry_after_seconds)
    cls = CLASS_OF_REASON.get(reason) or CLASS_OF_CODE.get(code, e.ConveyorError)
    return cls(
        status.message or reason,
        reason=reason,
        code=code,
        retry_after_seconds=retry_after_seconds,
        metadata=metadata,
    )


def error_from_call(
    error: grpc.aio.AioRpcError, target: str = "", timeout_seconds: float | None = None
) -> e.ConveyorError:
    """Translates what a failed call raised.

    Args:
        error: The exception of grpc.aio.
        target: Where the server should be, for the message.
        timeout_seconds: How long the call was given, if it had a timeout.

    Returns:
        The exception to raise `from` it.
    """
    status = _read_status(error)
    if status is not None:
        return error_from_status(status)
    code, details = error.code(), error.details() or ""
    message = call_message(code, details, target, timeout_seconds)
    return _error_without_reason(code, details, message, None)


def _read_status(error: grpc.aio.AioRpcError) -> status_pb2.Status | None:
    # It reads code, details and trailing metadata only, which AioRpcError has like any Call.
    call = cast(grpc.Call, error)
    try:
        return rpc_status.from_call(call)  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
    except (ValueError, DecodeError):
        return None  # the details contradict the status or are not a Status: trust the status


def _read_details(status: status_pb2.Status) -> tuple[str | None, dict[str, str], float | None]:
    reason: str | None = None
    metadata: dict[str, str] = {}
    retry_after_seconds: float | None = None
    for detail in status.details:
        info = error_details_pb2.ErrorInfo()
        retry = error_details_pb2.RetryInfo()
        try:
            if detail.Unpack(info) and info.domain == ERROR_DOMAIN:
                reason, metadata = info.reason, dict(info.metadata)
            elif detail.Unpack(retry):
                retry_after_seconds = retry.retry_delay.ToTimedelta().total_seconds()
        except DecodeError:
            continue  # a broken detail leaves the status itself as good as it was
    return reason, metadata, retry_after_seconds


def _error_without_reason(
    code: grpc.StatusCode, details: str, message: str, retry_after_seconds: float | None
) -> e.ConveyorError:
    cls = CLASS_OF_CODE.get(code, e.ConveyorError)
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED and "larger than max" in details:
        cls = e.MessageTooLarge  # the transport's own check of the message size
    return cls(
        message or details or code.name,
        reason="TRANSPORT" if issubclass(cls, e.TransportError) else "UNSPECIFIED",
        code=code,
        retry_after_seconds=retry_after_seconds,
    )

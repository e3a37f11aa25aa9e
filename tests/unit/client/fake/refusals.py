"""Typed errors as they travel."""

import grpc
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.duration_pb2 import Duration
from google.rpc import error_details_pb2, status_pb2

CODES = {
    "MODEL_NOT_FOUND": grpc.StatusCode.NOT_FOUND,
    "SESSION_NOT_FOUND": grpc.StatusCode.NOT_FOUND,
    "SESSION_CLOSED": grpc.StatusCode.NOT_FOUND,
    "SESSION_EXISTS": grpc.StatusCode.ALREADY_EXISTS,
    "SESSION_SUPERSEDED": grpc.StatusCode.ABORTED,
    "SESSION_MOVED": grpc.StatusCode.UNAVAILABLE,
    "STEP_GAP": grpc.StatusCode.FAILED_PRECONDITION,
    "STEP_CONFLICT": grpc.StatusCode.ABORTED,
    "STEP_RESULT_NOT_HELD": grpc.StatusCode.FAILED_PRECONDITION,
    "INVALID_FIELD": grpc.StatusCode.INVALID_ARGUMENT,
    "INVALID_MEMORY": grpc.StatusCode.INVALID_ARGUMENT,
    "MEMORY_TOO_LARGE": grpc.StatusCode.RESOURCE_EXHAUSTED,
    "NOT_SUPPORTED": grpc.StatusCode.UNIMPLEMENTED,
    "NON_FINITE_INPUT": grpc.StatusCode.INVALID_ARGUMENT,
    "STREAM_SESSIONS_LIMIT": grpc.StatusCode.RESOURCE_EXHAUSTED,
    "DEADLINE_EXCEEDED": grpc.StatusCode.DEADLINE_EXCEEDED,
    "SERVER_DRAINING": grpc.StatusCode.UNAVAILABLE,
    "CHECKPOINT_NOT_RETAINED": grpc.StatusCode.FAILED_PRECONDITION,
    "SNAPSHOT_CORRUPT": grpc.StatusCode.DATA_LOSS,
    "UNAUTHENTICATED": grpc.StatusCode.UNAUTHENTICATED,
}


class Refusal(Exception):
    """A typed error on its way out."""

    def __init__(self, reason: str, *, retry_seconds: float = 0.0, **metadata: str) -> None:
        super().__init__(reason)
        self.status = make_status(reason, retry_seconds=retry_seconds, **metadata)


def make_status(
    reason: str,
    *,
    code: grpc.StatusCode | None = None,
    retry_seconds: float = 0.0,
    **metadata: str,
) -> status_pb2.Status:
    """Builds a status with its details."""
    code = code or CODES[reason]
    status = status_pb2.Status(code=code.value[0], message=f"refused: {reason}")
    info = AnyMessage()
    info.Pack(error_details_pb2.ErrorInfo(reason=reason, domain="conveyor", metadata=metadata))
    status.details.append(info)
    if retry_seconds:
        retry = AnyMessage()
        retry.Pack(error_details_pb2.RetryInfo(retry_delay=make_duration(retry_seconds)))
        status.details.append(retry)
    return status


def make_duration(seconds: float) -> Duration:
    """Seconds as the wire has them."""
    return Duration(seconds=int(seconds), nanos=int(seconds % 1 * 1e9))

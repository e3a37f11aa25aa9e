"""One table: which gRPC status goes with which error."""

from typing import Any, Final, NoReturn

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc import aio

from conveyor_server import errors

DOMAIN: Final = "conveyor"
DETAILS_KEY: Final = "grpc-status-details-bin"

# The first class that an error is an instance of decides; what is none of them is INTERNAL.
_CODES: Final[tuple[tuple[type[errors.ConveyorError], grpc.StatusCode], ...]] = (
    (errors.NotFound, grpc.StatusCode.NOT_FOUND),
    (errors.InvalidInput, grpc.StatusCode.INVALID_ARGUMENT),
    (errors.SessionExists, grpc.StatusCode.ALREADY_EXISTS),
    (errors.Conflict, grpc.StatusCode.ABORTED),
    (errors.Precondition, grpc.StatusCode.FAILED_PRECONDITION),
    (errors.LimitExceeded, grpc.StatusCode.RESOURCE_EXHAUSTED),
    (errors.DataLost, grpc.StatusCode.DATA_LOSS),
    (errors.Unavailable, grpc.StatusCode.UNAVAILABLE),
    (errors.DeadlineExceeded, grpc.StatusCode.DEADLINE_EXCEEDED),
    (errors.NotSupported, grpc.StatusCode.UNIMPLEMENTED),
    (errors.Unauthenticated, grpc.StatusCode.UNAUTHENTICATED),
)
_NUMBERS: Final = {code: code.value[0] for code in grpc.StatusCode}


def code_of(error: errors.ConveyorError) -> grpc.StatusCode:
    """The status code of an error."""
    codes = (code for kind, code in _CODES if isinstance(error, kind))
    return next(codes, grpc.StatusCode.INTERNAL)


def status_of(error: errors.ConveyorError) -> status_pb2.Status:
    """The whole status: code, message, ErrorInfo and, where another try can help, RetryInfo."""
    status = status_pb2.Status(code=_NUMBERS[code_of(error)], message=error.message)
    info = error_details_pb2.ErrorInfo(reason=error.reason, domain=DOMAIN, metadata=error.metadata)
    _pack(status, info)
    if error.retry_after_seconds is not None:
        delay = duration_pb2.Duration()
        delay.FromMicroseconds(int(error.retry_after_seconds * 1e6))
        _pack(status, error_details_pb2.RetryInfo(retry_delay=delay))
    return status


def ok() -> status_pb2.Status:
    """Nothing went wrong."""
    return status_pb2.Status(code=code_pb2.OK)


async def abort(context: aio.ServicerContext[Any, Any], error: errors.ConveyorError) -> NoReturn:
    """Ends a call with an error."""
    await context.abort(
        code_of(error), error.message, ((DETAILS_KEY, status_of(error).SerializeToString()),)
    )
    raise AssertionError("abort returned")


def _pack(
    status: status_pb2.Status, detail: error_details_pb2.ErrorInfo | error_details_pb2.RetryInfo
) -> None:
    packed = any_pb2.Any()
    packed.Pack(detail)
    status.details.append(packed)

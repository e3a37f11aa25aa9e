"""Statuses become the right exceptions, whatever they carry."""

import inspect
import re

import grpc
import grpc.aio
import pytest
from google.protobuf.any_pb2 import Any
from google.rpc import status_pb2

from conveyor.v1 import errors_pb2
from conveyor_client import _errors
from conveyor_client._errors import ConveyorError
from conveyor_client._status import (
    CLASS_OF_REASON,
    error_from_call,
    error_from_status,
)
from tests.unit.client.fake.refusals import make_status

REASONS = [
    name.removeprefix("ERROR_REASON_")
    for name in errors_pb2.ErrorReason.DESCRIPTOR.values_by_name
    if name != "ERROR_REASON_UNSPECIFIED"
]


def test_every_reason_of_the_contract_has_a_class() -> None:
    assert set(CLASS_OF_REASON) == set(REASONS)


@pytest.mark.parametrize("reason", REASONS)
def test_a_status_becomes_its_exception(reason: str) -> None:
    status = make_status(
        reason, code=grpc.StatusCode.ABORTED, retry_seconds=0.25, expected_step="7", field="rows"
    )
    error = error_from_status(status)
    assert type(error) is CLASS_OF_REASON[reason]
    assert error.reason == reason
    assert error.code is grpc.StatusCode.ABORTED
    assert error.retry_after_seconds == 0.25
    assert error.retryable
    assert error.metadata == {"expected_step": "7", "field": "rows"}
    assert str(error) == f"refused: {reason}"
    twin = error.copy()
    assert twin is not error
    assert (type(twin), str(twin), twin.reason) == (type(error), str(error), reason)


def test_errors_know_what_they_are_about() -> None:
    code = grpc.StatusCode.NOT_FOUND
    expired = error_from_status(make_status("SESSION_EXPIRED", code=code))
    assert isinstance(expired, _errors.SessionEnded)
    assert expired.ending == "expired"
    assert not expired.retryable
    field = error_from_status(make_status("INVALID_FIELD", code=code, field="labels"))
    assert isinstance(field, _errors.InvalidField)
    assert field.field == "labels"
    gap = error_from_status(make_status("STEP_GAP", code=code))
    assert isinstance(gap, _errors.StepGap)
    assert gap.expected_step == 0


def test_a_reason_from_the_future_falls_back_on_the_code() -> None:
    status = make_status("BRAND_NEW", code=grpc.StatusCode.INVALID_ARGUMENT)
    error = error_from_status(status)
    assert type(error) is _errors.InvalidInput
    assert error.reason == "BRAND_NEW"


def test_somebody_elses_details_and_broken_ones_are_passed_over() -> None:
    status = status_pb2.Status(code=5, message="nothing here")
    status.details.append(Any(type_url="type.googleapis.com/google.rpc.ErrorInfo", value=b"\xff"))
    status.details.append(Any(type_url="type.googleapis.com/some.Thing", value=b"\x00"))
    error = error_from_status(status)
    assert type(error) is _errors.NotFound
    assert error.reason == "UNSPECIFIED"


def failed_call(
    code: grpc.StatusCode, details: str, trailing: tuple[tuple[str, bytes], ...] = ()
) -> grpc.aio.AioRpcError:
    return grpc.aio.AioRpcError(code, grpc.aio.Metadata(), grpc.aio.Metadata(*trailing), details)


@pytest.mark.parametrize(
    ("code", "details", "cls", "retryable"),
    [
        ("UNAVAILABLE", "Socket closed", _errors.TransportError, True),
        ("INTERNAL", "Received RST_STREAM with error code 2", _errors.TransportError, True),
        ("UNKNOWN", "Stream removed", _errors.TransportError, True),
        ("CANCELLED", "RST_STREAM", _errors.TransportError, True),
        (
            "RESOURCE_EXHAUSTED",
            "CLIENT: Received message larger than max (6 vs. 4)",
            _errors.MessageTooLarge,
            False,
        ),
        ("RESOURCE_EXHAUSTED", "too many streams", _errors.LimitExceeded, True),
        ("DEADLINE_EXCEEDED", "Deadline Exceeded", _errors.DeadlineExceeded, True),
        ("UNIMPLEMENTED", "Method not found!", _errors.NotSupported, False),
        ("UNAUTHENTICATED", "", _errors.Unauthenticated, False),
        ("OUT_OF_RANGE", "", _errors.InvalidInput, False),
        ("ALREADY_EXISTS", "", ConveyorError, False),
    ],
)
def test_plain_statuses_of_the_transport_are_classed(
    code: str, details: str, cls: type[ConveyorError], retryable: bool
) -> None:
    error = error_from_call(failed_call(grpc.StatusCode[code], details))
    assert type(error) is cls
    assert error.retryable is retryable
    assert str(error)


@pytest.mark.parametrize(
    ("code", "details", "message"),
    [
        (
            "UNAVAILABLE",
            "failed to connect to all addresses; last error: UNKNOWN: ipv4:1.2.3.4:5: Connection"
            " refused",
            "cannot reach host:5: is the server running?",
        ),
        (
            "UNAVAILABLE",
            "failed to connect to all addresses; last error: UNAVAILABLE: ipv4:1.2.3.4:5: Socket"
            " closed",
            "cannot reach host:5: it closed the connection; if it speaks TLS, pass tls=Tls()",
        ),
        (
            "UNAVAILABLE",
            "failed to connect to all addresses; last error: UNKNOWN: ipv4:1.2.3.4:5: Tls handshake"
            " failed (TSI_PROTOCOL_FAILURE): SSL_ERROR_SSL: error:1000007d:SSL"
            " routines:OPENSSL_internal:CERTIFICATE_VERIFY_FAILED: unable to get local issuer",
            "cannot reach host:5: its certificate is not trusted",
        ),
        (
            "UNAVAILABLE",
            "errors resolving host:5: [field:hostname lookup error: Domain name not found]",
            "cannot reach host:5: its host name cannot be resolved",
        ),
        (
            "UNKNOWN",
            "the target uri is not valid: dns:///",
            "cannot reach 'host:5': that is not an",
        ),
        (
            "UNAVAILABLE",
            "ipv4:1.2.3.4:5: tcp handshaker shutdown",
            "cannot reach host:5: what answ",
        ),
        ("UNAVAILABLE", "Socket closed", "the connection to host:5 broke: Socket closed"),
        ("INTERNAL", "Received RST_STREAM with error code 2", "the connection to host:5 broke"),
        ("UNAVAILABLE", "recvmsg:Connection reset by peer (104)", "the connection to host:5 broke"),
        ("DEADLINE_EXCEEDED", "Deadline Exceeded", "no answer from host:5 within 2.5 s"),
        (
            "RESOURCE_EXHAUSTED",
            "Stream removed (CLIENT: Received message larger than max (3580 vs. 100))",
            "the answer has 3,580 bytes (Options.message_bytes_max is 100)",
        ),
        (
            "RESOURCE_EXHAUSTED",
            "SERVER: Received message larger than max (5242892 vs. 4784128)",
            "the message has 5,242,892 bytes, too many for limits.message_bytes_max of the server",
        ),
        (
            "RESOURCE_EXHAUSTED",
            "Concurrent RPC limit exceeded!",
            "the server has too many calls at once (limits.concurrent_calls_max); try again later",
        ),
        (
            "RESOURCE_EXHAUSTED",
            "received metadata size exceeds hard limit (value length 200000 vs. 131072)",
            "the call's metadata is too large for the server (limits.metadata_bytes_max)",
        ),
        ("RESOURCE_EXHAUSTED", "of a proxy", "of a proxy"),
        ("UNIMPLEMENTED", "Method not found!", "unknown method: is host:5 a Conveyor server of"),
        ("UNAUTHENTICATED", "", "UNAUTHENTICATED"),
        ("OUT_OF_RANGE", "too far", "too far"),
    ],
)
def test_plain_statuses_are_told_without_the_internals_of_grpc(
    code: str, details: str, message: str
) -> None:
    error = error_from_call(failed_call(grpc.StatusCode[code], details), "host:5", 2.5)
    assert str(error).startswith(message)
    assert not set(re.findall(r"ipv4|UNKNOWN|RST_STREAM|recvmsg|\[", str(error)))


def test_details_that_contradict_the_status_do_not_count() -> None:
    status = make_status("STEP_GAP")
    trailing = (("grpc-status-details-bin", status.SerializeToString()),)
    honest = failed_call(grpc.StatusCode.FAILED_PRECONDITION, status.message, trailing)
    assert type(error_from_call(honest)) is _errors.StepGap
    contradicting = failed_call(grpc.StatusCode.NOT_FOUND, status.message, trailing)
    assert type(error_from_call(contradicting)) is _errors.NotFound
    garbage = (("grpc-status-details-bin", b"\xff\xff"),)
    broken = failed_call(grpc.StatusCode.NOT_FOUND, "gone", garbage)
    assert type(error_from_call(broken)) is _errors.NotFound


def test_the_tree_is_drawn_as_it_is() -> None:
    drawn = [
        line.replace("│", " ").replace("├── ", "    ").replace("└── ", "    ")
        for line in inspect.cleandoc(_errors.__doc__ or "").splitlines()[2:]
        if line.strip()
    ]
    stack: list[str] = []
    for line in drawn:
        depth = (len(line) - len(line.lstrip())) // 4
        name = line.split()[0]
        cls = getattr(_errors, name)
        assert cls.__base__.__name__ == (stack[depth - 1] if depth else "Exception")
        stack[depth:] = [name]
    names = {line.split()[0] for line in drawn}
    classes = {
        name
        for name, value in vars(_errors).items()
        if isinstance(value, type) and issubclass(value, ConveyorError)
    }
    assert names == classes

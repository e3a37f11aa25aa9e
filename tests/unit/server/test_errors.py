"""The error tree: its drawing, its reasons and the contract's list of them."""

import inspect
import re
from pathlib import Path

import grpc
import pytest
from google.protobuf import duration_pb2
from google.rpc import error_details_pb2

import conveyor.v1
from conveyor.v1 import errors_pb2
from conveyor_server import errors
from conveyor_server.errors import ConveyorError
from conveyor_server.rpc.status import DOMAIN, code_of, status_of

PREFIX = "ERROR_REASON_"
PROTO = Path(next(iter(conveyor.v1.__path__))) / "errors.proto"


def classes() -> list[type[ConveyorError]]:
    return [
        each
        for _, each in inspect.getmembers(errors, inspect.isclass)
        if issubclass(each, ConveyorError)
    ]


def leaves() -> list[type[ConveyorError]]:
    parents = {base for each in classes() for base in each.__bases__}
    return [each for each in classes() if each not in parents]


def make(kind: type[ConveyorError]) -> ConveyorError:
    """An instance, whatever its class asks for."""
    arguments = {
        "message": "what happened",
        "session_id": "s",
        "field": "labels",
        "problem": "too many",
        "first_step": 9,
        "expected_step": 5,
        "limit": "limits.sessions_max",
        "maximum": 7,
        "device": "cuda:1",
    }
    parameters = inspect.signature(kind.__init__).parameters
    return kind(**{name: arguments[name] for name in parameters if name in arguments})


def codes_in_the_contract() -> dict[str, str]:
    """Reason -> status code, as the comments of errors.proto have them."""
    text = PROTO.read_text(encoding="utf-8")
    return {
        reason: code
        for code, reason in re.findall(
            r"// \((\w+)\) [^\n]*(?:\n *//[^\n]*)*\n *ERROR_REASON_(\w+) = \d+;", text
        )
    }


def test_only_leaves_have_reasons_and_each_its_own() -> None:
    reasons = [each.reason for each in leaves()]
    assert len(set(reasons)) == len(reasons)
    for each in classes():
        if each not in leaves():
            assert "reason" not in vars(each), each


def test_the_reasons_are_those_of_the_contract() -> None:
    contract = {
        value.name.removeprefix(PREFIX) for value in errors_pb2.ErrorReason.DESCRIPTOR.values
    }
    assert {each.reason for each in leaves()} == contract - {"UNSPECIFIED"}


def test_a_reason_is_its_classs_name() -> None:
    for each in leaves():
        words = re.sub(r"(?<!^)(?=[A-Z])", "_", each.__name__).upper()
        assert each.reason == words.replace("NON__FINITE", "NON_FINITE"), each


def test_the_drawing_shows_the_tree_as_it_is() -> None:
    drawn: list[tuple[str, str]] = []
    path: list[str] = []
    for line in (errors.__doc__ or "").splitlines():
        if line.strip() == "ConveyorError":
            path = ["ConveyorError"]
        match = re.match(r"^ {4}([│ ├└─]*)── (\w+)", line)
        if match:
            depth = 1 + len(match[1]) // 4
            del path[depth:]
            drawn.append((match[2], path[-1]))
            path.append(match[2])
    tree = [(each.__name__, each.__bases__[0].__name__) for each in classes()]
    assert sorted(drawn) == sorted(pair for pair in tree if pair[0] != "ConveyorError")


def test_each_reason_has_the_code_that_the_contract_says() -> None:
    contract = codes_in_the_contract()
    assert set(contract) == {each.reason for each in leaves()}
    assert {each.reason: code_of(make(each)).name for each in leaves()} == contract


@pytest.mark.parametrize("kind", leaves(), ids=lambda kind: kind.__name__)
def test_a_status_says_all_there_is_to_say(kind: type[ConveyorError]) -> None:
    error = make(kind)
    status = status_of(error)
    assert status.code == code_of(error).value[0]
    assert status.message == error.message
    info = error_details_pb2.ErrorInfo()
    assert status.details[0].Unpack(info)
    assert (info.domain, info.reason) == (DOMAIN, error.reason)
    assert dict(info.metadata) == error.metadata
    retry = error_details_pb2.RetryInfo()
    assert len(status.details) == 1 + (error.retry_after_seconds is not None)
    if error.retry_after_seconds is not None:
        assert status.details[1].Unpack(retry)
        wanted = duration_pb2.Duration()
        wanted.FromMicroseconds(int(error.retry_after_seconds * 1e6))
        assert retry.retry_delay == wanted
        assert 0 < wanted.ToTimedelta().total_seconds() <= 1


def test_a_retry_is_offered_only_where_it_can_help() -> None:
    never = {
        grpc.StatusCode.INVALID_ARGUMENT,
        grpc.StatusCode.NOT_FOUND,
        grpc.StatusCode.FAILED_PRECONDITION,
        grpc.StatusCode.DATA_LOSS,
        grpc.StatusCode.ALREADY_EXISTS,
        grpc.StatusCode.UNIMPLEMENTED,
        grpc.StatusCode.UNAUTHENTICATED,
    }
    for each in leaves():
        code = code_of(make(each))
        if code in never:
            assert each.retry_after_seconds is None, each
        if code is grpc.StatusCode.UNAVAILABLE:
            assert each.retry_after_seconds, each


def test_errors_of_other_rooms_have_a_reason_of_the_list_too() -> None:
    import conveyor_server.rpc.server  # noqa: F401  all of rpc is loaded by it

    def below(kind: type[ConveyorError]) -> set[type[ConveyorError]]:
        return {kind} | {each for child in kind.__subclasses__() for each in below(child)}

    known = {each.reason for each in leaves()}
    for each in below(ConveyorError):
        if not each.__subclasses__():
            assert each.reason in known, each
            code = codes_in_the_contract()[each.reason]
            assert code_of(make(each)).name == code


def test_the_callers_words_are_quoted_and_nothing_else_is() -> None:
    assert make(errors.SessionNotFound).message == "there is no session 's'"
    assert errors.Internal().message == "internal error of the server; the details are in its log"
    gap = errors.StepGap(9, 5)
    assert gap.metadata == {"expected_step": "5"}
    assert "9" in gap.message
    assert errors.InvalidField("labels", "too many").metadata == {"field": "labels"}

"""What every call goes through around its handler.

Here it is told who calls, how the call is counted and how its errors leave. An interceptor acts
once for each call; the messages of a stream never pass through it.

To gRPC every call is one that streams its request: a unary one is then read only after it was let
in, and by us, so that its time and its bytes are bounded and what cannot be parsed is answered
like any other mistake of the caller.

An exception keeps the frames it came through, and they keep the request. So no frame here keeps an
exception, and none leaves with its traceback: the request is let go of when its call ends, and not
when the garbage collector comes by.
"""

import asyncio
import inspect
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TYPE_CHECKING, Any, Final, TypeVar

import grpc
from google.protobuf.message import DecodeError, EncodeError
from grpc import aio

from conveyor_server.clock import Clock
from conveyor_server.errors import ConveyorError, DeviceOutOfMemory, Internal, InvalidField
from conveyor_server.metrics import Metrics
from conveyor_server.rpc.access import Authenticator, act_for, check_size, principal, size_of
from conveyor_server.rpc.bounds import CallBounds
from conveyor_server.rpc.receiving import Receiver
from conveyor_server.rpc.results import ResultsBudget
from conveyor_server.rpc.status import abort, code_of

if TYPE_CHECKING:  # it needs an extra
    from conveyor_server.rpc.tracing import Tracing

UNKNOWN_METHOD: Final = "unknown"
STATUS_SECONDS_MAX: Final = 30.0
"""For a client to take the status of a call that was refused, behind what it has not read."""
_OURS: Final = ("conveyor.", "inference.")
_NOT_TRACED: Final = "grpc."
"""Health and reflection are asked all day long."""
_OPEN_TO_ALL: Final = frozenset(("grpc.health.v1.Health", name) for name in ("Check", "Watch"))
"""Whoever balances load has no token; these have bounds of their own. List names the models."""

_PARSED_BYTES: Final = 4
"""What each byte of a message takes at most once it is parsed, about."""
_log = logging.getLogger(__name__)

Handler = Callable[[Any, Any], Awaitable[Any]]
Parse = Callable[[bytes], Any]
E = TypeVar("E", bound=BaseException)


class CallInterceptor(aio.ServerInterceptor):
    """Authenticates, bounds, counts, and turns exceptions into statuses."""

    def __init__(
        self,
        authenticator: Authenticator,
        bounds: CallBounds,
        receiver: Receiver,
        results: ResultsBudget,
        metrics: Metrics,
        clock: Clock,
        metadata_bytes_max: int,
        tracing: "Tracing | None" = None,
    ) -> None:
        """Limits as in `config.LimitsConfig`; without `tracing` no call is traced."""
        self.authenticator = authenticator
        self.bounds = bounds
        self.receiver = receiver
        self.results = results
        self.metrics = metrics
        self.clock = clock
        self.metadata_bytes_max = metadata_bytes_max
        self.tracing = tracing
        self._wrapped: dict[str, grpc.RpcMethodHandler[Any, Any]] = {}

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        """Wraps the handler of a call."""
        method = str(handler_call_details.method)
        wrapped = self._wrapped.get(method)
        if wrapped is not None:
            return wrapped
        handler = await continuation(handler_call_details)
        if handler is None:
            labels = (UNKNOWN_METHOD, UNKNOWN_METHOD, UNKNOWN_METHOD)
            self.metrics.grpc_started.add(1, *labels)
            self.metrics.grpc_handled.add(1, *labels, grpc.StatusCode.UNIMPLEMENTED.name)
            return None
        # Only methods that exist come here, so there are few of them.
        self._wrapped[method] = _Method(self, method, handler).wrapped()
        return self._wrapped[method]


class _Method:
    """One method, with what its calls go through."""

    def __init__(self, door: CallInterceptor, method: str, handler: Any) -> None:
        _, self.service, self.name = method.split("/")
        self._door = door
        self._kind = _kind(handler)
        self._unary_request = not handler.request_streaming
        self._unary_response = not handler.response_streaming
        self._parse = _parsing(handler.request_deserializer)
        self._serialize = handler.response_serializer
        inner = getattr(handler, self._kind)
        self._inner: Handler = _written(inner) if inspect.isasyncgenfunction(inner) else inner
        self._ours = self.service.startswith(_OURS)  # these raise, and never abort by themselves
        self._open_to_all = (self.service, self.name) in _OPEN_TO_ALL
        self._tracing = None if self.service.startswith(_NOT_TRACED) else door.tracing
        self._labels = (self._kind, self.service, self.name)

    def wrapped(self) -> Any:
        """The handler for gRPC."""
        make = (
            grpc.stream_unary_rpc_method_handler
            if self._unary_response
            else grpc.stream_stream_rpc_method_handler
        )
        return make(
            self._call,
            request_deserializer=None if self._unary_request else self._parse,
            response_serializer=None if self._unary_response else self._serialize,
        )

    async def _call(self, messages: Any, context: Any) -> Any:
        started = self._door.clock.monotonic()
        metadata = context.invocation_metadata() or ()
        self._door.metrics.grpc_started.add(1, *self._labels)
        span = self._tracing and self._tracing.begin(self.service, self.name, metadata)

        def handled(code: grpc.StatusCode, reason: str = "") -> None:
            metrics = self._door.metrics
            metrics.grpc_handled.add(1, *self._labels, code.name)
            metrics.grpc_seconds.observe(self._door.clock.monotonic() - started, *self._labels)
            if span is not None:
                span.end(code, reason)

        try:
            outcome = await self._outcome(messages, context, metadata)
        except BaseException:
            handled(grpc.StatusCode.CANCELLED)
            raise
        if isinstance(outcome, grpc.StatusCode):  # aborted by a handler that is not ours
            handled(outcome)
            return None
        if isinstance(outcome, ConveyorError):
            self._door.metrics.rejected.add(1, outcome.reason)
            # Before the end: a client that reads nothing keeps its status away.
            handled(code_of(outcome), outcome.reason)
            await _end(context, outcome)
            return None
        handled(grpc.StatusCode.OK)
        if self._kind == "unary_unary":
            self._door.metrics.grpc_sent.add(1, *self._labels)
        return outcome

    async def _outcome(self, messages: Any, context: Any, metadata: Any) -> Any:
        """The response, or the error or the status that the call ends with in place of it.

        Raises:
            CancelledError: The call was cancelled, or its client is gone.
        """
        watched = context if self._ours else _Watched(context)
        try:
            return await self._admitted(messages, watched, metadata)
        except ConveyorError as error:
            return bare(error)
        except aio.AbortError as error:
            bare(error)
            return watched.aborted_with
        except aio.BaseError as error:  # what is left of these says that the call is over
            _log.debug("a call ended under its handler", extra={"problem": str(error)})
        except (MemoryError, EncodeError):  # what cannot be encoded does not fit
            _log.error("out of memory in a call", extra={"method": f"/{self.service}/{self.name}"})
            return DeviceOutOfMemory("the server")
        except Exception:  # noqa: BLE001  a bug fails its call, not the server
            method = f"/{self.service}/{self.name}"
            _log.exception("a call failed by our own mistake", extra={"method": method})
            return Internal()
        raise asyncio.CancelledError

    async def _admitted(self, messages: Any, context: Any, metadata: Any) -> Any:
        """Lets the call in, and runs it."""
        door = self._door
        size = size_of(metadata)
        door.receiver.let_go(size)  # gRPC keeps it in a circle of its own
        check_size(size, door.metadata_bytes_max)
        if not self._open_to_all:
            act_for(door.authenticator.authenticate(metadata))
            with door.bounds.calls.counted(context.peer()):
                return await self._run(messages, context)
        if self._unary_response:
            return await self._run(messages, context)
        with door.bounds.watches.counted(context.peer()):
            return await self._run(messages, context)

    async def _run(self, messages: Any, context: Any) -> Any:
        if not self._unary_request:
            return await self._inner(messages, context)
        received = await self._door.receiver.read(context, first_out=self._open_to_all)
        self._door.metrics.grpc_received.add(1, *self._labels)
        try:
            response = await self._inner(self._parse(received.take()), context)
            if not self._unary_response:
                return None
            data = self._serialize(response)
            self._door.results.count_response(principal(), len(data))
            return data
        finally:
            received.release()


class _Watched:
    """The context of a handler that is not ours, with an eye on the status it ends with."""

    def __init__(self, context: Any) -> None:
        self._context = context
        self.aborted_with = grpc.StatusCode.UNKNOWN

    def __getattr__(self, name: str) -> Any:
        return getattr(self._context, name)

    async def abort(self, code: grpc.StatusCode, *details: Any, **more: Any) -> None:
        self.aborted_with = code
        await self._context.abort(code, *details, **more)


def bare(error: E) -> E:
    """Takes from an error the frames that it came through, and the errors behind it."""
    error.__traceback__ = error.__context__ = error.__cause__ = None
    return error


def _written(responses: Callable[[Any, Any], AsyncIterator[Any]]) -> Handler:
    """Makes a handler that yields its responses one that writes them, as ours do."""

    async def write(request: Any, context: Any) -> None:
        async for response in responses(request, context):
            await context.write(response)

    return write


def _parsing(deserialize: Parse) -> Parse:
    """Makes a message that cannot be parsed an error of the caller's."""

    def parse(data: bytes) -> Any:
        try:
            return deserialize(data)
        except DecodeError as error:
            bytearray(_PARSED_BYTES * len(data))  # raises MemoryError if that is the reason
            raise InvalidField("message", "not a message of this method's type") from error

    return parse


async def _end(context: Any, refusal: ConveyorError) -> None:
    """Sends the status of a call that was refused.

    Raises:
        CancelledError: It could not be sent; this resets the call.
    """
    try:
        # The status stands behind what was written, and a client may never read that.
        async with asyncio.timeout(STATUS_SECONDS_MAX):
            await abort(context, refusal)
    except aio.AbortError as error:
        bare(error)  # gRPC keeps it, and goes by it once the handler has returned
        return
    except Exception as error:  # noqa: BLE001
        # Out of time, or the client went; grpc's own class for that is not public.
        _log.debug("a call ended without its status", extra={"problem": str(error)})
    raise asyncio.CancelledError


def _kind(handler: Any) -> str:
    request = "stream" if handler.request_streaming else "unary"
    response = "stream" if handler.response_streaming else "unary"
    return f"{request}_{response}"

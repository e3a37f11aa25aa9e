"""What every call goes through around its handler.

Here it is told who calls, how the call is counted and how its errors leave. An interceptor acts
once for each call; the messages of a stream never pass through it.
"""

import asyncio
import contextvars
import hmac
import inspect
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import TYPE_CHECKING, Any, Final, NoReturn

import grpc
from grpc import aio

from conveyor_server.clock import Clock
from conveyor_server.errors import ConveyorError, Internal, MessageTooLarge, Unauthenticated
from conveyor_server.metrics import Metrics
from conveyor_server.rpc.status import abort, code_of

if TYPE_CHECKING:  # it needs an extra
    from conveyor_server.rpc.tracing import Tracing

ANONYMOUS: Final = "anonymous"
UNKNOWN_METHOD: Final = "unknown"
_BEARER: Final = "Bearer "
STATUS_SECONDS_MAX: Final = 30.0
"""For a client to take the status of a call that was refused, behind what it has not read."""
_OURS: Final = ("conveyor.", "inference.")
_NOT_TRACED: Final = "grpc."
"""Health and reflection are asked all day long."""
_OPEN_TO_ALL: Final = frozenset(f"/grpc.health.v1.Health/{name}" for name in ("Check", "Watch"))
"""Whoever balances load has no token. List names the models, as ListModels does."""

_principal: contextvars.ContextVar[str] = contextvars.ContextVar("principal", default=ANONYMOUS)
_log = logging.getLogger(__name__)

Handler = Callable[[Any, Any], Awaitable[Any]]


def principal() -> str:
    """The authenticated caller of the call being handled."""
    return _principal.get()


class Authenticator:
    """Maps bearer tokens to principals."""

    def __init__(self, tokens: Mapping[str, str]) -> None:
        """Without tokens everybody is the one principal `anonymous`."""
        self._tokens = {token.encode(): name for token, name in tokens.items()}

    def authenticate(self, metadata: Mapping[str, str | bytes]) -> str:
        """Returns the caller's principal.

        Raises:
            Unauthenticated: No token, a malformed or an unknown one.
        """
        if not self._tokens:
            return ANONYMOUS
        value = metadata.get("authorization", "")
        if not isinstance(value, str) or not value.startswith(_BEARER):
            raise Unauthenticated(
                "this server needs a token: send metadata 'authorization: Bearer TOKEN'"
            )
        given = value.removeprefix(_BEARER).encode()
        found = None
        for token, name in self._tokens.items():  # all of them, so that time tells nothing
            if hmac.compare_digest(token, given):
                found = name
        if found is None:
            raise Unauthenticated("the server does not know this bearer token (auth.tokens)")
        return found


class CallInterceptor(aio.ServerInterceptor):
    """Authenticates, counts, and turns exceptions into statuses."""

    def __init__(
        self,
        authenticator: Authenticator,
        metrics: Metrics,
        clock: Clock,
        metadata_bytes_max: int,
        tracing: "Tracing | None" = None,
    ) -> None:
        """Limits as in `config.LimitsConfig`; without `tracing` no call is traced."""
        self._authenticator = authenticator
        self._metrics = metrics
        self._clock = clock
        self._metadata_bytes_max = metadata_bytes_max
        self._tracing = tracing

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        """Wraps the handler of a call."""
        handler = await continuation(handler_call_details)
        if handler is None:
            labels = (UNKNOWN_METHOD, UNKNOWN_METHOD, UNKNOWN_METHOD)
            self._metrics.grpc_started.add(1, *labels)
            self._metrics.grpc_handled.add(1, *labels, grpc.StatusCode.UNIMPLEMENTED.name)
            return None
        method = str(handler_call_details.method)
        kind = _kind(handler)
        inner = getattr(handler, kind)
        if inspect.isasyncgenfunction(inner):
            inner = _written(inner)
        return getattr(grpc, f"{kind}_rpc_method_handler")(
            self._wrap(inner, method, kind),
            request_deserializer=handler.request_deserializer,
            response_serializer=handler.response_serializer,
        )

    def _wrap(self, inner: Handler, method: str, kind: str) -> Handler:
        _, service, name = method.split("/")
        labels = (kind, service, name)
        ours = service.startswith(_OURS)  # these raise, and never abort by themselves
        tracing = None if service.startswith(_NOT_TRACED) else self._tracing

        async def call(request: Any, context: Any) -> Any:
            started = self._clock.monotonic()
            self._metrics.grpc_started.add(1, *labels)
            span = tracing and tracing.begin(service, name, context.invocation_metadata() or ())
            if not ours:
                context = _Watched(context)

            def handled(code: grpc.StatusCode, reason: str = "") -> None:
                if kind.startswith("unary"):
                    self._metrics.grpc_received.add(1, *labels)
                self._metrics.grpc_handled.add(1, *labels, code.name)
                self._metrics.grpc_seconds.observe(self._clock.monotonic() - started, *labels)
                if span is not None:
                    span.end(code, reason)

            try:
                self._admit(method, context)
                response = await inner(request, context)
            except ConveyorError as error:
                refusal = error
            except aio.AbortError:
                handled(context.aborted_with)
                raise
            except Exception:  # noqa: BLE001  a bug fails its call, not the server
                _log.exception("a call failed by our own mistake", extra={"method": method})
                refusal = Internal()
            except BaseException:
                handled(grpc.StatusCode.CANCELLED)
                raise
            else:
                handled(grpc.StatusCode.OK)
                if kind == "unary_unary":
                    self._metrics.grpc_sent.add(1, *labels)
                return response
            self._metrics.rejected.add(1, refusal.reason)
            # Before the end: a client that reads nothing keeps its status away.
            handled(code_of(refusal), refusal.reason)
            return await _end(context, refusal)

        return call

    def _admit(self, method: str, context: Any) -> None:
        metadata: dict[str, str | bytes] = dict(context.invocation_metadata() or ())
        size = sum(len(key) + len(value) for key, value in metadata.items())
        if size > self._metadata_bytes_max:
            raise MessageTooLarge(
                f"the metadata has {size:,} bytes",
                limit="limits.metadata_bytes_max",
                maximum=self._metadata_bytes_max,
            )
        if method not in _OPEN_TO_ALL:
            _principal.set(self._authenticator.authenticate(metadata))


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


def _written(responses: Callable[[Any, Any], AsyncIterator[Any]]) -> Handler:
    """Makes a handler that yields its responses one that writes them, as ours do."""

    async def write(request: Any, context: Any) -> None:
        async for response in responses(request, context):
            await context.write(response)

    return write


async def _end(context: Any, refusal: ConveyorError) -> NoReturn:
    try:
        # The status stands behind what was written, and a client may never read that.
        async with asyncio.timeout(STATUS_SECONDS_MAX):
            await abort(context, refusal)
    except aio.AbortError:
        raise
    except Exception as error:
        # Out of time, or the client went; grpc's own class for that is not public.
        _log.debug("a call ended without its status", exc_info=True)
        raise asyncio.CancelledError from error  # resets the call


def _kind(handler: Any) -> str:
    request = "stream" if handler.request_streaming else "unary"
    response = "stream" if handler.response_streaming else "unary"
    return f"{request}_{response}"

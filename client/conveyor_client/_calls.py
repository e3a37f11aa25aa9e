"""The channel and its calls: metadata, deadlines and typed errors on every one of them."""

import asyncio
import re
import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import grpc
import grpc.aio
from google.protobuf.message import Message
from google.protobuf.wrappers_pb2 import Int64Value, StringValue

from conveyor.v1 import model_pb2_grpc, session_pb2_grpc
from conveyor_client._errors import InvalidField, NotFound, NotOpen, Unavailable
from conveyor_client._home import Home
from conveyor_client._lane import StepsCall
from conveyor_client._policy import Options
from conveyor_client._status import error_from_call

_Q = TypeVar("_Q", bound=Message)
_R = TypeVar("_R", bound=Message)
Metadata = Sequence[tuple[str, str]]

_SERVING = 1
_PORT_MAX = 65_535
_PORTS = re.compile(r":(\d+)(?=,|$)")
_CALLS_END_SECONDS_MAX = 1.0


@dataclass(frozen=True, slots=True)
class Tls:
    """How to speak TLS.

    Attributes:
        root_certificates: PEM of whom to trust; None means the system's roots.
        private_key: PEM of the client's own key, where the server asks for a certificate.
        certificate_chain: PEM of the client's own certificate.
        server_name: The name to expect in the server's certificate, if not the target's.
    """

    root_certificates: bytes | None = None
    private_key: bytes | None = None
    certificate_chain: bytes | None = None
    server_name: str | None = None


class _Link:
    """An open channel and its stubs."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self.channel = channel
        self.sessions = session_pb2_grpc.SessionServiceStub(channel)
        self.models = model_pb2_grpc.ModelServiceStub(channel)
        # grpc.health.v1 has one string in the request and one enum in the response, both field 1,
        # so the wrapper types are the same bytes and the client needs no package for it.
        self.health = channel.unary_unary(
            "/grpc.health.v1.Health/Check",
            request_serializer=StringValue.SerializeToString,
            response_deserializer=Int64Value.FromString,
        )


class Calls:
    """One channel, its stubs, and one way to call through them.

    The channel is made at the first call, in the event loop that runs then. Once it is closed
    nothing of it is left, so that gRPC ends its threads with the last one.
    """

    def __init__(
        self,
        target: str,
        options: Options,
        home: Home,
        *,
        token: str | None = None,
        tls: Tls | None = None,
        metadata: Metadata = (),
    ) -> None:
        _check_port(target)
        self._options = options
        self.target = target
        self._metadata = tuple(metadata)
        if token is not None:
            self._metadata += (("authorization", f"Bearer {token}"),)
        self._tls = tls
        self._link: _Link | None = None
        self._closed = False
        self.home = home

    @property
    def sessions(self) -> "session_pb2_grpc.SessionServiceAsyncStub":
        """The stub of SessionService; raises `NotOpen` where there can be none."""
        return self._connected().sessions

    @property
    def models(self) -> "model_pb2_grpc.ModelServiceAsyncStub":
        """The stub of ModelService; raises `NotOpen` where there can be none."""
        return self._connected().models

    def _connected(self) -> _Link:
        self.home.enter()
        if self._closed:
            raise NotOpen("the client is closed")
        if self._link is None:
            self._link = _Link(_make_channel(self.target, self._options, self._tls))
            self.home.note_open()
        return self._link

    async def aclose(self) -> None:
        """Closes the channel; calls that still run are cancelled."""
        self._closed = True
        if self.home.forked:
            return  # without a touch: not even letting go is safe
        link, self._link = self._link, None
        if link is not None:
            if not self.home.lost:  # else its calls ended with their event loop
                await link.channel.close()
                if self.home.last:  # else gRPC's threads go on for the others, who wait in turn
                    await calls_ended()
            self.home.note_closed()

    def steps(self, key: str) -> StepsCall:
        """Starts StreamSteps.

        Args:
            key: What a proxy hashes to choose a server.
        """
        try:
            return self.sessions.StreamSteps(metadata=self._metadata_for(key))
        except grpc.aio.UsageError as error:
            raise NotOpen("the client is closed") from error

    async def unary(
        self,
        method: "grpc.aio.UnaryUnaryMultiCallable[_Q, _R]",
        request: _Q,
        *,
        timeout_seconds: float | None = None,
        key: str = "",
        repeatable: bool = False,
    ) -> _R:
        """Makes one unary call.

        Args:
            method: A stub's method.
            request: Its request.
            timeout_seconds: Overrides the client's.
            key: What a proxy hashes, if the call concerns one session.
            repeatable: It changes nothing, or numbers and ids make it safe to repeat; so it is, a
                few times, if nobody could answer.

        Returns:
            The response.

        Raises:
            ConveyorError: What went wrong, by class.
        """
        seconds = total_seconds = self._seconds(timeout_seconds)
        give_up_at = time.monotonic() + seconds
        attempt = 1
        while True:
            try:
                return await method(request, timeout=seconds, metadata=self._metadata_for(key))
            except grpc.aio.AioRpcError as error:
                cause = error
                translated = error_from_call(error, self.target, total_seconds)
            except grpc.aio.UsageError as error:
                raise NotOpen("the client is closed") from error
            wait_seconds = self._options.reconnect.wait_seconds(attempt)
            wait_seconds += translated.retry_after_seconds or 0.0
            seconds = give_up_at - time.monotonic() - wait_seconds
            may_repeat = repeatable and isinstance(translated, Unavailable)
            if not may_repeat or attempt >= self._options.call_attempts_max or seconds <= 0:
                del method  # whoever keeps the error keeps this frame, but not the channel
                raise translated from cause.with_traceback(None)
            attempt += 1
            await asyncio.sleep(wait_seconds)

    async def stream(
        self,
        method: "grpc.aio.UnaryStreamMultiCallable[_Q, _R]",
        request: _Q,
        *,
        timeout_seconds: float | None = None,
        key: str = "",
    ) -> AsyncGenerator[_R, None]:
        """Makes one call that answers with a stream; leaving the loop cancels it.

        Args:
            method: A stub's method.
            request: Its request.
            timeout_seconds: Overrides the client's.
            key: What a proxy hashes, if the call concerns one session.

        Yields:
            The responses.

        Raises:
            ConveyorError: What went wrong, by class.
        """
        seconds = self._seconds(timeout_seconds)
        try:
            call = method(request, timeout=seconds, metadata=self._metadata_for(key))
            try:
                async for response in call:
                    yield response
            finally:
                call.cancel()
                del call
        except grpc.aio.AioRpcError as error:
            del method  # as for `unary`
            raise error_from_call(error, self.target, seconds) from error.with_traceback(None)
        except grpc.aio.UsageError as error:
            raise NotOpen("the client is closed") from error

    async def health(self, service: str, timeout_seconds: float | None) -> bool:
        """Asks grpc.health.v1 about a service; an unknown one is not healthy."""
        try:
            answer = await self.unary(
                self._connected().health,
                StringValue(value=service),
                timeout_seconds=timeout_seconds,
            )
        except NotFound:
            return False
        return answer.value == _SERVING

    def _seconds(self, timeout_seconds: float | None) -> float:
        return self._options.timeout_seconds if timeout_seconds is None else timeout_seconds

    def _metadata_for(self, key: str) -> Metadata:
        return (*self._metadata, ("conveyor-key", key)) if key else self._metadata


def _check_port(target: str) -> None:
    """Refuses a port that there is not, of which gRPC would take the last 16 bits."""
    if target.startswith(("unix:", "unix-abstract:", "vsock:")):
        return
    for port in _PORTS.findall(target):
        if int(port) > _PORT_MAX:
            raise InvalidField(
                f"target is {target!r}; expected a port of 0 to {_PORT_MAX}",
                metadata={"field": "target"},
            )


async def calls_ended() -> None:
    """Waits, not for long, until gRPC has noticed that calls are cancelled.

    Its tasks for that hold the channel, and a loop that stops before they end keeps them for ever.
    """
    give_up_at = time.monotonic() + _CALLS_END_SECONDS_MAX
    while time.monotonic() < give_up_at:
        coroutines = (task.get_coro() for task in asyncio.all_tasks())
        if not any("_AioCall" in getattr(each, "__qualname__", "") for each in coroutines):
            return
        await asyncio.sleep(0.001)


def _make_channel(target: str, options: Options, tls: Tls | None) -> grpc.aio.Channel:
    arguments: list[tuple[str, str | int]] = [
        ("grpc.max_receive_message_length", options.message_bytes_max),
        ("grpc.max_send_message_length", -1),  # the server's limit is the one that counts
        # How to reconnect is decided a layer up; the channel must not sit out minutes meanwhile.
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.min_reconnect_backoff_ms", 100),
        ("grpc.max_reconnect_backoff_ms", 2000),
        ("grpc.use_local_subchannel_pool", 1),  # two clients are two connections
        ("grpc.enable_retries", 0),
    ]
    if tls is None:
        return grpc.aio.insecure_channel(target, options=arguments)
    if tls.server_name is not None:
        arguments.append(("grpc.ssl_target_name_override", tls.server_name))
    credentials = grpc.ssl_channel_credentials(
        tls.root_certificates, tls.private_key, tls.certificate_chain
    )
    return grpc.aio.secure_channel(target, credentials, options=arguments)

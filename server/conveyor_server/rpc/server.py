"""The gRPC server: services, health, reflection, transport limits."""

import asyncio
import logging
import socket
from typing import Final

from grpc import aio
from grpc_health.v1 import health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from conveyor.oip import inference_pb2, inference_pb2_grpc
from conveyor.os_errors import os_error_text
from conveyor.v1 import model_pb2, model_pb2_grpc, session_pb2, session_pb2_grpc
from conveyor_server.config import LimitsConfig, ListenConfig
from conveyor_server.core import ModelInfo
from conveyor_server.rpc.access import Authenticator
from conveyor_server.rpc.bounds import CallBounds
from conveyor_server.rpc.calls import CallInterceptor
from conveyor_server.rpc.health import NOT_SERVING, SERVICE_UNKNOWN, SERVING, Health
from conveyor_server.rpc.models import ModelServicer
from conveyor_server.rpc.oip.servicer import InferenceServicer
from conveyor_server.rpc.receiving import Receiver
from conveyor_server.rpc.service import Services
from conveyor_server.rpc.sessions import SessionServicer
from conveyor_server.rpc.streams import Streams
from conveyor_server.rpc.tls import TlsFilesError, credentials

CUT_SECONDS_MAX: Final = 2.0
"""What calls that were cut off at a stop have to end."""
PING_SECONDS_MIN: Final = 1
"""How often a client may ping a connection on which nothing else is sent.

Clients and proxies ping to notice a dead connection and to keep the way through firewalls open,
some every 10 s or less. gRPC's own default is 5 minutes, and 2 hours while there is no call.
"""
PING_STRIKES_MAX: Final = 4
"""Pings that come sooner than that, until a result is sent; one more ends the connection."""

STREAMS_PER_CALL: Final = 8
"""Streams that the transport takes on a connection for each call that we let in."""
PENDING_CALLS_MIN: Final = 8_192
"""Calls of one method that may wait for us, however few are let in at once."""
UNREAD_BYTES_MAX: Final = 256 * 2**10
"""What the transport takes of a stream ahead of our reading it."""

_FRAME_BYTES = 64 * 2**10
_ENTRY_BYTES = 32
"""What a message and each entry of a steps frame may have beside rows; then the transport refuses.

An entry's handle, first step, length and mode take 30 bytes with their largest values.
"""

_SESSION_SERVICE = session_pb2.DESCRIPTOR.services_by_name["SessionService"].full_name
_MODEL_SERVICE = model_pb2.DESCRIPTOR.services_by_name["ModelService"].full_name
_INFERENCE_SERVICE = inference_pb2.DESCRIPTOR.services_by_name["GRPCInferenceService"].full_name
_SERVICES = (_SESSION_SERVICE, _MODEL_SERVICE, _INFERENCE_SERVICE)


class AddressError(Exception):
    """The configured address cannot be used."""


class GrpcServer:
    """Starts, drains and stops the services."""

    def __init__(self, services: Services) -> None:
        """Builds the server; it listens from `start` on.

        Raises:
            AddressError: The TLS files cannot be used.
        """
        config = services.config
        try:
            self._credentials = credentials(config.listen)
        except TlsFilesError as error:
            raise AddressError(str(error)) from error
        self._shutdown = config.shutdown
        self._streams = Streams(config.limits.streams_max)
        self._health = Health()
        self._serving: dict[str, set[int]] = {}
        self._started = self._draining = False
        interceptor = CallInterceptor(
            authenticator=Authenticator(config.auth.tokens),
            bounds=CallBounds(config.limits),
            receiver=Receiver(config.limits, transport_message_bytes_max(config.limits)),
            results=services.results,
            metrics=services.metrics,
            clock=services.clock,
            metadata_bytes_max=config.limits.metadata_bytes_max,
            tracing=services.tracing,
        )
        logging.getLogger("grpc._cython.cygrpc").addFilter(_is_of_interest)
        self._server = aio.server(
            interceptors=[interceptor], options=transport_options(config.limits)
        )
        session_pb2_grpc.add_SessionServiceServicer_to_server(
            SessionServicer(services, self._streams), self._server
        )
        model_pb2_grpc.add_ModelServiceServicer_to_server(ModelServicer(services), self._server)
        inference_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(
            InferenceServicer(services, self._streams), self._server
        )
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        if config.listen.reflection:
            names = (*_SERVICES, "grpc.health.v1.Health", reflection.SERVICE_NAME)
            reflection.enable_server_reflection(names, self._server)
        services.metrics.gauge(
            "conveyor_streams",
            "StreamSteps and ModelStreamInfer calls under way.",
            (),
            lambda: [((), len(self._streams))],
        )

    async def start(self, listen: ListenConfig) -> str:
        """Listens, and returns host:port.

        Raises:
            AddressError: The address cannot be used.
        """
        try:
            if self._credentials is None:
                port = self._server.add_insecure_port(listen.address)
            else:
                port = self._server.add_secure_port(listen.address, self._credentials)
        except RuntimeError as error:
            why = _bind_problem(listen.address)
            message = (
                f"listen.address: cannot listen on {listen.address}: {why}; choose another"
                " address with --listen"
            )
            raise AddressError(message) from error
        await self._server.start()
        self._started = True
        await self._set_whole_serving()
        for service in _SERVICES:
            await self._health.set(service, SERVING)
        return f"{listen.address.rpartition(':')[0]}:{port}"

    async def set_model_serving(self, info: ModelInfo, serving: bool) -> None:
        """Health of a model: of `name/version`, and of its name while any version serves."""
        name, version = info.key.name, info.key.version
        versions = self._serving.setdefault(name, set())
        (versions.add if serving else versions.discard)(version)
        for service, served in ((name, bool(versions)), (f"{name}/{version}", serving)):
            await self._health.set(service, SERVING if served else SERVICE_UNKNOWN)
        await self._set_whole_serving()

    async def _set_whole_serving(self) -> None:
        await self._health.set("", NOT_SERVING if self.unready else SERVING)

    @property
    def unready(self) -> str:
        """Why health says that the server does not serve; empty while it does."""
        if self._draining:
            return "draining"
        if not self._started:
            return "starting"
        return "" if any(self._serving.values()) else "no model is served"

    async def drain(self) -> None:
        """Not serving any more: health says so, every stream is told, and no new one is taken."""
        self._draining = True
        await self._health.enter_graceful_shutdown()
        self._streams.drain(self._shutdown.reconnect_after_seconds)

    async def stop(self) -> None:
        """Ends: calls under way have the grace period to end by themselves."""
        await self._server.stop(self._shutdown.grace_seconds)
        # What was cut off then ends in a few turns of the loop. Closed earlier, the loop would
        # cancel it in the transport's hands, which writes a traceback to standard error.
        calls = asyncio.all_tasks() - {asyncio.current_task()}
        if calls:
            await asyncio.wait(calls, timeout=CUT_SECONDS_MAX)


def _is_of_interest(record: logging.LogRecord) -> bool:
    """Whether a line of gRPC's is more than a caller's going, which it calls an internal error."""
    kind = record.exc_info and record.exc_info[0]
    return not (kind and issubclass(kind, aio.InternalError))


def transport_message_bytes_max(limits: LimitsConfig) -> int:
    """The largest message that the transport lets through; beyond `message_bytes_max` we refuse."""
    message_bytes_max = (
        limits.message_bytes_max + _FRAME_BYTES + _ENTRY_BYTES * limits.frame_entries_max
    )
    return min(message_bytes_max, 2**31 - 1)


def transport_options(limits: LimitsConfig) -> list[tuple[str, int]]:
    """The options of the server's transport.

    Its own limits stand above ours, so that ours speak first and with a reason.
    """
    pending_max = max(PENDING_CALLS_MIN, limits.concurrent_calls_max)
    return [
        ("grpc.max_receive_message_length", transport_message_bytes_max(limits)),
        # Results are bounded by what was asked for; the client states its own limit.
        ("grpc.max_send_message_length", -1),
        # Between the two gRPC refuses at random, the more likely the larger.
        ("grpc.max_metadata_size", 4 * limits.metadata_bytes_max),
        ("grpc.absolute_max_metadata_size", 8 * limits.metadata_bytes_max),
        # A stream counts until we have let go of it, also one that was reset: gRPC refuses a flood
        # of those by itself. A call whose end the client saw counts as well, hence the room.
        ("grpc.max_concurrent_streams", STREAMS_PER_CALL * limits.connection_calls_max),
        # Calls of one method that wait for us. gRPC cancels at random what comes beyond.
        ("grpc.server.max_pending_requests", pending_max),
        ("grpc.server.max_pending_requests_hard_limit", 2 * pending_max),
        ("grpc.max_allowed_incoming_connections", limits.connections_max),
        ("grpc.max_connection_idle_ms", int(1000 * limits.connection_idle_seconds_max)),
        ("grpc.server_handshake_timeout_ms", int(1000 * limits.connection_handshake_seconds_max)),
        # What a client may send of a call before it is read for. gRPC would let this grow with the
        # speed of the link, to megabytes of every call that is going to be refused.
        ("grpc.http2.bdp_probe", 0),
        ("grpc.http2.lookahead_bytes", UNREAD_BYTES_MAX),
        # Two servers on one port would each hold half of the sessions.
        ("grpc.so_reuseport", 0),
        ("grpc.keepalive_time_ms", 30_000),
        ("grpc.keepalive_timeout_ms", 20_000),
        # With and without a call: a client that waits for its next input is a client, too.
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.min_ping_interval_without_data_ms", 1000 * PING_SECONDS_MIN),
        ("grpc.http2.max_ping_strikes", PING_STRIKES_MAX),
    ]


def _bind_problem(address: str) -> str:
    """Why an address that gRPC could not listen on cannot be bound; gRPC does not tell."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal():
        return "not of the form host:port"
    try:
        found = socket.getaddrinfo(
            host.strip("[]"), int(port), type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
        for family, kind, protocol, _, bound in found:
            with socket.socket(family, kind, protocol) as probe:
                probe.bind(bound)
    except (OSError, OverflowError) as error:
        return os_error_text(error) if isinstance(error, OSError) else str(error)
    return "gRPC could not bind it"

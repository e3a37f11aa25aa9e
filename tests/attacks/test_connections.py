"""Connections that do nothing: closed after a time, and no more of them than are allowed."""

from __future__ import annotations

import ssl
import struct
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Final

import numpy as np
import pytest

from conveyor.v1 import model_pb2
from tests.attacks.attacker import PREFACE, Attacker, connect, is_closed
from tests.integration.conftest import StartServer
from tests.integration.process import ServerProcess
from tests.integration.wire import Wire

IDLE: Final = {
    "shutdown.grace_seconds": 1,
    "limits.connection_idle_seconds_max": 1,
    "limits.connection_handshake_seconds_max": 1,
}

CERTIFICATE: Final = """\
-----BEGIN CERTIFICATE-----
MIIBljCCATugAwIBAgIUVEBTamed1rWgnJydYaDbBQDXJcwwCgYIKoZIzj0EAwIw
FDESMBAGA1UEAwwJbG9jYWxob3N0MCAXDTI2MTEyNzIxNDAzNFoYDzIxMjYxMTAz
MjE0MDM0WjAUMRIwEAYDVQQDDAlsb2NhbGhvc3QwWTATBgcqhkjOPQIBBggqhkjO
PQMBBwNCAASRNM1/PrMGff/dVrZqYjbycCbSlXER/xKjPkkuhCRnkKjLYhHzkIy1
qG9m+x9uttT9hDA/VF31qg6+dwW9xjnGo2kwZzAdBgNVHQ4EFgQUjMgt3ecuLA9W
Nz4z8Wu1ZX9JLl0wHwYDVR0jBBgwFoAUjMgt3ecuLA9WNz4z8Wu1ZX9JLl0wDwYD
VR0TAQH/BAUwAwEB/zAUBgNVHREEDTALgglsb2NhbGhvc3QwCgYIKoZIzj0EAwID
SQAwRgIhAOq8t/zX34UCteLyvHxvJTjQwDaDrmJgsxkM8z1ipvV9AiEAmrCwIbvz
9JJlTwXIraD5AbXOg01ievEuEUTdOO7HwkE=
-----END CERTIFICATE-----
"""
KEY: Final = """\
-----BEGIN PRIVATE KEY-----
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQgcOQuXOLflST9wpA+
QJ1EskjgnPoaGl+Q1KIcTWljCCKhRANCAASRNM1/PrMGff/dVrZqYjbycCbSlXER
/xKjPkkuhCRnkKjLYhHzkIy1qG9m+x9uttT9hDA/VF31qg6+dwW9xjnG
-----END PRIVATE KEY-----
"""
"""Of nothing but this test."""


@pytest.fixture(scope="module")
def server(start_server: StartServer) -> ServerProcess:
    return start_server(IDLE)


@pytest.fixture
def sockets() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


async def test_idle_connections_are_closed_and_streams_are_not(server: ServerProcess) -> None:
    async with Wire(server.address) as wire, wire.stream() as stream:
        handle = (await stream.open("tiny")).handle
        await stream.steps(handle, 1, np.zeros((1, 3), np.float32), 2)
        with ExitStack() as stack:
            idle = [stack.enter_context(Attacker(server.address)) for _ in range(20)]
            for attacker in idle:
                while not attacker.closed:
                    assert attacker.read(), "not closed"
                assert is_closed(attacker.socket)
        await stream.steps(handle, 2, np.zeros((1, 3), np.float32), 2)


def test_half_a_headers_frame_keeps_no_connection_open(
    server: ServerProcess, sockets: ExitStack
) -> None:
    half = [sockets.enter_context(connect(server.address)) for _ in range(20)]
    for connection in half:
        header = struct.pack(">I", 40)[1:] + b"\x01\x04" + struct.pack(">I", 1)
        connection.sendall(PREFACE + header + b"\x83")
    assert all(map(is_closed, half))


def test_a_connection_has_to_speak_http_in_time(server: ServerProcess, sockets: ExitStack) -> None:
    silent = [sockets.enter_context(connect(server.address)) for _ in range(20)]
    for connection in silent[10:]:
        connection.sendall(PREFACE[:10])
    assert all(map(is_closed, silent))


async def test_an_idle_client_connects_again_by_itself(server: ServerProcess) -> None:
    async with Wire(server.address) as wire:
        await wire.models.ListModels(model_pb2.ListModelsRequest())
        state = wire.channel.get_state()
        await wire.channel.wait_for_state_change(state)
        await wire.models.ListModels(model_pb2.ListModelsRequest())


def test_tls_handshakes_have_to_end_in_time(
    start_server: StartServer, tmp_path: Path, sockets: ExitStack
) -> None:
    certificate, key = tmp_path / "chain.pem", tmp_path / "key.pem"
    certificate.write_text(CERTIFICATE)
    key.write_text(KEY)
    server = start_server(
        {**IDLE, "listen.tls_certificate_file": certificate, "listen.tls_key_file": key}
    )
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    context = ssl.create_default_context(cafile=str(certificate))
    hello = context.wrap_bio(incoming, outgoing, server_hostname="localhost")
    with pytest.raises(ssl.SSLWantReadError):
        hello.do_handshake()
    half = outgoing.read()
    connections = [sockets.enter_context(connect(server.address)) for _ in range(20)]
    for connection in connections[:10]:
        connection.sendall(half[:50])
    for connection in connections[10:]:
        connection.sendall(half)  # the answer is read, and nothing more is said
    assert all(map(is_closed, connections))


async def test_connections_beyond_their_limit_are_closed(start_server: StartServer) -> None:
    server = start_server({"shutdown.grace_seconds": 1, "limits.connections_max": 6})
    with ExitStack() as stack:
        kept = [stack.enter_context(Attacker(server.address)) for _ in range(5)]
        for attacker in kept:
            assert attacker.read()
        async with Wire(server.address) as wire:
            session_id = await wire.new_session("tiny")
            with connect(server.address) as beyond:
                beyond.sendall(PREFACE)
                assert is_closed(beyond)
            await wire.step(session_id, 1, np.zeros((1, 3), np.float32))
            kept[0].socket.close()
            again = None
            while again is None:
                with Attacker(server.address) as tried:
                    again = tried if tried.read() else None

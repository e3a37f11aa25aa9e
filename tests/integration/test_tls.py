"""A server that speaks TLS, and what comes to its port that does not."""

from __future__ import annotations

import json
import resource
import socket
from pathlib import Path
from typing import Final

import grpc
import pytest
from grpc import aio
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tests.integration.certificates import Authority, settings_of
from tests.integration.conftest import StartServer
from tests.integration.process import ServerProcess, run_command
from tests.integration.wire import until

GARBAGE: Final = {
    "text": b"hello\r\n" * 50,
    "HTTP/1": b"GET / HTTP/1.1\r\n\r\n",
    "plain HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(3) + b"\x04" + bytes(5),
    "half a handshake": b"\x16\x03\x01\x02\x00\x01" + bytes(100),
    "binary": bytes(range(256)),
}
ASYNCIO_HAS_NO_DESCRIPTOR: Final = "socket.accept() out of system resource"


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("certificates"))


@pytest.fixture(scope="module")
def server(start_server: StartServer, authority: Authority) -> ServerProcess:
    settings = settings_of(authority.issue("models.example"))
    return start_server(
        {"shutdown.grace_seconds": 1, **settings}, expected_errors=(ASYNCIO_HAS_NO_DESCRIPTOR,)
    )


def connect(server: ServerProcess) -> socket.socket:
    host, _, port = server.address.rpartition(":")
    return socket.create_connection((host, int(port)), timeout=30)


async def healthy(server: ServerProcess, authority: Authority) -> bool:
    credentials = grpc.ssl_channel_credentials(authority.ca.read_bytes())
    options = [("grpc.ssl_target_name_override", "models.example")]
    async with aio.secure_channel(server.address, credentials, options=options) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        answer = await stub.Check(health_pb2.HealthCheckRequest(), timeout=30)
    return answer.status == health_pb2.HealthCheckResponse.SERVING


def descriptors(server: ServerProcess) -> int:
    return len(list(Path(f"/proc/{server.pid}/fd").iterdir()))


def all_json(server: ServerProcess) -> bool:
    return all(isinstance(json.loads(line), dict) for line in server.log_text().splitlines())


@pytest.mark.parametrize("garbage", GARBAGE.values(), ids=GARBAGE.keys())
async def test_what_is_no_handshake_leaves_no_line_that_is_not_json(
    server: ServerProcess, authority: Authority, garbage: bytes
) -> None:
    for _ in range(3):
        with connect(server) as intruder:
            intruder.sendall(garbage)
            intruder.shutdown(socket.SHUT_WR)
            while intruder.recv(4096):
                pass
    assert await healthy(server, authority)
    assert all_json(server), server.log_text()


async def test_too_few_descriptors_leave_no_line_that_is_not_json(
    server: ServerProcess, authority: Authority
) -> None:
    pid, held = server.pid, descriptors(server)
    before = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (held + 3, before[1]))
    try:
        waiting = [connect(server) for _ in range(12)]
        await until(lambda: descriptors(server) >= held + 3)
    finally:
        resource.prlimit(pid, resource.RLIMIT_NOFILE, before)
    for connection in waiting:
        connection.close()
    assert await healthy(server, authority)
    assert all_json(server), server.log_text()


def test_files_that_cannot_be_used_are_named_with_their_setting(
    repository: Path, authority: Authority, tmp_path: Path
) -> None:
    one, other = authority.issue("one.example"), authority.issue("other.example")
    absent, empty = tmp_path / "absent.pem", tmp_path / "empty.pem"
    empty.write_text("")
    refused = {
        (one.chain, other.key, None): f"listen.tls_key_file: {other.key} is not the key of",
        (absent, one.key, None): f"listen.tls_certificate_file: {absent}: no such file",
        (one.chain, empty, None): f"listen.tls_key_file: {empty} holds no private key in PEM",
        (one.chain, one.key, empty): f"listen.tls_client_ca_file: {empty} holds no certificate",
    }
    flags = ["--models", str(repository), "--listen", "127.0.0.1:0", "--metrics", ""]
    for (chain, key, ca), said in refused.items():
        settings = {"tls_certificate_file": chain, "tls_key_file": key, "tls_client_ca_file": ca}
        given = [f"--set=listen.{name}={file}" for name, file in settings.items() if file]
        done = run_command(["serve", *flags, *given])
        assert done.returncode == 2
        assert said in done.stderr
        assert "Traceback" not in done.stderr

"""/healthz and /readyz of a real server, from its start to its stop, beside gRPC's own health."""

from __future__ import annotations

import http.client
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from grpc_health.v1 import health_pb2

from conveyor.v1 import model_pb2
from tests.integration.bundles import TINY, add_model
from tests.integration.conftest import StartServer
from tests.integration.process import (
    START_SECONDS_MAX,
    STOP_SECONDS_MAX,
    ServerProcess,
    command_environment,
)
from tests.integration.wire import Wire, until

READY, HEALTHY = (200, "ok\n"), (200, "ok\n")


def ask(address: str, path: str) -> tuple[int, str]:
    connection = http.client.HTTPConnection(address, timeout=10)
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        return answer.status, answer.read().decode()
    finally:
        connection.close()


async def serving(wire: Wire) -> bool:
    answer = await wire.health.Check(health_pb2.HealthCheckRequest())
    return answer.status == health_pb2.HealthCheckResponse.SERVING


async def test_a_server_that_serves_is_ready(server: ServerProcess, wire: Wire) -> None:
    assert ask(server.metrics_address, "/healthz") == HEALTHY
    assert ask(server.metrics_address, "/readyz") == READY
    assert ask(server.metrics_address, "/nothing")[0] == 404
    assert await serving(wire)


def test_a_server_that_starts_is_healthy_and_not_ready(repository: Path, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    command = [sys.executable, "-m", "conveyor_server.cli", "serve", "--models", str(repository)]
    command += ["--listen", "127.0.0.1:0", "--metrics", address, "--device", "cpu"]
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(command, stderr=log, env=command_environment())
    try:
        deadline = time.monotonic() + START_SECONDS_MAX
        answers: list[tuple[int, str]] = []
        while READY not in answers:
            assert process.poll() is None, (tmp_path / "log").read_text()
            assert time.monotonic() < deadline, answers
            try:
                healthy, ready = ask(address, "/healthz"), ask(address, "/readyz")
            except ConnectionRefusedError:
                continue
            assert healthy == HEALTHY
            answers.append(ready)
        assert answers[0] == (503, "starting\n")
        assert set(answers) == {(503, "starting\n"), READY}
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(STOP_SECONDS_MAX) == 0
    assert os.path.getsize(tmp_path / "log") > 0


async def test_a_server_that_drains_is_healthy_and_not_ready(start_server: StartServer) -> None:
    server = start_server({"shutdown.grace_seconds": 20})
    async with Wire(server.address) as wire, wire.stream() as stream:
        await stream.open("tiny")
        watched = wire.health.Watch(health_pb2.HealthCheckRequest())
        assert (await watched.read()).status == health_pb2.HealthCheckResponse.SERVING
        assert ask(server.metrics_address, "/readyz") == READY
        server.signal(signal.SIGTERM)
        await stream.next("drain")
        assert ask(server.metrics_address, "/readyz") == (503, "draining\n")
        assert ask(server.metrics_address, "/healthz") == HEALTHY
        assert (await watched.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
        watched.cancel()
        await stream.end()
    assert server.wait() == 0


async def test_a_server_without_a_model_is_not_ready_until_one_comes(
    start_server: StartServer, tmp_path: Path
) -> None:
    add_model(tmp_path, "tiny", TINY)
    server = start_server(models=tmp_path)
    async with Wire(server.address) as wire:

        async def models() -> int:
            return len((await wire.models.ListModels(model_pb2.ListModelsRequest())).models)

        shutil.rmtree(tmp_path / "tiny")
        server.signal(signal.SIGHUP)
        await until(lambda: ask(server.metrics_address, "/readyz")[0] == 503)
        assert ask(server.metrics_address, "/readyz") == (503, "no model is served\n")
        assert ask(server.metrics_address, "/healthz") == HEALTHY
        assert await models() == 0
        await until(lambda: _not(serving(wire)))
        add_model(tmp_path, "tiny", TINY, seed=5)
        server.signal(signal.SIGHUP)
        await until(lambda: ask(server.metrics_address, "/readyz") == READY)
        await until(lambda: serving(wire))
        assert await models() == 1


async def _not(answer: object) -> bool:
    return not await answer  # type: ignore[misc]

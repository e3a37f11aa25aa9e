"""The server with the lowest protobuf that it allows; all other tests run with a newer one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Final

import numpy as np
import pytest
from grpc_health.v1 import health_pb2

from tests.integration.process import ServerProcess
from tests.integration.wire import Wire

LOWEST: Final = (
    "protobuf==6.31.1",
    "googleapis-common-protos==1.70.0",
    "grpcio==1.84.0",
    "grpcio-health-checking==1.80.0",
    "grpcio-reflection==1.80.0",
    "grpcio-status==1.80.0",
)


@pytest.fixture
def lowest(tmp_path: Path) -> Path:
    """A folder with those packages only."""
    packages = tmp_path / "packages"
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check",
         "--no-deps", "--target", packages, *LOWEST],
        check=True,
        timeout=100,
    )  # fmt: skip
    versions = "import google.protobuf as p, grpc; print(p.__version__, grpc.__version__)"
    said = subprocess.run(
        [sys.executable, "-c", versions],
        env={"PYTHONPATH": str(packages)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert said.stdout == "6.31.1 1.84.0\n"
    return packages


async def test_the_server_runs_with_protobuf_6(
    lowest: Path, repository: Path, tmp_path: Path
) -> None:
    environment = {"PYTHONPATH": str(lowest)}
    server = ServerProcess(
        tmp_path, repository, {"listen.reflection": "true"}, environment=environment
    )
    try:
        async with Wire(server.address) as wire, wire.stream() as stream:
            health = await wire.health.Check(health_pb2.HealthCheckRequest(service="tiny"))
            assert health.status == health_pb2.HealthCheckResponse.SERVING
            handle = (await stream.open("tiny")).handle
            assert len(await stream.steps(handle, 1, np.zeros((3, 3), np.float32), 2)) == 24
            await stream.end()
    finally:
        assert server.stop() == 0
    assert not server.problems()

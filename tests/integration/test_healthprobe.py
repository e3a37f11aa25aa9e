"""The container's health check, run as the image runs it."""

import socket
import subprocess
import sys
from pathlib import Path

from tests.integration.process import ServerProcess, command_environment

PROBE = Path(__file__).parents[2] / "server" / "healthprobe.py"


def probe(*arguments: str, **environment: str) -> int:
    return subprocess.run(
        [sys.executable, str(PROBE), *arguments],
        timeout=30,
        check=False,
        env=command_environment() | environment,
    ).returncode


def test_a_server_that_serves_is_healthy(server: ServerProcess) -> None:
    assert probe(server.address) == 0


def test_the_port_is_taken_from_the_environment(server: ServerProcess) -> None:
    port = server.address.rpartition(":")[2]
    assert probe(CONVEYOR_LISTEN__ADDRESS=f"0.0.0.0:{port}") == 0


def test_where_nobody_answers_it_is_not() -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        assert probe(f"127.0.0.1:{closed.getsockname()[1]}") == 1

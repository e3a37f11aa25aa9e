"""Runs client programs in processes of their own.

Two copies of one protocol cannot live in one process: the client's generated code and ours define
the same messages.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any, Final

import pytest

from tests.integration.oip.protocol import Protocol
from tests.integration.process import ServerProcess, command_environment

PROGRAMS: Final = Path(__file__).parent / "programs"
RunProgram = Callable[..., Any]


@pytest.fixture(scope="session")
def run_program() -> RunProgram:
    """Runs a program of ``programs`` and returns what it saw."""

    def run(name: str, address: str = "", **arguments: Any) -> Any:
        done = subprocess.run(
            [sys.executable, PROGRAMS / f"{name}.py", address, json.dumps(arguments)],
            capture_output=True,
            text=True,
            timeout=90,
            check=False,
            env=command_environment(),
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return run


@pytest.fixture
async def protocol(server: ServerProcess) -> AsyncIterator[Protocol]:
    async with Protocol(server.address) as connected:
        yield connected

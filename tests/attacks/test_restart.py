"""A server is killed and started again: those who come back learn what became of their sessions."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest

from tests.integration.process import ServerProcess
from tests.integration.wire import Refusal, Wire, refused

RESTARTED = Refusal("DATA_LOSS", "SERVER_RESTARTED")


@pytest.fixture
def killed(tmp_path: Path, repository: Path) -> Iterator[ServerProcess]:
    with ExitStack() as stack:
        server = ServerProcess(tmp_path / "killed", repository, {})
        stack.callback(server.kill)
        yield server


async def test_a_token_of_before_a_restart_says_what_happened(
    killed: ServerProcess, tmp_path: Path, repository: Path
) -> None:
    async with Wire(killed.address) as wire:
        opened = await wire.open("tiny", session_id="mine")
        await wire.step("mine", 1, np.zeros((2, 3), np.float32))
    killed.kill()
    server = ServerProcess(tmp_path / "again", repository, {})
    try:
        async with Wire(server.address) as wire, wire.stream() as stream:
            for mode in (0, 2):
                said = await refused(wire.open(session_id="mine", token=opened.token, mode=mode))
                assert said == RESTARTED
                assert "this server restarted" in said.message
                assert "in memory only" in said.message
            assert await stream.open_or_fail(session_id="mine", token=opened.token) == RESTARTED
            absent = Refusal("NOT_FOUND", "SESSION_NOT_FOUND")
            assert await refused(wire.step("mine", 3, bytes(12), length=1)) == absent
            again = await wire.open("tiny", session_id="mine")
            assert not again.resumed
        assert server.metric("conveyor_rejected_total", reason="SERVER_RESTARTED") == 3
        assert server.metric("conveyor_rejected_total", reason="STORE_LOST_WRITES") == 0
    finally:
        assert server.stop() == 0

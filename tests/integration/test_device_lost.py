"""A device that fails for good takes the process with it; one that is full fails one batch."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy.typing as npt
import pytest

from conveyor_server.app import EXIT_DEVICE_LOST
from tests.integration.process import ServerProcess
from tests.integration.wire import Wire, refused

Rows = Callable[..., npt.NDArray[Any]]
# The runner raises what torch does, once the file says so.
PROGRAM = """
import os, pathlib, torch
from conveyor_server.cli import main
from conveyor_server.engine.runner import ModelRunner

fault = pathlib.Path({fault!r})
run = ModelRunner.run

def faulty(self, works):
    if fault.exists():
        raise torch.AcceleratorError(fault.read_text())
    return run(self, works)

ModelRunner.run = faulty
main()
"""
ILLEGAL = "CUDA error: an illegal memory access was encountered\nadvice for developers of torch"
FULL = "CUDA error: out of memory"


@pytest.fixture(params=["inline", "beside the loop"])
def faulty(
    request: pytest.FixtureRequest, repository: Path, tmp_path: Path
) -> Iterator[tuple[ServerProcess, Path]]:
    """A server, and the file that holds its device's fault."""
    inline = 10**9 if request.param == "inline" else 0
    fault = tmp_path / "fault"
    server = ServerProcess(
        tmp_path / "server",
        repository,
        {"engine.inline_multiply_adds_max": inline, "engine.verify_same_bits": False},
        program=("-c", PROGRAM.format(fault=str(fault))),
    )
    try:
        yield server, fault
    finally:
        if server.running:
            server.kill()


async def test_a_lost_device_ends_the_process_at_once(
    faulty: tuple[ServerProcess, Path], rows: Rows
) -> None:
    server, fault = faulty
    async with Wire(server.address) as wire:
        session = await wire.new_session("tiny")
        await wire.step(session, 1, rows(2))
        fault.write_text(ILLEGAL)
        found = await refused(wire.step(session, 3, rows(1)))
        assert (found.code, found.reason) == (grpc.StatusCode.UNAVAILABLE.name, "")
        assert server.wait() == EXIT_DEVICE_LOST == 3
    *_, last = server.log_text().splitlines()
    line = json.loads(last)
    assert line["level"] == "critical"
    assert line["message"] == "the device is lost; the process ends"
    assert (line["sessions"], line["exit_status"]) == (1, 3)
    assert "illegal memory access" in line["exception"]


async def test_a_full_device_fails_its_batch_only(
    faulty: tuple[ServerProcess, Path], rows: Rows
) -> None:
    server, fault = faulty
    async with Wire(server.address) as wire:
        session = await wire.new_session("tiny")
        await wire.step(session, 1, rows(2))
        fault.write_text(FULL)
        found = await refused(wire.step(session, 3, rows(1)))
        assert (found.code, found.reason) == ("RESOURCE_EXHAUSTED", "DEVICE_OUT_OF_MEMORY")
        fault.unlink()
        assert (await wire.step(session, 3, rows(1))).rows_length == 1
    assert server.stop() == 0

"""A stream's frames by hand: how much goes into one."""

from __future__ import annotations

import asyncio
from typing import Any, cast

from conveyor.v1 import session_pb2
from conveyor_client import Options
from conveyor_client._chunk import Chunk
from conveyor_client._lane import Lane

STEPS = 10_000


class _Call:
    """A connection on which nothing comes back."""

    def __init__(self) -> None:
        self.frames: list[session_pb2.StreamStepsRequest] = []
        self.done = asyncio.Event()

    async def read(self) -> Any:
        await asyncio.Event().wait()

    async def write(self, frame: session_pb2.StreamStepsRequest) -> None:
        self.frames.append(frame)
        if sum(len(each.steps.entries) for each in self.frames) == STEPS:
            self.done.set()

    def cancel(self) -> None:
        pass


class _Tenant:
    row_bytes = 4


async def test_a_frame_has_no_more_entries_than_servers_take() -> None:
    call, loop = _Call(), asyncio.get_running_loop()
    lane = Lane(cast(Any, lambda key: call), "key", Options(), 1)
    await asyncio.sleep(0)
    for step in range(1, STEPS + 1):
        chunk = Chunk(
            bytes(4),
            1,
            session_pb2.OUTPUT_MODE_ALL,
            session_pb2.TRACE_MODE_UNSPECIFIED,
            loop.create_future(),
            first_step=step,
            expected=step,
        )
        lane.send(1, chunk, cast(Any, _Tenant()))
    async with asyncio.timeout(10):
        await call.done.wait()
    await lane.aclose()
    assert [len(frame.steps.entries) for frame in call.frames] == [4096, 4096, STEPS - 2 * 4096]
    steps = [entry.first_step for frame in call.frames for entry in frame.steps.entries]
    assert steps == list(range(1, STEPS + 1))

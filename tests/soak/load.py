"""Clients of every kind, most of them badly behaved, and one whose answers are checked."""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
import struct
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Final

import numpy as np
from grpc import aio

from tests.integration.process import ServerProcess, command_environment
from tests.integration.wire import Entry, Wire
from tests.soak.sample import Sample, sample

PREFACE: Final = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])
HALF_A_FRAME: Final = bytes([0, 0, 60, 1, 4, 0, 0, 0, 1]) + b"\x83\x86"
KILLED_AT_ONCE: Final = 2
"""Client processes at a time."""
RUDE_AT_ONCE: Final = 8
STARTED_SECONDS_MAX: Final = 60.0
KINDS: Final = ("unary", "stream", "slow")


class Load:
    """All clients of one server."""

    def __init__(self, server: ServerProcess, randomness: random.Random) -> None:
        self._server = server
        self._random = randomness
        self.counts = Counter[str]()
        self.wrong: list[str] = []

    async def run(self, seconds: float) -> Sample:
        """Runs them for so long; the most that the server held meanwhile."""
        end = time.monotonic() + seconds
        watching = asyncio.create_task(self._watch(end))
        parts: list[Callable[[], Awaitable[None]]] = [self._checked]
        parts += [self._killed] * KILLED_AT_ONCE
        parts += [self._rude] * RUDE_AT_ONCE
        parts += [self._cancelled] * 2
        await asyncio.gather(*(self._again(part, end) for part in parts))
        return await watching

    async def _again(self, part: Callable[[], Awaitable[None]], end: float) -> None:
        while time.monotonic() < end:
            await part()

    async def _watch(self, end: float) -> Sample:
        most = sample(self._server)
        while time.monotonic() < end:
            await asyncio.sleep(1)
            most = most.most(await asyncio.to_thread(sample, self._server))
        return most

    async def _checked(self) -> None:
        """A session in chunks of any length, against the same rows in one."""
        steps = self._random.randrange(2, 40)
        x = np.random.default_rng(self._random.randrange(2**32)).standard_normal((steps, 3))
        x = x.astype(np.float32)
        async with Wire(self._server.address) as wire:
            session_id, found, done = await wire.new_session("tiny"), b"", 0
            while done < steps:
                length = min(self._random.randrange(1, 8), steps - done)
                answer = await wire.step(session_id, done + 1, x[done : done + length])
                found += answer.rows
                done += length
            if found != await wire.predict("tiny", x):
                self.wrong.append(f"session {session_id}, {steps} steps")
            await wire.close(session_id)
        self.counts["sessions checked"] += 1

    async def _killed(self) -> None:
        """A process that is killed in the middle of what it does."""
        kind = self._random.choice(KINDS)
        client = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "tests.soak.client",
            self._server.address,
            kind,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=command_environment(),
        )
        assert client.stdout is not None
        try:
            async with asyncio.timeout(STARTED_SECONDS_MAX):
                assert await client.stdout.readline(), "the client did not begin"
            await asyncio.sleep(self._random.uniform(0, 2))
        finally:
            client.kill()
            await client.wait()
        self.counts[f"{kind} clients killed"] += 1

    async def _cancelled(self) -> None:
        """A stream that is given up while it steps."""
        async with Wire(self._server.address) as wire:
            with contextlib.suppress(aio.AioRpcError):
                async with wire.stream() as stream:
                    opened = await stream.open("tiny")
                    for number in range(self._random.randrange(20)):
                        x = np.zeros((4, 3), np.float32)
                        await stream.send_steps(Entry(opened.handle, 1 + 4 * number, x))
        self.counts["streams cancelled"] += 1

    async def _rude(self) -> None:
        """A connection without gRPC: half of a frame, a reset, anything."""
        host, _, port = self._server.address.rpartition(":")
        kind = self._random.choice(("half a frame", "silent", "reset", "random bytes"))
        reader, writer = await asyncio.open_connection(host, int(port))
        with contextlib.suppress(ConnectionError):
            if kind == "random bytes":
                writer.write(self._random.randbytes(self._random.randrange(1, 4096)))
            elif kind != "silent":
                writer.write(PREFACE + HALF_A_FRAME)
            await writer.drain()
            if kind != "reset":
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(self._random.uniform(0, 1)):
                        while await reader.read(2**16):
                            pass
        if kind == "reset":
            linger = struct.pack("ii", 1, 0)
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        writer.transport.abort()
        self.counts[f"connections: {kind}"] += 1

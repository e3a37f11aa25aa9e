"""A client that goes on until it is killed: `python -m tests.soak.client ADDRESS KIND`."""

from __future__ import annotations

import asyncio
import itertools
import sys

import numpy as np

from tests.integration.wire import Entry, Wire

ROWS = 4
WIDE_ROWS = 64
"""Of 16 KiB each in the answer."""


async def unary(wire: Wire) -> None:
    session_id = await wire.new_session("tiny")
    for number in itertools.count():
        await wire.step(session_id, 1 + ROWS * number, np.zeros((ROWS, 3), np.float32))


async def stream(wire: Wire) -> None:
    """Eight sessions, whose answers are read."""
    async with wire.stream() as opened:
        handles = [(await opened.open("tiny")).handle for _ in range(8)]
        for number in itertools.count():
            x = np.zeros((ROWS, 3), np.float32)
            entries = [Entry(handle, 1 + ROWS * number, x) for handle in handles]
            await opened.send_steps(*entries)
            while len(handles) > sum(1 for _ in await opened.pieces(len(handles), 2)):
                pass


async def slow(wire: Wire) -> None:
    """Large answers that nobody reads."""
    async with wire.stream() as opened:
        handle = (await opened.open("broad")).handle
        for number in itertools.count():
            x = np.zeros((WIDE_ROWS, 1), np.float32)
            await opened.send_steps(Entry(handle, 1 + WIDE_ROWS * number, x))


async def main(address: str, kind: str) -> None:
    async with Wire(address) as wire:
        await wire.new_session("words")
        print("begins", flush=True)
        await {"unary": unary, "stream": stream, "slow": slow}[kind](wire)


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))

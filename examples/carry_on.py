"""Carrying on after a dropped connection, without losing a step or running one twice.

A small relay stands between client and server, and is cut while the steps are under way. The client
connects again by itself, learns how far the session came, and sends what was not answered. What
comes out is compared with the same steps over a connection that holds.

    python examples/carry_on.py [HOST:PORT]
"""

import asyncio
import sys

import numpy as np

from conveyor_client import aio

TARGET = sys.argv[1] if len(sys.argv) > 1 else "127.0.0.1:50051"
STEPS = 200
CUTS = (50, 120)  # after so many answers the cable is pulled


class Relay:
    """Passes bytes on to the server until it is cut, and then again for who comes back."""

    def __init__(self) -> None:
        """Nobody is connected yet."""
        self.connections = 0
        self.writers: set[asyncio.StreamWriter] = set()

    async def accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One client's connection, to its end."""
        self.connections += 1
        far_reader, far_writer = await asyncio.open_connection(*TARGET.rsplit(":", 1))
        self.writers |= {writer, far_writer}
        await asyncio.gather(self.pass_on(reader, far_writer), self.pass_on(far_reader, writer))

    async def pass_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One direction."""
        try:
            while data := await reader.read(65536):
                writer.write(data)
        except ConnectionError:
            pass
        writer.transport.abort()
        self.writers.discard(writer)

    def cut(self) -> None:
        """What is on its way is lost."""
        for writer in self.writers:
            writer.transport.abort()


async def main() -> None:
    """Steps one session over the relay, and one without."""
    inputs = np.random.default_rng(3).uniform(-1, 1, (STEPS, 5)) * [60, 1, 1, 1, 1]
    relay = Relay()
    async with await asyncio.start_server(relay.accept, "127.0.0.1", 0) as server:
        host, port = server.sockets[0].getsockname()[:2]
        async with aio.Client(f"{host}:{port}") as client, client.session("temperature") as session:
            outputs: list[np.ndarray] = []
            async for output in session.stream(inputs, in_flight=16):
                outputs.append(output)
                if len(outputs) in CUTS:
                    relay.cut()
                    print(f"cut after {len(outputs)} answers, epoch {session.epoch}")
            info = await session.info()
        relay.cut()
    async with aio.Client(TARGET) as client, client.session("temperature") as session:
        expected = await session.step(inputs)
    print(f"{relay.connections} connections, epoch {info.epoch}, {info.applied_step} steps applied")
    print("the same bits as over a connection that held:", np.array_equal(outputs, expected))


asyncio.run(main())

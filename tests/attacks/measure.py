"""The figures of docs/RELIABILITY.md: `python -m tests.attacks.measure`; it takes minutes."""

from __future__ import annotations

import asyncio
import tempfile
import threading
import time
import timeit
from collections import Counter
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

import numpy as np
from grpc import aio

from conveyor.v1 import model_pb2, session_pb2
from conveyor_server.rpc.access import Authenticator
from tests.attacks.attacker import flood_with_resets, flood_with_resets_again, resident_bytes
from tests.attacks.envoy import EnvoyProcess, find_envoy, shipped
from tests.integration.bundles import add_all
from tests.integration.process import ServerProcess
from tests.integration.wire import Wire

TOKEN: Final = "anna-0123456789abcdef"
CONFIG: Final = f'[auth.tokens]\n"{TOKEN}" = "anna"\n'
MINE: Final = [("authorization", f"Bearer {TOKEN}")]
X: Final = np.zeros((1, 3), np.float32)
MIB: Final = 2**20


async def growth(server: ServerProcess, count: int, call: Callable[[], Awaitable[Any]]) -> str:
    """Four calls at a time; in MiB."""
    before, peak = resident_bytes(server), 0

    async def some() -> None:
        nonlocal peak
        for _ in range(count // 4):
            try:
                await call()
            except aio.AioRpcError:
                peak = max(peak, resident_bytes(server))

    await asyncio.gather(*(some() for _ in range(4)))
    after = resident_bytes(server)
    return f"{(after - before) / MIB:+.0f} MiB after {count}, {(peak - before) / MIB:+.0f} at most"


async def memory(server: ServerProcess) -> None:
    large = session_pb2.StepRequest(session_id="s", rows=bytes(4 * MIB - 64))
    async with Wire(server.address, MINE) as wire:
        refused = await growth(server, 4_000, lambda: wire.sessions.Step(large))
        print("calls of 4 MiB without a token:", refused)
        refused = await growth(server, 4_000, lambda: wire.sessions.Step(large, metadata=MINE))
        print("calls of 4 MiB with a token, refused:", refused)
        session_id = await wire.new_session("broad")
        before = resident_bytes(server)
        for step in range(60):
            await wire.step(session_id, 1 + 384 * step, np.zeros((384, 1), np.float32))
        print(f"60 steps of 6 MiB out: {(resident_bytes(server) - before) / MIB:+.0f} MiB")


async def burst(server: ServerProcess, connections: int, count: int) -> None:
    wires = [Wire(server.address, MINE) for _ in range(connections)]

    async def one(wire: Wire) -> str:
        try:
            await wire.models.ListModels(model_pb2.ListModelsRequest(), metadata=MINE)
        except aio.AioRpcError as error:
            return error.code().name
        return "answered"

    ended = Counter(await asyncio.gather(*(one(wire) for wire in wires for _ in range(count))))
    print(f"{count} calls at once on each of {connections} connections:", dict(ended))
    for wire in wires:
        await wire.channel.close()


async def victims(address: str, seconds: float) -> str:
    """Eight sessions that step, with a pause of 10 ms after each step."""
    taken: list[float] = []
    failed = Counter[str]()
    async with Wire(address, MINE) as wire:

        async def steps() -> None:
            session_id, step = await wire.new_session("tiny"), 1
            end = time.monotonic() + seconds
            while time.monotonic() < end:
                begun = time.perf_counter()
                try:
                    await wire.step(session_id, step, X)
                    step += 1
                except aio.AioRpcError as error:
                    failed[error.code().name] += 1
                taken.append(time.perf_counter() - begun)
                await asyncio.sleep(0.01)

        await asyncio.gather(*(steps() for _ in range(8)))
    p50, p99 = np.percentile(taken, (50, 99)) * 1e3
    worst = max(taken) * 1e3
    return f"p50 {p50:.1f} p99 {p99:.1f} worst {worst:.0f} ms, {sum(failed.values())} lost"


async def resets(server: ServerProcess) -> None:
    print("steps of eight sessions, quiet:", await victims(server.address, 5))
    before = resident_bytes(server)
    flood = threading.Thread(target=flood_with_resets, args=(server.address, 9_600, 5))
    flood.start()
    print("while 9,600 streams a second are reset:", await victims(server.address, 5))
    flood.join()
    print(f"and afterwards: {(resident_bytes(server) - before) / MIB:+.0f} MiB")


async def resets_behind_envoy(server: ServerProcess) -> None:
    """Quiet and attacked in turn, as other programs of the machine disturb both."""
    folder = tempfile.TemporaryDirectory()
    with folder, EnvoyProcess(Path(folder.name), shipped(server.address)) as envoy:
        for _ in range(3):
            print("behind Envoy, quiet:", await victims(envoy.address, 5))
            with ThreadPoolExecutor() as pool:
                flood = pool.submit(flood_with_resets_again, envoy.address, 9_600, 5)
                attacked = await victims(envoy.address, 5)
                print(f"attacked, cut off {flood.result()} times: {attacked}")


def tokens() -> None:
    for count in (1, 2_002, 200_000):
        known = Authenticator({f"token-number-{number:08}": "anna" for number in range(count)})
        metadata = [("authorization", "Bearer token-number-00000000")]
        taken = min(timeit.repeat(lambda: known.authenticate(metadata), number=20_000, repeat=5))  # noqa: B023
        print(f"a token among {count}: {taken / 20_000 * 1e6:.1f} us")


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        add_all(Path(folder) / "models")

        def measured(*parts: Callable[[ServerProcess], Any]) -> None:
            own = Path(tempfile.mkdtemp(dir=folder))
            server = ServerProcess(own, Path(folder) / "models", {}, CONFIG)
            try:
                for part in parts:
                    asyncio.run(part(server))
            finally:
                server.stop()

        measured(memory)
        measured(
            lambda server: burst(server, 1, 2_000),
            lambda server: burst(server, 1, 5_000),
            lambda server: burst(server, 10, 1_000),
            resets,
        )
        if find_envoy():
            measured(resets_behind_envoy)
        else:
            print("Envoy is not installed: nothing was measured behind it")
    tokens()


if __name__ == "__main__":
    main()

"""Lines measured through real sockets: rounds that alternate between server and comparator."""

import asyncio
import gc
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Final

from bench.inference import InferenceFleet
from bench.load import Fleet, StreamFleet, UnaryFleet, Window
from bench.processes import ServerProcess, total
from bench.result import Line, Measured, Target

WARM_SECONDS: Final = 0.2
"""Load before each round that is not measured."""


@dataclass(frozen=True, slots=True)
class Servers:
    """What is measured and what it is measured against."""

    conveyor: ServerProcess
    null: ServerProcess
    null_engine: ServerProcess
    """The null handler with an engine call in it."""


@dataclass(frozen=True, slots=True)
class Contender:
    """A server with a load of its own."""

    name: str
    server: ServerProcess
    fleet: Callable[[str], Fleet]
    """target -> the load."""


@dataclass(frozen=True, slots=True)
class ServedLine:
    """One line: the first contender is the subject, the others are its comparators."""

    name: str
    group: str
    contenders: Callable[[Servers], Sequence[Contender]]
    targets: tuple[Target, ...] = ()
    """Of the first comparator."""


def _against_null(fleet: Callable[[str], Fleet]) -> Callable[[Servers], Sequence[Contender]]:
    return lambda servers: (
        Contender("conveyor", servers.conveyor, fleet),
        Contender("null handler", servers.null, fleet),
    )


def _alone(servers: Servers) -> Sequence[Contender]:
    def fleet(target: str) -> Fleet:
        return StreamFleet(target, streams=1)

    return (
        *_against_null(fleet)(servers),
        Contender("null handler + engine", servers.null_engine, fleet),
    )


def _one_stream(servers: Servers) -> Sequence[Contender]:
    return (
        *_against_null(lambda target: StreamFleet(target, streams=1, sessions=256))(servers),
        Contender("256 streams", servers.conveyor, lambda target: StreamFleet(target, streams=256)),
    )


LINES: Final = (
    ServedLine(
        "1 stream, 1 step a frame",
        "streams",
        _alone,
        (Target("p50", "at most", 1.6),),
    ),
    ServedLine(
        "64 streams, 1 step a frame",
        "streams",
        _against_null(lambda target: StreamFleet(target, streams=64)),
        (Target("steps/s", "at least", 0.6),),
    ),
    ServedLine(
        "256 streams, 1 step a frame",
        "streams",
        _against_null(lambda target: StreamFleet(target, streams=256)),
    ),
    ServedLine(
        "1 stream, 64-step chunks",
        "chunks",
        _against_null(lambda target: StreamFleet(target, streams=1, steps=64)),
    ),
    ServedLine(
        "16 streams, 64-step chunks",
        "chunks",
        _against_null(lambda target: StreamFleet(target, streams=16, steps=64)),
    ),
    ServedLine("1 stream of 256 sessions, 1 step each", "many", _one_stream),
    ServedLine(
        "64 unary Step calls in flight",
        "unary",
        _against_null(lambda target: UnaryFleet(target, sessions=64)),
    ),
    ServedLine(
        "64 inference streams, 1 step a message",
        "inference",
        _against_null(lambda target: InferenceFleet(target, streams=64)),
        (Target("steps/s", "at least", 0.8),),
    ),
)


async def measure(line: ServedLine, servers: Servers, *, rounds: int, seconds: float) -> list[Line]:
    """Measures one line; one result for each comparator."""
    contenders = line.contenders(servers)
    fleets = [contender.fleet(contender.server.address) for contender in contenders]
    measured: list[list[Measured]] = [[] for _ in contenders]
    for fleet in fleets:
        await fleet.open()
    with _quiet_collector():
        for number in range(rounds):
            # Every second round goes backwards, so that a drift of the machine favours nobody.
            order = range(len(fleets)) if number % 2 == 0 else reversed(range(len(fleets)))
            for index in order:
                server = contenders[index].server
                measured[index].append(await _round(fleets[index], server, seconds))
    for fleet in fleets:
        await fleet.close()
    subject, *comparators = zip(contenders, measured, strict=True)
    return [
        Line(
            name=line.name,
            subject=subject[0].name,
            comparator=contender.name,
            subject_rounds=subject[1],
            comparator_rounds=found,
            targets=() if number else line.targets,
        )
        for number, (contender, found) in enumerate(comparators)
    ]


async def _round(fleet: Fleet, server: ServerProcess, seconds: float) -> Measured:
    before = server.metrics() if server.metrics_address else {}
    machine_before, server_before = _busy_seconds(), server.cpu_seconds()
    generator_before, began = time.process_time(), perf_counter()
    window = Window(began + WARM_SECONDS, began + WARM_SECONDS + seconds)
    await fleet.run(window)
    wall = perf_counter() - began
    generator = time.process_time() - generator_before
    server_after, machine_after = server.cpu_seconds(), _busy_seconds()
    after = server.metrics() if server.metrics_address else {}
    ticks, sessions = (
        total(after, name) - total(before, name)
        for name in ("conveyor_tick_sessions_count", "conveyor_tick_sessions_sum")
    )
    found = Measured(
        value=window.steps_per_second,
        p50_ms=window.percentile_ms(50),
        p99_ms=window.percentile_ms(99),
        generator_cpu=generator / wall,
        mean_batch=sessions / ticks if ticks else None,
    )
    if server_before is not None and server_after is not None:
        server_cpu = (server_after - server_before) / wall
        found.server_cpu = server_cpu
        found.step_cpu_us = server_cpu / found.value * 1e6 if found.value else None
        if machine_before is not None and machine_after is not None:
            busy = (machine_after - machine_before) / wall
            found.others_cpu = max(0.0, busy - server_cpu - generator / wall)
    return found


@contextmanager
def _quiet_collector() -> Iterator[None]:
    """Keeps what exists by now, a lot once torch is loaded, out of the collector's walks."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _busy_seconds() -> float | None:
    """Processor time taken by everything on this machine; None where the system does not tell."""
    try:
        fields = Path("/proc/stat").read_text(encoding="ascii").split("\n", 1)[0].split()[1:]
    except OSError:
        return None
    user, nice, system, _idle, _wait, irq, softirq, steal = (int(field) for field in fields[:8])
    ticks = user + nice + system + irq + softirq + steal

    return ticks / os.sysconf("SC_CLK_TCK")


def run(
    servers: Servers, groups: set[str], *, rounds: int, seconds: float, say: Callable[[str], None]
) -> list[Line]:
    """Measures every line of these groups."""

    async def all_of_them() -> list[Line]:
        found: list[Line] = []
        for line in LINES:
            if line.group in groups:
                say(line.name)
                found += await measure(line, servers, rounds=rounds, seconds=seconds)
        return found

    return asyncio.run(all_of_them())

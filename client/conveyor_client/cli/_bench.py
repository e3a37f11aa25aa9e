"""``conveyor bench``: how fast a server steps, seen from a client."""

import asyncio
from collections import Counter
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from typing import Annotated

import numpy as np
import typer
from rich.table import Table

from conveyor_client._errors import ConveyorError
from conveyor_client._nouns import FloatArray, Int32Array, ModelInfo
from conveyor_client._policy import Options
from conveyor_client._session import Session
from conveyor_client.cli._common import (
    AsJson,
    fail,
    print_json,
    show,
)
from conveyor_client.cli._connection import Connection, connecting

_OUTSTANDING_MAX = 1024
_PERCENTILES = (50.0, 90.0, 99.0, 99.9)


@dataclass(frozen=True, slots=True)
class Plan:
    """What is asked of the server.

    Attributes:
        memory_rows: Of the made-up memory of a model with attention.
        rate: Chunks per second over all sessions, sent whether or not the answers are there (open
            loop); 0 sends each chunk when the one before it is answered (closed loop).
    """

    model: str
    memory_rows: int
    connections: int
    streams: int
    sessions: int
    chunk_steps: int
    duration_seconds: float
    warmup_seconds: float
    rate: float


@dataclass(frozen=True, slots=True)
class Figures:
    """What came of a plan.

    Attributes:
        chunks: Answered while measuring.
        latency_ms: Mean, percentiles and maximum. In an open loop from the intended time of
            sending, so that a stalled server is not excused from what could not be sent meanwhile.
        send_lag_ms: Open loop: how late this generator itself sent.
        errors: Chunks that failed, by reason.
    """

    plan: Plan
    loop: str
    sessions: int
    chunks: int
    chunks_per_second: float
    steps_per_second: float
    latency_ms: dict[str, float]
    send_lag_ms: dict[str, float]
    errors: dict[str, int]


@dataclass(slots=True)
class Record:
    """What was measured, in seconds of the loop's clock."""

    measure_from: float
    measure_until: float
    latencies: list[float] = field(default_factory=list[float])
    lags: list[float] = field(default_factory=list[float])
    errors: Counter[str] = field(default_factory=Counter[str])

    def note(self, begun: float, sent: float, ended: float) -> None:
        """Takes an answer in, if it came while measuring.

        Args:
            begun: When the chunk was meant to be sent; its latency counts from here.
            sent: When it was.
            ended: When its answer came.
        """
        if self.measure_from <= ended < self.measure_until:
            self.latencies.append(ended - begun)
            self.lags.append(sent - begun)


@connecting
def bench(
    connection: Connection,
    model: Annotated[str, typer.Argument(help="The model.")] = "temperature",
    *,
    connections: Annotated[int, typer.Option(min=1, help="TCP connections.")] = 1,
    streams: Annotated[int, typer.Option(min=1, help="Streams on each connection.")] = 1,
    sessions: Annotated[int, typer.Option(min=1, help="Sessions on each stream.")] = 1,
    chunk: Annotated[int, typer.Option(min=1, help="Steps in a chunk.")] = 1,
    duration: Annotated[float, typer.Option(min=0.1, help="Seconds measured.")] = 5.0,
    warmup: Annotated[float, typer.Option(min=0.0, help="Seconds before that.")] = 1.0,
    rate: Annotated[
        float, typer.Option(min=0.0, help="Chunks/s in all (open loop); 0: closed loop.")
    ] = 0.0,
    memory_rows: Annotated[
        int, typer.Option(min=1, help="Of the memory, for a model with attention.")
    ] = 16,
    seed: Annotated[int, typer.Option(min=0, help="Of the made-up inputs.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Measures steps per second and latencies.

    Closed loop: every session sends its next chunk when the last is answered. Open loop (--rate):
    chunks leave on schedule whatever the server does, and latency counts from the scheduled time.
    """
    plan = Plan(model, memory_rows, connections, streams, sessions, chunk, duration, warmup, rate)

    async def act() -> None:
        result = await measure(connection, plan, seed)
        if as_json:
            print_json(result)
        else:
            _show(result)
        if not result.chunks:
            fail("no step was answered in that time; try a longer --duration")

    connection.run(act)


async def measure(connection: Connection, plan: Plan, seed: int = 0) -> Figures:
    """Runs a plan.

    Args:
        connection: The server.
        plan: What to ask of it.
        seed: Of the made-up inputs.

    Returns:
        The figures.

    Raises:
        ConveyorError: A session could not be opened.
    """
    loop = asyncio.get_running_loop()
    async with AsyncExitStack() as stack:
        opened: list[Session] = []
        for _ in range(plan.connections):
            options = Options(streams_max=plan.streams, stream_sessions_max=plan.sessions)
            client = connection.client(options)
            await stack.enter_async_context(client)
            memory = _memory(await client.model(plan.model), plan.memory_rows, seed)
            made = [
                client.session(plan.model, memory=memory)
                for _ in range(plan.streams * plan.sessions)
            ]
            await asyncio.gather(*(session.open() for session in made))
            opened += made
        inputs = _inputs(opened[0].model, plan.chunk_steps, seed)
        begin = loop.time()
        measure_from = begin + plan.warmup_seconds
        record = Record(measure_from, measure_from + plan.duration_seconds)
        load = _closed_loop if plan.rate == 0 else _open_loop
        await asyncio.gather(
            *(load(session, inputs, record, plan, i) for i, session in enumerate(opened))
        )
        await asyncio.gather(*(session.close() for session in opened), return_exceptions=True)
    return _figures(plan, record)


def _inputs(model: ModelInfo, chunk_steps: int, seed: int) -> FloatArray | Int32Array:
    random = np.random.default_rng(seed)
    if model.input.is_tokens:
        return random.integers(0, model.input.vocabulary_size, chunk_steps, dtype=np.int32)
    return random.standard_normal((chunk_steps, model.input.row_elements), dtype=np.float32)


def _memory(model: ModelInfo, rows: int, seed: int) -> FloatArray | None:
    if model.memory is None:
        return None
    random = np.random.default_rng(seed)
    return random.standard_normal((rows, model.memory.row_elements), dtype=np.float32)


async def _closed_loop(
    session: Session, inputs: FloatArray | Int32Array, record: Record, plan: Plan, number: int
) -> None:
    now = asyncio.get_running_loop().time
    while (begun := now()) < record.measure_until:
        try:
            await session.step(inputs)
        except ConveyorError as error:
            record.errors[error.reason] += 1
            if not error.retryable:
                return
            await asyncio.sleep(error.retry_after_seconds or 0.01)
        else:
            record.note(begun, begun, now())


async def _open_loop(
    session: Session, inputs: FloatArray | Int32Array, record: Record, plan: Plan, number: int
) -> None:
    loop = asyncio.get_running_loop()
    sessions = plan.connections * plan.streams * plan.sessions
    gap_seconds = sessions / plan.rate
    intended = record.measure_from - plan.warmup_seconds + gap_seconds * number / sessions
    room = asyncio.Semaphore(_OUTSTANDING_MAX)
    async with asyncio.TaskGroup() as tasks:
        while intended < record.measure_until:
            await asyncio.sleep(max(0.0, intended - loop.time()))
            await room.acquire()  # bounded; the wait counts, as latency is from the intended time
            if loop.time() >= record.measure_until:
                break
            tasks.create_task(_step(session, inputs, record, intended, room))
            intended += gap_seconds


async def _step(
    session: Session,
    inputs: FloatArray | Int32Array,
    record: Record,
    intended: float,
    room: asyncio.Semaphore,
) -> None:
    loop = asyncio.get_running_loop()
    sent = loop.time()
    try:
        await session.step(inputs)
        record.note(intended, sent, loop.time())
    except ConveyorError as error:
        record.errors[error.reason] += 1
    finally:
        room.release()


def _figures(plan: Plan, record: Record) -> Figures:
    chunks_per_second = len(record.latencies) / plan.duration_seconds
    return Figures(
        plan=plan,
        loop="open" if plan.rate else "closed",
        sessions=plan.connections * plan.streams * plan.sessions,
        chunks=len(record.latencies),
        chunks_per_second=chunks_per_second,
        steps_per_second=chunks_per_second * plan.chunk_steps,
        latency_ms=_spread(record.latencies),
        send_lag_ms=_spread(record.lags) if plan.rate else {},
        errors=dict(record.errors),
    )


def _spread(seconds: list[float]) -> dict[str, float]:
    if not seconds:
        return {}
    values = np.array(seconds) * 1e3
    ranks = np.percentile(values, _PERCENTILES, method="higher")
    spread = {f"p{p:g}": float(value) for p, value in zip(_PERCENTILES, ranks, strict=True)}
    return {"mean": float(values.mean()), **spread, "max": float(values.max())}


def _show(figures: Figures) -> None:
    plan = figures.plan
    table = Table(show_header=False)
    table.add_row("loop", figures.loop + (f", {plan.rate:g} chunks/s" if plan.rate else ""))
    table.add_row(
        "sessions",
        f"{figures.sessions} of {plan.model}: {plan.connections} connections x"
        f" {plan.streams} streams x {plan.sessions}",
    )
    table.add_row("steps in a chunk", str(plan.chunk_steps))
    table.add_row("steps/s", f"{figures.steps_per_second:,.0f}")
    table.add_row("chunks/s", f"{figures.chunks_per_second:,.0f}")
    table.add_row("latency, ms", _line(figures.latency_ms))
    if figures.send_lag_ms:
        table.add_row("sent late by, ms", _line(figures.send_lag_ms))
    errors = "  ".join(f"{reason} {count}" for reason, count in figures.errors.items())
    table.add_row("errors", errors or "none")
    show(table)


def _line(spread: dict[str, float]) -> str:
    return "  ".join(f"{name} {value:.3f}" for name, value in spread.items())

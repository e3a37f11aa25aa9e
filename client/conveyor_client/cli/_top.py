"""``conveyor top``: a live table of what a server is doing."""

import asyncio
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Annotated

import typer
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table

from conveyor_client._client import Client
from conveyor_client._nouns import ModelInfo
from conveyor_client.cli._common import (
    AsJson,
    list_table,
    print_json,
    run,
    show,
    size_text,
)
from conveyor_client.cli._connection import Connection, connecting
from conveyor_client.cli._exposition import Samples, by_label, fetch, quantile, total

_HINT = "rates and latencies: --metrics HOST:9464"


@dataclass(frozen=True, slots=True)
class ModelLine:
    """What one model did in an interval; times in milliseconds, None where nothing happened."""

    model: str
    steps_per_second: float
    ticks_per_second: float
    tick_sessions_mean: float | None
    step_ms_p50: float | None
    step_ms_p99: float | None
    slots: dict[str, float]


@dataclass(frozen=True, slots=True)
class Overview:
    """What a server holds, and what its models did in an interval."""

    sessions: dict[str, float]
    state_bytes: dict[str, float]
    models: list[ModelLine]


@connecting
def top(
    connection: Connection,
    metrics: Annotated[
        str | None,
        typer.Option(envvar="CONVEYOR_METRICS", help="URL of the server's metrics endpoint."),
    ] = None,
    interval: Annotated[float, typer.Option(min=0.05, help="Seconds between looks.")] = 1.0,
    once: Annotated[bool, typer.Option("--once", help="One look, for scripts.")] = False,
    as_json: AsJson = False,
) -> None:
    """Shows steps/s, ticks, batches, latencies, sessions and slots, model by model.

    Rates and latencies come from the metrics endpoint. Without one, the models and their sessions
    are shown as the server lists them.
    """

    async def act() -> None:
        if metrics is None:
            await _watch_models(connection, interval, once, as_json)
        else:
            look = partial(fetch, metrics, connection.timeout_seconds, connection.context)
            await _watch_metrics(look, interval, once, as_json)

    # Of a metrics endpoint that does not answer the server cannot tell why.
    connection.run(act) if metrics is None else run(act)


async def _watch_metrics(
    look: Callable[[], Samples], interval: float, once: bool, as_json: bool
) -> None:
    loop = asyncio.get_running_loop()
    before, then = await asyncio.to_thread(look), loop.time()
    await asyncio.sleep(interval)
    after, now = await asyncio.to_thread(look), loop.time()
    overview = summarise(before, after, now - then)
    if once:
        print_json(overview) if as_json else show(_render(overview))
        return
    with Live(_render(overview), console=Console(), auto_refresh=False) as live:
        while True:
            live.refresh()
            before, then = after, now
            await asyncio.sleep(interval)
            after, now = await asyncio.to_thread(look), loop.time()
            live.update(_render(summarise(before, after, now - then)))


def summarise(before: Samples, after: Samples, seconds: float) -> Overview:
    """Works out what a server did between two scrapes.

    Args:
        before: The earlier scrape.
        after: The later one.
        seconds: Between them.

    Returns:
        The totals, and a line for each model, by name.
    """
    names = {
        name
        for metric in ("conveyor_slots", "conveyor_steps_total")
        for name in by_label(after, metric, "model")
    }
    return Overview(
        sessions=by_label(after, "conveyor_sessions", "state"),
        state_bytes=by_label(after, "conveyor_state_bytes", "tier"),
        models=[_summarise_model(before, after, seconds, name) for name in sorted(names)],
    )


def _summarise_model(before: Samples, after: Samples, seconds: float, model: str) -> ModelLine:
    def grown(name: str) -> float:
        return total(after, name, model=model) - total(before, name, model=model)

    def milliseconds(q: float) -> float | None:
        value = quantile(before, after, "conveyor_step_seconds", q, model=model)
        return None if math.isnan(value) else value * 1e3

    ticks = grown("conveyor_tick_sessions_count")
    return ModelLine(
        model=model,
        steps_per_second=grown("conveyor_steps_total") / seconds,
        ticks_per_second=ticks / seconds,
        tick_sessions_mean=grown("conveyor_tick_sessions_sum") / ticks if ticks else None,
        step_ms_p50=milliseconds(0.5),
        step_ms_p99=milliseconds(0.99),
        slots=by_label(after, "conveyor_slots", "state", model=model),  # of all versions
    )


def _render(overview: Overview) -> Group:
    table = list_table(
        *("model", "steps/s", "ticks/s", "mean batch", "p50 ms", "p99 ms", "slots"),
        whole=("model", "steps/s", "ticks/s", "p50 ms", "p99 ms"),
    )
    for line in overview.models:
        table.add_row(
            line.model,
            f"{line.steps_per_second:,.0f}",
            f"{line.ticks_per_second:,.0f}",
            _number(line.tick_sessions_mean, ".1f"),
            _number(line.step_ms_p50, ".2f"),
            _number(line.step_ms_p99, ".2f"),
            _counts(line.slots),
        )
    sizes = "  ".join(f"{tier} {size_text(size)}" for tier, size in overview.state_bytes.items())
    return Group(f"sessions: {_counts(overview.sessions)}", f"state: {sizes}", table)


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _counts(counts: dict[str, float]) -> str:
    return "  ".join(f"{name} {count:.0f}" for name, count in counts.items())


async def _watch_models(connection: Connection, interval: float, once: bool, as_json: bool) -> None:
    async with connection.client() as client:
        if once:
            models = [model async for model in client.models()]
            if as_json:
                print_json(models)
            else:
                show(Group(_models_table(models), _HINT))
            return
        with Live(console=Console(), auto_refresh=False) as live:
            while True:
                live.update(await _overview(client), refresh=True)
                await asyncio.sleep(interval)


async def _overview(client: Client) -> Group:
    models = [model async for model in client.models()]
    steps: dict[str, int] = {}
    async for session in client.sessions(page_size=1000):
        steps[session.model] = steps.get(session.model, 0) + session.applied_step
    if not steps:
        return Group(_models_table(models), _HINT)
    table = list_table("model", "steps of your sessions", whole=("model",))
    for name, count in sorted(steps.items()):
        table.add_row(name, f"{count:,}")
    return Group(_models_table(models), table, _HINT)


def _models_table(models: list[ModelInfo]) -> Table:
    table = list_table(
        *("model", "version", "sessions", "slots", "state", "device"), whole=("model", "device")
    )
    for model in models:
        table.add_row(
            model.name,
            str(model.version),
            str(model.sessions),
            str(model.slots),
            size_text(model.sessions * model.carry_bytes),
            model.device,
        )
    return table

"""What operators see: health, reflection, metrics, the log."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from grpc_health.v1 import health_pb2

from conveyor.v1 import session_pb2
from tests.integration.conftest import StartServer
from tests.integration.process import ServerProcess
from tests.integration.wire import Wire, refused

Rows = Callable[..., npt.NDArray[Any]]
SERVING = health_pb2.HealthCheckResponse.SERVING


@pytest.mark.parametrize(
    "service",
    [
        "",
        "conveyor.v1.SessionService",
        "conveyor.v1.ModelService",
        "tiny",
        "tiny/1",
        "words",
        "words/1",
    ],
)
async def test_health_of_the_server_its_services_and_its_models(wire: Wire, service: str) -> None:
    answer = await wire.health.Check(health_pb2.HealthCheckRequest(service=service))
    assert answer.status == SERVING


@pytest.mark.parametrize("service", ["tiny/2", "nothing", "conveyor.v1.Other"])
async def test_health_of_what_is_not_there(wire: Wire, service: str) -> None:
    said = await refused(wire.health.Check(health_pb2.HealthCheckRequest(service=service)))
    assert said.code == "NOT_FOUND"


async def test_health_can_be_watched(wire: Wire) -> None:
    call = wire.health.Watch(health_pb2.HealthCheckRequest(service="tiny"))
    assert (await call.read()).status == SERVING
    call.cancel()


async def test_health_can_be_listed(wire: Wire) -> None:
    listed = (await wire.health.List(health_pb2.HealthListRequest())).statuses
    assert {"", "conveyor.v1.SessionService", "tiny", "tiny/1", "words/1"} < set(listed)
    for service, answer in listed.items():
        checked = await wire.health.Check(health_pb2.HealthCheckRequest(service=service))
        assert answer == checked


async def test_reflection_is_off_unless_asked_for(wire: Wire, start_server: StartServer) -> None:
    assert (await refused(wire.reflection().read())).code == "UNIMPLEMENTED"
    server = start_server({"listen.reflection": "true"})
    async with Wire(server.address) as reflecting:
        names = await reflecting.reflected()
    assert {"conveyor.v1.SessionService", "conveyor.v1.ModelService"} < names


def _names(page: str) -> set[str]:
    return {line.split()[2] for line in page.splitlines() if line.startswith("# TYPE ")}


async def test_every_metric_that_applies_is_exposed(
    wire: Wire, server: ServerProcess, rows: Rows
) -> None:
    async with wire.stream() as stream:
        handle = (await stream.open("tiny")).handle
        await stream.steps(handle, 1, rows(20), 2)
        await stream.steps(handle, 20, rows(20)[19:], 2)
        page = server.scrape()
        assert server.metric("conveyor_streams") == 1
    assert _names(page) >= {
        "grpc_server_started_total",
        "grpc_server_handled_total",
        "grpc_server_msg_received_total",
        "grpc_server_msg_sent_total",
        "grpc_server_handling_seconds",
        "conveyor_steps_total",
        "conveyor_step_seconds",
        "conveyor_queue_seconds",
        "conveyor_tick_seconds",
        "conveyor_tick_sessions",
        "conveyor_tick_steps",
        "conveyor_sessions",
        "conveyor_sessions_ended_total",
        "conveyor_slots",
        "conveyor_state_bytes",
        "conveyor_page_ins_total",
        "conveyor_page_outs_total",
        "conveyor_resumes_total",
        "conveyor_duplicate_steps_total",
        "conveyor_rejected_total",
    }
    assert server.metric("conveyor_steps_total", model="tiny") >= 20
    assert server.metric("conveyor_duplicate_steps_total", model="tiny") >= 1
    assert server.metric("conveyor_slots", model="tiny") == 1024
    assert server.metric("conveyor_slots", model="tiny", state="used") >= 1


async def test_counters_count_what_happened(wire: Wire, server: ServerProcess, rows: Rows) -> None:
    def read() -> dict[str, float]:
        return {
            "steps": server.metric("conveyor_steps_total", model="deep"),
            "ticked": server.metric("conveyor_tick_steps_sum", model="deep"),
            "chunks": server.metric("conveyor_step_seconds_count", model="deep"),
            "queued": server.metric("conveyor_queue_seconds_count", model="deep"),
            "gaps": server.metric("conveyor_rejected_total", reason="STEP_GAP"),
            "ok": server.metric("grpc_server_handled_total", grpc_method="Step", grpc_code="OK"),
            "bad": server.metric(
                "grpc_server_handled_total", grpc_method="Step", grpc_code="FAILED_PRECONDITION"
            ),
            "closed": server.metric("conveyor_sessions_ended_total", reason="closed"),
            "sessions": server.metric("conveyor_sessions"),
        }

    before = read()
    session_id = await wire.new_session("deep")
    await wire.step(session_id, 1, rows(40, 4))
    await wire.step(session_id, 41, rows(2, 4))
    await refused(wire.step(session_id, 99, rows(2, 4)))
    await wire.close(session_id)
    grown = {name: value - before[name] for name, value in read().items()}
    assert grown == {
        "steps": 42,
        "ticked": 42,
        "chunks": 2,
        "queued": 2,
        "gaps": 1,
        "ok": 2,
        "bad": 1,
        "closed": 1,
        "sessions": 0,
    }


def _series(page: str) -> set[str]:
    return {
        line.rpartition(" ")[0] for line in page.splitlines() if line and not line.startswith("#")
    }


async def test_random_names_and_ids_add_no_time_series(
    wire: Wire, server: ServerProcess, rows: Rows
) -> None:
    random = np.random.default_rng(0)

    async def attempt(number: int) -> None:
        name = random.bytes(6).hex()
        method = wire.channel.unary_unary(f"/conveyor.v1.SessionService/{name}")
        if number % 2:
            method = wire.channel.unary_unary(f"/{name}/{name}")
        assert (await refused(method(b""))).code == "UNIMPLEMENTED"
        assert (await refused(wire.get(name))).code == "NOT_FOUND"
        assert (await refused(wire.open(name))).code == "NOT_FOUND"
        await wire.open("tiny", session_id=name, labels={name: name})
        await wire.step(name, 1, rows(1))
        await wire.close(name)

    await attempt(0)
    await attempt(1)
    before = _series(server.scrape())
    for start in range(0, 1000, 50):
        await asyncio.gather(*(attempt(start + number) for number in range(50)))
    assert _series(server.scrape()) == before


async def test_no_session_id_or_label_is_ever_a_metric_label(
    wire: Wire, server: ServerProcess, rows: Rows
) -> None:
    await wire.open("tiny", session_id="conspicuous-id", labels={"conspicuous": "label"})
    await wire.step("conspicuous-id", 1, rows(1))
    assert "conspicuous" not in server.scrape()


async def test_the_grpc_port_has_no_metrics_and_the_metrics_port_nothing_else(
    server: ServerProcess,
) -> None:
    async with Wire(server.metrics_address) as wire:
        call = wire.sessions.ListSessions(session_pb2.ListSessionsRequest(), timeout=5)
        assert (await refused(call)).code in ("UNAVAILABLE", "DEADLINE_EXCEEDED")
    assert server.metric("conveyor_sessions") >= 0


async def test_the_log_says_what_is_served_and_where(server: ServerProcess) -> None:
    lines = server.log()
    loaded = {line["model"] for line in lines if line["message"] == "model loaded"}
    assert {"tiny", "words", "deep"} <= loaded
    (serving,) = [line for line in lines if line["message"] == "serving"]
    assert serving["address"] == server.address
    for line in lines:
        assert {"time", "level", "logger", "message"} <= set(line)


async def test_the_log_has_one_line_for_each_session_that_ended(
    wire: Wire, server: ServerProcess, rows: Rows
) -> None:
    nasty = "two\r\nlines\x1b[31m"
    await wire.open("tiny", session_id="logged-end", labels={nasty: nasty})
    await wire.step("logged-end", 1, rows(4))
    await wire.close("logged-end")
    lines = [line for line in server.log() if line.get("session") == "logged-end"]
    assert [line["message"] for line in lines] == ["session ended"]
    assert (lines[0]["reason"], lines[0]["model"], lines[0]["steps"]) == ("closed", "tiny", 4)
    assert lines[0]["labels"] == {nasty: nasty}
    (raw,) = [line for line in server.log_text().splitlines() if "logged-end" in line]
    assert raw.isprintable()


async def test_a_stop_ends_the_sessions_and_the_log_says_so(
    repository: Path, tmp_path: Path, rows: Rows
) -> None:
    server = ServerProcess(tmp_path, repository, {"shutdown.grace_seconds": 1})
    try:
        async with Wire(server.address) as wire:
            for name in ("first", "second"):
                await wire.open("tiny", session_id=name)
            await wire.step("second", 1, rows(3))
        assert server.stop() == 0
    finally:
        server.kill()
    ended = [line for line in server.log() if line["message"] == "session ended"]
    assert {(line["session"], line["reason"], line["steps"]) for line in ended} == {
        ("first", "stopped", 0),
        ("second", "stopped", 3),
    }

"""Tracing of a whole server: spans reach a collector; without one nothing is imported for it."""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import numpy.typing as npt
import pytest
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from conveyor.install import install_command
from tests.integration.conftest import StartServer
from tests.integration.process import ServerProcess, command_environment, run_command
from tests.integration.wire import Wire

Rows = Callable[..., npt.NDArray[Any]]


class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    """Keeps what it is sent."""

    def __init__(self) -> None:
        self.spans: list[Span] = []
        self.services: set[str] = set()
        self.arrived = threading.Condition()

    def Export(
        self, request: trace_service_pb2.ExportTraceServiceRequest, context: object
    ) -> trace_service_pb2.ExportTraceServiceResponse:
        with self.arrived:
            for resource in request.resource_spans:
                for attribute in resource.resource.attributes:
                    if attribute.key == "service.name":
                        self.services.add(attribute.value.string_value)
                for scope in resource.scope_spans:
                    self.spans += scope.spans
            self.arrived.notify_all()
        return trace_service_pb2.ExportTraceServiceResponse()


@pytest.fixture
def collector() -> Iterator[tuple[Collector, str]]:
    kept = Collector()
    server = grpc.server(ThreadPoolExecutor(2))
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(kept, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield kept, f"http://127.0.0.1:{port}"
    server.stop(None)


async def test_spans_reach_the_collector_at_the_latest_when_the_server_stops(
    collector: tuple[Collector, str], start_server: StartServer, rows: Rows
) -> None:
    kept, endpoint = collector
    server = start_server({"tracing.endpoint": endpoint, "tracing.service_name": "sensors"})
    async with Wire(server.address) as wire:
        session_id = await wire.new_session("tiny")
        await wire.step(session_id, 1, rows(2))
    assert server.stop() == 0
    with kept.arrived:
        assert kept.arrived.wait_for(lambda: len(kept.spans) >= 2, 10)
    (step,) = [span for span in kept.spans if span.name == "conveyor.v1.SessionService/Step"]
    assert [event.name for event in step.events] == ["queue", "tick"]
    assert kept.services == {"sensors"}


async def test_a_collector_that_is_not_there_holds_nobody_up(
    repository: Path, tmp_path: Path, rows: Rows
) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{closed.getsockname()[1]}"
        settings = {"tracing.endpoint": endpoint, "tracing.export_seconds_max": 1}
        server = ServerProcess(tmp_path, repository, settings)
        try:
            async with Wire(server.address) as wire:
                session_id = await wire.new_session("tiny")
                await wire.step(session_id, 1, rows(2))
            begun = time.monotonic()
            assert server.stop() == 0
            # The bound itself is a second; the rest is what any stop takes on a busy machine.
            assert time.monotonic() - begun < 20
        finally:
            server.kill()
    loggers = {line["logger"].partition(".")[0] for line in server.problems()}
    assert loggers <= {"opentelemetry"}


def test_without_an_endpoint_nothing_of_it_is_imported() -> None:
    code = """
import sys
from conveyor_server.app import App
from conveyor_server.config import load_config
from conveyor_server.scheduler.driver import Driver
from conveyor_server.scheduler.scheduler import Scheduler
app = App(load_config(flags={"engine.device": "cpu"}))
assert type(app._driver) is Driver and type(app._scheduler) is Scheduler
print([name for name in sys.modules if name.startswith("opentelemetry")])
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
        env=command_environment(),
    )
    assert done.stdout == "[]\n"


def test_without_the_extra_one_line_says_what_to_install(repository: Path) -> None:
    code = (
        "import sys; sys.modules['opentelemetry'] = None;"
        f"sys.argv = ['conveyor-server', 'serve', '--models', {str(repository)!r},"
        " '--set', 'tracing.endpoint=http://127.0.0.1:4317'];"
        "from conveyor_server.cli import main; main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env=command_environment(),
    )
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1, done.stderr
    assert install_command("otel") in done.stderr


@pytest.mark.parametrize("endpoint", ["127.0.0.1:4317", "grpc://collector:4317", "http://a/path"])
def test_an_endpoint_that_is_no_url_is_refused(repository: Path, endpoint: str) -> None:
    done = run_command(
        ["check", "--models", str(repository), "--set", f"tracing.endpoint={endpoint}"]
    )
    assert done.returncode == 2
    assert "tracing.endpoint" in done.stderr

"""The only place that wires objects: it starts, drains and stops the server in order."""

import asyncio
import ctypes
import gc
import json
import logging
import os
import signal
import sys
import uuid
from collections import Counter
from collections.abc import Iterable
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Final, NoReturn

from conveyor.install import install_command
from conveyor.os_errors import os_error_text
from conveyor_server.admission.admission import Admission
from conveyor_server.clock import SystemClock
from conveyor_server.config import Config, TracingConfig
from conveyor_server.core import SessionState, Tier
from conveyor_server.descriptors import DescriptorWatch, connections_that_fit, raise_limit
from conveyor_server.engine.devices import choose_device
from conveyor_server.engine.engine import TorchEngine
from conveyor_server.hangup import HangUp
from conveyor_server.metrics import Labels, Metrics
from conveyor_server.monitoring import Monitoring
from conveyor_server.reload import Reloader
from conveyor_server.rpc.results import ResultsBudget
from conveyor_server.rpc.server import AddressError, GrpcServer
from conveyor_server.rpc.service import Services
from conveyor_server.scheduler.driver import Driver
from conveyor_server.scheduler.models import ModelTable
from conveyor_server.scheduler.operations import Operations
from conveyor_server.scheduler.scheduler import Scheduler
from conveyor_server.scheduler.traced import TracedDriver, TracedScheduler
from conveyor_server.standard_error import StandardError
from conveyor_server.store.memory import MemoryStore

if TYPE_CHECKING:  # it needs an extra
    from conveyor_server.rpc.tracing import Tracing

GIL_SWITCH_SECONDS: Final = 0.0005
"""How long one thread may keep another waiting for the interpreter.

The default of 5 ms would be felt between the event loop and the engine's thread.
"""
M_ARENA_MAX: Final = -8
"""The number of that parameter in glibc's malloc.h."""
MALLOC_ARENAS_MAX: Final = 2
EXIT_DEVICE_LOST: Final = 3
"""Exit status of a process whose device failed for good."""
SERVER_LIMITS: Final = (
    "sessions_max",
    "streams_max",
    "inbox_chunks_max",
    "host_state_bytes_max",
    "memories_bytes_max",
    "held_results_total_bytes_max",
    "results_total_bytes_max",
)
"""Settings of `limits` that a gauge of the whole server can be held against."""
_log = logging.getLogger(__name__)


class StartError(Exception):
    """The server cannot start; the message says why."""


class ServerBroken(Exception):
    """A tick broke off by a mistake of ours, and the server stopped; the log has the details."""


class App:
    """One server process."""

    def __init__(self, config: Config, standard_error: StandardError | None = None) -> None:
        """Builds everything; nothing runs yet.

        Args:
            config: All settings.
            standard_error: Where the log goes, if it is not Python's own.

        Raises:
            DeviceError: The configured device is not there, or cannot be used.
            StartError: Calls are to be traced and the extra for it is not installed.
        """
        self._config = config = _with_connections_that_fit(config)
        traced = tracing_class(config.tracing)
        self._tracing = traced and traced(config.tracing)
        self._clock = SystemClock()
        self._metrics = Metrics()
        self._standard_error = standard_error
        if standard_error is not None:
            standard_error.count_dropped(self._metrics.log_lines_dropped.add)
        self._device = choose_device(config.engine.device)
        self._engine = TorchEngine(
            self._device,
            cpu_threads=config.engine.cpu_threads,
            slots=config.engine.slots,
            batch_sessions_max=config.engine.batch_sessions_max,
            verify_same_bits=config.engine.verify_same_bits,
            on_lost=self._end_at_once,
        )
        self._models = ModelTable(dropped=self._engine.remove)
        self._store = MemoryStore()
        inline_max, make_scheduler = config.engine.inline_multiply_adds_max, Scheduler
        if self._tracing is None:
            self._driver = Driver(inline_max)
        else:
            self._driver = TracedDriver(inline_max, self._tracing)
            make_scheduler = partial(TracedScheduler, self._tracing)
        self._scheduler = make_scheduler(
            engine=self._engine,
            store=self._store,
            models=self._models,
            limits=config.limits,
            batch_sessions_max=config.engine.batch_sessions_max,
            quantum_steps=config.engine.quantum_steps,
            clock=self._clock,
            metrics=self._metrics,
            wake=self._driver.wake,
        )
        self._results = ResultsBudget(config.limits)
        self._operations = Operations(self._scheduler, uuid.uuid4().hex)
        self._stop_asked = asyncio.Event()
        self._broken = False
        self._declare_gauges()

    async def run(self) -> None:
        """Serves until SIGTERM or SIGINT, or until its terminal is closed.

        Raises:
            StartError: There is no model to serve, or the ready file cannot be written.
            AddressError: An address cannot be listened on, or the TLS files not used.
            ServerBroken: It stopped by a mistake of its own.
        """
        sys.setswitchinterval(GIL_SWITCH_SECONDS)
        _few_malloc_arenas()
        self._clear_ready_file()
        server = GrpcServer(
            Services(
                config=self._config,
                admission=Admission(self._config.limits),
                driver=self._driver,
                engine=self._engine,
                metrics=self._metrics,
                clock=self._clock,
                device=str(self._device),
                results=self._results,
                tracing=self._tracing,
            )
        )
        monitoring = Monitoring(self._metrics.registry, lambda: server.unready)
        try:
            # First of all, so that it can be asked how the start goes on.
            metrics_address = await self._serve_metrics(monitoring)
            await self._serve(server, metrics_address)
        finally:
            await monitoring.stop()
        if self._broken:
            raise ServerBroken("the server stopped because of an internal error; see its log")

    async def _serve(self, server: GrpcServer, metrics_address: str) -> None:
        self._driver.start(self._scheduler, self._operations, broken=self._break)
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stop_asked.set)
        reloader = Reloader(
            self._config, self._engine, self._models, self._driver, server.set_model_serving
        )
        HangUp(reloader.request, self._stop_asked.set).listen()
        await reloader.look()
        if not list(self._models):
            raise StartError(
                f"models.folder: {self._config.models.folder} has no model that can be served;"
                " the log lines above and `conveyor-server check` say why"
            )
        reloader.start()
        _quiet_garbage_collector()
        address = await server.start(self._config.listen)
        self._announce(address, metrics_address)
        descriptors = DescriptorWatch(self._metrics.descriptors_exhausted)
        descriptors.start()
        await self._stop_asked.wait()
        descriptors.stop()
        reloader.stop()
        await self._stop(server)

    def _break(self) -> None:
        """The driver ticks no more."""
        self._broken = True
        self._stop_asked.set()

    def _end_at_once(self, error: RuntimeError) -> NoReturn:
        """Ends the process on whatever thread this is: no session can be stepped or saved here.

        Nothing is drained. What runs would wait for the device, and callers learn soonest from a
        connection that breaks off that they have to look elsewhere.
        """
        _log.critical(
            "the device is lost; the process ends",
            exc_info=error,
            extra={
                "device": str(self._device),
                "sessions": len(self._scheduler.sessions),
                "exit_status": EXIT_DEVICE_LOST,
            },
        )
        if self._standard_error is not None:
            self._standard_error.drain()
        os._exit(EXIT_DEVICE_LOST)

    async def _stop(self, server: GrpcServer) -> None:
        _log.info("draining", extra={"sessions": len(self._scheduler.sessions)})
        self._operations.draining = True
        await server.drain()
        await server.stop()
        self._driver.stop()
        for session in self._scheduler.sessions:  # they were in memory only
            self._scheduler.log_end(session, "stopped")
        if self._tracing is not None:
            await asyncio.to_thread(self._tracing.close)
        _log.info("stopped")

    # --- metrics and addresses -------------------------------------------------------------------

    async def _serve_metrics(self, monitoring: Monitoring) -> str:
        listen = self._config.listen.metrics_address
        if not listen:
            return ""
        try:
            return await monitoring.start(listen)
        except OSError as error:
            why = os_error_text(error)
            raise AddressError(
                f"listen.metrics_address: cannot listen on {listen}: {why}; choose another"
                " address with --metrics"
            ) from error

    def _clear_ready_file(self) -> None:
        """Nobody must take an earlier server's file for this one's.

        Raises:
            StartError: It could not be written later on.
        """
        file = self._config.listen.ready_file
        if file is None:
            return
        try:
            file.unlink(missing_ok=True)
            _partial(file).touch()
        except OSError as error:
            raise StartError(f"listen.ready_file: {os_error_text(error, file)}") from error

    def _announce(self, address: str, metrics_address: str) -> None:
        _log.info("serving", extra={"address": address, "metrics_address": metrics_address})
        file = self._config.listen.ready_file
        if file is not None:
            # Written beside and renamed, so that whoever waits for it never reads half of it.
            partial = _partial(file)
            ready = {"address": address, "metrics_address": metrics_address}
            try:
                partial.write_text(json.dumps(ready), encoding="utf-8")
                partial.replace(file)
            except OSError as error:  # the disk is full, for instance
                raise StartError(f"listen.ready_file: {os_error_text(error, file)}") from error

    def _declare_gauges(self) -> None:
        gauge = self._metrics.gauge
        inbox = self._scheduler.inbox
        gauge("conveyor_sessions", "Open sessions.", ("state",), self._read_sessions)
        gauge(
            "conveyor_slots",
            "Rows of the state pools.",
            ("model", "version", "state"),
            self._read_slots,
        )
        gauge(
            "conveyor_state_bytes",
            "Bytes of carries and memories; a memory on the device is in host memory too.",
            ("tier",),
            self._read_state_bytes,
        )
        gauge(
            "conveyor_memories_bytes",
            "Bytes of what sessions attend over, in host memory.",
            (),
            lambda: [((), self._scheduler.memories.size_bytes)],
        )
        gauge(
            "conveyor_predictions",
            "Whole sequences on models that cannot be stepped.",
            ("state",),
            self._read_predictions,
        )
        gauge(
            "conveyor_held_result_bytes",
            "Bytes of inputs and results held for retries.",
            (),
            lambda: [((), self._scheduler.held.size_bytes)],
        )
        gauge(
            "conveyor_results_bytes",
            "Bytes of results wanted of what was taken or waiting to be read, but for free shares.",
            (),
            lambda: [((), self._results.size_bytes)],
        )
        gauge(
            "conveyor_inbox_chunks",
            "Chunks accepted and not finished.",
            (),
            lambda: [((), inbox.chunks)],
        )
        gauge(
            "conveyor_device_memory_bytes",
            "Memory of the CUDA device.",
            ("state",),
            self._engine.device_memory if self._device.type == "cuda" else list,
        )
        limits = self._config.limits
        info = (metadata.version("conveyor"), str(self._device))
        gauge(
            "conveyor_limit",
            "Limits of the whole server.",
            ("setting",),
            lambda: [((name,), getattr(limits, name)) for name in SERVER_LIMITS],
        )
        gauge(
            "conveyor_info",
            "Always 1; the labels say what runs.",
            ("version", "device"),
            lambda: [(info, 1)],
        )

    def _read_sessions(self) -> Iterable[tuple[Labels, float]]:
        counts = Counter(session.state for session in self._scheduler.sessions)
        return [((state.name.lower(),), counts[state]) for state in SessionState]

    def _read_slots(self) -> Iterable[tuple[Labels, float]]:
        for info in self._models.all_loaded():
            key = info.key
            try:
                used, total = self._engine.slots_used(key), self._engine.slots_total(key)
            except KeyError:  # dropped since, on the loop's thread
                continue
            yield (key.name, str(key.version), "used"), used
            yield (key.name, str(key.version), "free"), total - used

    def _read_predictions(self) -> Iterable[tuple[Labels, float]]:
        predictions = self._scheduler.predictions
        return [(("waiting",), predictions.waiting), (("running",), predictions.running)]

    def _read_state_bytes(self) -> Iterable[tuple[Labels, float]]:
        device = sum(
            session.model.carry_bytes
            for session in self._scheduler.sessions
            if session.tier is Tier.DEVICE
        )
        memories = self._scheduler.memories
        host = self._store.size_bytes + memories.size_bytes
        return [(("device",), device + memories.device_bytes), (("host",), host)]


def tracing_class(config: TracingConfig) -> "type[Tracing] | None":
    """Nothing of OpenTelemetry is imported unless calls are to be traced.

    Raises:
        StartError: They are, and the extra for it is not installed.
    """
    if not config.endpoint:
        return None
    try:
        from conveyor_server.rpc.tracing import Tracing  # noqa: PLC0415
    except ModuleNotFoundError as error:
        raise StartError(
            f"tracing.endpoint is set and {error.name}, which it needs, is not installed:"
            f" {install_command('otel')}"
        ) from error
    return Tracing


def _with_connections_that_fit(config: Config) -> Config:
    connections_max = connections_that_fit(config.limits.connections_max, raise_limit())
    limits = config.limits.model_copy(update={"connections_max": connections_max})
    return config.model_copy(update={"limits": limits})


def _partial(file: Path) -> Path:
    return file.with_name(file.name + ".partial")


def _few_malloc_arenas() -> None:
    """Lets gRPC's threads share the C library's memory.

    As a rule glibc has eight arenas for each processor, and each keeps the largest messages that
    its threads once held.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:  # glibc and musl have it, and the latter ignores it
        mallopt(M_ARENA_MAX, MALLOC_ARENAS_MAX)


def _quiet_garbage_collector() -> None:
    """Keeps the collector off what lives as long as the process.

    torch alone makes some hundred thousand objects, and walking them all again and again takes
    tens of milliseconds each time, in the middle of a tick.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)

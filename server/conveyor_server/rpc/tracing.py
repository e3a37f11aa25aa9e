"""OpenTelemetry: a span for each call, with an event for each wait and each tick of its chunks.

Imported only where `tracing.endpoint` is set: it is the one module that needs the extra `otel`.
"""

import contextvars
import threading
from collections.abc import Iterable
from importlib import metadata
from typing import Final

import grpc
from opentelemetry import trace
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import SERVICE_NAME, SERVICE_VERSION, Resource
from opentelemetry.sdk.trace import SpanLimits, SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from conveyor_server.config import TracingConfig
from conveyor_server.scheduler.traced import Ticked

CALLER_KEYS: Final = ("traceparent", "tracestate")
"""Metadata that carries the caller's context, as W3C Trace Context has it."""
SERVER_FAULTS: Final = frozenset(
    {
        grpc.StatusCode.UNKNOWN,
        grpc.StatusCode.DEADLINE_EXCEEDED,
        grpc.StatusCode.UNIMPLEMENTED,
        grpc.StatusCode.INTERNAL,
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.DATA_LOSS,
    }
)
"""Statuses that make a server's span one of an error; the others are the caller's doing."""

_current: contextvars.ContextVar["Call | None"] = contextvars.ContextVar("call", default=None)

Metadata = Iterable[tuple[str, str | bytes]]


class Tracing:
    """Makes the spans and sends them. Implements `scheduler.traced.Traces`."""

    def __init__(self, config: TracingConfig, processor: SpanProcessor | None = None) -> None:
        """Spans go to `processor`, or else to the configured collector."""
        version = metadata.version("conveyor")
        self._close_seconds_max = config.export_seconds_max
        self._provider = TracerProvider(
            resource=Resource.create({SERVICE_NAME: config.service_name, SERVICE_VERSION: version}),
            sampler=ParentBased(TraceIdRatioBased(config.sample_ratio)),
            span_limits=SpanLimits(max_events=config.events_max),
            shutdown_on_exit=False,
        )
        self._provider.add_span_processor(processor or _exporting(config))
        self._tracer = self._provider.get_tracer("conveyor", version)
        self._propagator = TraceContextTextMapPropagator()
        self._by_asker: dict[int, Call] = {}

    def begin(self, service: str, method: str, sent: Metadata) -> "Call":
        """Begins the span of a call in its own task; the caller is told by its metadata."""
        carrier = {
            key: value for key, value in sent if key in CALLER_KEYS and isinstance(value, str)
        }
        span = self._tracer.start_span(
            f"{service}/{method}",
            context=self._propagator.extract(carrier),
            kind=trace.SpanKind.SERVER,
            attributes={"rpc.system": "grpc", "rpc.service": service, "rpc.method": method},
        )
        call = Call(span, self._by_asker)
        _current.set(call)
        return call

    def sent(self, asker: object) -> None:
        """See `Traces.sent`. What a tick sends, as a closed loop does, is of the call before.

        Calls that are not sampled are bound too: else what they feed back would become that of
        whatever call the tick happens to run in.
        """
        call = _current.get()
        if call is not None and id(asker) not in self._by_asker:
            call.bind(asker)

    def of(self, asker: object) -> "Call | None":
        """See `Traces.of`."""
        call = self._by_asker.get(id(asker))
        return call if call is not None and call.sampled else None

    def close(self) -> None:
        """Sends what is left, and gives up after `tracing.export_seconds_max`."""
        closing = threading.Thread(target=self._provider.shutdown, daemon=True)
        closing.start()
        closing.join(self._close_seconds_max)


class Call:
    """One call's span. Implements `scheduler.traced.CallTrace`.

    Attributes:
        sampled: Whether anything of it is written down.
    """

    def __init__(self, span: trace.Span, by_asker: dict[int, "Call"]) -> None:
        """`by_asker` is where it is found while it lasts."""
        self._span = span
        self._by_asker = by_asker
        self._askers: list[object] = []
        self._ended = False
        self.sampled = span.is_recording()

    def bind(self, asker: object) -> None:
        """Chunks that `asker` answers are this call's."""
        if not self._ended:
            self._askers.append(asker)  # which keeps its id from being another one's
            self._by_asker[id(asker)] = self

    def queued(self, session_id: str, first_step: int, waited_seconds: float) -> None:
        """See `CallTrace.queued`."""
        self._span.add_event(
            "queue",
            {
                "conveyor.session": session_id,
                "conveyor.first_step": first_step,
                "conveyor.queue_seconds": waited_seconds,
            },
        )

    def ticked(self, ticked: Ticked) -> None:
        """See `CallTrace.ticked`."""
        attributes: dict[str, str | int | float] = {
            "conveyor.session": ticked.session_id,
            "conveyor.model": ticked.model,
            "conveyor.first_step": ticked.first_step,
            "conveyor.steps": ticked.steps,
            "conveyor.engine_seconds": ticked.engine_seconds,
            "conveyor.tick_sessions": ticked.tick_sessions,
            "conveyor.tick_steps": ticked.tick_steps,
        }
        if ticked.failed:
            attributes["conveyor.reason"] = ticked.failed
        self._span.add_event("tick", attributes)

    def end(self, code: grpc.StatusCode, reason: str = "") -> None:
        """Ends the span with the call's status and, if it was refused, the reason."""
        self._ended = True
        for asker in self._askers:
            del self._by_asker[id(asker)]
        self._askers.clear()
        self._span.set_attribute("rpc.grpc.status_code", code.value[0])
        if reason:
            self._span.set_attribute("conveyor.reason", reason)
        if code in SERVER_FAULTS:
            self._span.set_status(trace.StatusCode.ERROR, reason or code.name)
        self._span.end()


def _exporting(config: TracingConfig) -> SpanProcessor:
    exporter = OTLPSpanExporter(
        endpoint=config.endpoint,
        insecure=config.endpoint.startswith("http://"),
        timeout=config.export_seconds_max,
    )
    return BatchSpanProcessor(
        exporter,
        max_queue_size=config.spans_queued_max,
        max_export_batch_size=min(512, config.spans_queued_max),
    )

"""Spans of calls: a real server with a fake engine, on the loop of the test."""

import asyncio
from collections.abc import AsyncIterator
from types import TracebackType
from typing import Any, Self, cast

import grpc
import pytest
from grpc import aio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from conveyor.oip import inference_pb2, inference_pb2_grpc
from conveyor.v1 import session_pb2, session_pb2_grpc
from conveyor_server.admission.admission import Admission
from conveyor_server.clock import SystemClock
from conveyor_server.config import Config, ListenConfig, TracingConfig
from conveyor_server.metrics import Metrics
from conveyor_server.rpc.results import ResultsBudget
from conveyor_server.rpc.server import GrpcServer
from conveyor_server.rpc.service import Services
from conveyor_server.rpc.tracing import Tracing
from conveyor_server.scheduler.models import ModelTable
from conveyor_server.scheduler.operations import Operations
from conveyor_server.scheduler.traced import TracedDriver, TracedScheduler
from conveyor_server.store.memory import MemoryStore
from tests.support.engine import FakeEngine
from tests.support.models import FEATURES, LOOPED
from tests.support.rig import rows_of

TRACE_ID = "0af7651916cd43dd8448eb211c80319c"
PARENT_ID = "b7ad6b7169203331"
SAMPLED = ("traceparent", f"00-{TRACE_ID}-{PARENT_ID}-01")
NOT_SAMPLED = ("traceparent", f"00-{TRACE_ID}-{PARENT_ID}-00")
SESSIONS = "conveyor.v1.SessionService"
MODEL = FEATURES.key.name
QUANTUM = 4


class Served:
    """The wiring of the app with tracing on, above a fake engine."""

    def __init__(self, **tracing: Any) -> None:
        self.exporter = InMemorySpanExporter()
        config = Config()
        self.tracing = Tracing(TracingConfig(**tracing), SimpleSpanProcessor(self.exporter))
        models = ModelTable()
        for model in (FEATURES, LOOPED):
            models.add(model)
        self.engine = FakeEngine((FEATURES, LOOPED), 8)
        clock, metrics = SystemClock(), Metrics()
        self.driver = TracedDriver(10**9, self.tracing)
        self.scheduler = TracedScheduler(
            self.tracing,
            engine=self.engine,
            store=MemoryStore(),
            models=models,
            limits=config.limits,
            batch_sessions_max=8,
            quantum_steps=QUANTUM,
            clock=clock,
            metrics=metrics,
            wake=self.driver.wake,
        )
        self._server = GrpcServer(
            Services(
                config=config,
                admission=Admission(config.limits),
                driver=self.driver,
                engine=self.engine,
                metrics=metrics,
                clock=clock,
                device="fake",
                results=ResultsBudget(config.limits),
                tracing=self.tracing,
            )
        )

    async def __aenter__(self) -> Self:
        operations = Operations(self.scheduler, "life")
        self.driver.start(self.scheduler, operations, broken=lambda: None)
        address = await self._server.start(ListenConfig(address="127.0.0.1:0"))
        self.channel = aio.insecure_channel(address)
        self.sessions = cast(Any, session_pb2_grpc.SessionServiceStub(self.channel))
        self.inference = cast(Any, inference_pb2_grpc.GRPCInferenceServiceStub(self.channel))
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.channel.close()
        await self._server.stop()
        self.driver.stop()

    async def open(self, session_id: str, model: str = MODEL) -> None:
        await self.sessions.OpenSession(
            session_pb2.OpenSessionRequest(session_id=session_id, model=model)
        )

    async def step(self, session_id: str, first_step: int, *values: int, **more: Any) -> Any:
        request = session_pb2.StepRequest(
            session_id=session_id,
            first_step=first_step,
            length=len(values),
            rows=rows_of(FEATURES, *values),
        )
        return await self.sessions.Step(request, **more)

    async def spans(self, method: str, count: int = 1) -> list[ReadableSpan]:
        """Those that ended; an answer reaches its caller before the call has ended here."""
        async with asyncio.timeout(10):
            while True:
                spans = self.exporter.get_finished_spans()
                found = [span for span in spans if span.name.endswith(f"/{method}")]
                if len(found) >= count:
                    assert len(found) == count
                    return found
                await asyncio.sleep(0.01)

    async def span(self, method: str) -> ReadableSpan:
        (span,) = await self.spans(method)
        return span


@pytest.fixture
async def served() -> AsyncIterator[Served]:
    async with Served() as served:
        yield served


def inferring(sequence: int, *values: int, start: bool = False) -> inference_pb2.ModelInferRequest:
    """A request of the inference protocol."""
    request = inference_pb2.ModelInferRequest(model_name=MODEL)
    request.parameters["sequence_id"].int64_param = sequence
    request.parameters["sequence_start"].bool_param = start
    shape = (1, len(values), FEATURES.input_size)
    request.inputs.add(name="INPUT", datatype="FP32", shape=shape)
    request.raw_input_contents.append(rows_of(FEATURES, *values))
    return request


def events(span: ReadableSpan, name: str) -> list[dict[str, Any]]:
    return [dict(event.attributes or {}) for event in span.events if event.name == name]


async def test_a_unary_call_is_one_span_with_its_wait_and_its_ticks(served: Served) -> None:
    await served.open("s")
    await served.step("s", 1, 1, 2, 3, 4, 5, 6)
    span = await served.span("Step")
    assert span.kind is SpanKind.SERVER
    assert span.parent is None
    assert dict(span.attributes or {}) == {
        "rpc.system": "grpc",
        "rpc.service": SESSIONS,
        "rpc.method": "Step",
        "rpc.grpc.status_code": 0,
    }
    assert span.status.status_code is StatusCode.UNSET
    assert [event.name for event in span.events] == ["queue", "tick", "tick"]
    (queue,) = events(span, "queue")
    assert queue["conveyor.session"] == "s"
    assert queue["conveyor.first_step"] == 1
    assert queue["conveyor.queue_seconds"] >= 0
    ticks = events(span, "tick")
    assert [tick["conveyor.first_step"] for tick in ticks] == [1, 1 + QUANTUM]
    assert [tick["conveyor.steps"] for tick in ticks] == [QUANTUM, 2]
    for tick in ticks:
        assert tick["conveyor.model"] == MODEL
        assert tick["conveyor.tick_sessions"] == 1
        assert tick["conveyor.tick_steps"] == tick["conveyor.steps"]
        assert tick["conveyor.engine_seconds"] >= 0


async def test_a_stream_is_one_span_for_all_its_sessions(served: Served) -> None:
    call = served.sessions.StreamSteps()
    for tag, name in enumerate(("a", "b"), start=1):
        opening = session_pb2.OpenSessionRequest(session_id=name, model=MODEL)
        frame = session_pb2.OpenFrame(tag=tag, session=opening)
        await call.write(session_pb2.StreamStepsRequest(open=frame))
    handles = [(await call.read()).opened.handle for _ in "ab"]
    steps = session_pb2.StepsFrame(rows=rows_of(FEATURES, 1, 2))
    for handle in handles:
        steps.entries.add(handle=handle, first_step=1, length=1)
    await call.write(session_pb2.StreamStepsRequest(steps=steps))
    await call.done_writing()
    while await call.read() is not aio.EOF:
        pass
    assert await call.code() is grpc.StatusCode.OK
    span = await served.span("StreamSteps")
    ticks = events(span, "tick")
    assert [tick["conveyor.session"] for tick in ticks] == ["a", "b"]
    assert [tick["conveyor.tick_sessions"] for tick in ticks] == [2, 2]
    assert len(events(span, "queue")) == 2


async def test_steps_that_a_loop_feeds_back_are_of_its_call(served: Served) -> None:
    request = session_pb2.GenerateRequest(
        model=LOOPED.key.name, prompt=rows_of(LOOPED, 1), prompt_length=1, steps_max=3
    )
    async for _ in served.sessions.Generate(request):
        pass
    span = await served.span("Generate")
    assert len(events(span, "tick")) == 1 + 3
    assert not served.tracing._by_asker  # nothing of an ended call is kept


async def test_of_a_long_inference_stream_no_more_is_kept_than_of_a_short_one(
    served: Served,
) -> None:
    call = served.inference.ModelStreamInfer()
    for number in range(20):
        await call.write(inferring(5, number + 1, start=not number))
        assert not (await call.read()).error_message
        assert len(served.tracing._by_asker) == 1
    await call.done_writing()
    assert await call.read() is aio.EOF
    ticks = events(await served.span("ModelStreamInfer"), "tick")
    assert [tick["conveyor.first_step"] for tick in ticks] == [*range(1, 21)]
    assert not served.tracing._by_asker


async def test_what_a_caller_that_is_not_traced_feeds_back_is_in_nobodys_span() -> None:
    async with Served(events_max=65_536) as served:
        request = session_pb2.GenerateRequest(
            model=LOOPED.key.name, prompt=rows_of(LOOPED, 1), prompt_length=1, steps_max=200
        )

        async def generate(sampled: tuple[str, str]) -> None:
            async for _ in served.sessions.Generate(request, metadata=(sampled,)):
                pass

        await asyncio.gather(generate(SAMPLED), generate(NOT_SAMPLED))
        ticks = events(await served.span("Generate"), "tick")
        assert len({tick["conveyor.session"] for tick in ticks}) == 1
        assert len(ticks) == 1 + 200


async def test_the_callers_context_is_taken(served: Served) -> None:
    await served.open("s")
    await served.step("s", 1, 1, metadata=(SAMPLED, ("tracestate", "vendor=value")))
    span = await served.span("Step")
    assert span.context is not None
    assert f"{span.context.trace_id:032x}" == TRACE_ID
    assert span.context.trace_state.get("vendor") == "value"
    assert span.parent is not None
    assert f"{span.parent.span_id:016x}" == PARENT_ID
    assert span.parent.is_remote


@pytest.mark.parametrize(
    "value", ["", "00-0-0-01", "zz", f"ff-{TRACE_ID}-{PARENT_ID}-01", "00-" + "a" * 4000]
)
async def test_a_context_that_is_none_is_passed_over(served: Served, value: str) -> None:
    await served.open("s")
    await served.step("s", 1, 1, metadata=(("traceparent", value),))
    assert (await served.span("Step")).parent is None


async def test_a_caller_that_is_not_traced_makes_no_span(served: Served) -> None:
    await served.open("s")
    await served.step("s", 1, 1, metadata=(NOT_SAMPLED,))
    await served.step("s", 2, 1, metadata=(SAMPLED,))
    (tick,) = events(await served.span("Step"), "tick")
    assert tick["conveyor.first_step"] == 2


async def test_of_callers_that_have_not_decided_the_ratio_is_traced() -> None:
    async with Served(sample_ratio=0.0) as served:
        await served.open("s")
        await served.step("s", 1, 1)
        await served.step("s", 2, 1, metadata=(SAMPLED,))
        (tick,) = events(await served.span("Step"), "tick")
        assert tick["conveyor.first_step"] == 2
        assert len(served.exporter.get_finished_spans()) == 1


async def test_a_refusal_has_its_reason_and_is_no_error_of_the_server(served: Served) -> None:
    await served.open("s")
    with pytest.raises(aio.AioRpcError):
        await served.step("s", 9, 1)
    span = await served.span("Step")
    attributes = dict(span.attributes or {})
    assert attributes["conveyor.reason"] == "STEP_GAP"
    assert attributes["rpc.grpc.status_code"] == grpc.StatusCode.FAILED_PRECONDITION.value[0]
    assert span.status.status_code is StatusCode.UNSET


async def test_a_failing_engine_is_an_error_of_the_server(served: Served) -> None:
    await served.open("s")

    def fail(*_: object) -> Any:
        raise RuntimeError("broken")

    served.engine.run = fail  # type: ignore[method-assign]
    with pytest.raises(aio.AioRpcError):
        await served.step("s", 1, 1)
    span = await served.span("Step")
    assert span.status.status_code is StatusCode.ERROR
    (tick,) = events(span, "tick")
    assert tick["conveyor.reason"] == "ENGINE_FAILED"


async def test_of_a_long_call_the_last_events_are_kept() -> None:
    async with Served(events_max=3) as served:
        await served.open("s")
        await served.step("s", 1, *range(1, 6 * QUANTUM + 1))
        span = await served.span("Step")
        firsts = [tick["conveyor.first_step"] for tick in events(span, "tick")]
        assert firsts == [1 + QUANTUM * number for number in (3, 4, 5)]
        assert span.dropped_events == 4


async def test_health_is_not_traced(served: Served) -> None:
    health = cast(Any, health_pb2_grpc.HealthStub(served.channel))
    await health.Check(health_pb2.HealthCheckRequest(service=""))
    await served.open("s")
    await served.span("OpenSession")
    assert len(served.exporter.get_finished_spans()) == 1

"""A small server on a real socket that keeps the contract, or breaks it, or breaks off, at will.

Its models are running sums: `counter` adds two features, `tokens` adds the token to three counters,
and `looker`, which a test has to load, adds two features and shows them above the mean of a memory.
Gates are a made-up function of the step, `gate_values`. State lives in a `World`, which outlives
the server like a store would.
"""

import asyncio
import threading
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any
from uuid import uuid4

import grpc
import grpc.aio
import numpy as np
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.duration_pb2 import Duration
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from conveyor.v1 import model_pb2, model_pb2_grpc, session_pb2, session_pb2_grpc

COUNTER = model_pb2.Model(
    name="counter",
    version=1,
    digest="digest-counter",
    description="A running sum of two features.",
    signature=model_pb2.Signature(
        input=model_pb2.TensorSignature(
            element_type=model_pb2.ELEMENT_TYPE_FLOAT32,
            row_elements=2,
            row_bytes=8,
            labels=["left", "right"],
        ),
        output=model_pb2.TensorSignature(
            element_type=model_pb2.ELEMENT_TYPE_FLOAT32,
            row_elements=2,
            row_bytes=8,
            labels=["left", "right"],
        ),
        output_activation="none",
    ),
    layers=[model_pb2.Layer(cell="rnn", size=2)],
    generative=True,
    streamable=True,
    carry_bytes=8,
    newest=True,
)
TOKENS = model_pb2.Model(
    name="tokens",
    version=2,
    digest="digest-tokens",
    description="A running sum of tokens.",
    signature=model_pb2.Signature(
        input=model_pb2.TensorSignature(
            element_type=model_pb2.ELEMENT_TYPE_INT32,
            row_elements=1,
            row_bytes=4,
            vocabulary_size=4,
            labels=["a", "b", "c", "d"],
        ),
        output=model_pb2.TensorSignature(
            element_type=model_pb2.ELEMENT_TYPE_FLOAT32, row_elements=3, row_bytes=12
        ),
        output_activation="log_softmax",
    ),
    layers=[model_pb2.Layer(cell="lstm", size=3, options={"peephole": "none"})],
    generative=True,
    streamable=True,
    newest=True,
)
LOOKER = model_pb2.Model(
    name="looker",
    version=1,
    digest="digest-looker",
    description="A running sum that looks at a memory.",
    signature=model_pb2.Signature(
        input=COUNTER.signature.input,
        output=COUNTER.signature.output,
        memory=model_pb2.TensorSignature(
            element_type=model_pb2.ELEMENT_TYPE_FLOAT32, row_elements=3, row_bytes=12
        ),
        output_activation="none",
    ),
    layers=[model_pb2.Layer(cell="gru", size=4), model_pb2.Layer(cell="lstm", size=5)],
    generative=True,
    streamable=True,
    newest=True,
)
GATES = {"rnn": "h", "lstm": "ifgoch", "gru": "rznh"}


def gate_values(layer: int, gate: str, first_step: int, length: int, units: int) -> np.ndarray:
    """What a gate does: (length, units), from 0 to 1, or from -1 to 1 where it is no share."""
    steps = np.arange(first_step, first_step + length)[:, None]
    values = ((steps * 7 + layer * 5 + ord(gate) + np.arange(units)) % 11) / 10
    return (values if gate in "iforz" else values * 2 - 1).astype("<f4")


def attention_weights(first_step: int, length: int, rows: int) -> np.ndarray:
    """Where a model looks: mostly at one row, which moves on with the step."""
    steps = np.arange(first_step, first_step + length)[:, None]
    here = steps % rows == np.arange(rows)
    return np.where(here, 0.75, 0.25 / max(rows - 1, 1)).astype("<f4")


def make_trace(state: "State", mode: int, first_step: int, length: int) -> session_pb2.Trace:
    """The trace of steps that ran."""
    trace = session_pb2.Trace()
    for number, layer in enumerate(state.model.layers):
        traced = trace.layers.add(layer=number, cell=layer.cell)
        for name in GATES[layer.cell]:
            values = gate_values(number, name, first_step, length, layer.size)
            gate = traced.gates.add(name=name, units=layer.size)
            if mode == session_pb2.TRACE_MODE_FULL:
                gate.values = values.tobytes()
                continue
            for row in values:
                gate.summaries.add(
                    mean=row.mean(),
                    minimum=row.min(),
                    maximum=row.max(),
                    share_low=np.mean(row < 0.1),
                    share_high=np.mean(row > 0.9),
                )
    if len(state.memory):
        trace.attention_columns = len(state.memory)
        trace.attention = attention_weights(first_step, length, len(state.memory)).tobytes()
    return trace


def take_memory(model: model_pb2.Model, given: bool, memory: session_pb2.Memory) -> np.ndarray:
    """What a new session attends over; no rows for a model without attention."""
    wanted = model.signature.HasField("memory")
    elements = model.signature.memory.row_elements
    if given != wanted or len(memory.rows) != memory.length * elements * 4:
        raise Refusal("INVALID_MEMORY")
    if not wanted:
        return np.zeros((0, 1), "<f4")
    if memory.length > model.limits.memory_rows_max:
        raise Refusal("MEMORY_TOO_LARGE")
    return np.frombuffer(memory.rows, "<f4").reshape(-1, elements)


CODES = {
    "MODEL_NOT_FOUND": grpc.StatusCode.NOT_FOUND,
    "SESSION_NOT_FOUND": grpc.StatusCode.NOT_FOUND,
    "SESSION_CLOSED": grpc.StatusCode.NOT_FOUND,
    "SESSION_EXISTS": grpc.StatusCode.ALREADY_EXISTS,
    "SESSION_SUPERSEDED": grpc.StatusCode.ABORTED,
    "SESSION_MOVED": grpc.StatusCode.UNAVAILABLE,
    "STEP_GAP": grpc.StatusCode.FAILED_PRECONDITION,
    "STEP_CONFLICT": grpc.StatusCode.ABORTED,
    "STEP_RESULT_NOT_HELD": grpc.StatusCode.FAILED_PRECONDITION,
    "INVALID_FIELD": grpc.StatusCode.INVALID_ARGUMENT,
    "INVALID_MEMORY": grpc.StatusCode.INVALID_ARGUMENT,
    "MEMORY_TOO_LARGE": grpc.StatusCode.RESOURCE_EXHAUSTED,
    "NOT_SUPPORTED": grpc.StatusCode.UNIMPLEMENTED,
    "NON_FINITE_INPUT": grpc.StatusCode.INVALID_ARGUMENT,
    "STREAM_SESSIONS_LIMIT": grpc.StatusCode.RESOURCE_EXHAUSTED,
    "SERVER_DRAINING": grpc.StatusCode.UNAVAILABLE,
    "CHECKPOINT_NOT_RETAINED": grpc.StatusCode.FAILED_PRECONDITION,
    "SNAPSHOT_CORRUPT": grpc.StatusCode.DATA_LOSS,
    "UNAUTHENTICATED": grpc.StatusCode.UNAUTHENTICATED,
}


async def until(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    """Waits for something that another task brings about."""
    loop = asyncio.get_running_loop()
    give_up_at = loop.time() + seconds
    while not condition():
        assert loop.time() < give_up_at, "it never came about"
        await asyncio.sleep(0.001)


class Refusal(Exception):
    """A typed error on its way out."""

    def __init__(self, reason: str, *, retry_seconds: float = 0.0, **metadata: str) -> None:
        super().__init__(reason)
        self.status = make_status(reason, retry_seconds=retry_seconds, **metadata)


def make_status(
    reason: str,
    *,
    code: grpc.StatusCode | None = None,
    retry_seconds: float = 0.0,
    **metadata: str,
) -> status_pb2.Status:
    """Builds a status with its details."""
    code = code or CODES[reason]
    status = status_pb2.Status(code=code.value[0], message=f"refused: {reason}")
    info = AnyMessage()
    info.Pack(error_details_pb2.ErrorInfo(reason=reason, domain="conveyor", metadata=metadata))
    status.details.append(info)
    if retry_seconds:
        retry = AnyMessage()
        retry.Pack(error_details_pb2.RetryInfo(retry_delay=make_duration(retry_seconds)))
        status.details.append(retry)
    return status


def make_duration(seconds: float) -> Duration:
    return Duration(seconds=int(seconds), nanos=int(seconds % 1 * 1e9))


@dataclass
class State:
    """One session."""

    session_id: str
    model: model_pb2.Model
    epoch: int = 0
    carry: np.ndarray = field(default_factory=lambda: np.zeros(3, np.float32))
    applied: int = 0
    durable: int = 0
    durability: int = session_pb2.DURABILITY_NONE
    inputs: dict[int, bytes] = field(default_factory=dict)
    results: dict[int, bytes] = field(default_factory=dict)
    runs: Counter[int] = field(default_factory=Counter)
    checkpoints: dict[int, np.ndarray] = field(default_factory=dict)
    idle_seconds: float = 60.0
    labels: dict[str, str] = field(default_factory=dict)
    memory: np.ndarray = field(default_factory=lambda: np.zeros((0, 1), np.float32))
    held_steps: int = 1000
    holder: Any = None
    handle: int = 0

    def describe(self) -> session_pb2.Session:
        return session_pb2.Session(
            session_id=self.session_id,
            model=self.model.name,
            version=self.model.version,
            model_digest=self.model.digest,
            state=session_pb2.SESSION_STATE_IDLE,
            tier=session_pb2.STATE_TIER_DEVICE,
            epoch=self.epoch,
            applied_step=self.applied,
            durable_step=self.durable,
            durability=self.durability,
            memory_rows=len(self.memory),
            idle_ttl=make_duration(self.idle_seconds),
            labels=self.labels,
        )

    def run(self, first_step: int, row: bytes) -> tuple[bytes, bool]:
        """Applies or repeats one step."""
        if first_step > self.applied + 1:
            raise Refusal("STEP_GAP", expected_step=str(self.applied + 1))
        if first_step <= self.applied:
            if first_step not in self.results:
                raise Refusal("STEP_RESULT_NOT_HELD")
            if self.inputs[first_step] != row:
                raise Refusal("STEP_CONFLICT")
            return self.results[first_step], True
        out = add(self.model, self.carry, row, self.memory)
        self.applied = first_step
        self.runs[first_step] += 1
        self.inputs[first_step] = row
        self.results[first_step] = out
        self.inputs.pop(first_step - self.held_steps, None)
        self.results.pop(first_step - self.held_steps, None)
        return out, False

    def checkpoint(self) -> None:
        self.durable = self.applied
        self.checkpoints[self.applied] = self.carry.copy()

    def go_back(self, step: int) -> None:
        """Forgets what came after a checkpoint, as a crash would."""
        self.carry = self.checkpoints[step].copy() if step else np.zeros(3, np.float32)
        self.applied = self.durable = step
        self.inputs = {n: row for n, row in self.inputs.items() if n <= step}
        self.results = {n: row for n, row in self.results.items() if n <= step}


def takes_tokens(model: model_pb2.Model) -> bool:
    return model.signature.input.element_type == model_pb2.ELEMENT_TYPE_INT32


def add(model: model_pb2.Model, carry: np.ndarray, row: bytes, memory: np.ndarray) -> bytes:
    if takes_tokens(model):
        carry += np.frombuffer(row, "<i4")[0]
        return carry.tobytes()
    carry[:2] += np.frombuffer(row, "<f4")
    return (carry[:2] + memory.mean() if len(memory) else carry[:2]).tobytes()


@dataclass
class World:
    """What outlives a server."""

    sessions: dict[str, State] = field(default_factory=dict)
    ended: dict[str, str] = field(default_factory=dict)
    calls: Counter[str] = field(default_factory=Counter)
    frames: list[session_pb2.StreamStepsRequest] = field(default_factory=list)
    metadata: list[dict[str, str]] = field(default_factory=list)

    def find(self, session_id: str) -> State:
        if session_id in self.ended:
            raise Refusal(self.ended[session_id])
        state = self.sessions.get(session_id)
        if state is None:
            raise Refusal("SESSION_NOT_FOUND")
        return state

    def end(self, session_id: str, reason: str = "SESSION_CLOSED") -> State:
        self.ended[session_id] = reason
        return self.sessions.pop(session_id)


@dataclass
class Faults:
    """What shall go wrong."""

    piece_steps_max: int = 1_000_000
    break_after_results: int | None = None
    break_with: grpc.StatusCode = grpc.StatusCode.UNAVAILABLE
    break_with_text: str = "Socket closed"
    swallow_results: bool = False
    stream_sessions_max: int = 1_000
    hold_results: asyncio.Event | None = None
    step_hook: Callable[[State, int], None] | None = None


class FakeServer(session_pb2_grpc.SessionServiceServicer, model_pb2_grpc.ModelServiceServicer):
    """The server; one lives in one event loop."""

    def __init__(self, world: World | None = None) -> None:
        self.world = world or World()
        self.models = [COUNTER, TOKENS]
        self.limits = model_pb2.Limits(
            chunk_steps_max=64,
            predict_steps_max=1000,
            generate_steps_max=1000,
            message_bytes_max=64 * 1024,
            steps_in_flight_max=128,
            stream_sessions_max=256,
            memory_rows_max=8,
            idle_ttl_max=make_duration(600),
            idle_ttl_default=make_duration(60),
        )
        self.window = session_pb2.ReplayWindow(steps_max=256, bytes_max=64 * 1024)
        self.held_steps = 1000
        self.traces = True
        self.faults = Faults()
        self.port = 0
        self.streams: list[_Stream] = []
        self.streams_seen = 0
        self._server: grpc.aio.Server | None = None

    @property
    def target(self) -> str:
        return f"127.0.0.1:{self.port}"

    async def start(self) -> "FakeServer":
        self._server = grpc.aio.server(options=[("grpc.so_reuseport", 1)])
        session_pb2_grpc.add_SessionServiceServicer_to_server(self, self._server)
        model_pb2_grpc.add_ModelServiceServicer_to_server(self, self._server)
        handler = grpc.unary_unary_rpc_method_handler(self._health)
        self._server.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler("grpc.health.v1.Health", {"Check": handler}),)
        )
        self.port = self._server.add_insecure_port(f"127.0.0.1:{self.port}")
        await self._server.start()
        return self

    async def stop(self) -> None:
        if self._server is not None:
            await self._server.stop(None)
            self._server = None

    async def __aenter__(self) -> "FakeServer":
        return await self.start()

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    async def drain(self, reconnect_after: float = 0.0) -> None:
        for stream in self.streams:
            frame = session_pb2.DrainFrame(reconnect_after=make_duration(reconnect_after))
            stream.draining = True
            stream.put(session_pb2.StreamStepsResponse(drain=frame))

    def break_streams(self) -> None:
        for stream in self.streams:
            stream.put(None)

    # --- handlers --------------------------------------------------------------------------------

    async def _health(self, request: bytes, context: Any) -> bytes:
        self.world.calls["Check"] += 1
        if request == b"":
            return b"\x08\x01"
        if request == b"\x0a\x07counter":
            return b"\x08\x02"
        await context.abort(grpc.StatusCode.NOT_FOUND, "unknown service")
        raise AssertionError

    async def _answer(self, name: str, context: Any, action: Callable[[], Any]) -> Any:
        self.world.calls[name] += 1
        self.world.metadata.append(dict(context.invocation_metadata()))
        try:
            return action()
        except Refusal as refusal:
            await context.abort_with_status(rpc_status.to_status(refusal.status))

    def _model(self, name: str, version: int = 0) -> model_pb2.Model:
        if ":" in name:
            raise Refusal("INVALID_FIELD", field="name")
        for model in self.models:
            if model.name == name and version in (0, model.version):
                described = model_pb2.Model()
                described.CopyFrom(model)
                described.limits.CopyFrom(self.limits)
                return described
        raise Refusal("MODEL_NOT_FOUND")

    def open(self, request: session_pb2.OpenSessionRequest) -> session_pb2.OpenSessionResponse:
        world = self.world
        known = world.sessions.get(request.session_id)
        if known is None:
            if request.mode == session_pb2.OPEN_MODE_RESUME:
                world.find(request.session_id)
            world.ended.pop(request.session_id, None)
            model = self._model(request.model, request.version)
            state = State(
                session_id=request.session_id or uuid4().hex,
                model=model,
                memory=take_memory(model, request.HasField("memory"), request.memory),
                durability=request.durability or session_pb2.DURABILITY_NONE,
                labels=dict(request.labels),
                held_steps=self.held_steps,
            )
            if request.HasField("idle_ttl"):
                state.idle_seconds = request.idle_ttl.ToTimedelta().total_seconds()
            world.sessions[state.session_id] = state
        elif request.mode == session_pb2.OPEN_MODE_CREATE:
            raise Refusal("SESSION_EXISTS")
        else:
            state = known
            if state.holder is not None:
                holder, state.holder = state.holder, None
                holder.lose(state, make_status("SESSION_SUPERSEDED"))
        state.epoch += 1
        return session_pb2.OpenSessionResponse(
            session=state.describe(),
            resumed=known is not None,
            token=f"token-{state.session_id}-{state.epoch}",
            replay_window=self.window,
            held_results_steps=self.held_steps,
        )

    async def OpenSession(self, request: Any, context: Any) -> Any:
        return await self._answer("OpenSession", context, lambda: self.open(request))

    async def Step(self, request: Any, context: Any) -> Any:
        def action() -> Any:
            state = self.world.find(request.session_id)
            first_new = max(request.first_step, state.applied + 1)
            rows, duplicate = run_rows(state, request.first_step, request.length, request.rows)
            ran = request.first_step + request.length - first_new
            trace = None
            if request.trace and ran > 0:
                trace = make_trace(state, request.trace, first_new, ran)
            return session_pb2.StepResponse(
                first_step=request.first_step,
                length=request.length,
                rows_length=request.length,
                rows=rows,
                durable_step=state.durable,
                duplicate=duplicate,
                trace=trace,
            )

        return await self._answer("Step", context, action)

    async def GetSession(self, request: Any, context: Any) -> Any:
        return await self._answer(
            "GetSession",
            context,
            lambda: session_pb2.GetSessionResponse(
                session=self.world.find(request.session_id).describe()
            ),
        )

    async def ListSessions(self, request: Any, context: Any) -> Any:
        def action() -> Any:
            chosen = [
                state
                for _, state in sorted(self.world.sessions.items())
                if request.model in ("", state.model.name)
            ]
            size = request.page_size or 100
            start = int(request.page_token or 0)
            more = start + size < len(chosen)
            return session_pb2.ListSessionsResponse(
                sessions=[state.describe() for state in chosen[start : start + size]],
                next_page_token=str(start + size) if more else "",
                total_size=len(chosen),
            )

        return await self._answer("ListSessions", context, action)

    async def CloseSession(self, request: Any, context: Any) -> Any:
        def action() -> Any:
            self.world.find(request.session_id)
            return session_pb2.CloseSessionResponse(
                session=self.world.end(request.session_id).describe()
            )

        return await self._answer("CloseSession", context, action)

    async def ResetSession(self, request: Any, context: Any) -> Any:
        def action() -> Any:
            state = self.world.find(request.session_id)
            state.go_back(0)
            return session_pb2.ResetSessionResponse(session=state.describe())

        return await self._answer("ResetSession", context, action)

    async def ForkSession(self, request: Any, context: Any) -> Any:
        def action() -> Any:
            source = self.world.find(request.session_id)
            copies = []
            for new_id in request.new_session_ids:
                if new_id in self.world.sessions:
                    raise Refusal("SESSION_EXISTS")
                copy = State(new_id or uuid4().hex, source.model, memory=source.memory)
                copy.carry, copy.applied = source.carry.copy(), source.applied
                self.world.sessions[copy.session_id] = copy
                copies.append(copy.describe())
            return session_pb2.ForkSessionResponse(sessions=copies)

        return await self._answer("ForkSession", context, action)

    async def RewindSession(self, request: Any, context: Any) -> Any:
        def action() -> Any:
            state = self.world.find(request.session_id)
            if request.step not in state.checkpoints:
                raise Refusal("CHECKPOINT_NOT_RETAINED")
            state.go_back(request.step)
            return session_pb2.RewindSessionResponse(session=state.describe())

        return await self._answer("RewindSession", context, action)

    async def ExportSession(self, request: Any, context: Any) -> Any:
        def action() -> Any:
            state = self.world.find(request.session_id)
            head = f"snap|{state.session_id}|{state.model.name}|{state.applied}|".encode()
            body = state.carry.tobytes() + state.memory.astype("<f4").tobytes()
            return session_pb2.ExportSessionResponse(session=state.describe(), snapshot=head + body)

        return await self._answer("ExportSession", context, action)

    async def ImportSession(self, request: Any, context: Any) -> Any:
        def action() -> Any:
            parts = request.snapshot.split(b"|", 4)
            if len(parts) != 5 or parts[0] != b"snap":
                raise Refusal("SNAPSHOT_CORRUPT")
            _, name, model, applied, carry = parts
            state = State(request.session_id or name.decode(), self._model(model.decode()))
            if state.session_id in self.world.sessions:
                raise Refusal("SESSION_EXISTS")
            numbers = np.frombuffer(carry, "<f4").copy()
            state.carry, memory = numbers[:3], numbers[3:]
            elements = state.model.signature.memory.row_elements
            state.memory = memory.reshape(-1, elements or 1)
            state.applied = int(applied)
            self.world.ended.pop(state.session_id, None)
            self.world.sessions[state.session_id] = state
            return session_pb2.ImportSessionResponse(session=state.describe())

        return await self._answer("ImportSession", context, action)

    async def Generate(self, request: Any, context: Any) -> AsyncIterator[Any]:
        self.world.calls["Generate"] += 1
        if request.session_id:
            state = self.world.find(request.session_id)
        else:
            model = self._model(request.model)
            memory = take_memory(model, request.HasField("memory"), request.memory)
            state = State("made", model, memory=memory)
        if request.first_step and request.first_step != state.applied + 1:
            refusal = Refusal("STEP_GAP", expected_step=str(state.applied + 1))
            await context.abort_with_status(rpc_status.to_status(refusal.status))
        size = state.model.signature.input.row_bytes
        for start in range(0, len(request.prompt), size):
            state.run(state.applied + 1, request.prompt[start : start + size])
        end = session_pb2.GENERATE_END_STEPS_MAX
        made = 0
        while made < request.steps_max:
            step = state.applied
            if takes_tokens(state.model):
                token = (int(state.carry[0]) + request.seed) % 4
                yield session_pb2.GenerateResponse(step=step, tokens=[token])
                made += 1
                if token in request.stop_tokens:
                    end = session_pb2.GENERATE_END_STOP_TOKEN
                    break
                fed = np.array([token], "<i4").tobytes()
            else:
                fed = state.carry[:2].tobytes()
                yield session_pb2.GenerateResponse(step=step, rows=fed)
                made += 1
            if made < request.steps_max:
                state.run(state.applied + 1, fed)
        yield session_pb2.GenerateResponse(end=end, applied_step=state.applied)

    async def Predict(self, request: Any, context: Any) -> Any:
        def action() -> Any:
            model = self._model(request.model, request.version)
            memory = take_memory(model, request.HasField("memory"), request.memory)
            state = State("made", model, memory=memory)
            rows, _ = run_rows(state, 1, request.length, request.rows)
            size = state.model.signature.output.row_bytes
            if request.output == session_pb2.OUTPUT_MODE_LAST:
                rows = rows[-size:]
            return session_pb2.PredictResponse(
                version=state.model.version, rows_length=len(rows) // size, rows=rows
            )

        return await self._answer("Predict", context, action)

    async def ListModels(self, request: Any, context: Any) -> Any:
        def action() -> Any:
            size = request.page_size or 100
            start = int(request.page_token or 0)
            chosen = self.models[start : start + size]
            more = start + size < len(self.models)
            return model_pb2.ListModelsResponse(
                models=[self._model(model.name) for model in chosen],
                next_page_token=str(start + size) if more else "",
            )

        return await self._answer("ListModels", context, action)

    async def GetModel(self, request: Any, context: Any) -> Any:
        return await self._answer(
            "GetModel",
            context,
            lambda: model_pb2.GetModelResponse(model=self._model(request.name, request.version)),
        )

    async def StreamSteps(self, requests: Any, context: Any) -> None:
        self.world.calls["StreamSteps"] += 1
        self.world.metadata.append(dict(context.invocation_metadata()))
        stream = _Stream(self, context)
        self.streams.append(stream)
        self.streams_seen += 1
        try:
            await stream.serve()
        finally:
            self.streams.remove(stream)
            for state in stream.states.values():
                if state.holder is stream:
                    state.holder = None


def run_rows(state: State, first_step: int, length: int, rows: bytes) -> tuple[bytes, bool]:
    size = state.model.signature.input.row_bytes
    assert len(rows) == length * size
    answers = [state.run(first_step + i, rows[i * size : (i + 1) * size]) for i in range(length)]
    return b"".join(row for row, _ in answers), any(duplicate for _, duplicate in answers)


class _Stream:
    """One StreamSteps call."""

    def __init__(self, server: FakeServer, context: Any) -> None:
        self.server = server
        self.context = context
        self.states: dict[int, State] = {}
        self.draining = False
        self.silent = False
        self.results_sent = 0
        self._handles = 0
        self._out: asyncio.Queue[Any] = asyncio.Queue()

    def put(self, frame: session_pb2.StreamStepsResponse | None) -> None:
        """Sends a frame, or breaks the connection."""
        self._out.put_nowait(frame)

    def lose(self, state: State, status: status_pb2.Status) -> None:
        handle = state.handle
        self.states.pop(handle, None)
        frame = session_pb2.ClosedFrame(handle=handle, status=status, applied_step=state.applied)
        self.put(session_pb2.StreamStepsResponse(closed=frame))

    async def serve(self) -> None:
        writer = asyncio.ensure_future(self._write())
        reader = asyncio.ensure_future(self._read())
        try:
            done, _ = await asyncio.wait({writer, reader}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            writer.cancel()
            reader.cancel()
            await asyncio.gather(writer, reader, return_exceptions=True)
        for task in done:
            if not task.cancelled() and task.exception() is None and task.result():
                faults = self.server.faults
                await self.context.abort(faults.break_with, faults.break_with_text)

    async def _write(self) -> bool:
        faults = self.server.faults
        while True:
            frame = await self._out.get()
            if frame is None:
                return True
            if self.silent:
                continue
            if frame.HasField("results"):
                if faults.hold_results is not None:
                    await faults.hold_results.wait()
                limit = faults.break_after_results
                if limit is not None and self.results_sent >= limit:
                    faults.break_after_results = None
                    return True
                self.results_sent += 1
                if faults.swallow_results:
                    continue
            await self.context.write(frame)

    async def _read(self) -> bool:
        while True:
            frame = await self.context.read()
            if frame is grpc.aio.EOF:
                return False
            self.server.world.frames.append(frame)
            kind = frame.WhichOneof("frame")
            if kind == "open":
                self._open(frame.open)
            elif kind == "steps":
                self._steps(frame.steps)
            elif kind == "close":
                self._close(frame.close)
            else:
                self.put(session_pb2.StreamStepsResponse(heartbeat=frame.heartbeat))

    def _open(self, frame: session_pb2.OpenFrame) -> None:
        try:
            if self.draining:
                raise Refusal("SERVER_DRAINING")
            if len(self.states) >= self.server.faults.stream_sessions_max:
                raise Refusal("STREAM_SESSIONS_LIMIT", retry_seconds=1.0)
            response = self.server.open(frame.session)
        except Refusal as refusal:
            failure = session_pb2.FailureFrame(tag=frame.tag, status=refusal.status)
            self.put(session_pb2.StreamStepsResponse(failure=failure))
            return
        self._handles += 1
        state = self.server.world.sessions[response.session.session_id]
        state.holder, state.handle = self, self._handles
        self.states[self._handles] = state
        opened = session_pb2.OpenedFrame(tag=frame.tag, handle=self._handles, session=response)
        self.put(session_pb2.StreamStepsResponse(opened=opened))

    def _steps(self, frame: session_pb2.StepsFrame) -> None:
        offset = 0
        for entry in frame.entries:
            state = self.states[entry.handle]
            size = entry.length * state.model.signature.input.row_bytes
            rows = frame.rows[offset : offset + size]
            offset += size
            try:
                self._run(entry, state, rows)
            except Refusal as refusal:
                failure = session_pb2.FailureFrame(
                    handle=entry.handle,
                    status=refusal.status,
                    first_step=max(entry.first_step, min(state.applied + 1, entry.first_step)),
                )
                self.put(session_pb2.StreamStepsResponse(failure=failure))
        assert offset == len(frame.rows)

    def _run(self, entry: session_pb2.StepsEntry, state: State, rows: bytes) -> None:
        if self.server.faults.step_hook is not None:
            self.server.faults.step_hook(state, entry.first_step)
        in_size = state.model.signature.input.row_bytes
        if not np.isfinite(np.frombuffer(rows, "<f4")).all() and state.model.name == "counter":
            raise Refusal("NON_FINITE_INPUT")
        if entry.trace and not self.server.traces:
            raise Refusal("NOT_SUPPORTED")
        done = 0
        while done < entry.length:
            length = min(entry.length - done, self.server.faults.piece_steps_max)
            part = rows[done * in_size : (done + length) * in_size]
            out, duplicate = run_rows(state, entry.first_step + done, length, part)
            out_size = state.model.signature.output.row_bytes
            ends = done + length == entry.length
            if entry.output == session_pb2.OUTPUT_MODE_NONE:
                out = b""
            elif entry.output == session_pb2.OUTPUT_MODE_LAST:
                out = out[-out_size:] if ends else b""
            result = session_pb2.ResultsEntry(
                handle=entry.handle,
                first_step=entry.first_step + done,
                length=length,
                rows_length=len(out) // out_size,
                durable_step=state.durable,
                duplicate=duplicate,
            )
            if entry.trace and not duplicate:
                first = entry.first_step + done
                result.trace.CopyFrom(make_trace(state, entry.trace, first, length))
            results = session_pb2.ResultsFrame(entries=[result], rows=out)
            self.put(session_pb2.StreamStepsResponse(results=results))
            done += length

    def _close(self, frame: session_pb2.CloseFrame) -> None:
        state = self.states.pop(frame.handle)
        state.holder = None
        if not frame.detach:
            self.server.world.end(state.session_id)
        closed = session_pb2.ClosedFrame(handle=frame.handle, applied_step=state.applied)
        self.put(session_pb2.StreamStepsResponse(closed=closed))


class ServerThread:
    """The server in an event loop of its own, for clients that block."""

    def __init__(self) -> None:
        self.server = FakeServer()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)

    def __enter__(self) -> FakeServer:
        self._thread.start()
        self.call(self.server.start())
        return self.server

    def __exit__(self, *_: object) -> None:
        self.call(self.server.stop())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def call(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(10)

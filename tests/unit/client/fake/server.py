"""A small server on a real socket that keeps the contract, or breaks it, or breaks off, at will.

Its models are running sums: `counter` adds two features, `tokens` adds the token to three counters,
and `looker`, which a test has to load, adds two features and shows them above the mean of a memory.
Gates are a made-up function of the step, `gate_values`. State lives in a `World`, which outlives
the server like a store would.
"""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any
from uuid import uuid4

import grpc
import grpc.aio
import numpy as np
from grpc_status import rpc_status

from conveyor.v1 import model_pb2, model_pb2_grpc, session_pb2, session_pb2_grpc
from tests.unit.client.fake.models import COUNTER, TOKENS, takes_tokens
from tests.unit.client.fake.refusals import Refusal, make_duration, make_status
from tests.unit.client.fake.sessions import State, World, make_trace, run_rows, take_memory
from tests.unit.client.fake.stream import Faults, Stream


async def until(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    """Waits for something that another task brings about."""
    loop = asyncio.get_running_loop()
    give_up_at = loop.time() + seconds
    while not condition():
        assert loop.time() < give_up_at, "it never came about"
        await asyncio.sleep(0.001)


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
        self.streams: list[Stream] = []
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
        stream = Stream(self, context)
        self.streams.append(stream)
        self.streams_seen += 1
        try:
            await stream.serve()
        finally:
            self.streams.remove(stream)
            for state in stream.states.values():
                if state.holder is stream:
                    state.holder = None


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
        self.call(_calls_ended())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def call(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(10)


async def _calls_ended() -> None:
    """Waits for what was cut off: on a loop that is closed earlier it would complain aloud."""
    calls = asyncio.all_tasks() - {asyncio.current_task()}
    if calls:
        await asyncio.wait(calls, timeout=2)

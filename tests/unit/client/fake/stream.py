"""One stream of the fake server, and what may go wrong on it."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import grpc
import grpc.aio
import numpy as np
from google.rpc import status_pb2

from conveyor.v1 import session_pb2
from tests.unit.client.fake.refusals import Refusal
from tests.unit.client.fake.sessions import State, make_trace, run_rows

if TYPE_CHECKING:
    from tests.unit.client.fake.server import FakeServer


@dataclass
class Faults:
    """What shall go wrong."""

    piece_steps_max: int = 1_000_000
    break_after_results: int | None = None
    break_with: grpc.StatusCode = grpc.StatusCode.UNAVAILABLE
    break_with_text: str = "Socket closed"
    swallow_results: bool = False
    stream_sessions_max: int = 1_000
    hold_results: asyncio.Event | None = None  # and what is refused
    step_hook: Callable[[State, int], None] | None = None


class Stream:
    """One StreamSteps call."""

    def __init__(self, server: "FakeServer", context: Any) -> None:
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
        """Tells that a session is no longer its own."""
        handle = state.handle
        self.states.pop(handle, None)
        frame = session_pb2.ClosedFrame(handle=handle, status=status, applied_step=state.applied)
        self.put(session_pb2.StreamStepsResponse(closed=frame))

    async def serve(self) -> None:
        """Reads and writes until either end is reached."""
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
            told = frame.HasField("results") or frame.HasField("failure")
            if told and faults.hold_results is not None:
                await faults.hold_results.wait()
            if frame.HasField("results"):
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

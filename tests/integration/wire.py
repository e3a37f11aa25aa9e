"""The contract by hand: stubs over a real socket, streams frame by frame, refusals taken apart."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Final, Self

import grpc
import numpy as np
import numpy.typing as npt
from google.protobuf.duration_pb2 import Duration
from google.rpc import error_details_pb2, status_pb2
from grpc import aio
from grpc_health.v1 import health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from conveyor.v1 import model_pb2_grpc, session_pb2, session_pb2_grpc

ALL: Final = session_pb2.OUTPUT_MODE_ALL
LAST: Final = session_pb2.OUTPUT_MODE_LAST
NONE: Final = session_pb2.OUTPUT_MODE_NONE
WAIT_SECONDS_MAX: Final = 30.0
"""For an answer that has to come; only a failing test waits so long."""

_CODES: Final = {code.value[0]: code.name for code in grpc.StatusCode}
Metadata = Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Refusal:
    """A status taken apart."""

    code: str
    reason: str
    message: str = field(compare=False, default="")
    retry_seconds: float | None = field(compare=False, default=None)
    metadata: dict[str, str] = field(compare=False, default_factory=dict[str, str])


def refusal(status: status_pb2.Status) -> Refusal:
    reason, retry, metadata = "", None, dict[str, str]()
    for detail in status.details:
        info, delay = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo()
        if detail.Unpack(info):
            assert info.domain == "conveyor"
            reason, metadata = info.reason, dict(info.metadata)
        elif detail.Unpack(delay):
            retry = delay.retry_delay.ToMicroseconds() / 1e6
    return Refusal(_CODES[status.code], reason, status.message, retry, metadata)


def refusal_of(error: aio.AioRpcError) -> Refusal:
    for key, value in error.trailing_metadata() or ():
        if key == "grpc-status-details-bin":
            assert isinstance(value, bytes)
            found = refusal(status_pb2.Status.FromString(value))
            assert found.code == error.code().name
            assert found.message == error.details()
            return found
    return Refusal(error.code().name, "", error.details() or "")


async def refused(call: Awaitable[Any]) -> Refusal:
    """The refusal of a call that has to be refused."""
    try:
        answer = await call
    except aio.AioRpcError as error:
        return refusal_of(error)
    raise AssertionError(f"not refused: {answer}")


def seconds(value: float) -> Duration:
    duration = Duration()
    duration.FromMicroseconds(round(value * 1e6))
    return duration


def floats(rows: bytes, columns: int) -> npt.NDArray[np.float32]:
    return np.frombuffer(rows, dtype="<f4").reshape(-1, columns)


class Wire:
    """A channel to one server."""

    def __init__(self, address: str, metadata: Metadata = ()) -> None:
        options = [
            ("grpc.max_send_message_length", -1),
            ("grpc.max_receive_message_length", -1),
            ("grpc.use_local_subchannel_pool", 1),
        ]
        self.channel = aio.insecure_channel(address, options=options)
        self.sessions = session_pb2_grpc.SessionServiceStub(self.channel)
        self.models = model_pb2_grpc.ModelServiceStub(self.channel)
        self.health = health_pb2_grpc.HealthStub(self.channel)
        self.metadata = tuple(metadata)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.channel.close()

    async def open(self, model: str = "", **fields: Any) -> session_pb2.OpenSessionResponse:
        request = session_pb2.OpenSessionRequest(model=model, **fields)
        return await self.sessions.OpenSession(request, metadata=self.metadata)

    async def new_session(self, model: str) -> str:
        return (await self.open(model)).session.session_id

    async def step(
        self,
        session_id: str,
        first_step: int,
        rows: npt.NDArray[Any] | bytes,
        length: int | None = None,
        **fields: Any,
    ) -> session_pb2.StepResponse:
        payload = rows if isinstance(rows, bytes) else rows.tobytes()
        request = session_pb2.StepRequest(
            session_id=session_id,
            first_step=first_step,
            length=len(rows) if length is None else length,
            rows=payload,
            **fields,
        )
        return await self.sessions.Step(request, metadata=self.metadata)

    async def get(self, session_id: str) -> session_pb2.Session:
        request = session_pb2.GetSessionRequest(session_id=session_id)
        return (await self.sessions.GetSession(request, metadata=self.metadata)).session

    async def close(self, session_id: str) -> session_pb2.Session:
        request = session_pb2.CloseSessionRequest(session_id=session_id)
        return (await self.sessions.CloseSession(request, metadata=self.metadata)).session

    async def export(self, session_id: str) -> bytes:
        request = session_pb2.ExportSessionRequest(session_id=session_id)
        return (await self.sessions.ExportSession(request, metadata=self.metadata)).snapshot

    async def predict(self, model: str, rows: npt.NDArray[Any]) -> bytes:
        request = session_pb2.PredictRequest(model=model, length=len(rows), rows=rows.tobytes())
        return (await self.sessions.Predict(request, metadata=self.metadata)).rows

    async def generate(self, **fields: Any) -> list[session_pb2.GenerateResponse]:
        request = session_pb2.GenerateRequest(**fields)
        call = self.sessions.Generate(request, metadata=self.metadata)
        return [response async for response in call]

    def reflection(self) -> Any:
        """A call to the reflection service. A refusal is to be read before anything is written:
        grpc.aio calls a write that the refusal overtakes an internal error."""
        stub = reflection_pb2_grpc.ServerReflectionStub(self.channel)
        return stub.ServerReflectionInfo(metadata=self.metadata)

    async def reflected(self) -> set[str]:
        """The names of the services that reflection lists."""
        call = self.reflection()
        await call.write(reflection_pb2.ServerReflectionRequest(list_services=""))
        await call.done_writing()
        answers = [answer async for answer in call]
        return {each.name for answer in answers for each in answer.list_services_response.service}

    @asynccontextmanager
    async def stream(self) -> AsyncIterator[Stream]:
        stream = Stream(self)
        try:
            yield stream
        finally:
            stream.cancel()


@dataclass(frozen=True)
class Entry:
    """One chunk to send."""

    handle: int
    first_step: int
    rows: npt.NDArray[Any]
    output: int = ALL
    length: int | None = None
    trace: int = 0


class Stream:
    """One StreamSteps call. Frames that nobody asked for yet are kept in ``unread``."""

    def __init__(self, wire: Wire) -> None:
        self.call = wire.sessions.StreamSteps(metadata=wire.metadata)
        self.unread: list[session_pb2.StreamStepsResponse] = []
        self._tags = 0

    async def send(self, **frame: Any) -> None:
        await self.call.write(session_pb2.StreamStepsRequest(**frame))

    async def read(self) -> session_pb2.StreamStepsResponse:
        """The next frame."""
        if self.unread:
            return self.unread.pop(0)
        async with asyncio.timeout(WAIT_SECONDS_MAX):
            frame = await self.call.read()
        assert frame is not aio.EOF, "the stream ended"
        return frame

    async def next(self, kind: str) -> Any:
        """The next frame of a kind; those before it stay unread."""
        for position, frame in enumerate(self.unread):
            if frame.WhichOneof("frame") == kind:
                return getattr(self.unread.pop(position), kind)
        passed = list[session_pb2.StreamStepsResponse]()
        self.unread, kept = [], self.unread
        while (frame := await self.read()).WhichOneof("frame") != kind:
            passed.append(frame)
        self.unread = kept + passed
        return getattr(frame, kind)

    async def open_or_fail(
        self, model: str = "", **fields: Any
    ) -> session_pb2.OpenedFrame | Refusal:
        self._tags += 1
        request = session_pb2.OpenSessionRequest(model=model, **fields)
        await self.send(open=session_pb2.OpenFrame(tag=self._tags, session=request))
        passed, self.unread = self.unread, []
        try:
            while True:
                frame = await self.read()
                kind = frame.WhichOneof("frame")
                if kind == "opened" and frame.opened.tag == self._tags:
                    return frame.opened
                if kind == "failure" and frame.failure.tag == self._tags:
                    return refusal(frame.failure.status)
                passed.append(frame)
        finally:
            self.unread = passed

    async def open(self, model: str = "", **fields: Any) -> session_pb2.OpenedFrame:
        opened = await self.open_or_fail(model, **fields)
        assert isinstance(opened, session_pb2.OpenedFrame), opened
        return opened

    async def send_steps(self, *entries: Entry, timeout_seconds: float | None = None) -> None:
        frame = session_pb2.StepsFrame(
            entries=[
                session_pb2.StepsEntry(
                    handle=entry.handle,
                    first_step=entry.first_step,
                    length=len(entry.rows) if entry.length is None else entry.length,
                    output=session_pb2.OutputMode.ValueType(entry.output),
                    trace=session_pb2.TraceMode.ValueType(entry.trace),
                )
                for entry in entries
            ],
            rows=b"".join(entry.rows.tobytes() for entry in entries),
            timeout=None if timeout_seconds is None else seconds(timeout_seconds),
        )
        await self.send(steps=frame)

    async def pieces(self, count: int, columns: int) -> list[Piece]:
        """The next ``count`` pieces of results."""
        found: list[Piece] = []
        while len(found) < count:
            found += split(await self.next("results"), columns)
        assert len(found) == count, "more pieces than asked for"
        return found

    async def steps(
        self, handle: int, first_step: int, rows: npt.NDArray[Any], columns: int, output: int = ALL
    ) -> bytes:
        """Runs one chunk and returns its output rows; only its pieces may come meanwhile."""
        await self.send_steps(Entry(handle, first_step, rows, output))
        out: list[bytes] = []
        done = first_step - 1
        while done < first_step + len(rows) - 1:
            for piece in split(await self.next("results"), columns):
                assert (piece.handle, piece.first_step) == (handle, done + 1)
                done += piece.length
                out.append(piece.rows)
        return b"".join(out)

    async def failure(self) -> tuple[Refusal, session_pb2.FailureFrame]:
        frame = await self.next("failure")
        return refusal(frame.status), frame

    async def end(self) -> None:
        """Half-closes and reads to the end."""
        await self.call.done_writing()
        async with asyncio.timeout(WAIT_SECONDS_MAX):
            while (frame := await self.call.read()) is not aio.EOF:
                self.unread.append(frame)

    def cancel(self) -> None:
        self.call.cancel()


@dataclass(frozen=True)
class Piece:
    """One entry of a results frame with its rows."""

    handle: int
    first_step: int
    length: int
    rows: bytes
    rows_length: int
    duplicate: bool


def split(results: session_pb2.ResultsFrame, columns: int) -> list[Piece]:
    pieces: list[Piece] = []
    offset = 0
    for entry in results.entries:
        size = 4 * columns * entry.rows_length
        rows = results.rows[offset : offset + size]
        assert len(rows) == size
        offset += size
        pieces.append(
            Piece(
                entry.handle,
                entry.first_step,
                entry.length,
                rows,
                entry.rows_length,
                entry.duplicate,
            )
        )
    assert offset == len(results.rows)
    return pieces


async def until(condition: Any, what: str = "") -> None:
    """Waits for something that has to come true soon, however busy the machine is."""
    async with asyncio.timeout(WAIT_SECONDS_MAX):
        while True:
            outcome = condition()
            if asyncio.iscoroutine(outcome):
                outcome = await outcome
            if outcome:
                return
            await asyncio.sleep(0.02)
    raise AssertionError(what)

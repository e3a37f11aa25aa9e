"""The load: closed loops over real sockets, the same code for every server.

Its cost for each message is kept down: bytes go in and out of grpc as they are, and of a request
only the step numbers change. What it takes from the machine all the same is measured and reported.
"""

import asyncio
import math
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any, Final, Protocol
from uuid import uuid4

import numpy as np
from grpc import aio

from bench.model import MODEL, SIZE
from conveyor.v1 import session_pb2

RESULTS_TAG: Final = 0x12
"""First byte of a response that holds a results frame: field 2 of StreamStepsResponse."""
OPTIONS: Final = (
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    ("grpc.use_local_subchannel_pool", 1),
)
_SERVICE: Final = "/conveyor.v1.SessionService/"
FINISH_SECONDS_MAX: Final = 30.0


class LoadError(Exception):
    """A server answered something that it should not have."""


@dataclass(slots=True)
class Window:
    """When to measure, and what came to its end in that time."""

    begin: float
    end: float
    steps: int = 0
    latencies: list[float] = field(default_factory=list[float])

    def note(self, started: float, ended: float, steps: int) -> None:
        """Counts one answered request."""
        if self.begin <= ended <= self.end:
            self.steps += steps
            self.latencies.append(ended - started)

    @property
    def steps_per_second(self) -> float:
        """Steps answered."""
        return self.steps / (self.end - self.begin)

    def percentile_ms(self, percent: float) -> float:
        """Of the time from handing a request to grpc to having all of its answer."""
        return float(np.percentile(self.latencies, percent)) * 1e3 if self.latencies else math.nan


class Fleet(Protocol):
    """Sessions that stay open from round to round."""

    async def open(self) -> None:
        """Connects and opens every session."""
        ...

    async def run(self, window: Window) -> None:
        """Keeps one request of each of its loops in flight until the window ends."""
        ...

    async def close(self) -> None:
        """Ends every session and disconnects."""
        ...


class StreamFleet:
    """Streams with one frame in flight each: one chunk of each of the stream's sessions."""

    def __init__(self, target: str, *, streams: int, sessions: int = 1, steps: int = 1) -> None:
        """``sessions`` on each stream, ``steps`` in each chunk."""
        self._channel = aio.insecure_channel(target, options=OPTIONS)
        method = self._channel.stream_stream(f"{_SERVICE}StreamSteps")
        self._streams = [_Stream(method(), sessions, steps) for _ in range(streams)]

    async def open(self) -> None:
        """See ``Fleet.open``."""
        await asyncio.gather(*(stream.open() for stream in self._streams))

    async def run(self, window: Window) -> None:
        """See ``Fleet.run``."""
        await asyncio.gather(*(loop(s.exchange, s.frame_steps, window) for s in self._streams))

    async def close(self) -> None:
        """See ``Fleet.close``."""
        await asyncio.gather(*(stream.close() for stream in self._streams))
        await self._channel.close()


class UnaryFleet:
    """Sessions with one Step call in flight each."""

    def __init__(self, target: str, *, sessions: int) -> None:
        """One step in each call."""
        self._channel = aio.insecure_channel(target, options=OPTIONS)
        self._ids = [uuid4().hex for _ in range(sessions)]
        self._step = self._channel.unary_unary(f"{_SERVICE}Step")
        self._requests = [
            session_pb2.StepRequest(session_id=each, first_step=1, length=1, rows=input_rows(1))
            for each in self._ids
        ]

    async def open(self) -> None:
        """See ``Fleet.open``."""
        method = self._channel.unary_unary(f"{_SERVICE}OpenSession")
        requests = (session_pb2.OpenSessionRequest(model=MODEL, session_id=i) for i in self._ids)
        await asyncio.gather(*(method(request.SerializeToString()) for request in requests))

    async def run(self, window: Window) -> None:
        """See ``Fleet.run``."""
        await asyncio.gather(*(loop(self._exchange(r), 1, window) for r in self._requests))

    async def close(self) -> None:
        """See ``Fleet.close``."""
        method = self._channel.unary_unary(f"{_SERVICE}CloseSession")
        requests = (session_pb2.CloseSessionRequest(session_id=each) for each in self._ids)
        await asyncio.gather(*(method(request.SerializeToString()) for request in requests))
        await self._channel.close()

    def _exchange(self, request: session_pb2.StepRequest) -> Callable[[], Awaitable[None]]:
        async def exchange() -> None:
            await self._step(request.SerializeToString())
            request.first_step += 1

        return exchange


class _Stream:
    """One StreamSteps call."""

    def __init__(self, call: Any, sessions: int, steps: int) -> None:
        self._call = call
        self._sessions = sessions
        self._steps = steps
        self.frame_steps = sessions * steps
        self._request = session_pb2.StreamStepsRequest()
        self._entries: list[session_pb2.StepsEntry] = []
        self._next_step = 1
        self._last = b""
        self.exchange = self._exchange_one if self.frame_steps == 1 else self._exchange_many

    async def open(self) -> None:
        for tag in range(self._sessions):
            wanted = session_pb2.OpenSessionRequest(model=MODEL)
            frame = session_pb2.OpenFrame(tag=tag, session=wanted)
            request = session_pb2.StreamStepsRequest(open=frame)
            await self._call.write(request.SerializeToString())
        steps = self._request.steps
        for _ in range(self._sessions):
            answer = await self._read()
            if answer.WhichOneof("frame") != "opened":
                raise LoadError(f"an open frame was answered by {answer}")
            steps.entries.add(handle=answer.opened.handle, length=self._steps)
        steps.rows = input_rows(self.frame_steps)
        self._entries = list(steps.entries)

    async def close(self) -> None:
        """Ends the sessions and the stream."""
        for entry in self._entries:
            frame = session_pb2.CloseFrame(handle=entry.handle)
            request = session_pb2.StreamStepsRequest(close=frame)
            await self._call.write(request.SerializeToString())
        await self._call.done_writing()
        async with asyncio.timeout(FINISH_SECONDS_MAX):
            while await self._call.read() is not aio.EOF:
                pass

    async def _exchange_one(self) -> None:
        """One step of one session: the answer is one frame, of which the first byte says enough."""
        self._entries[0].first_step = self._next_step
        self._next_step += 1
        await self._call.write(self._request.SerializeToString())
        answer = await self._call.read()
        if answer is aio.EOF or answer[0] != RESULTS_TAG:
            raise LoadError(f"a step was answered by {answer!r}")

    async def _exchange_many(self) -> None:
        """One chunk of every session: the answer is as many frames as it takes."""
        for entry in self._entries:
            entry.first_step = self._next_step
        self._next_step += self._steps
        await self._call.write(self._request.SerializeToString())
        missing = self.frame_steps
        while missing:
            answer = await self._read()
            if answer.WhichOneof("frame") != "results":
                raise LoadError(f"a chunk was answered by {answer}")
            missing -= sum(entry.length for entry in answer.results.entries)

    async def _read(self) -> session_pb2.StreamStepsResponse:
        answer = await self._call.read()
        if answer is aio.EOF:
            raise LoadError("the server ended the stream")
        return session_pb2.StreamStepsResponse.FromString(answer)


def input_rows(count: int) -> bytes:
    """The same rows every time; what they hold does not change what they cost."""
    return np.random.default_rng(1).standard_normal((count, SIZE), dtype=np.float32).tobytes()


async def loop(exchange: Callable[[], Awaitable[None]], steps: int, window: Window) -> None:
    """Keeps one exchange under way until the window ends."""
    started = perf_counter()
    while started < window.end:
        await exchange()
        ended = perf_counter()
        window.note(started, ended, steps)
        started = ended

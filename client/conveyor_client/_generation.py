"""What a model makes by itself, as it comes."""

from collections import deque
from collections.abc import AsyncGenerator
from types import TracebackType
from typing import Literal, Self

from conveyor.v1 import session_pb2
from conveyor_client._nouns import FloatArray
from conveyor_client._rows import RowCodec

GenerationEnd = Literal["steps_max", "stop_token"]


class Generation:
    """An asynchronous iterator of what is generated: tokens, or output rows of shape (O,).

    Leaving the loop early leaves the call running until `aclose`; ``async with`` does that by
    itself.

    Attributes:
        end: Why it ended: "steps_max" or "stop_token"; None while it goes on.
        applied_step: The session's applied step once it ended; 0 before.
        step: The number of the step whose output the latest item was made from.
    """

    def __init__(
        self, responses: AsyncGenerator[session_pb2.GenerateResponse, None], codec: RowCodec
    ) -> None:
        self.end: GenerationEnd | None = None
        self.applied_step = 0
        self.step = 0
        self._responses = responses
        self._codec = codec
        self._ready: deque[int | FloatArray] = deque()
        self._next_step = 0

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.aclose()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> int | FloatArray:
        while not self._ready:
            await self._receive()
        self.step, self._next_step = self._next_step, self._next_step + 1
        return self._ready.popleft()

    async def aclose(self) -> None:
        """Ends the call if it still runs."""
        await self._responses.aclose()

    async def _receive(self) -> None:
        response = await anext(self._responses)  # its StopAsyncIteration is this iterator's too
        if response.tokens or response.rows:
            self._next_step = response.step
            self._ready.extend(response.tokens)
            if response.rows:
                self._ready.extend(self._codec.decode(response.rows, single=False))
        if response.end:
            stopped = response.end == session_pb2.GENERATE_END_STOP_TOKEN
            self.end = "stop_token" if stopped else "steps_max"
            self.applied_step = response.applied_step

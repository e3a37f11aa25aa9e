"""Inputs out, outputs and traces back: long chunks are cut, several inputs kept in flight."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterable, Iterable
from dataclasses import dataclass

from conveyor.v1 import session_pb2
from conveyor_client._attachment import Attachment
from conveyor_client._chunk import Chunk
from conveyor_client._nouns import OUTPUT_MODES, FloatArray, Output, Rows, TraceValue
from conveyor_client._rows import RowCodec
from conveyor_client._trace import Trace, trace_from_pieces

Inputs = AsyncIterable[Rows] | Iterable[Rows]


@dataclass(frozen=True, slots=True)
class Sent:
    """What was submitted together: the parts of one chunk, and whether one row is wanted of it."""

    chunks: list[Chunk]
    single: bool
    codec: RowCodec

    @property
    def output(self) -> FloatArray:
        """The output rows, once it is answered."""
        pieces = [piece for chunk in self.chunks for piece in chunk.pieces]
        rows = pieces[0] if len(pieces) == 1 else b"".join(pieces)
        return self.codec.decode(rows, self.single)

    @property
    def trace(self) -> Trace:
        """The trace, once it is answered, if one was asked for."""
        pieces = [piece for chunk in self.chunks for piece in chunk.traces]
        return trace_from_pieces(self.chunks[0].first_step, pieces)


class Sender:
    """The way of a session's inputs to its attachment and of the answers back.

    Args:
        attachment: Takes chunks.
        seconds: How long to wait for an answer, where a call does not say.
    """

    def __init__(self, attachment: Attachment, seconds: float) -> None:
        self._attachment = attachment
        self._seconds = seconds

    def send(
        self,
        inputs: Rows,
        mode: Output,
        timeout_seconds: float | None,
        *,
        trace: TraceValue = session_pb2.TRACE_MODE_UNSPECIFIED,
    ) -> Sent:
        """Submits a step or a chunk, a long one in parts.

        Raises:
            InvalidInput: The rows are not what the model takes.
            ConveyorError: The session is not open.
        """
        opened = self._attachment.require()
        rows, length, single = opened.codec.encode(inputs)
        submit, part_steps = self._attachment.submit, opened.part_steps_max
        if length <= part_steps:
            output = OUTPUT_MODES[mode]
            chunk = submit(rows, length, output, trace=trace, timeout_seconds=timeout_seconds)
            return Sent([chunk], single or mode == "last", opened.codec)
        chunks: list[Chunk] = []
        row_bytes = opened.model.input.row_bytes
        for start in range(0, length, part_steps):
            end = min(start + part_steps, length)
            output = OUTPUT_MODES["none" if mode == "last" and end < length else mode]
            part = rows[start * row_bytes : end * row_bytes]
            chunks.append(
                submit(
                    part,
                    end - start,
                    output,
                    trace=trace,
                    timeout_seconds=timeout_seconds,
                    follows=chunks[-1] if chunks else None,
                )
            )
        return Sent(chunks, mode == "last", opened.codec)

    async def wait_for(self, sent: Sent, timeout_seconds: float | None) -> Sent:
        """Waits until all of it is answered.

        The time of a call is for all of it. Without one, each part has the client's time: a chunk
        may be of any length.

        Raises:
            ConveyorError: Why it was not.
        """
        seconds = self._seconds if timeout_seconds is None else timeout_seconds
        loop = asyncio.get_running_loop()
        begun_seconds = loop.time()
        try:
            for chunk in sent.chunks:
                if timeout_seconds is None:
                    begun_seconds = loop.time()
                await self._attachment.wait_for(chunk, seconds, begun_seconds)
        finally:
            self._attachment.give_up(sent.chunks)  # of no effect on what is answered
        return sent

    async def in_order(
        self,
        inputs: Inputs,
        in_flight: int,
        mode: Output,
        timeout_seconds: float | None,
        *,
        trace: TraceValue = session_pb2.TRACE_MODE_UNSPECIFIED,
    ) -> AsyncGenerator[Sent]:
        """Submits inputs, several ahead, and yields what was answered, in order.

        Raises:
            ConveyorError: As `send` and `wait_for`; inputs after the failed one are not run.
        """
        items: Inputs = self._attachment.require().codec.items(inputs)
        room = asyncio.Semaphore(max(1, in_flight))
        queue: asyncio.Queue[Sent | None] = asyncio.Queue()

        async def feed() -> None:
            try:
                async for item in _each(items):
                    await room.acquire()
                    queue.put_nowait(self.send(item, mode, timeout_seconds, trace=trace))
            finally:
                queue.put_nowait(None)

        feeder = asyncio.create_task(feed())
        try:
            while (head := await queue.get()) is not None:
                await self.wait_for(head, timeout_seconds)
                room.release()
                yield head
            await feeder  # raises what reading or packing the inputs raised
        finally:
            feeder.cancel()
            await asyncio.gather(feeder, return_exceptions=True)
            while not queue.empty():
                if (left := queue.get_nowait()) is not None:
                    self._attachment.give_up(left.chunks)


async def _each(items: Inputs) -> AsyncGenerator[Rows]:
    if isinstance(items, AsyncIterable):
        async for item in items:
            yield item
        return
    for item in items:
        yield item

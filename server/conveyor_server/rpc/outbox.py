"""What waits to be sent on one stream.

Pieces that come between two writes, which means those of one tick and, with a slow client, of
several, leave in one results frame.
"""

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Final

from google.protobuf.message import Message

from conveyor.v1 import session_pb2
from conveyor_server.core import Piece
from conveyor_server.errors import SlowReader
from conveyor_server.metrics import Metrics
from conveyor_server.rpc.results import Account
from conveyor_server.rpc.service import Context
from conveyor_server.rpc.traces import trace_message

FRAME_BYTES_TARGET: Final = 2**20
"""A results frame is closed when its pieces reach this.

Only a single larger piece makes a larger one.
"""
_CONTROL_BYTES: Final = 256
"""What a frame without rows is counted as."""
_ENTRY_BYTES: Final = 64
"""What a piece is counted as beside its rows and its trace."""
_WRITE_COPIES: Final = 3
"""How often a frame is in memory while it is written: the message, its bytes, the transport's."""
METHOD: Final = ("stream_stream", "conveyor.v1.SessionService", "StreamSteps")
"""How calls of StreamSteps and their messages are counted."""

MakeFrame = Callable[[], session_pb2.StreamStepsResponse]
"""A frame that is made when it is written: the scheduler puts nouns here and converts nothing."""


async def first_of(outbox: "Outbox", seconds_max: float, *tasks: "asyncio.Task[None]") -> None:
    """Returns when one of a stream's tasks ended.

    Raises:
        SlowReader: One and the same write took all of `seconds_max`.
    """
    waits = 0
    while True:
        written, blocked = outbox.frames_written, outbox.blocked
        # In two waits: one of them may be over at once, if the server itself was stopped.
        done, _ = await asyncio.wait(
            tasks, timeout=seconds_max / 2, return_when=asyncio.FIRST_COMPLETED
        )
        if done:
            return
        stuck = blocked and outbox.blocked and outbox.frames_written == written
        waits = waits + 1 if stuck else 0
        if waits == 2:
            raise SlowReader(
                f"the client read no results for {seconds_max:g} s",
                limit="limits.slow_reader_seconds_max",
                maximum=seconds_max,
            )


class Outbox:
    """Frames and pieces in the order they came, filled by the scheduler.

    The stream's writer empties it, or its reader does where what it read was answered at once: a
    detour through another task costs a lone client a tenth of its latency.

    Attributes:
        held: Whether the reader is about to look and the writer need not be woken.
        frames_written: Grows with every write.
        account: What is owed to the client: what waits here and whatever its filler adds.
    """

    def __init__(
        self,
        metrics: Metrics,
        frame_bytes_max: int,
        account: Account,
        method: tuple[str, str, str] = METHOD,
    ) -> None:
        """`frame_bytes_max`: the largest message the other side is known to take."""
        self._metrics = metrics
        self._frame_bytes_written = 0
        self._in_flight_bytes = 0
        self._writer: asyncio.Task[None] | None = None
        self._closed = False
        self._method = method
        self._frame_bytes = min(FRAME_BYTES_TARGET, frame_bytes_max)
        self._items: deque[tuple[int, Piece | MakeFrame]] = deque()
        self._wake: asyncio.Future[None] | None = None
        self._changed = asyncio.Event()
        self._finished = False
        self._writing = False
        self.held = False
        self.frames_written = 0
        self.account = account

    def __len__(self) -> int:
        return len(self._items)

    @property
    def blocked(self) -> bool:
        """Whether a write is under way."""
        return self._writing

    @property
    def owed_bytes(self) -> int:
        """What is owed but for the frame that is being written."""
        return self.account.size_bytes - self._in_flight_bytes

    def put_piece(self, handle: int, piece: Piece) -> None:
        """Adds a result."""
        self._items.append((handle, piece))
        self.account.add(piece.size_bytes + _ENTRY_BYTES)
        self._wake_writer()

    def put(self, make_frame: MakeFrame) -> None:
        """Adds any other frame."""
        self._items.append((0, make_frame))
        self.account.add(_CONTROL_BYTES)
        self._wake_writer()

    def notify(self) -> None:
        """Something that `until` may be waiting for changed."""
        self._changed.set()

    async def until(self, condition: Callable[[], bool]) -> None:
        """Returns once the condition holds.

        It is looked at after every write and every `notify`.
        """
        while not condition():
            self._changed.clear()
            await self._changed.wait()

    async def close(self, *tasks: "asyncio.Task[None]") -> None:
        """The stream is over: its tasks end, nothing is kept, and nothing more is owed.

        A task that is writing goes on until the client takes the frame or its connection ends: if
        it were cancelled, gRPC would keep the frame for ever. Until then the frame counts.
        """
        self._closed = True
        ending = [task for task in tasks if task is not self._writer]
        for task in ending:
            task.cancel()
        await asyncio.gather(*ending, return_exceptions=True)
        self._items.clear()
        self.account.close(self._in_flight_bytes)

    def finish(self) -> None:
        """Lets the writer write what is there, then end."""
        self._finished = True
        self._wake_writer()

    async def write_to(self, context: Context) -> None:
        """Writes what comes until `finish`."""
        loop = asyncio.get_running_loop()
        while True:
            await self.flush(context)
            if self._finished and not self._writing:
                return
            self._wake = loop.create_future()
            await self._wake

    async def flush(self, context: Context, *, frames_max: int | None = None) -> None:
        """Writes what is there, unless that is being done already.

        Beyond `frames_max` the stream's writer goes on: while ticks follow one another there is
        always more to write, and the reader has to get back to reading.
        """
        if self._writing:
            return
        self._writing = True
        begun = self.frames_written
        try:
            while self and (frames_max is None or self.frames_written - begun < frames_max):
                await self._write(context, self._next_frame())
                self._metrics.grpc_sent.add(1, *self._method)
                self.frames_written += 1
                self._changed.set()
        finally:
            self._writing = False
        if self:
            self._wake_writer()

    async def _write(self, context: Context, frame: Message) -> None:
        frame_bytes, self._frame_bytes_written = self._frame_bytes_written, 0
        self._in_flight_bytes = _WRITE_COPIES * frame_bytes
        self.account.add(self._in_flight_bytes - frame_bytes)
        self._writer = asyncio.current_task()
        try:
            await context.write(frame)
        except Exception:
            if self._closed:  # nobody waits for it any more
                raise asyncio.CancelledError from None
            raise
        finally:
            self.account.add(-self._in_flight_bytes)
            self._in_flight_bytes, self._writer = 0, None
        if self._closed:
            raise asyncio.CancelledError

    def _wake_writer(self) -> None:
        if self.held or self._writing or self._wake is None or self._wake.done():
            return
        self._wake.set_result(None)

    def _next_frame(self) -> Message:
        items = self._items
        make_frame = items[0][1]
        if not isinstance(make_frame, Piece):
            self._frame_bytes_written = _CONTROL_BYTES
            items.popleft()
            return make_frame()
        response = session_pb2.StreamStepsResponse()
        results = response.results
        rows: list[bytes] = []
        size = 0
        while items:
            handle, piece = items[0]
            if not isinstance(piece, Piece):
                break
            piece_bytes = piece.size_bytes + _ENTRY_BYTES
            if size and size + piece_bytes > self._frame_bytes:
                break
            items.popleft()
            results.entries.add(
                handle=handle,
                first_step=piece.first_step,
                length=piece.length,
                rows_length=piece.rows_length,
                durable_step=piece.durable_step,
                duplicate=piece.duplicate,
                trace=None if piece.trace is None else trace_message([piece.trace]),
            )
            rows.append(piece.rows)
            size += piece_bytes
        results.rows = b"".join(rows)
        self._frame_bytes_written = size
        return response

"""A session's hold on the server: opening, numbering, sending, resuming and letting go.

The public face is `Session`; the stream below is a `Lane`. An attachment is a lane's `Tenant`.
"""

import asyncio
from collections.abc import AsyncGenerator, Iterable
from contextlib import asynccontextmanager

from conveyor.v1 import session_pb2
from conveyor_client._chunk import Chunk
from conveyor_client._errors import (
    NOT_OPENED,
    ConveyorError,
    DeadlineExceeded,
    NotOpen,
    OwnershipLost,
    ServerDraining,
    SessionMoved,
    SessionNotFound,
    TransportError,
    Unavailable,
)
from conveyor_client._lane import Lane, is_stream_full
from conveyor_client._ledger import Ledger
from conveyor_client._nouns import ModelInfo, OutputValue, SessionInfo, TraceValue
from conveyor_client._opened import Opened, describe
from conveyor_client._opening import Hub, again, check_size, requested_model


class Attachment:
    """One session on one lane at a time."""

    def __init__(
        self, hub: Hub, request: session_pb2.OpenSessionRequest, *, own_stream: bool
    ) -> None:
        self.row_bytes = self.output_row_bytes = 0
        self.heartbeat_seconds = hub.options.heartbeat_seconds
        self.request = request
        self.answer: session_pb2.OpenSessionResponse | None = None
        self.opened: Opened | None = None
        self.error: ConveyorError | None = None
        self._hub = hub
        self._own_stream = own_stream
        self._lane: Lane | None = None
        self._handle = 0  # 0 while there is no connection that knows it
        self._ledger: Ledger | None = None
        self._opening: asyncio.Future[None] | None = None
        self._closing: asyncio.Future[None] | None = None
        self._idle_waiters: list[asyncio.Future[None]] = []
        self._exclusive = asyncio.Lock()
        self._suspended = False
        self._resume_due = False
        self._lost_at = 0.0
        self._reopen_attempt = 0

    # --- opening ---------------------------------------------------------------------------------

    async def open(self) -> None:
        """Finds a stream with room and opens the session on it.

        Raises:
            ConveyorError: What the server refused.
        """
        self._hub.home.enter()
        try:
            requested = await requested_model(self._hub, self.request)
            check_size(self.request, requested)
            answer = await self._open_on_some_lane(requested)
            described = answer.session
            model = await self._hub.cached_model(
                described.model, described.version, digest=described.model_digest
            )
        except BaseException:
            self._give_up_opening()
            raise
        self._start(model)

    async def _open_on_some_lane(self, model: ModelInfo | None) -> session_pb2.OpenSessionResponse:
        own_key = self.request.session_id if self._own_stream else ""
        options = self._hub.options
        attempt = 1
        for _ in range(options.streams_max + options.call_attempts_max):
            lane = self._lane = self._hub.lane_for(model, own_key=own_key)
            self._opening = self._loop.create_future()
            lane.join(self)
            try:
                await self._opening
            except ConveyorError as error:
                lane.leave(self)
                if is_stream_full(error):
                    lane.mark_full()
                elif isinstance(error, Unavailable) and attempt < options.call_attempts_max:
                    wait_seconds = options.reconnect.wait_seconds(attempt)
                    attempt += 1
                    await asyncio.sleep(wait_seconds + (error.retry_after_seconds or 0.0))
                else:
                    raise
            else:
                assert self.answer is not None, "an open session has an answer"
                return self.answer
        raise NotOpen(
            "the server had no room for the session on any stream of this client"
            f" (Options.streams_max is {options.streams_max})"
        )

    def _give_up_opening(self) -> None:
        if self._handle and self._lane is not None:
            resumed = self.answer is not None and self.answer.resumed
            self._lane.send_close(self._handle, detach=resumed)
        self._leave()
        self.answer = None

    def _start(self, model: ModelInfo) -> None:
        assert self.answer is not None, "an open session has an answer"
        self.opened = describe(self._hub.options, model, self.answer)
        self._ledger = self.opened.ledger
        self.row_bytes, self.output_row_bytes = model.input.row_bytes, model.output.row_bytes
        if self._lane is not None:
            self._lane.lower_frame_bytes(self.opened.frame_bytes_max)
        self._note(self.answer)

    def _note(self, answer: session_pb2.OpenSessionResponse) -> None:
        if self._ledger is not None:
            self._ledger.keeps_until_durable = answer.session.durability in (
                session_pb2.DURABILITY_ASYNC,
                session_pb2.DURABILITY_SYNC,
            )
        idle_seconds = answer.session.idle_ttl.ToTimedelta().total_seconds()
        if idle_seconds > 0:
            self.heartbeat_seconds = min(self._hub.options.heartbeat_seconds, idle_seconds / 3.0)

    def require(self) -> Opened:
        """What is known of the open session.

        Raises:
            ConveyorError: Why it is not open, or not any more.
        """
        if self.error is not None:
            raise self.error.copy()
        if self.opened is None:
            raise NotOpen(NOT_OPENED)
        return self.opened

    @property
    def _loop(self) -> asyncio.AbstractEventLoop:
        """The client's event loop, in which all of this runs."""
        return asyncio.get_running_loop()

    # --- stepping --------------------------------------------------------------------------------

    def submit(
        self,
        rows: bytes,
        length: int,
        output: OutputValue,
        *,
        trace: TraceValue = session_pb2.TRACE_MODE_UNSPECIFIED,
        timeout_seconds: float | None = None,
        follows: Chunk | None = None,
    ) -> Chunk:
        """Queues a chunk, and sends it if there is room in the window.

        A part of a longer input names the part that it `follows`, and only runs if that one does.

        Returns:
            The chunk; its future is the answer.

        Raises:
            ConveyorError: The session is not open, or not any more.
        """
        self._hub.home.enter()
        future: asyncio.Future[Chunk] = self._loop.create_future()
        chunk = Chunk(rows, length, output, trace, future, timeout_seconds, follows=follows)
        self.require().ledger.pending.append(chunk)
        self._pump()
        return chunk

    async def wait_for(self, chunk: Chunk, seconds: float, begun_seconds: float) -> None:
        """Waits until a chunk is answered, at most `seconds` from the loop's time `begun_seconds`.

        Raises:
            DeadlineExceeded: It was not in time.
            ConveyorError: Why it failed.
        """
        timer = self._loop.call_at(begun_seconds + seconds, _expire, chunk, seconds)
        try:
            await chunk.future
        finally:
            timer.cancel()

    def give_up(self, chunks: Iterable[Chunk]) -> None:
        """Stops waiting for chunks; what has a number may run all the same."""
        ledger = self._ledger
        assert ledger is not None, "only an open session has chunks"
        for chunk in chunks:
            ledger.give_up(chunk)

    def _pump(self) -> None:
        lane, ledger, handle = self._lane, self._ledger, self._handle
        if not handle or lane is None or ledger is None:
            return
        while ledger.waiting and (chunk := ledger.take()) is not None:
            lane.send(handle, chunk, self)

    def _progress(self) -> None:
        """Sends what there is room for now, and wakes who waits for quiet."""
        ledger = self._ledger
        assert ledger is not None, "only an open session progresses"
        self._pump()
        if self._idle_waiters and ledger.idle:
            for waiter in self._idle_waiters:
                if not waiter.done():
                    waiter.set_result(None)
            self._idle_waiters.clear()

    # --- doing things alone ----------------------------------------------------------------------

    @asynccontextmanager
    async def exclusively(self, seconds: float) -> AsyncGenerator[Ledger]:
        """Holds new steps back and waits until none is in flight.

        Args:
            seconds: How long to wait for that.

        Yields:
            The ledger, idle.

        Raises:
            DeadlineExceeded: Steps were still in flight.
            ConveyorError: The session is not open, or not any more.
        """
        self._hub.home.enter()
        ledger = self.require().ledger
        async with self._exclusive:
            ledger.paused = True
            try:
                await self._until_idle(ledger, seconds)
                self._suspended = True  # the numbers are about to change
                yield ledger
            finally:
                ledger.paused = self._suspended = False
                if self._resume_due:
                    self._resume()
                self._pump()

    async def _until_idle(self, ledger: Ledger, seconds: float) -> None:
        try:
            async with asyncio.timeout(seconds):
                while not ledger.idle:
                    waiter: asyncio.Future[None] = self._loop.create_future()
                    self._idle_waiters.append(waiter)
                    await waiter
        except TimeoutError as error:
            raise DeadlineExceeded(f"not every step was answered within {seconds:g} s") from error
        self.require()

    def rebase(self, info: SessionInfo) -> None:
        """Takes the numbers from the server, inside `exclusively`."""
        self.rebase_at(info.applied_step, info.durable_step)

    def rebase_at(self, applied_step: int, durable_step: int) -> None:
        """Takes the numbers given, inside `exclusively`."""
        if self._ledger is not None and self.error is None:
            self._ledger.rebase(applied_step, durable_step)
        self._resume_due = False

    # --- letting go ------------------------------------------------------------------------------

    async def give_handle_back(self, *, detach: bool, seconds: float) -> bool:
        """Closes the handle on the stream, if there is one.

        Returns:
            Whether the server confirmed it.

        Raises:
            DeadlineExceeded: The server did not answer.
            ConveyorError: The server refused.
        """
        self._hub.home.enter()
        if not self._handle or self._lane is None:
            return False
        if self._ledger is not None:
            self._ledger.drop_pending(NotOpen("the session was closed before this step was sent"))
        self._closing = self._loop.create_future()
        handle, self._handle = self._handle, 0
        self._lane.send_close(handle, detach)
        try:
            async with asyncio.timeout(seconds):
                await self._closing
        except TimeoutError as error:
            raise DeadlineExceeded(
                "the server did not confirm in time that the session ended; it ends by its idle"
                " time"
            ) from error
        except TransportError:
            return False
        return True

    def end(self, error: ConveyorError) -> None:
        """Ends the session for this client: what waits, and every later call, raises this."""
        if self.error is not None:
            return
        self.error = error
        self._leave()
        if self._ledger is not None:
            self._ledger.abandon(error)
        for future in (self._opening, self._closing, *self._idle_waiters):
            if future is not None and not future.done():
                future.set_exception(error.copy())
                future.exception()  # seen; nobody may be waiting
        self._idle_waiters.clear()

    def _leave(self) -> None:
        if self._lane is not None:
            self._lane.leave(self)
        self._handle = 0

    # --- what the lane asks ----------------------------------------------------------------------

    @property
    def established(self) -> bool:
        """Whether it was open before, so that it is to be resumed after a break."""
        return self.answer is not None

    @property
    def settled(self) -> bool:
        """Whether the present connection owes it nothing more."""
        return self._ledger is None or self._ledger.settled

    def open_request(self) -> session_pb2.OpenSessionRequest:
        """What opens it, for the first time or again."""
        if self.answer is None:
            return self.request
        return again(self.request, self.answer)

    # --- what the lane tells ---------------------------------------------------------------------

    def on_opened(self, handle: int, response: session_pb2.OpenSessionResponse) -> None:
        """It is open under this handle."""
        self.answer = response
        self._handle = handle
        self._note(response)
        if self._opening is not None and not self._opening.done():
            self._opening.set_result(None)
        if self._ledger is not None:
            self._resume_due = True
            if not self._suspended:
                self._resume()

    def _resume(self) -> None:
        ledger, answer, lane, handle = self._ledger, self.answer, self._lane, self._handle
        self._resume_due = False
        if ledger is None or answer is None or self.error is not None:
            return
        try:
            ledger.resume(answer.session.applied_step, answer.session.durable_step)
        except ConveyorError as error:
            if lane is not None and handle:
                lane.send_close(handle, detach=True)
            self.end(error)
            return
        self._progress()

    def on_results(self, entry: session_pb2.ResultsEntry, rows: bytes) -> bool:
        """A piece of results; False if it fits nothing that was sent."""
        ledger = self._ledger
        if self.error is not None:
            return True  # given up here, still answered there
        if ledger is None or not ledger.answer(entry, rows):
            return False
        self._reopen_attempt = 0
        self._progress()
        return True

    def on_durable(self, step: int) -> None:
        """A checkpoint was written."""
        if self._ledger is not None and self.error is None:
            self._ledger.durable(step)
            self._progress()

    def on_failure(self, first_step: int, error: ConveyorError) -> None:
        """A chunk failed, or the session with all it has in flight."""
        ledger = self._ledger
        if isinstance(
            error, ServerDraining | SessionMoved
        ):  # not run; the next connection takes it
            self.on_pause()
            if ledger is not None:
                ledger.give_back(first_step)
            if isinstance(error, SessionMoved):
                self._reopen_later(error)
        elif isinstance(error, OwnershipLost | SessionNotFound) or ledger is None:
            self.end(error)
        elif ledger.refuse(first_step, error):
            self._progress()
        elif self._closing is not None and not self._closing.done():
            self._closing.set_exception(error)

    def on_closed(self, error: ConveyorError | None, applied_step: int) -> None:
        """The handle is gone: as asked, or for this reason."""
        self._handle = 0
        if isinstance(error, SessionMoved | ServerDraining):
            self._reopen_later(error)
        elif error is not None:
            self.end(error)
        elif self._closing is not None and not self._closing.done():
            if self._ledger is not None:
                self._ledger.answered_step = max(self._ledger.answered_step, applied_step)
            self._closing.set_result(None)

    def on_pause(self) -> None:
        """The connection is breaking off; the lane makes another one."""
        self._handle = 0
        if self._closing is not None and not self._closing.done():
            self._closing.set_exception(TransportError("the connection broke", reason="TRANSPORT"))

    def on_refused(self, error: ConveyorError) -> None:
        """The server did not open it, or not again."""
        if self.established and error.retryable:
            self._reopen_later(error)
        else:
            self.on_lost(error)

    def on_lost(self, error: ConveyorError) -> None:
        """It will not be opened again."""
        if self._opening is not None and not self._opening.done():
            self._leave()
            self._opening.set_exception(error)
        else:
            self.end(error)

    def _reopen_later(self, error: ConveyorError) -> None:
        """Asks the lane to open it again, within the bounds of reconnecting."""
        reconnect = self._hub.options.reconnect
        now = self._loop.time()
        if self._reopen_attempt == 0:
            self._lost_at = now
        self._reopen_attempt += 1
        wait_seconds = reconnect.wait_seconds(self._reopen_attempt)
        wait_seconds += error.retry_after_seconds or 0.0
        too_late = now + wait_seconds - self._lost_at > reconnect.seconds_max
        if self._reopen_attempt > reconnect.attempts_max or too_late:
            self.end(error)
        else:
            self._loop.call_later(wait_seconds, self._reopen)

    def _reopen(self) -> None:
        if self.error is None and not self._handle and self._lane is not None:
            self._lane.reopen(self)


def _expire(chunk: Chunk, seconds: float) -> None:
    chunk.fail(DeadlineExceeded(f"no answer to a step within {seconds:g} s"))

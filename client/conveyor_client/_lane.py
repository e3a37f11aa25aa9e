"""One StreamSteps stream that carries many sessions and outlives its connections.

A lane has one reader and one writer task for each connection it makes, and a runner that makes
them. Everything submitted in one turn of the event loop leaves in one frame; results find their
session by its handle. When the connection breaks or drains the lane makes a new one and every
session opens itself again; what to send again is the session's business (`_ledger`).
"""

import asyncio
from collections import deque
from collections.abc import Callable

import grpc
import grpc.aio

from conveyor.v1 import session_pb2
from conveyor_client._chunk import Chunk
from conveyor_client._errors import (
    ConveyorError,
    LimitExceeded,
    NotOpen,
    ServerDraining,
    TransportError,
)
from conveyor_client._policy import Options
from conveyor_client._requests import duration
from conveyor_client._status import error_from_call, error_from_status
from conveyor_client._tenant import Tenant

Request = session_pb2.StreamStepsRequest
Response = session_pb2.StreamStepsResponse
StepsCall = grpc.aio.StreamStreamCall[Request, Response]
Dial = Callable[[str], StepsCall]
"""Starts the call, given the routing key."""

_FRAME_ENTRIES_MAX = 4096  # a quarter of what a server takes by default
_FRAME_OVERHEAD_BYTES = 24  # an entry's own fields, at their longest in practice


class Lane:
    """A stream and its sessions."""

    def __init__(
        self,
        dial: Dial,
        key: str,
        options: Options,
        sessions_max: int,
        target: str = "the server",
    ) -> None:
        """`target` is where `dial` goes, for messages."""
        self._target = target
        self.key = key
        self.sessions_max = sessions_max
        self.frame_bytes_max = options.frame_bytes_max
        self._dial = dial
        self._options = options
        self._loop = asyncio.get_running_loop()
        self._tenants: set[Tenant] = set()
        self._by_handle: dict[int, Tenant] = {}
        self._handle_of: dict[Tenant, int] = {}
        self._opening: dict[int, Tenant] = {}
        self._outgoing: deque[Request | tuple[int, Chunk, Tenant]] = deque()
        self._wake = asyncio.Event()
        self._next_tag = 1
        self._heard = 0.0
        self._asked = 0.0  # since when an answer is owed; 0 if none is
        self._progressed = False
        self._connected = False
        self._drain_seconds: float | None = None
        self._drain_timer: asyncio.TimerHandle | None = None
        self._drained = False
        self._attention = asyncio.Event()
        self._beat_seconds = options.heartbeat_seconds
        self._closing = False
        self._runner: asyncio.Task[None] | None = self._loop.create_task(self._run())

    # --- for sessions ----------------------------------------------------------------------------

    @property
    def closed(self) -> bool:
        """Whether it takes no session any more."""
        return self._closing or self._runner is None or self._runner.done()

    @property
    def has_room(self) -> bool:
        """Whether it takes one session more."""
        return not self.closed and len(self._tenants) < self.sessions_max

    def mark_full(self) -> None:
        """Takes the server's word that this stream carries no more."""
        self.sessions_max = max(1, len(self._tenants))

    def lower_frame_bytes(self, frame_bytes_max: int) -> None:
        """Keeps frames within what the server of one more session takes."""
        self.frame_bytes_max = min(self.frame_bytes_max, frame_bytes_max)

    def join(self, tenant: Tenant) -> None:
        """Puts a session on this lane and opens it.

        Args:
            tenant: It will hear `on_opened` or `on_lost`.
        """
        self._tenants.add(tenant)
        if self._connected and self._drain_seconds is None:
            self._open(tenant)

    def leave(self, tenant: Tenant) -> None:
        """Takes a session off this lane, whatever its state."""
        self._tenants.discard(tenant)
        self._handle_of.pop(tenant, None)

    def reopen(self, tenant: Tenant) -> None:
        """Opens a session again on the connection that stands, if one does."""
        if tenant in self._tenants and self._connected and self._drain_seconds is None:
            self._open(tenant)

    def send(self, handle: int, chunk: Chunk, tenant: Tenant) -> None:
        """Sends a chunk, from its step `expected` on, with the next frame."""
        self._outgoing.append((handle, chunk, tenant))
        self._wake.set()

    def send_close(self, handle: int, detach: bool) -> None:
        """Gives a handle back."""
        close = session_pb2.CloseFrame(handle=handle, detach=detach)
        self._post(Request(close=close))

    async def aclose(self) -> None:
        """Ends the stream; sessions that are still on it are told."""
        self._closing = True
        self._wake.set()
        # Not kept: a cancelled task keeps its frames, these the call, and that gRPC's threads.
        runner, self._runner = self._runner, None
        if runner is not None:
            runner.cancel()
            await asyncio.wait({runner})
        self._lose_all(NotOpen("the client was closed while the session was open"))

    # --- connections -----------------------------------------------------------------------------

    async def _run(self) -> None:
        reconnect = self._options.reconnect
        attempt, broken_at = 0, 0.0
        while True:
            error = await self._connect_and_serve()
            drain_seconds, self._drain_seconds = self._drain_seconds, None
            self._pause_all()
            now = self._loop.time()
            if attempt == 0 or self._progressed:
                attempt, broken_at = 0, now
            attempt += 1
            wait_seconds = reconnect.wait_seconds(attempt)
            wait_seconds += max(drain_seconds or 0.0, error.retry_after_seconds or 0.0)
            out_of_time = now + wait_seconds - broken_at > reconnect.seconds_max
            if not error.retryable or attempt > reconnect.attempts_max or out_of_time:
                self._lose_all(error)
                return
            self._drop_fresh(error)
            if not self._tenants:
                return
            await asyncio.sleep(wait_seconds)

    async def _connect_and_serve(self) -> ConveyorError:
        """Makes a connection and serves it to its end.

        Returns:
            Why it ended.
        """
        self._progressed = False
        self._drained = False
        self._heard, self._asked = self._loop.time(), 0.0
        call = self._dial(self.key)
        self._connected = True
        for tenant in self._tenants:
            self._open(tenant)
        reader = self._loop.create_task(self._read(call))
        writer = self._loop.create_task(self._write(call))
        try:
            return await self._watch(reader, writer)
        finally:
            self._connected = False
            if self._drain_timer is not None:
                self._drain_timer.cancel()
            reader.cancel()
            writer.cancel()
            call.cancel()
            await asyncio.gather(reader, writer, return_exceptions=True)
            self._by_handle.clear()
            self._handle_of.clear()
            self._opening.clear()
            self._outgoing.clear()

    async def _watch(
        self, reader: "asyncio.Task[ConveyorError]", writer: "asyncio.Task[ConveyorError]"
    ) -> ConveyorError:
        """Waits for the end of a connection, with heartbeats and an eye on a silent server."""
        while True:
            self._beat_seconds = min(
                (tenant.heartbeat_seconds for tenant in self._tenants),
                default=self._options.heartbeat_seconds,
            )
            attention = self._loop.create_task(self._attention.wait())
            try:
                done, _ = await asyncio.wait(
                    {reader, writer, attention},
                    timeout=self._beat_seconds,
                    return_when=asyncio.FIRST_COMPLETED,
                )
            finally:
                attention.cancel()
                self._attention.clear()
            if reader in done:  # it knows the status; the writer only that writing failed
                return reader.result()
            if writer in done:
                await asyncio.wait({reader}, timeout=1.0)
                return reader.result() if reader.done() else writer.result()
            if self._drained:
                return ServerDraining("the server is shutting down", reason="SERVER_DRAINING")
            if attention in done:
                continue
            silent_seconds = self._loop.time() - max(self._heard, self._asked)
            if self._asked and silent_seconds > self._options.silence_seconds_max:
                return TransportError(
                    f"no answer from {self._target} for {silent_seconds:.0f} s", reason="TRANSPORT"
                )
            self._post(Request(heartbeat=session_pb2.HeartbeatFrame(nonce=1)))

    def _open(self, tenant: Tenant) -> None:
        tag, self._next_tag = self._next_tag, self._next_tag + 1
        self._opening[tag] = tenant
        self._handle_of.pop(tenant, None)  # what is still said of an old handle is old news
        frame = session_pb2.OpenFrame(tag=tag, session=tenant.open_request())
        self._post(Request(open=frame))

    def _post(self, frame: Request) -> None:
        self._outgoing.append(frame)
        self._wake.set()

    # --- the writer ------------------------------------------------------------------------------

    async def _write(self, call: StepsCall) -> ConveyorError:
        outgoing = self._outgoing
        try:
            while True:
                while not outgoing:
                    self._wake.clear()
                    await self._wake.wait()
                head = outgoing[0]
                frame = self._pack() if isinstance(head, tuple) else head
                if frame is head:
                    outgoing.popleft()
                if not self._asked:
                    self._asked = self._loop.time()
                await call.write(frame)
        except grpc.aio.AioRpcError as error:
            return error_from_call(error, self._target)
        except asyncio.InvalidStateError:  # the call is done already
            message = f"the connection to {self._target} broke"
            return TransportError(message, reason="TRANSPORT")

    def _pack(self) -> Request:
        """Packs the chunks at the head of the queue into one frame, as many as fit."""
        outgoing = self._outgoing
        entries: list[session_pb2.StepsEntry] = []
        rows: list[bytes] = []
        size_bytes = 0
        timeout_seconds: float | None = None
        while outgoing:
            head = outgoing[0]
            if not isinstance(head, tuple):
                break
            handle, chunk, tenant = head
            payload = chunk.rows
            if chunk.expected != chunk.first_step:  # the rest of a chunk answered in part
                payload = payload[(chunk.expected - chunk.first_step) * tenant.row_bytes :]
            size_bytes += len(payload) + _FRAME_OVERHEAD_BYTES
            if entries and (
                size_bytes > self.frame_bytes_max
                or len(entries) >= _FRAME_ENTRIES_MAX
                or chunk.timeout_seconds != timeout_seconds
            ):
                break
            timeout_seconds = chunk.timeout_seconds
            outgoing.popleft()
            rows.append(payload)
            entries.append(
                session_pb2.StepsEntry(
                    handle=handle,
                    first_step=chunk.expected,
                    length=chunk.missing,
                    output=chunk.output,
                    trace=chunk.trace,
                )
            )
        frame = session_pb2.StepsFrame(entries=entries, rows=b"".join(rows))
        if timeout_seconds is not None:
            frame.timeout.CopyFrom(duration(timeout_seconds))
        return Request(steps=frame)

    # --- the reader ------------------------------------------------------------------------------

    async def _read(self, call: StepsCall) -> ConveyorError:
        now = self._loop.time
        try:
            while True:
                frame = await call.read()
                if not isinstance(frame, Response):  # grpc.aio.EOF: it ended with status OK
                    return TransportError("the server ended the stream", reason="TRANSPORT")
                self._heard, self._asked = now(), 0.0
                error = self._dispatch(frame)
                if error is not None:
                    return error
                if self._drain_seconds is not None and self._all_settled():
                    self._end_draining()
        except grpc.aio.AioRpcError as error:
            return error_from_call(error, self._target)

    def _dispatch(self, frame: Response) -> ConveyorError | None:
        """Hands a frame to whom it concerns.

        Returns:
            An error if the connection is of no use any more.
        """
        kind = frame.WhichOneof("frame")
        if kind == "results":
            return self._on_results(frame.results)
        if kind == "durable":
            for entry in frame.durable.entries:
                tenant = self._by_handle.get(entry.handle)
                if tenant is not None:
                    tenant.on_durable(entry.durable_step)
        elif kind == "opened":
            self._on_opened(frame.opened)
        elif kind == "failure":
            return self._on_failure(frame.failure)
        elif kind == "closed":
            self._on_closed(frame.closed)
        elif kind == "drain":
            self._start_draining(frame.drain.reconnect_after.ToTimedelta().total_seconds())
        elif kind == "heartbeat":
            self._progressed = True
        return None

    def _on_results(self, frame: session_pb2.ResultsFrame) -> ConveyorError | None:
        rows = frame.rows
        offset = 0
        by_handle = self._by_handle
        for entry in frame.entries:
            tenant = by_handle.get(entry.handle)
            if tenant is None:
                return _broken_contract(f"results for the unknown handle {entry.handle}")
            end = offset + entry.rows_length * tenant.output_row_bytes
            if not tenant.on_results(entry, rows[offset:end]):
                return _broken_contract(f"results of step {entry.first_step} were not awaited")
            offset = end
        if offset != len(rows):
            return _broken_contract("a results frame holds other rows than its entries say")
        self._progressed = True
        return None

    def _on_opened(self, frame: session_pb2.OpenedFrame) -> None:
        tenant = self._opening.pop(frame.tag, None)
        if tenant is None or tenant not in self._tenants:  # given up meanwhile
            detach = frame.session.resumed
            self.send_close(frame.handle, detach)
            if tenant is not None:
                self._by_handle[frame.handle] = tenant
            return
        self._by_handle[frame.handle] = tenant
        self._handle_of[tenant] = frame.handle
        tenant.on_opened(frame.handle, frame.session)
        if tenant.heartbeat_seconds < self._beat_seconds:
            self._attention.set()

    def _on_failure(self, frame: session_pb2.FailureFrame) -> ConveyorError | None:
        error = error_from_status(frame.status)
        if frame.tag:
            tenant = self._opening.pop(frame.tag, None)
            if tenant is None or tenant not in self._tenants:
                return None
            if isinstance(error, ServerDraining):
                self._start_draining(error.retry_after_seconds or 0.0)
            else:
                tenant.on_refused(error)
            return None
        tenant = self._by_handle.get(frame.handle)
        if tenant is None:
            # Of no session: a frame of ours as a whole was refused, and its chunks will never be
            # answered.
            return error if not frame.handle else None
        tenant.on_failure(frame.first_step, error)
        if isinstance(error, ServerDraining):
            self._start_draining(error.retry_after_seconds or 0.0)
        return None

    def _on_closed(self, frame: session_pb2.ClosedFrame) -> None:
        tenant = self._by_handle.pop(frame.handle, None)
        if tenant is None or self._handle_of.get(tenant) != frame.handle:
            return
        del self._handle_of[tenant]
        error = error_from_status(frame.status) if frame.status.code else None
        tenant.on_closed(error, frame.applied_step)

    def _start_draining(self, reconnect_after_seconds: float) -> None:
        if self._drain_seconds is not None:
            return
        self._drain_seconds = reconnect_after_seconds
        for tenant in list(self._tenants):
            tenant.on_pause()
        self._drain_timer = self._loop.call_later(
            self._options.drain_seconds_max, self._end_draining
        )

    def _end_draining(self) -> None:
        self._drained = True
        self._attention.set()

    def _all_settled(self) -> bool:
        return all(tenant.settled for tenant in self._tenants)

    # --- ends ------------------------------------------------------------------------------------

    def _pause_all(self) -> None:
        for tenant in list(self._tenants):
            tenant.on_pause()

    def _drop_fresh(self, error: ConveyorError) -> None:
        """Fails sessions that were never open, unless the lane is on its way back for others."""
        if any(tenant.established for tenant in self._tenants):
            return
        for tenant in list(self._tenants):
            tenant.on_lost(error.copy())

    def _lose_all(self, error: ConveyorError) -> None:
        for tenant in list(self._tenants):
            tenant.on_lost(error.copy())
        self._tenants.clear()


def _broken_contract(what: str) -> ConveyorError:
    # Retryable like a broken connection: a fresh one starts from agreed numbers.
    return TransportError(f"the server broke the contract: {what}", reason="TRANSPORT")


def is_stream_full(error: ConveyorError) -> bool:
    """Whether another stream would take the session that this one did not."""
    return isinstance(error, LimitExceeded) and error.reason == "STREAM_SESSIONS_LIMIT"

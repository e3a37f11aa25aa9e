"""StreamSteps: the hot path.

One reader and one writer for each stream, and no task for each message.
"""

import asyncio
from collections import OrderedDict, deque
from collections.abc import Iterable
from functools import partial
from typing import Any, Final

from grpc import aio

from conveyor.v1 import session_pb2
from conveyor_server.admission.admission import Binding, Entry, result_bytes
from conveyor_server.core import Chunk, OpenRequest, Piece
from conveyor_server.errors import (
    ConveyorError,
    InvalidField,
    MessageTooLarge,
    StreamSessionsLimit,
    UnknownHandle,
)
from conveyor_server.rpc import frames
from conveyor_server.rpc.convert import open_request, seconds
from conveyor_server.rpc.outbox import METHOD, Outbox, first_of
from conveyor_server.rpc.service import Context, Services
from conveyor_server.rpc.status import status_of
from conveyor_server.rpc.streams import Streams
from conveyor_server.scheduler.operations import Operations

CLOSED_HANDLES_MAX: Final = 4096
"""Closed handles whose row size is remembered.

Frames that were on their way when a handle closed can then still be read.
"""
OPERATIONS_MAX: Final = 1024
"""Opens and closes of one stream that wait to be carried out; beyond it nothing more is read."""


class StepStream:
    """One StreamSteps call. Implements `core.Owner` for the sessions open on it."""

    def __init__(
        self, services: Services, principal: str, context: Context, streams: Streams
    ) -> None:
        """Serves nothing yet; `streams` are those it is one of."""
        self._services = services
        self._streams = streams
        self._limits = services.config.limits
        self._principal = principal
        self._context = context
        account = services.results.account(principal, self._notify)
        self._outbox = Outbox(services.metrics, self._limits.message_bytes_max, account)
        self._account = account
        self._bindings: dict[int, Binding] = {}
        self._handles: dict[tuple[str, int], int] = {}
        self._closed: OrderedDict[int, Binding] = OrderedDict()
        self._admitted: deque[tuple[Entry, Chunk | ConveyorError]] = deque()
        self._opening = 0
        self._opening_bytes = 0
        """Of memories that came with opens which wait to be carried out."""
        self._last_handle = 0
        self._pending = 0
        self._operations = 0
        self._keeping_alive = False
        self._gone = False

    async def serve(self) -> None:
        """Reads frames until the client half-closes or goes.

        Then what was accepted is answered, and sessions are detached.
        """
        seconds_max = self._limits.slow_reader_seconds_max
        writer = asyncio.create_task(self._outbox.write_to(self._context))
        reader = asyncio.create_task(self._read())
        try:
            await first_of(self._outbox, seconds_max, reader, writer)
            if reader.done():
                reader.result()
                self._outbox.finish()
                await first_of(self._outbox, seconds_max, writer)
            writer.result()
        finally:
            self._gone = True
            await self._outbox.close(reader, writer)
            self._admitted.clear()
            self._services.driver.post(self._detach_all)

    def drain(self, reconnect_after_seconds: float) -> None:
        """Tells the client that the server is stopping."""
        self._outbox.put(partial(frames.drain, reconnect_after_seconds))

    # --- core.Owner: called by the scheduler between two engine calls ----------------------------

    def piece(self, chunk: Chunk, piece: Piece) -> None:
        """See `core.Reply`."""
        if not self._gone:
            self._outbox.put_piece(chunk.handle, piece)
            before = _promised_bytes(chunk, chunk.done - piece.length)
            self._account.add(_promised_bytes(chunk, chunk.done) - before)
        if piece.final:
            self._answered()

    def failed(self, chunk: Chunk, first_step: int, error: ConveyorError) -> None:
        """See `core.Reply`."""
        if not self._gone:
            self._fail(error, handle=chunk.handle, first_step=first_step)
            self._account.add(-_promised_bytes(chunk, chunk.done))
        self._answered()

    def lost(self, session_id: str, epoch: int, applied_step: int, error: ConveyorError) -> None:
        """See `core.Owner`."""
        handle = self._handles.get((session_id, epoch))
        if handle is not None:
            self._unbind(handle, applied_step, error)

    # --- frames from the client ------------------------------------------------------------------

    async def _read(self) -> None:
        received, outbox = self._services.metrics.grpc_received, self._outbox
        while True:
            frame = await self._context.read()
            if frame is aio.EOF:
                break
            received.add(1, *METHOD)
            outbox.held = True
            try:
                self._handle_frame(frame)
            except ConveyorError as error:
                self._fail(error)
            while True:
                if len(self._streams) == 1:  # there is nobody to share a batch with
                    self._services.driver.tick_at_once()
                outbox.held = False
                if outbox:
                    await outbox.flush(self._context, frames_max=1)
                if not self._may_go_on():
                    await outbox.until(self._may_go_on)
                if not self._admitted:
                    break
                outbox.held = True
                self._submit_admitted()
        await outbox.until(lambda: self._pending == 0)

    def _handle_frame(self, frame: session_pb2.StreamStepsRequest) -> None:
        match frame.WhichOneof("frame"):
            case "steps":
                self._steps(frame.steps)
            case "open":
                self._open(frame.open)
            case "close":
                self._close(frame.close)
            case "heartbeat":
                self._heartbeat(frame.heartbeat)
            case None:
                raise InvalidField(
                    "frame", "is not set; expected one of the frames of the contract"
                )

    def _steps(self, frame: session_pb2.StepsFrame) -> None:
        if len(frame.entries) > self._limits.frame_entries_max:
            # One failure for all of them, of no session: the frame itself is the mistake.
            raise MessageTooLarge(
                f"the frame has {len(frame.entries):,} entries; send fewer at a time",
                limit="limits.frame_entries_max",
                maximum=self._limits.frame_entries_max,
            )
        now = self._services.clock.monotonic()
        timeout = seconds(frame, "timeout")
        deadline = None if timeout is None else now + timeout
        try:
            self._services.admission.message(frame.rows)
            entries = self._entries(frame.entries)
            checked = self._services.admission.frame(entries, frame.rows, now, deadline)
        except ConveyorError as error:
            self._fail_frame(frame, error)
            return
        self._admitted.extend(zip(entries, checked, strict=True))
        self._submit_admitted()

    def _fail_frame(self, frame: session_pb2.StepsFrame, error: ConveyorError) -> None:
        """Refuses every chunk of a frame whose bytes cannot be told apart."""
        if not frame.entries:
            self._fail(error)
            return
        self._services.metrics.rejected.add(len(frame.entries), error.reason)
        status = status_of(error)
        for item in frame.entries:
            self._outbox.put(partial(frames.failure, status, item.handle, item.first_step))

    def _submit_admitted(self) -> None:
        """Hands chunks in while there is room for their results; the others wait with the frame."""
        admitted, submit = self._admitted, self._services.driver.submit
        while admitted:
            entry, chunk = admitted[0]
            try:
                if isinstance(chunk, ConveyorError):
                    raise chunk
                if chunk.handle not in self._bindings:
                    raise UnknownHandle(
                        f"handle {chunk.handle} of this stream was closed", handle=chunk.handle
                    )
                wanted = result_bytes(chunk)
                if not self._room_for(wanted):
                    return
                submit(chunk)
                self._account.take(wanted)
                self._pending += 1
            except ConveyorError as error:
                self._fail(error, handle=entry.binding.handle, first_step=entry.first_step)
            admitted.popleft()
        self._account.wait_no_more()

    def _entries(self, items: Iterable[session_pb2.StepsEntry]) -> list[Entry]:
        bindings, closed = self._bindings, self._closed
        entries: list[Entry] = []
        for item in items:
            binding = bindings.get(item.handle) or closed.get(item.handle)
            if binding is None:
                raise UnknownHandle(
                    f"this stream has no open session with handle {item.handle}", handle=item.handle
                )
            entries.append(Entry(binding, item.first_step, item.length, item.output, item.trace))
        return entries

    def _open(self, frame: session_pb2.OpenFrame) -> None:
        try:
            if len(self._bindings) + self._opening >= self._limits.stream_sessions_max:
                raise StreamSessionsLimit(
                    f"this stream holds {len(self._bindings):,} sessions; use another stream for"
                    " more",
                    limit="limits.stream_sessions_max",
                    maximum=self._limits.stream_sessions_max,
                )
            wanted = open_request(self._services.admission, self._principal, frame.session)
        except ConveyorError as error:
            self._fail(error, tag=frame.tag)
            return
        self._opening += 1
        self._opening_bytes += len(frame.session.memory.rows)
        self._pending += 1
        self._operations += 1
        self._services.driver.post(lambda operations: self._opened(operations, wanted, frame.tag))

    def _opened(self, operations: Operations, wanted: OpenRequest, tag: int) -> None:
        self._opening -= 1
        self._opening_bytes -= 0 if wanted.memory is None else len(wanted.memory.rows)
        try:
            if self._gone:
                return
            opened = operations.open(wanted, self)
        except ConveyorError as error:
            self._fail(error, tag=tag)
        else:
            self._last_handle += 1
            handle, view = self._last_handle, opened.view
            self._bindings[handle] = Binding(
                self._principal,
                view.session_id,
                view.epoch,
                view.model,
                self,
                handle,
                view.memory_rows,
            )
            self._handles[view.session_id, view.epoch] = handle
            self._outbox.put(partial(frames.opened, opened, self._limits, tag, handle))
        finally:
            self._carried_out()

    def _close(self, frame: session_pb2.CloseFrame) -> None:
        binding = self._bindings.get(frame.handle)
        if binding is None:
            error = UnknownHandle(f"no session is open under handle {frame.handle}")
            self._fail(error, handle=frame.handle)
            return
        self._pending += 1
        self._operations += 1
        if frame.detach:
            self._services.driver.post(lambda operations: self._detach(operations, binding))
        else:
            closing = _Closing(self, binding)
            self._services.driver.post(
                lambda operations: operations.close(
                    self._principal, binding.session_id, closing, self, binding.epoch
                )
            )

    def _detach(self, operations: Operations, binding: Binding) -> None:
        applied = operations.detach(self._principal, binding.session_id, binding.epoch, self)
        if applied is not None:
            self._unbind(binding.handle, applied)
        self._carried_out()

    def closed(self, binding: Binding, applied_step: int) -> None:
        """A close frame was carried out."""
        self._unbind(binding.handle, applied_step)
        self._carried_out()

    def not_closed(self, binding: Binding, error: ConveyorError) -> None:
        """A close frame was refused."""
        self._fail(error, handle=binding.handle)
        self._carried_out()

    def _heartbeat(self, frame: session_pb2.HeartbeatFrame) -> None:
        if not self._keeping_alive:  # else the one that waits will do for this one too
            self._keeping_alive = True
            self._services.driver.post(self._keep_alive)
        self._outbox.put(partial(frames.heartbeat, frame.nonce))

    def _keep_alive(self, operations: Operations) -> None:
        self._keeping_alive = False
        ids = [binding.session_id for binding in self._bindings.values()]
        operations.keep_alive(self._principal, ids, self)

    # --- helpers ---------------------------------------------------------------------------------

    def _may_go_on(self) -> bool:
        """Whether there is room for more of what this client sends.

        Owed is what waits to be written, and what is wanted of the chunks that were taken.
        """
        if self._operations >= OPERATIONS_MAX:
            return False
        if self._opening_bytes >= self._limits.message_bytes_max:
            return False
        if self._admitted and isinstance(chunk := self._admitted[0][1], Chunk):
            return self._room_for(result_bytes(chunk))
        return self._outbox.owed_bytes <= self._limits.outbox_bytes_max

    def _room_for(self, wanted: int) -> bool:
        owed = self._outbox.owed_bytes
        if owed and owed + wanted > self._limits.outbox_bytes_max:
            return False
        return self._account.room_for(wanted)

    def _notify(self) -> None:
        self._outbox.notify()

    def _fail(
        self, error: ConveyorError, *, handle: int = 0, first_step: int = 0, tag: int = 0
    ) -> None:
        self._services.metrics.rejected.add(1, error.reason)
        self._outbox.put(partial(frames.failure, error, handle, first_step, tag))

    def _answered(self) -> None:
        self._pending -= 1
        if not self._pending:
            self._outbox.notify()

    def _carried_out(self) -> None:
        self._operations -= 1
        if self._operations == OPERATIONS_MAX - 1 or not self._opening:
            self._outbox.notify()
        self._answered()

    def _unbind(self, handle: int, applied_step: int, error: ConveyorError | None = None) -> None:
        binding = self._bindings.pop(handle, None)
        if binding is None:
            return
        del self._handles[binding.session_id, binding.epoch]
        self._closed[handle] = binding
        if len(self._closed) > CLOSED_HANDLES_MAX:
            self._closed.popitem(last=False)
        self._outbox.put(partial(frames.closed, handle, applied_step, error))

    def _detach_all(self, operations: Operations) -> None:
        for binding in list(self._bindings.values()):
            operations.detach(self._principal, binding.session_id, binding.epoch, self)
        self._bindings.clear()
        self._handles.clear()


def _promised_bytes(chunk: Chunk, done: int) -> int:
    """Bytes of results still to come of a chunk of which so many steps are done."""
    wanted = result_bytes(chunk)
    return wanted - wanted * done // chunk.length


class _Closing:
    """Takes the outcome of a close frame."""

    def __init__(self, stream: StepStream, binding: Binding) -> None:
        self._stream = stream
        self._binding = binding

    def set_result(self, result: Any) -> None:
        self._stream.closed(self._binding, result.applied_step)

    def set_exception(self, exception: ConveyorError) -> None:
        self._stream.not_closed(self._binding, exception)

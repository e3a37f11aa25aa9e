"""`conveyor.v1.SessionService`."""

from collections.abc import AsyncIterator

from conveyor.v1 import session_pb2, session_pb2_grpc
from conveyor_server.admission.admission import Binding, Entry, result_bytes
from conveyor_server.admission.fields import check_session_id, page_size
from conveyor_server.core import SessionView
from conveyor_server.errors import InvalidField, NotSupported, SessionSuperseded
from conveyor_server.rpc.access import principal
from conveyor_server.rpc.convert import open_request, opened_message, seconds, session_message
from conveyor_server.rpc.generate import generate
from conveyor_server.rpc.predict import predict
from conveyor_server.rpc.service import Context, Services, Waiter
from conveyor_server.rpc.stream import StepStream
from conveyor_server.rpc.streams import Streams
from conveyor_server.rpc.traces import trace_message
from conveyor_server.store.checkpoint import Checkpoint, encode, read_snapshot


class SessionServicer(session_pb2_grpc.SessionServiceServicer):
    """Each method converts, delegates and converts back."""

    def __init__(self, services: Services, streams: Streams) -> None:
        """`streams` keeps count of the StreamSteps calls."""
        self._services = services
        self._streams = streams
        self._driver = services.driver
        self._admission = services.admission
        self._limits = services.config.limits

    async def OpenSession(
        self, request: session_pb2.OpenSessionRequest, context: Context
    ) -> session_pb2.OpenSessionResponse:
        """See the contract."""
        wanted = open_request(self._admission, principal(), request)
        opened = await self._driver.call(lambda operations: operations.open(wanted))
        return opened_message(opened, self._limits)

    async def Step(
        self, request: session_pb2.StepRequest, context: Context
    ) -> session_pb2.StepResponse:
        """See the contract."""
        check_session_id(request.session_id)
        self._admission.message(request.rows)
        caller, waiter = principal(), Waiter()
        view = self._driver.peek(caller, request.session_id)
        if request.epoch not in (0, view.epoch):
            raise SessionSuperseded(
                f"session {request.session_id!r} has been opened elsewhere since"
            )
        binding = Binding(
            caller,
            request.session_id,
            request.epoch,
            view.model,
            waiter.reply,
            memory_rows=view.memory_rows,
        )
        entry = Entry(binding, request.first_step, request.length, request.output, request.trace)
        now = self._services.clock.monotonic()
        remaining = _remaining_seconds(context)
        deadline = None if remaining is None else now + remaining
        chunk = self._admission.chunk(entry, request.rows, now, deadline)
        self._services.results.count_for_call(caller, result_bytes(chunk))
        self._driver.submit(chunk)
        answer = await waiter.wait()
        return session_pb2.StepResponse(
            first_step=request.first_step,
            length=request.length,
            rows_length=answer.rows_length,
            rows=b"".join(answer.rows),
            durable_step=answer.durable_step,
            duplicate=answer.duplicate,
            trace=trace_message(answer.traces) if answer.traces else None,
        )

    # Writing through the context, a handler returns nothing to iterate over.
    async def StreamSteps(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, request_iterator: AsyncIterator[session_pb2.StreamStepsRequest], context: Context
    ) -> None:
        """See the contract.

        Reads and writes through the context, which costs less than an iterator.
        """
        stream = StepStream(self._services, principal(), context, self._streams)
        with self._streams.joined(stream):
            await stream.serve()

    async def GetSession(
        self, request: session_pb2.GetSessionRequest, context: Context
    ) -> session_pb2.GetSessionResponse:
        """See the contract."""
        check_session_id(request.session_id)
        view = self._driver.peek(principal(), request.session_id)
        return session_pb2.GetSessionResponse(session=session_message(view))

    async def ListSessions(
        self, request: session_pb2.ListSessionsRequest, context: Context
    ) -> session_pb2.ListSessionsResponse:
        """See the contract. A page token is the last id of the page before."""
        caller, size = principal(), page_size(request.page_size)
        if request.page_token:
            check_session_id(request.page_token, "page_token")
        views, more, total = await self._driver.call(
            lambda operations: operations.page(
                caller, after=request.page_token, size=size, model=request.model
            )
        )
        return session_pb2.ListSessionsResponse(
            sessions=[session_message(view) for view in views],
            next_page_token=views[-1].session_id if more else "",
            total_size=total,
        )

    async def CloseSession(
        self, request: session_pb2.CloseSessionRequest, context: Context
    ) -> session_pb2.CloseSessionResponse:
        """See the contract."""
        check_session_id(request.session_id)
        caller = principal()
        view: SessionView = await self._driver.call_after_queue(
            lambda operations, future: operations.close(caller, request.session_id, future)
        )
        return session_pb2.CloseSessionResponse(session=session_message(view))

    async def ResetSession(
        self, request: session_pb2.ResetSessionRequest, context: Context
    ) -> session_pb2.ResetSessionResponse:
        """See the contract."""
        check_session_id(request.session_id)
        caller = principal()
        view: SessionView = await self._driver.call_after_queue(
            lambda operations, future: operations.reset(caller, request.session_id, future)
        )
        return session_pb2.ResetSessionResponse(session=session_message(view))

    async def ForkSession(
        self, request: session_pb2.ForkSessionRequest, context: Context
    ) -> session_pb2.ForkSessionResponse:
        """See the contract."""
        check_session_id(request.session_id)
        caller = principal()
        new_ids = self._admission.fork_ids(request.new_session_ids)
        if request.at_step < 0:
            raise InvalidField("at_step", f"is {request.at_step}; expected 0 (now) or more")
        views: list[SessionView] = await self._driver.call_after_queue(
            lambda operations, future: operations.fork(
                caller, request.session_id, new_ids, request.at_step, future
            )
        )
        return session_pb2.ForkSessionResponse(sessions=[session_message(view) for view in views])

    async def RewindSession(
        self, request: session_pb2.RewindSessionRequest, context: Context
    ) -> session_pb2.RewindSessionResponse:
        """See the contract. Needs retained checkpoints, and so a store."""
        raise NotSupported(
            "RewindSession needs a store, and this server has none; use ExportSession to keep a"
            " state"
        )

    async def ExportSession(
        self, request: session_pb2.ExportSessionRequest, context: Context
    ) -> session_pb2.ExportSessionResponse:
        """See the contract."""
        check_session_id(request.session_id)
        caller = principal()
        view = self._driver.peek(caller, request.session_id)
        self._services.results.count_for_call(caller, view.state_bytes)
        exported: tuple[SessionView, Checkpoint] = await self._driver.call_after_queue(
            lambda operations, future: operations.export(caller, request.session_id, future)
        )
        view, checkpoint = exported
        snapshot = await self._driver.aside(encode, checkpoint)
        return session_pb2.ExportSessionResponse(session=session_message(view), snapshot=snapshot)

    async def ImportSession(
        self, request: session_pb2.ImportSessionRequest, context: Context
    ) -> session_pb2.ImportSessionResponse:
        """See the contract."""
        caller = principal()
        self._admission.message(request.snapshot)
        if request.session_id:
            check_session_id(request.session_id)
        idle = seconds(request, "idle_ttl")
        idle_seconds = (
            self._limits.idle_seconds_default
            if idle is None
            else self._admission.idle_seconds(idle)
        )
        checkpoint = await self._driver.aside(read_snapshot, request.snapshot)
        view = await self._driver.call(
            lambda operations: operations.import_(
                caller, checkpoint, request.session_id, idle_seconds
            )
        )
        return session_pb2.ImportSessionResponse(session=session_message(view))

    # It writes through the context too.
    async def Generate(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, request: session_pb2.GenerateRequest, context: Context
    ) -> None:
        """See the contract."""
        await generate(self._services, principal(), request, context)

    async def Predict(
        self, request: session_pb2.PredictRequest, context: Context
    ) -> session_pb2.PredictResponse:
        """See the contract."""
        return await predict(self._services, principal(), request, _remaining_seconds(context))


def _remaining_seconds(context: Context) -> float | None:
    """Time until the caller's deadline; None without one, though grpc's types do not say so."""
    return context.time_remaining()

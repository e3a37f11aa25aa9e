"""What the flags of a request do to the session that its sequence is.

START opens the session or takes it back to its beginning, END closes it after its step. All of it
goes through the scheduler's inbox in the order the requests came.
"""

import asyncio
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from conveyor_server.admission.fields import check_model_name
from conveyor_server.core import (
    NO_CLAIM,
    Chunk,
    MemoryRows,
    ModelInfo,
    OpenMode,
    OpenRequest,
    SessionKey,
    SessionState,
    WholeSequence,
)
from conveyor_server.errors import (
    ConveyorError,
    DataLost,
    ModelNotFound,
    ModelNotStreamable,
    ServerDraining,
    SessionEnded,
    SessionExists,
    SessionMismatch,
    SessionNotFound,
)
from conveyor_server.rpc.oip import refusals
from conveyor_server.rpc.oip.requests import Asked
from conveyor_server.rpc.oip.tensors import Steps
from conveyor_server.rpc.oip.underway import Request
from conveyor_server.rpc.service import Services
from conveyor_server.rpc.streams import Streams
from conveyor_server.scheduler.driver import Driver
from conveyor_server.scheduler.operations import Operations
from conveyor_server.sessions.memory import check_memory


class Sequences:
    """All sequences of the server; their state is the scheduler's."""

    def __init__(self, services: Services, streams: Streams) -> None:
        """`streams` know whether the server is stopping."""
        self._services = services
        self._driver = services.driver
        self._streams = streams
        self._ending: dict[SessionKey, asyncio.Event] = {}

    def check_serving(self) -> None:
        """Raises `ServerDraining` once the server is stopping."""
        if self._streams.draining:
            raise ServerDraining

    async def model_of(self, asked: Asked, principal: str) -> ModelInfo:
        """The model that a request is to run on.

        A START waits here until an END of the same sequence that was sent before it is done.

        Raises:
            Refusal: There is no such model or sequence, or none is named.
            ModelNotStreamable: The model runs whole sequences only, and an id is given.
        """
        if not asked.session_id:
            model = self._resolve(asked)
            if not model.streamable:  # a whole sequence in one request
                return model
            raise refusals.no_sequence_id(asked.model)
        key = (principal, asked.session_id)
        ending = self._ending.get(key)
        if asked.start:
            while ending is not None:
                await ending.wait()
                ending = self._ending.get(key)
            return self._resolve(asked)
        model = None if ending else await self._live(key)
        # A session of another model's may have the id, if the native services opened it.
        if (
            model is None
            or model.key.name != asked.model
            or asked.version not in (None, model.key.version)
        ):
            self._resolve(asked)
            raise refusals.not_started(asked.model, asked.sequence)
        return model

    def submit(self, request: Request, model: ModelInfo, principal: str, steps: Steps) -> None:
        """Hands a request in.

        Raises:
            Refusal: The sequence's END was sent before, or a memory comes without START.
            InboxFull, InvalidMemory, and what `Admission.following` and `Admission.sequence` raise.
                Nothing was changed by any of them.
        """
        if not model.streamable:
            self._submit_whole(request, model, steps)
            return
        asked = request.asked
        if steps.memory is not None and not asked.start:
            raise refusals.Refusal("inputs", "input 'MEMORY' goes with the START flag only")
        request.model, request.length, request.stacked = model, steps.length, steps.stacked
        request.key = key = (principal, asked.session_id)
        if key in self._ending and not asked.start:
            raise refusals.not_started(asked.model, asked.sequence)
        chunk = self._chunk(request, model, key, steps)
        request.submitted_seconds = self._services.clock.monotonic()
        if asked.start:
            self._driver.post(
                lambda operations: self._begin(operations, request, chunk, steps.memory)
            )
        try:
            self._driver.submit(chunk)
        except ConveyorError:
            request.dropped = True  # so that the sequence is not begun either
            raise
        if asked.end:
            request.ended = self._ended
            # One that is there, of an END on another stream, has somebody waiting for it.
            self._ending.setdefault(key, asyncio.Event())

    async def make_way(
        self, request: Request, model: ModelInfo, principal: str, steps: Steps
    ) -> None:
        """Ends a live sequence that a START cannot simply take back, after what is queued.

        That is one that attends over a memory: the new one brings its own.

        Raises:
            InvalidMemory: It brings none.
            Whatever `Admission.following` raises. Nothing was changed by any of them.
        """
        if not model.memory_row_size:
            return
        check_memory(model, steps.memory)
        session_id = request.asked.session_id
        self._chunk(request, model, (principal, session_id), steps)  # what is wrong with it is told
        with suppress(SessionNotFound, SessionEnded):
            await self._driver.call_after_queue(
                lambda operations, future: operations.close(principal, session_id, future)
            )

    def _chunk(self, request: Request, model: ModelInfo, key: SessionKey, steps: Steps) -> Chunk:
        """A request's steps, checked."""
        services, timeout = self._services, request.asked.timeout_seconds
        return services.admission.following(
            model,
            key,
            steps.length,
            steps.rows,
            request,
            request.received_seconds,
            None if timeout is None else services.clock.monotonic() + timeout,
        )

    def _submit_whole(self, request: Request, model: ModelInfo, steps: Steps) -> None:
        """Hands in a sequence for a model that cannot be stepped."""
        services, timeout = self._services, request.asked.timeout_seconds
        services.admission.sequence(model, steps.length, steps.rows)
        request.model, request.length, request.stacked = model, steps.length, steps.stacked
        request.submitted_seconds = now = services.clock.monotonic()
        request.whole = whole = WholeSequence(
            model=model,
            rows=steps.rows,
            length=steps.length,
            outputs=steps.length,
            settle=request.settled,
            arrived_seconds=request.received_seconds,
            deadline_seconds=None if timeout is None else now + timeout,
        )

        def begin(operations: Operations) -> None:
            if request.dropped:
                return
            try:
                operations.predict(whole)
            except ConveyorError as error:
                request.fail(error)

        self._driver.post(begin)

    def drop(self, requests: Sequence[Request]) -> None:
        """Nobody waits for these any more: what has not run of them does not."""
        replies = frozenset(requests)
        keys = {request.key for request in requests if request.whole is None}
        for request in requests:
            request.dropped = True

        def drop_all(operations: Operations) -> None:
            for request in requests:
                if request.whole is not None:
                    operations.drop_prediction(request.whole)
            for principal, session_id in keys:
                operations.drop(principal, session_id, replies)

        self._driver.post(drop_all)

    def _ended(self, request: Request) -> None:
        """The last request of a sequence is done or failed.

        One that failed for a reason that passes may be sent again, so the session stays.
        """
        error = request.error
        if error is not None and not isinstance(error, DataLost):
            self.settle(request.key)
            return
        principal, session_id = request.key
        closing = _Closing(self, request.key)
        self._driver.post(lambda operations: operations.close(principal, session_id, closing))

    def settle(self, key: SessionKey) -> None:
        """An END is over; a later START may go on."""
        ending = self._ending.pop(key, None)
        if ending is not None:
            ending.set()

    def _resolve(self, asked: Asked) -> ModelInfo:
        model = resolve(self._driver, asked.model, asked.version)
        if asked.session_id and not model.streamable:
            raise ModelNotStreamable(
                f"model '{asked.model}' has bidirectional or reverse layers, so it keeps no state"
                " between requests; send whole sequences, without a sequence_id"
            )
        return model

    async def _live(self, key: SessionKey) -> ModelInfo | None:
        """The model that a session is on; None: there is no such session."""
        try:
            return self._driver.peek(*key).model
        except (SessionNotFound, SessionEnded):
            pass  # it may be about to be opened
        try:
            view = await self._driver.call(lambda operations: operations.get(*key))
        except (SessionNotFound, SessionEnded):
            return None
        return view.model

    def _begin(
        self,
        operations: Operations,
        request: Request,
        chunk: Chunk,
        memory: MemoryRows | None,
    ) -> None:
        if request.dropped:
            return
        (principal, session_id), model = request.key, chunk.model
        try:
            view = operations.get(principal, session_id)
        except (SessionNotFound, SessionEnded):
            self._open(operations, request, model, memory)
            return
        if memory is not None:
            request.opening = SessionExists(
                f"sequence {request.asked.sequence} of model '{request.asked.model}' was begun"
                " elsewhere at the same time"
            )
            chunk.epoch = NO_CLAIM
        elif view.model is model:
            operations.reset(principal, session_id, _Opening(request))
        elif view.state is SessionState.ACTIVE:
            request.opening = SessionMismatch(
                f"sequence {request.asked.sequence} of model '{request.asked.model}' still runs on"
                f" version {view.model.key.version}"
            )
        else:  # of a version that is no longer the one asked for
            operations.close(principal, session_id, _Opening(request))
            self._open(operations, request, model, None)

    def _open(
        self,
        operations: Operations,
        request: Request,
        model: ModelInfo,
        memory: MemoryRows | None,
    ) -> None:
        principal, session_id = request.key
        wanted = OpenRequest(
            principal,
            session_id,
            model.key.name,
            model.key.version,
            OpenMode.CREATE,
            memory=memory,
        )
        try:
            operations.open(wanted)
        except ConveyorError as error:
            request.opening = error


def resolve(driver: Driver, name: str, version: int | None) -> ModelInfo:
    """A model that takes requests; None: its newest version.

    Raises:
        Refusal: There is none.
    """
    try:
        check_model_name(name)
        if version == 0:
            raise ModelNotFound(f"no version 0 of {name!r}", hint="versions are numbered from 1")
        return driver.model(name, version or 0)
    except ModelNotFound as error:
        raise refusals.unknown_model(name, version, error.hint) from error


class _Opening:
    """Takes the outcome of what a START does to a live session."""

    def __init__(self, request: Request) -> None:
        self._request = request

    def set_result(self, result: Any) -> None:
        pass

    def set_exception(self, exception: ConveyorError) -> None:
        self._request.opening = exception


class _Closing:
    """Takes the outcome of a close; a session that is gone already is closed as well."""

    def __init__(self, sequences: Sequences, key: SessionKey) -> None:
        self._sequences = sequences
        self._key = key

    def set_result(self, result: Any) -> None:
        self._sequences.settle(self._key)

    def set_exception(self, exception: ConveyorError) -> None:
        self._sequences.settle(self._key)

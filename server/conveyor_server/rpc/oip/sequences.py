"""What the flags of a request do to the session that its sequence is.

START opens the session or takes it back to its beginning, END closes it after its step. All of it
goes through the scheduler's inbox in the order the requests came.
"""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from conveyor_server.admission import check_model_name
from conveyor_server.core import (
    Chunk,
    ModelInfo,
    OpenMode,
    OpenRequest,
    Piece,
    SessionKey,
    SessionState,
)
from conveyor_server.errors import (
    ConveyorError,
    DataLost,
    ModelNotFound,
    ModelNotStreamable,
    ServerDraining,
    SessionEnded,
    SessionMismatch,
    SessionNotFound,
)
from conveyor_server.rpc.oip import refusals
from conveyor_server.rpc.oip.requests import Asked
from conveyor_server.rpc.oip.tensors import Steps
from conveyor_server.rpc.service import Services
from conveyor_server.rpc.streams import Streams
from conveyor_server.scheduler.driver import Driver
from conveyor_server.scheduler.operations import Operations


class Waiting(Protocol):
    """Who sent a request and waits for what becomes of it."""

    def answered(self, request: "Request") -> None:
        """It is done or it failed. Called on the scheduler's thread; must not block."""
        ...


@dataclass(slots=True, eq=False)
class Request:
    """One request on its way. Implements `core.Reply` for its chunk."""

    asked: Asked
    waiting: Waiting
    received_seconds: float
    model: ModelInfo | None = None
    length: int = 0
    stacked: bool = True
    """Whether the tensors have a dimension for steps."""
    rows: list[bytes] = field(default_factory=list[bytes])
    error: ConveyorError | None = None
    done: bool = False
    dropped: bool = False
    """Whether nobody waits for it any more."""
    submitted_seconds: float = 0.0
    begun_seconds: float = 0.0
    opening: ConveyorError | None = None
    """Why the sequence could not be begun."""
    sequences: "Sequences | None" = None
    """Who is to close the session after this step."""
    key: SessionKey = ("", "")

    def piece(self, chunk: Chunk, piece: Piece) -> None:
        """See `core.Reply`."""
        self.rows.append(piece.rows)
        if piece.final:
            self.begun_seconds = chunk.begun_seconds
            self._end()

    def failed(self, chunk: Chunk, first_step: int, error: ConveyorError) -> None:
        """See `core.Reply`."""
        self.fail(self.opening or error)

    def fail(self, error: ConveyorError) -> None:
        """It ends here."""
        asked = self.asked
        self.error = refusals.translated(error, asked.model, asked.sequence)
        self._end()

    def _end(self) -> None:
        self.done = True
        if self.sequences is not None:
            self.sequences.ended(self)
        self.waiting.answered(self)


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
            ModelNotStreamable: The model runs whole sequences only.
        """
        if not asked.session_id:
            self._resolve(asked)
            raise refusals.no_sequence_id(asked.model)
        key = (principal, asked.session_id)
        ending = self._ending.get(key)
        if asked.start:
            while ending is not None:
                await ending.wait()
                ending = self._ending.get(key)
            return self._resolve(asked)
        model = None if ending else await self._live(key)
        if model is None or asked.version not in (None, model.key.version):
            self._resolve(asked)
            raise refusals.not_started(asked.model, asked.sequence)
        return model

    def submit(self, request: Request, model: ModelInfo, principal: str, steps: Steps) -> None:
        """Hands a request in.

        Raises:
            Refusal: The sequence's END was sent before.
            InboxFull, and what `Admission.following` raises. Nothing was changed by any of them.
        """
        asked = request.asked
        services = self._services
        request.model, request.length, request.stacked = model, steps.length, steps.stacked
        request.key = key = (principal, asked.session_id)
        if key in self._ending and not asked.start:
            raise refusals.not_started(asked.model, asked.sequence)
        now = services.clock.monotonic()
        timeout = asked.timeout_seconds
        chunk = services.admission.following(
            model,
            key,
            steps.length,
            steps.rows,
            request,
            request.received_seconds,
            None if timeout is None else now + timeout,
        )
        request.submitted_seconds = now
        if asked.start:
            self._driver.post(lambda operations: self._begin(operations, request, model))
        try:
            self._driver.submit(chunk)
        except ConveyorError:
            request.dropped = True  # so that the sequence is not begun either
            raise
        if asked.end:
            request.sequences = self
            self._ending[key] = asyncio.Event()

    def drop(self, requests: Sequence[Request]) -> None:
        """Nobody waits for these any more: what has not run of them does not."""
        replies = frozenset(requests)
        keys = {request.key for request in requests}
        for request in requests:
            request.dropped = True

        def drop_all(operations: Operations) -> None:
            for principal, session_id in keys:
                operations.drop(principal, session_id, replies)

        self._driver.post(drop_all)

    def ended(self, request: Request) -> None:
        """The last request of a sequence is done or failed.

        One that failed for a reason that passes may be sent again, so the session stays.
        """
        error = request.error
        if error is not None and not isinstance(error, DataLost):
            self._settle(request.key)
            return
        principal, session_id = request.key
        closing = _Closing(self, request.key)
        self._driver.post(lambda operations: operations.close(principal, session_id, closing))

    def _settle(self, key: SessionKey) -> None:
        """An END is over; a later START may go on."""
        ending = self._ending.pop(key, None)
        if ending is not None:
            ending.set()

    def settled(self, key: SessionKey) -> None:
        """A session is closed."""
        self._settle(key)

    def _resolve(self, asked: Asked) -> ModelInfo:
        model = resolve(self._driver, asked.model, asked.version)
        if not model.streamable:
            raise ModelNotStreamable(
                f"model '{asked.model}' has bidirectional or reverse layers, so it keeps no state"
                " between requests; use Predict of conveyor.v1"
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

    def _begin(self, operations: Operations, request: Request, model: ModelInfo) -> None:
        if request.dropped:
            return
        principal, session_id = request.key
        try:
            view = operations.get(principal, session_id)
        except (SessionNotFound, SessionEnded):
            self._open(operations, request, model)
            return
        if view.model is model:
            operations.reset(principal, session_id, _Opening(request))
        elif view.state is SessionState.ACTIVE:
            request.opening = SessionMismatch(
                f"sequence {request.asked.sequence} of model '{request.asked.model}' still runs on"
                f" version {view.model.key.version}"
            )
        else:  # of a version that is no longer the one asked for
            operations.close(principal, session_id, _Opening(request))
            self._open(operations, request, model)

    def _open(self, operations: Operations, request: Request, model: ModelInfo) -> None:
        principal, session_id = request.key
        wanted = OpenRequest(
            principal, session_id, model.key.name, model.key.version, OpenMode.CREATE
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
            raise ModelNotFound("versions are numbered from 1")
        return driver.model(name, version or 0)
    except ModelNotFound as error:
        raise refusals.unknown_model(name, version) from error


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
        self._sequences.settled(self._key)

    def set_exception(self, exception: ConveyorError) -> None:
        self._sequences.settled(self._key)

"""What can be done to sessions beside stepping them.

Every method runs on the scheduler's thread between two ticks (see `driver`). Those that concern
what was sent before them (close, reset, fork, export) take a `Future` and wait in the session's
queue as a barrier.
"""

import logging
from collections.abc import Callable, Container, Sequence
from typing import Final, Protocol, TypeVar

from conveyor_server.core import (
    Durability,
    ModelInfo,
    ModelKey,
    Opened,
    OpenMode,
    OpenRequest,
    Owner,
    Reply,
    SessionView,
    WholeSequence,
)
from conveyor_server.errors import (
    ConveyorError,
    DeviceOutOfMemory,
    Internal,
    InvalidField,
    ModelNotFound,
    NotSupported,
    ServerDraining,
    SessionClosed,
    SessionExists,
    SessionMismatch,
    SessionSuperseded,
)
from conveyor_server.scheduler.copies import Copies
from conveyor_server.scheduler.creation import Creation, check_streamable
from conveyor_server.scheduler.scheduler import Scheduler
from conveyor_server.sessions.memory import check_memory
from conveyor_server.sessions.session import Barrier, Session
from conveyor_server.sessions.tokens import check_token, make_token
from conveyor_server.store.checkpoint import Checkpoint

PAGE_BYTES: Final = 32 * 2**10
"""Of a list of sessions: what is made in one go, while nobody else is served."""
_VIEW_BYTES: Final = 192
"""What a session takes there beside its labels, about."""
T_contra = TypeVar("T_contra", contravariant=True)
_log = logging.getLogger(__name__)


class Future(Protocol[T_contra]):
    """Takes the outcome of a barrier, at once or later."""

    def set_result(self, result: T_contra, /) -> None:
        """It is done."""
        ...

    def set_exception(self, exception: ConveyorError, /) -> None:
        """It is refused."""
        ...


def mistake(error: Exception) -> ConveyorError:
    """What the caller of an operation is told of what it must not raise, which is logged."""
    if isinstance(error, MemoryError):
        _log.error("out of memory in an operation")
        return DeviceOutOfMemory("the server")
    _log.error("an operation raised what it must not", exc_info=error)
    return Internal()


class Operations:
    """Session management on a scheduler."""

    def __init__(self, scheduler: Scheduler, incarnation: str) -> None:
        """`incarnation` names this life of the server's memory; tokens of another are refused."""
        self._scheduler = scheduler
        self._incarnation = incarnation
        self._creation = Creation(scheduler)
        self._copies = Copies(scheduler, self._creation)
        self.draining = False

    @property
    def _now(self) -> float:
        return self._scheduler.clock.monotonic()

    def open(self, request: OpenRequest, owner: Owner | None = None) -> Opened:
        """Creates or resumes a session and claims it for `owner`.

        Raises:
            ServerDraining, NotSupported, ModelNotFound, ModelNotStreamable, SessionNotFound,
            SessionEnded, SessionExists, SessionMismatch, SessionsLimit, PrincipalSessionsLimit,
            InvalidToken, InvalidMemory, InvalidShape, MemoryTooLarge, ServerRestarted.
        """
        if self.draining:
            raise ServerDraining
        if request.durability is not Durability.NONE:
            raise NotSupported(
                f"durability {request.durability.name} needs a store, and this server has none;"
                " use NONE"
            )
        key = (request.principal, request.session_id)
        session = self._scheduler.sessions.find(key) if request.session_id else None
        if request.token:
            check_token(request.token, request.session_id, self._incarnation)
        if session is None:
            # A token speaks of a session that was; a new one in its place would be a silent step
            # back.
            if request.mode is OpenMode.RESUME or request.token:
                self._scheduler.sessions.get(key, self._now)
            return self._create(request, owner)
        return self._resume(session, request, owner)

    def predict(self, sequence: WholeSequence) -> None:
        """Begins a whole sequence on a model that cannot be stepped.

        Raises:
            ServerDraining, ModelNotFound, InboxFull.
        """
        if self.draining:
            raise ServerDraining
        key = sequence.model.key
        if self._scheduler.models.resolve(key.name, key.version) is not sequence.model:
            raise ModelNotFound(
                f"model {key.name!r} version {key.version} was taken out of service during the"
                " call; send it again",
                model=key.name,
            )
        self._scheduler.predictions.add(sequence)

    def drop_prediction(self, sequence: WholeSequence) -> None:
        """Nobody waits for a whole sequence any more; it may be over."""
        self._scheduler.predictions.cancel(sequence)

    def get(self, principal: str, session_id: str) -> SessionView:
        """Describes a session."""
        return self._find(principal, session_id).view(self._now)

    def page(
        self, principal: str, *, after: str, size: int, model: str
    ) -> tuple[list[SessionView], bool, int]:
        """See `SessionTable.page`; a page has at most `PAGE_BYTES`, but always a session."""
        now = self._now
        sessions, more, total = self._scheduler.sessions.page(
            principal, after=after, size=size, model=model
        )
        views: list[SessionView] = []
        page_bytes = 0
        for session in sessions:
            page_bytes += _VIEW_BYTES + sum(len(key) + len(text) for key, text in session.labels)
            if views and page_bytes > PAGE_BYTES:
                return views, True, total
            views.append(session.view(now))
        return views, more, total

    def keep_alive(self, principal: str, session_ids: Sequence[str], owner: Owner) -> None:
        """Starts the idle time of an owner's sessions anew."""
        for session_id in session_ids:
            session = self._scheduler.sessions.find((principal, session_id))
            if session is not None and session.owner is owner:
                session.active_monotonic = self._now

    def detach(self, principal: str, session_id: str, epoch: int, owner: Owner) -> int | None:
        """The owner is gone: what it sent and nobody waits for is dropped; the session lives on.

        Returns:
            The applied step, or None if the session was no longer this owner's.
        """
        session = self._scheduler.sessions.find((principal, session_id))
        if session is None or session.owner is not owner or session.epoch != epoch:
            return None
        session.owner = None
        gone = SessionSuperseded(f"session {session_id!r} was released by its stream")
        self._scheduler.fail_chunks(session, gone, only=lambda chunk: chunk.reply is owner)
        self._scheduler.advance(session)
        return session.applied

    def drop(self, principal: str, session_id: str, replies: Container[Reply]) -> None:
        """Whoever sent some chunks is gone: those that have not run are dropped; the session stays.

        A session that ended meanwhile has none.
        """
        session = self._scheduler.sessions.find((principal, session_id))
        if session is not None:
            gone = SessionSuperseded(
                f"the caller of session {session_id!r} has gone, so this step was dropped"
            )
            self._scheduler.fail_chunks(session, gone, only=lambda chunk: chunk.reply in replies)
            self._scheduler.advance(session)

    def position(self, principal: str, session_id: str) -> tuple[ModelInfo, int, int, bytes | None]:
        """A session's model, epoch, applied step and, if it is held, that step's output row."""
        session = self._find(principal, session_id)
        return session.model, session.epoch, session.applied, session.held.newest_output()

    def describe_models(self) -> list[tuple[ModelInfo, int, bool]]:
        """Versions in service: each with its open sessions and whether it is its name's newest."""
        models = self._scheduler.models
        return [(info, models.sessions[info.key], models.newest(info)) for info in models]

    def describe_model(self, name: str, version: int) -> tuple[ModelInfo, int, bool]:
        """One version as in `describe_models`, also one out of service that sessions still use.

        Raises:
            ModelNotFound: It is not loaded; for version 0: there is none in service.
        """
        models = self._scheduler.models
        info = models.loaded(ModelKey(name, version)) or models.resolve(name, version)
        newest = any(each.key == info.key and models.newest(each) for each in models)
        return info, models.sessions[info.key], newest

    def close(
        self,
        principal: str,
        session_id: str,
        future: Future[SessionView],
        owner: Owner | None = None,
        epoch: int = 0,
    ) -> None:
        """Ends a session after what was sent before.

        Args:
            principal: Whose.
            session_id: Which.
            future: Takes the session as it was at its end.
            owner: Who asks, and needs not be told.
            epoch: The claim that ends with it; 0: any. A claim that was lost closes nothing.
        """

        def run(session: Session) -> None:
            if epoch not in (0, session.epoch):
                raise SessionSuperseded(f"session {session_id!r} has been opened elsewhere since")
            view = session.view(self._now)
            told = session.owner is not owner
            ended = SessionClosed(f"session {session_id!r} was closed")
            self._scheduler.end(session, ended, tell_owner=told)
            future.set_result(view)

        self._after_queue(principal, session_id, future, run)

    def discard(self, principal: str, session_id: str) -> None:
        """Ends a session made for one call, if it is still there."""
        session = self._scheduler.sessions.find((principal, session_id))
        if session is not None:
            self._scheduler.end(
                session, SessionClosed("the call that this session was made for has ended")
            )

    def reset(self, principal: str, session_id: str, future: Future[SessionView]) -> None:
        """Takes a session back to its beginning, and out of quarantine."""

        def run(session: Session) -> None:
            self._scheduler.residency.clear(session)
            session.held.clear()
            self._scheduler.held.update(session.key, session.held)
            session.applied = session.durable = 0
            session.quarantined = False
            session.active_monotonic = self._now
            future.set_result(session.view(self._now))

        self._after_queue(principal, session_id, future, run)

    def fork(
        self,
        principal: str,
        session_id: str,
        new_session_ids: Sequence[str],
        at_step: int,
        future: Future[list[SessionView]],
    ) -> None:
        """Copies a session, all copies or none; of the results held, the newest step's only."""

        def run(session: Session) -> None:
            if self.draining:
                raise ServerDraining
            copies = self._copies.fork(session, new_session_ids, at_step)
            future.set_result([copy.view(self._now) for copy in copies])

        self._after_queue(principal, session_id, future, run)

    def export(
        self, principal: str, session_id: str, future: Future[tuple[SessionView, Checkpoint]]
    ) -> None:
        """Takes what a snapshot is made of; to write it takes a while and needs no session."""

        def run(session: Session) -> None:
            checkpoint = self._copies.export(session)
            future.set_result((session.view(self._now), checkpoint))

        self._after_queue(principal, session_id, future, run)

    def import_(
        self, principal: str, checkpoint: Checkpoint, session_id: str, idle_seconds: float
    ) -> SessionView:
        """Makes a session from what a snapshot holds.

        Raises:
            SnapshotIncompatible, MemoryTooLarge, ModelNotStreamable,
            SessionExists, SessionsLimit, PrincipalSessionsLimit, ServerDraining.
        """
        if self.draining:
            raise ServerDraining
        session = self._copies.import_(principal, checkpoint, session_id, idle_seconds)
        return session.view(self._now)

    # --- helpers ---------------------------------------------------------------------------------

    def _find(self, principal: str, session_id: str) -> Session:
        return self._scheduler.sessions.get((principal, session_id), self._now)

    def _after_queue(
        self,
        principal: str,
        session_id: str,
        future: Future[T_contra],
        run: Callable[[Session], None],
    ) -> None:
        def guarded(session: Session) -> None:
            try:
                run(session)
            except ConveyorError as error:
                future.set_exception(error)
            except Exception as error:  # noqa: BLE001  it fails its caller, not everybody's ticks
                future.set_exception(mistake(error))

        try:
            session = self._find(principal, session_id)
        except ConveyorError as error:
            future.set_exception(error)
            return
        session.queue.append(Barrier(guarded, future.set_exception))
        if len(session.queue) == 1:
            self._scheduler.advance(session)

    def _create(self, request: OpenRequest, owner: Owner | None) -> Opened:
        if not request.model:
            raise InvalidField(
                "model",
                f"is empty, and there is no session {request.session_id!r} to resume; a new session"
                " needs a model",
            )
        model = self._scheduler.models.resolve(request.model, request.version)
        check_streamable(model)
        check_memory(model, request.memory)
        self._scheduler.sessions.check_room(request.principal)
        session = self._creation.session(
            request.principal,
            self._creation.free_id(request.principal, request.session_id),
            model,
            request.idle_seconds or self._scheduler.limits.idle_seconds_default,
            labels=request.labels,
            ephemeral=request.ephemeral,
            memory=self._creation.memory(model, request.memory.rows if request.memory else b""),
        )
        session.owner = owner
        return self._opened(session, resumed=False)

    def _resume(self, session: Session, request: OpenRequest, owner: Owner | None) -> Opened:
        if request.mode is OpenMode.CREATE:
            raise SessionExists(
                f"session {session.session_id!r} exists already; resume it, or take another id"
            )
        key = session.model.key
        if (request.model and request.model != key.name) or request.version not in (0, key.version):
            raise SessionMismatch(
                f"session {session.session_id!r} is on model {key.name!r} version {key.version};"
                " the request names another"
            )
        if request.memory is not None and (
            session.memory is None or session.memory.rows != request.memory.rows
        ):
            raise SessionMismatch(
                f"session {session.session_id!r} attends over another memory, or over none; leave"
                " the memory out to resume it"
            )
        self._revoke(session)
        self._scheduler.advance(session)
        if self._scheduler.sessions.find(session.key) is not session:
            return self.open(request, owner)  # a close waited behind what was revoked
        session.owner = owner
        session.active_monotonic = self._now
        if request.idle_seconds is not None:
            session.idle_seconds = request.idle_seconds
            self._scheduler.sessions.renew(session)
        self._scheduler.metrics.resumes.add(1, "claimed")
        return self._opened(session, resumed=True)

    def _revoke(self, session: Session) -> None:
        """Ends the claim there is: what was sent under it and has not run is dropped."""
        lost, epoch = session.owner, session.epoch
        superseded = SessionSuperseded(f"session {session.session_id!r} has been opened elsewhere")
        session.owner = None
        session.epoch += 1
        self._scheduler.fail_chunks(
            session, superseded, only=lambda chunk: chunk.epoch not in (0, session.epoch)
        )
        if lost is not None:
            lost.lost(session.session_id, epoch, session.applied, superseded)

    def _opened(self, session: Session, *, resumed: bool) -> Opened:
        token = make_token(session.session_id, session.epoch, self._incarnation)
        return Opened(session.view(self._now), resumed, token)

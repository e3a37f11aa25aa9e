"""Copying sessions: forks on this server, snapshots to and from others.

A copy is refused before anything is made, or it is there whole.
"""

from collections.abc import Sequence
from dataclasses import replace

from conveyor_server.core import STEP_MAX, ModelInfo
from conveyor_server.errors import (
    CheckpointNotRetained,
    SessionQuarantined,
    SessionsLimit,
    SnapshotIncompatible,
)
from conveyor_server.scheduler.creation import Creation, check_streamable
from conveyor_server.scheduler.scheduler import Scheduler
from conveyor_server.sessions.memory import SharedMemory, check_memory_rows
from conveyor_server.sessions.session import Session
from conveyor_server.store.checkpoint import Checkpoint, Header, check_fits, record_bytes


class Copies:
    """Makes sessions and snapshots of what a session is now."""

    def __init__(self, scheduler: Scheduler, creation: Creation) -> None:
        """`creation` makes the sessions that become copies."""
        self._scheduler = scheduler
        self._creation = creation

    def fork(self, session: Session, new_session_ids: Sequence[str], at_step: int) -> list[Session]:
        """Copies a session, all copies or none; of the results held, the newest step's only.

        Raises:
            SessionQuarantined, CheckpointNotRetained, SessionExists, SessionsLimit,
            PrincipalSessionsLimit.
        """
        _check_copyable(session)
        if at_step and at_step != session.applied:
            raise CheckpointNotRetained(
                f"session {session.session_id!r} is at step {session.applied:,}; this server keeps"
                f" no state of step {at_step:,} to fork from",
                applied_step=session.applied,
            )
        principal = session.principal
        ids = [self._creation.free_id(principal, new_id) for new_id in new_session_ids]
        self._scheduler.sessions.check_room(principal, len(ids))
        checkpoint = self._scheduler.residency.checkpoint(session)
        if session.applied:
            self._check_host_room(checkpoint, principal, ids)
        return [self._copy(session, new_id, checkpoint.carry) for new_id in ids]

    def export(self, session: Session) -> Checkpoint:
        """Takes what a snapshot is made of, which names no principal.

        Raises:
            SessionQuarantined: Its carry is none to go on from.
        """
        _check_copyable(session)
        checkpoint = self._scheduler.residency.checkpoint(session)
        memory = b"" if session.memory is None else session.memory.rows
        header = replace(checkpoint.header, principal="", memory_bytes=len(memory))
        return Checkpoint(header, checkpoint.carry, memory)

    def import_(
        self, principal: str, checkpoint: Checkpoint, session_id: str, idle_seconds: float
    ) -> Session:
        """Makes a session from what a snapshot holds.

        Raises:
            SnapshotIncompatible, MemoryTooLarge, ModelNotStreamable,
            SessionExists, SessionsLimit, PrincipalSessionsLimit.
        """
        model = self._model_of(checkpoint.header)
        check_streamable(model)
        check_fits(checkpoint, model)
        memory = self._import_memory(checkpoint, model)
        new_id = self._creation.free_id(principal, session_id or checkpoint.header.session_id)
        self._scheduler.sessions.check_room(principal)
        self._check_host_room(checkpoint, principal, [new_id])
        session = self._creation.session(principal, new_id, model, idle_seconds, memory=memory)
        self._scheduler.residency.place(session, checkpoint.carry, checkpoint.header.step)
        return session

    def _copy(self, source: Session, session_id: str, carry: bytes) -> Session:
        copy = self._creation.session(
            source.principal,
            session_id,
            source.model,
            source.idle_seconds,
            labels=source.labels,
            memory=source.memory,
        )
        if source.applied:
            self._scheduler.residency.place(copy, carry, source.applied)
            copy.held.take_newest(source.held)
            self._scheduler.held.update(copy.key, copy.held)
        return copy

    def _model_of(self, header: Header) -> ModelInfo:
        for model in self._scheduler.models:
            if model.digest == header.model_digest and model.key.name == header.model:
                return model
        raise SnapshotIncompatible(
            f"the snapshot is of model {header.model!r} with digest {header.model_digest}; this"
            " server serves no version with that digest"
        )

    def _import_memory(self, checkpoint: Checkpoint, model: ModelInfo) -> SharedMemory | None:
        if checkpoint.memory:
            check_memory_rows(model, len(checkpoint.memory) // model.memory_row_bytes)
        return self._creation.memory(model, checkpoint.memory)

    def _check_host_room(
        self, checkpoint: Checkpoint, principal: str, new_ids: Sequence[str]
    ) -> None:
        """Refuses copies that others would have to be evicted for."""
        header = replace(
            checkpoint.header,
            principal=principal,
            session_id=max(new_ids, key=len),
            epoch=STEP_MAX,  # as long as it can be written
            memory_bytes=0,
        )
        size = record_bytes(header)
        if len(new_ids) * size > self._scheduler.host_room_bytes:
            raise SessionsLimit(
                f"no room for {len(new_ids):,} more states of {size:,} bytes in host memory",
                limit="limits.host_state_bytes_max",
                maximum=self._scheduler.limits.host_state_bytes_max,
            )


def _check_copyable(session: Session) -> None:
    if session.quarantined:
        raise SessionQuarantined(
            f"session {session.session_id!r} is quarantined, so it cannot be copied; reset or"
            " close it"
        )

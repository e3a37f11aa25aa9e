"""Why a chunk that passed the door is refused after all: what depends on its session or on time.

The numbers of its steps are the session's own matter (see `Session.settle`).
"""

from conveyor_server.core import Chunk
from conveyor_server.errors import (
    DeadlineExceeded,
    SessionMismatch,
    SessionQuarantined,
    SessionSuperseded,
    StepsInFlightLimit,
)
from conveyor_server.sessions.session import Session


def check_arrival(session: Session, chunk: Chunk, steps_in_flight_max: int) -> None:
    """Checks whether a chunk may join its session's queue.

    Raises:
        SessionSuperseded, SessionMismatch, SessionQuarantined, StepsInFlightLimit.
    """
    if chunk.epoch and chunk.epoch != session.epoch:
        raise SessionSuperseded(f"session {session.session_id!r} has been opened elsewhere since")
    if chunk.handle and chunk.reply is not session.owner:
        raise SessionSuperseded(f"session {session.session_id!r} was released by its stream")
    if chunk.model is not session.model:
        raise SessionMismatch(
            f"session {session.session_id!r} is now on model {session.model.key.name!r} version"
            f" {session.model.key.version}"
        )
    if session.quarantined:
        raise quarantined(session)
    # A session made for one call is bounded by that call's own limit.
    in_flight = 0 if session.ephemeral else session.steps_in_flight + chunk.length
    if in_flight > steps_in_flight_max:
        raise StepsInFlightLimit(
            f"session {session.session_id!r} has {session.steps_in_flight:,} steps in flight, and"
            f" this chunk has {chunk.length:,} more; wait for answers",
            limit="limits.steps_in_flight_max",
            maximum=steps_in_flight_max,
        )


def check_in_time(chunk: Chunk, now: float) -> None:
    """Raises `DeadlineExceeded` if a chunk's time was over before its first step was run."""
    due = chunk.deadline_seconds
    if due is not None and not chunk.done and now > due:
        raise DeadlineExceeded("the chunk did not start before its deadline, so it was not run")


def quarantined(session: Session) -> SessionQuarantined:
    """What whoever steps a quarantined session is told."""
    return SessionQuarantined(
        f"session {session.session_id!r} is quarantined: after step {session.applied} its state"
        " became NaN or infinite, or was lost; reset or close it",
        applied_step=session.applied,
    )

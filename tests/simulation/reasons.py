"""What the server may refuse or end, and when."""

import itertools
from typing import Final

from conveyor_server.core import Chunk, OpenMode, SessionKey
from conveyor_server.errors import ConveyorError, SessionEnded
from tests.simulation.expected import Expected
from tests.simulation.world import World

ENDINGS: Final = {"SESSION_EXPIRED", "SESSION_CLOSED", "SESSION_EVICTED", "SESSION_NOT_FOUND"}


def justify_failure(
    world: World, expected: Expected | None, chunk: Chunk, first_step: int, error: ConveyorError
) -> None:
    """Why a chunk could be refused, or ended before its end."""
    reason = error.reason
    begun = first_step != chunk.first_step
    if reason in ENDINGS:
        if expected is not None:
            assert isinstance(error, SessionEnded)
            justify_end(world, expected, error)
        return
    assert expected is not None, f"{reason}, though there is no such session"
    if reason == "SESSION_SUPERSEDED":
        lost = world.unanswered[chunk] is not expected or chunk.epoch != expected.epoch
        assert chunk.epoch, "a chunk that named no claim was dropped with one"
        given_back = chunk.handle and expected.owner is not chunk.reply
        assert lost or given_back or world.dropping == expected.key
    elif reason == "SESSION_MISMATCH":
        assert chunk.model is not expected.model
    elif reason == "STEP_GAP":
        assert first_step > expected.applied + 1
        assert error.metadata["expected_step"] == str(expected.applied + 1)
    elif reason == "STEP_CONFLICT":
        assert expected.contradicts(chunk)
    elif reason == "STEP_RESULT_NOT_HELD":
        assert first_step <= expected.applied
    elif reason in ("ENGINE_FAILED", "DEVICE_OUT_OF_MEMORY"):
        of_memory = bool(expected.memory) and error in world.failing_memories
        assert error is world.failing or of_memory
        world.ended["MEMORY_FAILED"] += of_memory
    elif reason == "SESSION_QUARANTINED":
        assert expected.quarantined
    elif reason == "STEPS_IN_FLIGHT_LIMIT":
        assert not expected.ephemeral
        before = itertools.takewhile(lambda each: each is not chunk, world.unanswered)
        in_flight = sum(each.length for each in before if same_session(each, expected.key))
        assert in_flight + chunk.length > world.setup.steps_in_flight_max
    elif reason == "DEADLINE_EXCEEDED":
        assert chunk.deadline_seconds is not None
        assert world.now > chunk.deadline_seconds
        assert not begun
    else:
        raise AssertionError(f"{reason} is no reason to refuse a chunk")


def justify_refusal(
    world: World,
    error: ConveyorError,
    key: SessionKey,
    mode: OpenMode = OpenMode.CREATE,
    memory: bytes = b"",
) -> None:
    """Why a session could not be opened or made."""
    live, reason = world.live, error.reason
    world.ended[reason] += 1
    mine = sum(each[0] == key[0] for each in live)
    if reason == "SESSION_EXISTS":
        assert mode is OpenMode.CREATE
        assert key in live
    elif reason in ENDINGS:
        assert mode is OpenMode.RESUME
        assert key not in live
    elif reason == "SESSION_MISMATCH":
        assert key in live
    elif error.metadata.get("limit") == "limits.host_state_bytes_max":
        assert mode is OpenMode.CREATE, "an open takes no host memory"
        assert world.setup.host_state_bytes_max < 1 << 30
        world.ended["HOST_STATE_LIMIT"] += 1
    elif error.metadata.get("limit") == "limits.memories_bytes_max":
        held = world.rig.scheduler.memories.size_bytes
        assert held + len(memory) > world.setup.memories_bytes_max
        world.ended["MEMORIES_LIMIT"] += 1
    elif reason == "SESSIONS_LIMIT":
        assert len(live) >= world.setup.sessions_max
    else:
        assert reason == "PRINCIPAL_SESSIONS_LIMIT"
        assert mine >= world.setup.principal_sessions_max


def justify_end(world: World, expected: Expected, error: SessionEnded) -> None:
    """Why a session could end."""
    if error.reason == "SESSION_CLOSED":
        assert expected.closing, "closed by nobody"
    elif error.reason == "SESSION_EVICTED":
        assert world.setup.host_state_bytes_max < 1 << 30, "evicted without need"
    else:
        assert error.reason == "SESSION_EXPIRED"
        accepted = any(same_session(chunk, expected.key) for chunk in world.unanswered)
        ends = expected.lifetime_ends if accepted else expected.lease_ends
        assert world.now >= ends, "expired before its time"


def same_session(chunk: Chunk, key: SessionKey) -> bool:
    """Whether a chunk is for that session."""
    return (chunk.principal, chunk.session_id) == key

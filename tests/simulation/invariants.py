"""What has to be true between any two things that happen."""

from collections import Counter

from conveyor_server.core import Chunk, SessionKey
from conveyor_server.errors import SessionEnded, SessionNotFound
from conveyor_server.scheduler.scheduler import Batch
from conveyor_server.sessions.session import Session
from tests.simulation.expected import Expected
from tests.simulation.world import PRINCIPALS, STREAMABLE, World
from tests.support.models import ATTENTIVE, BOTHWAYS, FEATURES, TOKENS


def check(world: World) -> None:
    """Looks at everything."""
    _check_slots(world)
    _check_memories(world)
    _check_counts(world)
    for key, expected in world.live.items():
        session = world.rig.scheduler.sessions.find(key)
        assert session is not None, f"{key} is gone"
        _check_session(world, session, expected)
        _check_invisible(world, key)
    _check_listing(world)


def check_leases(world: World) -> None:
    """Nothing outlives its lease; looked at where the scheduler has just done so too."""
    for key, expected in world.live.items():
        session = world.rig.scheduler.sessions.find(key)
        assert session is not None
        assert world.now < expected.lifetime_ends, "alive beyond its lifetime"
        if not session.queue and not session.running:
            assert world.now < session.lease_ends, "idle beyond its lease"


def _check_slots(world: World) -> None:
    engine, sessions = world.rig.engine, list(world.rig.scheduler.sessions)
    for model in STREAMABLE:
        allocator = engine.allocators[model.key]
        allocator.check()
        slots = [
            session.slot
            for session in sessions
            if session.model is model and session.slot is not None
        ]
        assert len(set(slots)) == len(slots) == allocator.used
        assert 0 not in slots, "the dummy slot was handed out"
        assert world.rig.scheduler.residency.resident(model.key) == len(slots)
    on_host = sum(
        len(world.rig.store.get(session.key))
        for session in sessions
        if session.slot is None and session.tier != 0
    )
    assert world.rig.store.size_bytes == on_host, "a record without a session"


def _check_memories(world: World) -> None:
    """Every memory is some live session's, and on the device as long as one has a slot."""
    memories, sessions = world.rig.scheduler.memories, list(world.rig.scheduler.sessions)
    attending = Counter(session.memory for session in sessions if session.memory is not None)
    resident = Counter(
        session.memory
        for session in sessions
        if session.memory is not None and session.slot is not None
    )
    for memory, count in attending.items():
        assert memory.sessions == count
        assert memory.resident == resident[memory]
        assert bool(memory.number) == bool(resident[memory])
    assert memories.size_bytes == sum(len(memory.rows) for memory in attending)
    assert memories.size_bytes <= world.setup.memories_bytes_max
    assert memories.device_bytes == sum(len(memory.rows) for memory in resident)
    on_device = world.rig.engine.memories[ATTENTIVE.key]
    assert on_device == {memory.number: memory.rows for memory in resident}
    assert not any(world.rig.engine.memories[key] for key in (FEATURES.key, TOKENS.key))


def _check_counts(world: World) -> None:
    scheduler, setup = world.rig.scheduler, world.setup
    accepted = len(world.unanswered) + len(world.whole)
    assert scheduler.inbox.chunks == accepted <= setup.inbox_chunks_max
    size = sum(len(each.rows) for each in (*world.unanswered, *world.whole))
    predictions = scheduler.predictions
    assert predictions.waiting + predictions.running == len(world.whole)
    assert len(world.whole) <= setup.predictions_max
    assert predictions.running <= setup.running_predictions_max
    assert scheduler.inbox.size_bytes == size <= setup.inbox_bytes_max
    assert len(scheduler.sessions) == len(world.live) <= setup.sessions_max
    owners = Counter(key[0] for key in world.live)
    assert max(owners.values(), default=0) <= setup.principal_sessions_max
    models = Counter(expected.model.key for expected in world.live.values())
    models[BOTHWAYS.key] += len(world.whole)
    assert +scheduler.models.sessions == +models
    held = sum(session.held.size_bytes for session in scheduler.sessions)
    assert scheduler.held.size_bytes == held <= setup.held_results_total_bytes_max
    assert len(scheduler.sessions._tombstones) <= setup.ended_sessions_max
    assert len(scheduler.sessions._leases) <= 2 * len(world.live) + 64


def _check_session(world: World, session: Session, expected: Expected) -> None:
    assert session.applied == expected.applied
    assert session.epoch == expected.epoch
    assert session.owner is expected.owner
    assert session.quarantined == expected.quarantined
    assert (b"" if session.memory is None else session.memory.rows) == expected.memory
    running = isinstance(world.batch, Batch) and session in world.batch.sessions
    assert session.running == running
    if not running:
        carry = world.rig.scheduler.residency.checkpoint(session).carry
        assert carry == expected.carry, "another carry than straight through"
        assert session.ready == bool(session.queue), "a chunk waits that nobody will run"
    assert session.held.steps <= world.setup.held_results_steps_max
    assert session.held.size_bytes <= world.setup.held_results_bytes_max
    queued = [item for item in session.queue if isinstance(item, Chunk)]
    assert session.steps_in_flight == sum(chunk.length for chunk in queued)
    assert expected.ephemeral or session.steps_in_flight <= world.setup.steps_in_flight_max
    assert set(queued) <= set(world.unanswered)


def _check_listing(world: World) -> None:
    for principal in PRINCIPALS:
        views, more, total = world.rig.operations.page(principal, after="", size=100, model="")
        mine = sorted(
            key[1]
            for key, expected in world.live.items()
            if key[0] == principal and not expected.ephemeral
        )
        assert [view.session_id for view in views] == mine
        assert (more, total) == (False, len(mine))


def _check_invisible(world: World, key: SessionKey) -> None:
    """A session is as good as none to anybody else."""
    for stranger in ("eve", *(each for each in PRINCIPALS if each != key[0])):
        if (stranger, key[1]) in world.live:
            continue
        try:
            world.rig.operations.get(stranger, key[1])
        except SessionNotFound as error:
            message = error.message
        except SessionEnded:
            assert stranger in PRINCIPALS  # it had one of its own under that id
            continue
        assert message == f"there is no session {key[1]!r}"

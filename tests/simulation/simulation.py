"""A whole server below its door, driven step by step and compared with the rules after each one.

Everything is real but time and arithmetic. What callers send goes through admission into the inbox,
just as from `rpc`; a tick is taken in its three parts, so that things arrive while a batch runs, as
they do with the driver's worker thread.
"""

from typing import Final

from conveyor_server.errors import (
    ConveyorError,
    DeviceOutOfMemory,
    EngineFailed,
    SessionEnded,
    SessionNotFound,
)
from conveyor_server.scheduler.scheduler import Batch, Outcome
from tests.simulation.callers import Callers
from tests.simulation.invariants import check, check_leases
from tests.simulation.reasons import justify_end
from tests.simulation.streams import Stream
from tests.simulation.world import PRINCIPALS, STREAMS, Setup, World

RECORD_BYTES_MAX: Final = 512
"""No record of the small models is larger."""


class Simulation:
    """The server, the callers, and what has to be true of them."""

    def __init__(self, setup: Setup) -> None:
        self.world = World(setup)
        self.streams = [Stream(self.world, PRINCIPALS[number % 2]) for number in range(STREAMS)]
        self.world.streams += self.streams
        self.callers = Callers(self.world)
        self._outcome: Outcome | None = None

    def fail_next(self, *, memory: bool) -> None:
        """The next engine call will fail."""
        error: ConveyorError = EngineFailed("broken")
        if memory:
            error = DeviceOutOfMemory("fake")
        self.world.rig.engine.fail_next = [error]

    def fail_next_memory(self) -> None:
        """The next memory will not get onto the device."""
        error = DeviceOutOfMemory("fake")
        self.world.rig.engine.fail_next_memory = [error]
        self.world.failing_memories.append(error)

    def begin(self) -> None:
        """The first part of a tick and the engine call; things may arrive before `finish`."""
        world = self.world
        assert world.batch is None
        page_outs = world.rig.metrics.page_outs.total()
        world.batch = world.rig.scheduler.begin()
        self._notice_ended()
        check_leases(world)
        page_outs = world.rig.metrics.page_outs.total() - page_outs
        # What this very tick pages out is counted at the next one.
        bound = world.setup.host_state_bytes_max + page_outs * RECORD_BYTES_MAX
        assert world.rig.store.size_bytes <= bound
        if world.batch is not None:
            self._outcome = world.rig.scheduler.execute(world.batch)

    def finish(self) -> None:
        """The last part of a tick."""
        world = self.world
        batch, outcome = world.batch, self._outcome
        assert batch is not None
        world.batch, self._outcome = None, None
        if isinstance(outcome, ConveyorError):
            world.failing = outcome
        elif isinstance(batch, Batch):
            assert isinstance(outcome, list)
            for session, done in zip(batch.sessions, outcome, strict=True):
                if not done.finite:
                    world.live[session.key].quarantined = True
                    world.ended["quarantined"] += 1
        world.rig.scheduler.finish(batch, outcome)
        world.failing = None
        self._notice_ended()
        self.check()

    def tick(self) -> None:
        """A whole tick, or the rest of one."""
        world = self.world
        if world.batch is None:
            self.begin()
        if world.batch is not None:
            self.finish()
        self.check()

    def drain(self) -> None:
        """Ticks until there is nothing to do; then everything must have been answered."""
        world = self.world
        for _ in range(2_000):
            self.tick()
            if not world.rig.scheduler.has_work:
                break
        else:
            raise AssertionError("the scheduler never comes to rest")
        assert not world.unanswered, "a chunk was never answered"
        assert not world.operations_waiting, "an operation was never answered"
        assert not world.whole, "a whole sequence was never answered"
        assert world.rig.scheduler.inbox.chunks == 0
        assert world.rig.scheduler.inbox.size_bytes == 0
        assert all(not session.queue for session in world.rig.scheduler.sessions)

    def check(self) -> None:
        """Looks whether everything holds that has to."""
        check(self.world)

    def _notice_ended(self) -> None:
        """Sessions that the server ended by itself have to have had a reason to end."""
        world = self.world
        sessions = world.rig.scheduler.sessions
        for key, expected in list(world.live.items()):
            if sessions.find(key) is None:
                try:
                    sessions.get(key, world.now)
                except SessionEnded as error:
                    justify_end(world, expected, error)
                    world.over(expected, error.reason)
                except SessionNotFound:
                    world.over(expected, "forgotten")  # more ended at once than are remembered

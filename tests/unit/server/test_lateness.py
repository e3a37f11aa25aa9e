"""The server's own absence: noticed, and it ends nobody's lease."""

from __future__ import annotations

import pytest

from conveyor_server.errors import SessionExpired
from conveyor_server.scheduler.lateness import LATE_SECONDS, LOOK_SECONDS, Lateness
from conveyor_server.scheduler.scheduler import READ_SECONDS
from tests.support.replies import Recorder
from tests.support.rig import PRINCIPAL, Rig

IDLE = 5.0
STOPPED = 20.0


def test_a_loop_that_is_there_is_never_late() -> None:
    lateness = Lateness(100.0)
    assert [lateness.look(100.0 + LOOK_SECONDS * n) for n in range(1, 50)] == [0] * 49


def test_a_gap_is_told_once_and_whole() -> None:
    lateness = Lateness(100.0)
    assert lateness.look(100.0 + LATE_SECONDS) == 0
    assert lateness.look(120.0 + LATE_SECONDS) == pytest.approx(20)
    assert lateness.look(120.0 + LATE_SECONDS) == 0


def _stopped(rig: Rig) -> None:
    """The server stops, and goes on."""
    rig.clock.advance(STOPPED)
    rig.scheduler.was_late(STOPPED)


def test_what_was_left_of_a_lease_is_left_after_a_stop() -> None:
    rig = Rig()
    rig.open(idle_seconds=IDLE)
    rig.clock.advance(2)
    _stopped(rig)
    rig.run()
    rig.clock.advance(2.5)
    rig.run()
    assert rig.view().applied_step == 0
    rig.clock.advance(0.6)
    rig.run()
    with pytest.raises(SessionExpired):
        rig.view()


def test_what_arrived_meanwhile_is_read_before_a_lease_ends() -> None:
    """A lease that had nearly ended, and a heartbeat that is not yet read at the first tick."""
    rig, owner = Rig(), Recorder()
    rig.open(owner=owner, idle_seconds=IDLE)
    rig.open("silent", idle_seconds=IDLE)
    rig.clock.advance(IDLE - 0.001)
    _stopped(rig)
    rig.clock.advance(READ_SECONDS / 2)
    rig.run()
    assert not owner.losses
    rig.operations.keep_alive(PRINCIPAL, ["s"], owner)
    assert rig.scheduler.next_wakeup() == rig.clock.monotonic() + READ_SECONDS / 2
    rig.clock.advance(READ_SECONDS / 2)
    rig.run()
    with pytest.raises(SessionExpired):
        rig.view("silent")
    assert rig.view("s").session_id == "s"


def test_a_lifetime_is_not_prolonged() -> None:
    rig = Rig(lifetime_seconds_max=10)
    rig.open(idle_seconds=IDLE)
    rig.clock.advance(1)
    _stopped(rig)
    rig.clock.advance(READ_SECONDS)
    rig.run()
    with pytest.raises(SessionExpired):
        rig.view()

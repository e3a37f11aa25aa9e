"""Limits of the scheduler, the sessions and the inbox: at them all passes, above them nothing."""

from collections.abc import Callable
from typing import Any

import pytest

from conveyor_server.core import OpenRequest, SessionView
from conveyor_server.errors import (
    ConveyorError,
    InboxFull,
    PrincipalSessionsLimit,
    SessionExpired,
    SessionNotFound,
    SessionsLimit,
    StepResultNotHeld,
    StepsInFlightLimit,
)
from conveyor_server.sessions.held import ENTRY_BYTES
from conveyor_server.store.checkpoint import decode
from tests.support.models import FEATURES
from tests.support.replies import Outcome, Recorder
from tests.support.rig import PRINCIPAL, Rig

ROW = FEATURES.input_row_bytes


def _refused(
    call: Callable[[], Any], error: type[ConveyorError], limit: str, maximum: object
) -> None:
    with pytest.raises(error) as caught:
        call()
    assert caught.value.metadata == {"limit": limit, "maximum": str(maximum)}
    assert caught.value.retry_after_seconds is not None


def test_sessions_max() -> None:
    rig = Rig(sessions_max=3)
    for name in "abc":
        rig.open(name)
    _refused(lambda: rig.open("d"), SessionsLimit, "limits.sessions_max", 3)
    assert rig.open("c").resumed
    rig.close("a")
    rig.open("d")


def test_principal_sessions_max() -> None:
    rig = Rig(principal_sessions_max=2)
    rig.open("a")
    rig.open("b")
    limit = "limits.principal_sessions_max"
    _refused(lambda: rig.open("c"), PrincipalSessionsLimit, limit, 2)
    rig.open("c", principal="bob")


@pytest.mark.parametrize("limit", ["sessions_max", "principal_sessions_max"])
def test_a_fork_counts_all_its_copies_or_makes_none(limit: str) -> None:
    rig = Rig(**{limit: 4})
    rig.open("a")
    rig.step("a", 1, [1])
    with pytest.raises((SessionsLimit, PrincipalSessionsLimit)):
        rig.fork("a", "b", "c", "d", "e")
    assert len(rig.scheduler.sessions) == 1
    assert len(rig.fork("a", "b", "c", "d")) == 3
    with pytest.raises((SessionsLimit, PrincipalSessionsLimit)):
        rig.fork("a", "f")


@pytest.mark.parametrize("limit", ["sessions_max", "principal_sessions_max"])
def test_an_import_counts_as_a_session(limit: str) -> None:
    rig = Rig(**{limit: 2})
    rig.open("a")
    snapshot = decode(rig.export("a"))
    rig.operations.import_(PRINCIPAL, snapshot, "b", 1.0)
    with pytest.raises((SessionsLimit, PrincipalSessionsLimit)):
        rig.operations.import_(PRINCIPAL, snapshot, "c", 1.0)


def test_steps_in_flight_max() -> None:
    rig = Rig(steps_in_flight_max=5)
    rig.open()
    recorder = Recorder()
    first = rig.send("s", 1, [1, 2, 3], recorder)
    second = rig.send("s", 4, [4, 5], recorder)
    third = rig.send("s", 6, [6], recorder)
    rig.scheduler.begin()
    refused = recorder.of(third).error
    assert isinstance(refused, StepsInFlightLimit)
    assert refused.metadata == {"limit": "limits.steps_in_flight_max", "maximum": "5"}
    assert not recorder.of(first).settled
    assert not recorder.of(second).settled


def test_steps_in_flight_are_given_back() -> None:
    rig = Rig(steps_in_flight_max=5)
    rig.open()
    for step in range(1, 100, 5):
        rig.step("s", step, range(5))
    with pytest.raises(StepsInFlightLimit):
        rig.step("s", 101, range(6))
    assert rig.session().steps_in_flight == 0


def test_a_session_made_for_one_call_is_bounded_by_that_calls_limit() -> None:
    rig = Rig(steps_in_flight_max=5)
    request = OpenRequest(PRINCIPAL, "", FEATURES.key.name, ephemeral=True)
    view = rig.operations.open(request).view
    assert rig.step(view.session_id, 1, range(40))
    rig.operations.discard(PRINCIPAL, view.session_id)
    rig.operations.discard(PRINCIPAL, view.session_id)
    with pytest.raises(SessionNotFound):
        rig.view(view.session_id)


def test_inbox_chunks_max() -> None:
    rig = Rig(inbox_chunks_max=3)
    rig.open()
    recorder = Recorder()
    for step in range(1, 4):
        rig.send("s", step, [step], recorder)
    limit = "limits.inbox_chunks_max"
    _refused(lambda: rig.send("s", 4, [4], recorder), InboxFull, limit, 3)
    rig.scheduler.begin()  # taken in, but not finished: they still count
    _refused(lambda: rig.send("s", 4, [4], recorder), InboxFull, limit, 3)


def test_inbox_bytes_max() -> None:
    rig = Rig(inbox_bytes_max=1024)
    rig.open()
    recorder = Recorder()
    rows = 1024 // ROW
    _refused(
        lambda: rig.send("s", 1, range(rows + 1), recorder),
        InboxFull,
        "limits.inbox_bytes_max",
        1024,
    )
    rig.send("s", 1, range(rows), recorder)
    _refused(
        lambda: rig.send("s", rows + 1, [1], recorder), InboxFull, "limits.inbox_bytes_max", 1024
    )
    rig.run()
    assert (rig.scheduler.inbox.chunks, rig.scheduler.inbox.size_bytes) == (0, 0)
    rig.send("s", rows + 1, range(rows), recorder)


def test_idle_seconds_default() -> None:
    rig = Rig(idle_seconds_default=7)
    assert rig.open().view.idle_seconds == 7
    assert rig.open("t", idle_seconds=3.0).view.idle_seconds == 3


def test_idle_seconds_max() -> None:
    rig = Rig(idle_seconds_default=7, idle_seconds_max=5)
    assert rig.open().view.idle_seconds == 5


def test_lifetime_seconds_max() -> None:
    rig = Rig(lifetime_seconds_max=10, idle_seconds_default=4)
    rig.open()
    for step in range(1, 4):
        rig.clock.advance(3)
        rig.step("s", step, [step])
    rig.clock.advance(0.999)
    rig.run()
    assert rig.view().expire_seconds - rig.view().create_seconds == 10
    rig.clock.advance(0.001)
    with pytest.raises(SessionExpired):
        rig.step("s", 4, [4])


def test_held_results_steps_max() -> None:
    rig = Rig(held_results_steps_max=4, quantum_steps=1)
    rig.open()
    rows = rig.step("s", 1, range(4))
    assert rig.step("s", 1, range(4)) == rows
    rig.step("s", 5, [4])
    assert rig.step("s", 2, range(1, 5))[: -FEATURES.output_row_bytes] == rows[12:]
    with pytest.raises(StepResultNotHeld):
        rig.step("s", 1, [0])


def test_held_results_bytes_max() -> None:
    bytes_a_step = ENTRY_BYTES + FEATURES.input_row_bytes + FEATURES.output_row_bytes
    rig = Rig(held_results_bytes_max=3 * bytes_a_step, quantum_steps=1)
    rig.open()
    rig.step("s", 1, range(3))
    assert rig.session().held.size_bytes == 3 * bytes_a_step
    rig.step("s", 4, [3])
    assert rig.session().held.size_bytes == 3 * bytes_a_step
    rig.step("s", 2, [1])
    with pytest.raises(StepResultNotHeld):
        rig.step("s", 1, [0])


def test_held_results_total_bytes_max() -> None:
    bytes_a_step = ENTRY_BYTES + FEATURES.input_row_bytes + FEATURES.output_row_bytes
    rig = Rig(held_results_total_bytes_max=2 * bytes_a_step)
    for name in "ab":
        rig.open(name)
        rig.step(name, 1, [1])
    assert rig.scheduler.held.size_bytes == 2 * bytes_a_step
    rig.step("a", 1, [1])
    rig.open("c")
    rig.step("c", 1, [1])
    assert rig.scheduler.held.size_bytes == 2 * bytes_a_step
    rig.step("b", 1, [1])
    with pytest.raises(StepResultNotHeld):
        rig.step("a", 1, [1])
    for name in "abc":
        rig.close(name)
    assert rig.scheduler.held.size_bytes == 0


def test_ended_sessions_are_remembered_up_to_the_limits() -> None:
    rig = Rig(ended_sessions_max=1, ended_seconds_max=5)
    for name in "ab":
        rig.open(name)
        rig.close(name)
    with pytest.raises(SessionNotFound):
        rig.view("a")
    with pytest.raises(ConveyorError) as caught:
        rig.view("b")
    assert caught.value.reason == "SESSION_CLOSED"
    rig.clock.advance(5.1)
    with pytest.raises(SessionNotFound):
        rig.view("b")


def test_a_refused_chunk_changes_nothing() -> None:
    rig = Rig(steps_in_flight_max=4, inbox_chunks_max=2)
    rig.open()
    rig.step("s", 1, [1])
    before = rig.scheduler.residency.checkpoint(rig.session()).carry
    for first, values in ((3, [3]), (1, [9]), (2, range(5))):
        with pytest.raises(ConveyorError):
            rig.step("s", first, values)
    with pytest.raises(ConveyorError):
        rig.step("nobody", 1, [1])
    assert rig.scheduler.residency.checkpoint(rig.session()).carry == before
    assert rig.view().applied_step == 1
    assert rig.session().steps_in_flight == 0
    assert (rig.scheduler.inbox.chunks, rig.scheduler.inbox.size_bytes) == (0, 0)


def test_an_operation_on_a_session_that_is_not_there_is_refused() -> None:
    rig = Rig()
    view, views = Outcome[SessionView](), Outcome[list[SessionView]]()
    snapshot = Outcome[tuple[SessionView, bytes]]()
    rig.operations.close(PRINCIPAL, "x", view)
    rig.operations.fork(PRINCIPAL, "x", ["y"], 0, views)
    rig.operations.export(PRINCIPAL, "x", snapshot)
    for outcome in (view, views, snapshot):
        assert isinstance(outcome.error, SessionNotFound)

"""Who may do what to a session that several reach for: the newest claim wins, and wins whole."""

from typing import Any

import pytest

from conveyor_server.core import OpenMode, SessionState, SessionView
from conveyor_server.errors import (
    ConveyorError,
    SessionClosed,
    SessionExists,
    SessionMismatch,
    SessionNotFound,
    SessionQuarantined,
    SessionSuperseded,
)
from tests.support.engine import straight_through
from tests.support.models import FEATURES, TOKENS
from tests.support.replies import Outcome, Recorder
from tests.support.rig import PRINCIPAL, Rig, rows_of


def outputs(*values: int) -> bytes:
    return b"".join(straight_through(FEATURES, rows_of(FEATURES, *values))[0])


def close(rig: Rig, **more: Any) -> Outcome[SessionView]:
    outcome = Outcome[SessionView]()
    rig.operations.close(PRINCIPAL, "s", outcome, **more)
    return outcome


def test_the_newer_stream_wins_and_the_older_one_is_told() -> None:
    rig, old, new = Rig(quantum_steps=1), Recorder(), Recorder()
    rig.open(owner=old)
    half = rig.send("s", 1, [1, 2], old, epoch=1)
    behind = rig.send("s", 3, [3], old, epoch=1)
    rig.scheduler.tick()
    opened = rig.open(owner=new)
    assert (opened.resumed, opened.view.epoch, opened.view.applied_step) == (True, 2, 1)
    (loss,) = old.losses
    assert (loss.epoch, loss.applied_step) == (1, 1)
    for chunk, step in ((half, 2), (behind, 3)):
        assert isinstance(old.of(chunk).error, SessionSuperseded)
        assert old.of(chunk).failed_step == step
    late = rig.send("s", 2, [2], old, epoch=1)
    rig.run()
    assert isinstance(old.of(late).error, SessionSuperseded)
    chunk = rig.send("s", 2, [20], new, epoch=2)
    rig.run()
    assert new.of(chunk).rows == outputs(1, 20)[-FEATURES.output_row_bytes :]


def test_a_call_that_names_an_older_claim_is_dropped_with_it() -> None:
    rig, call = Rig(quantum_steps=1), Recorder()
    rig.open()
    named = rig.send("s", 1, [1, 2], call, epoch=1)
    unnamed = rig.send("s", 3, [3], call)
    rig.scheduler.tick()
    assert rig.open(owner=Recorder()).view.applied_step == 1
    assert isinstance(call.of(named).error, SessionSuperseded)
    rig.run()
    assert rig.view().applied_step == 1
    assert call.of(unnamed).error is not None  # a gap now


def test_a_call_that_names_no_claim_runs_under_any() -> None:
    rig, call = Rig(quantum_steps=1), Recorder()
    rig.open()
    chunk = rig.send("s", 1, [1, 2], call)
    rig.scheduler.tick()
    rig.open(owner=Recorder())
    rig.run()
    assert call.of(chunk).rows == outputs(1, 2)


def test_a_stream_that_lost_a_session_cannot_close_it() -> None:
    rig, old, new = Rig(), Recorder(), Recorder()
    rig.open(owner=old)
    rig.open(owner=new)
    with pytest.raises(SessionSuperseded):
        assert close(rig, owner=old, epoch=1).result
    assert new.losses == []
    assert close(rig, owner=new, epoch=2).result.epoch == 2
    assert new.losses == []  # it asked for it


def test_a_close_that_waits_goes_with_its_claim() -> None:
    rig, old, new = Rig(quantum_steps=1), Recorder(), Recorder()
    rig.open(owner=old)
    rig.send("s", 1, [1, 2], old, epoch=1)
    rig.scheduler.tick()
    waiting = close(rig, owner=old, epoch=1)
    assert not waiting.done
    rig.open(owner=new)
    assert isinstance(waiting.error, SessionSuperseded)
    assert rig.view().epoch == 2


def test_an_open_never_answers_with_a_session_that_a_waiting_close_just_ended() -> None:
    for mode in (OpenMode.EITHER, OpenMode.RESUME):
        rig, old, new = Rig(quantum_steps=1), Recorder(), Recorder()
        rig.open(owner=old)
        rig.send("s", 1, [1, 2], old, epoch=1)
        rig.scheduler.tick()
        waiting = close(rig)
        if mode is OpenMode.RESUME:
            with pytest.raises(SessionClosed):
                rig.open(owner=new, mode=mode, model="")
        else:
            opened = rig.open(owner=new, mode=mode)
            assert (opened.resumed, opened.view.applied_step) == (False, 0)
            assert rig.session().owner is new
        assert waiting.result.applied_step == 1


def test_what_was_sent_to_an_earlier_session_of_the_id_does_not_run_on_the_later() -> None:
    rig, old = Rig(), Recorder()
    rig.open(owner=old)
    rig.close()
    assert rig.open(owner=Recorder()).view.epoch == 2
    chunk = rig.send("s", 1, [1], old, epoch=1)
    rig.run()
    assert isinstance(old.of(chunk).error, SessionSuperseded)
    assert rig.view().applied_step == 0


def test_what_was_checked_against_another_model_does_not_run() -> None:
    rig, call = Rig((FEATURES, TOKENS)), Recorder()
    rig.open(model=TOKENS.key.name)
    chunk = rig.send("s", 1, [1], call, model=TOKENS)
    rig.close()
    rig.open(model=FEATURES.key.name)
    rig.run()
    assert isinstance(call.of(chunk).error, SessionMismatch)
    assert rig.engine.runs == []


def test_a_session_given_back_lives_on_without_what_nobody_waits_for() -> None:
    rig, old, new = Rig(quantum_steps=1), Recorder(), Recorder()
    rig.open(owner=old)
    chunk = rig.send("s", 1, [1, 2, 3], old, epoch=1)
    rig.scheduler.tick()
    assert rig.operations.detach(PRINCIPAL, "s", 1, old) == 1
    assert rig.operations.detach(PRINCIPAL, "s", 1, old) is None
    assert isinstance(old.of(chunk).error, SessionSuperseded)
    late = rig.send("s", 2, [2], old, epoch=1, handle=1)
    rig.run()
    assert isinstance(old.of(late).error, SessionSuperseded)
    opened = rig.open(owner=new)
    assert (opened.resumed, opened.view.applied_step) == (True, 1)
    assert old.losses == []
    assert rig.operations.detach(PRINCIPAL, "s", 1, old) is None


def test_a_stream_that_opens_a_session_twice_keeps_the_newer_claim() -> None:
    rig, stream = Rig(), Recorder()
    rig.open(owner=stream)
    assert rig.open(owner=stream).view.epoch == 2
    assert [loss.epoch for loss in stream.losses] == [1]
    assert rig.session().owner is stream


@pytest.mark.parametrize(
    ("more", "error"),
    [
        ({"mode": OpenMode.CREATE}, SessionExists),
        ({"model": TOKENS.key.name}, SessionMismatch),
        ({"version": 2}, SessionMismatch),
    ],
)
def test_a_refused_open_takes_nothing_from_the_owner(
    more: dict[str, Any], error: type[ConveyorError]
) -> None:
    rig, owner = Rig((FEATURES, TOKENS)), Recorder()
    rig.open(owner=owner)
    with pytest.raises(error):
        rig.open(owner=Recorder(), **more)
    assert owner.losses == []
    assert rig.session().owner is owner
    assert rig.view().epoch == 1


def test_a_heartbeat_keeps_only_ones_own_sessions_alive() -> None:
    rig, mine, others = Rig(idle_seconds_default=10), Recorder(), Recorder()
    rig.open("mine", mine)
    rig.open("others", others)
    rig.clock.advance(6)
    rig.operations.keep_alive(PRINCIPAL, ["mine", "others", "nobody"], mine)
    rig.clock.advance(6)
    rig.run()
    assert rig.view("mine")
    with pytest.raises(ConveyorError):
        rig.view("others")
    assert [loss.error.reason for loss in others.losses] == ["SESSION_EXPIRED"]


def test_operations_come_after_what_was_sent_before_them() -> None:
    rig, stream = Rig(quantum_steps=1), Recorder()
    rig.open(owner=stream)
    first = rig.send("s", 1, [1, 2], stream, epoch=1)
    rig.scheduler.tick()
    reset = Outcome[SessionView]()
    snapshot = Outcome[tuple[SessionView, bytes]]()
    closed = Outcome[SessionView]()
    post, operations = rig.scheduler.inbox.put_operation, rig.operations
    post(lambda: operations.export(PRINCIPAL, "s", snapshot))
    post(lambda: operations.reset(PRINCIPAL, "s", reset))
    again = rig.send("s", 1, [5], stream, epoch=1)
    post(lambda: operations.close(PRINCIPAL, "s", closed, stream, 1))
    behind = rig.send("s", 2, [6], stream, epoch=1)
    assert not snapshot.done
    rig.run()
    assert stream.of(first).rows == outputs(1, 2)
    assert snapshot.result[0].applied_step == 2
    assert reset.result.applied_step == 0
    assert stream.of(again).rows == outputs(5)
    assert closed.result.applied_step == 1
    assert isinstance(stream.of(behind).error, SessionClosed)


def test_a_reset_session_has_forgotten_its_results() -> None:
    rig = Rig()
    rig.open()
    rig.step("s", 1, [1, 2, 3])
    rig.reset()
    assert rig.session().held.steps == 0
    assert rig.scheduler.held.size_bytes == 0
    assert rig.operations.position(PRINCIPAL, "s")[2:] == (0, None)
    assert rig.step("s", 1, [7]) == outputs(7)
    assert rig.step("s", 1, [7]) == outputs(7)


def test_a_quarantined_session_can_only_be_reset_or_closed() -> None:
    rig, stream = Rig(), Recorder()
    rig.open(owner=stream)
    rig.step("s", 1, [1])
    rig.engine.poisoned.add(rows_of(FEATURES, 13))
    chunk = rig.send("s", 2, [2, 13, 3], stream, epoch=1)
    behind = rig.send("s", 5, [5], stream, epoch=1)
    rig.run()
    for each in (chunk, behind):
        error = stream.of(each).error
        assert isinstance(error, SessionQuarantined)
        assert error.metadata == {"applied_step": "1"}
    assert rig.view().state is SessionState.QUARANTINED
    for refused in (lambda: rig.step("s", 2, [2]), rig.export, lambda: rig.fork("s", "t")):
        with pytest.raises(SessionQuarantined):
            refused()
    assert rig.reset().state is SessionState.IDLE
    assert rig.step("s", 1, [1]) == outputs(1)


def test_a_quarantined_session_leaves_its_batch_alone() -> None:
    rig, stream = Rig(), Recorder()
    sent = {}
    for name in "abc":
        rig.open(name)
        sent[name] = rig.send(name, 1, [1], stream)
    rig.engine.poisoned_slots.add(2)
    rig.run()
    assert len(rig.engine.runs) == 1
    assert stream.of(sent["a"]).rows == stream.of(sent["c"]).rows == outputs(1)
    assert isinstance(stream.of(sent["b"]).error, SessionQuarantined)


def test_nobody_elses_session_can_be_reached() -> None:
    rig = Rig()
    rig.open()
    rig.step("s", 1, [1])
    eve = "eve"
    view, views = Outcome[SessionView](), Outcome[list[SessionView]]()
    snapshot = Outcome[tuple[SessionView, bytes]]()
    rig.operations.close(eve, "s", view)
    rig.operations.fork(eve, "s", ["t"], 0, views)
    rig.operations.export(eve, "s", snapshot)
    reset = Outcome[SessionView]()
    rig.operations.reset(eve, "s", reset)
    for outcome in (view, views, snapshot, reset):
        assert isinstance(outcome.error, SessionNotFound)
    for call in (
        lambda: rig.view("s", eve),
        lambda: rig.step("s", 2, [2], principal=eve),
        lambda: rig.open("s", principal=eve, mode=OpenMode.RESUME),
        lambda: rig.operations.position(eve, "s"),
    ):
        with pytest.raises(SessionNotFound):
            call()
    assert rig.open("s", principal=eve).view.applied_step == 0
    assert rig.view("s").applied_step == 1


def test_what_was_sent_after_a_reset_outlives_a_quarantine() -> None:
    rig = Rig(quantum_steps=1)
    rig.open()
    poison = rows_of(FEATURES, 666)
    rig.engine.poisoned.add(poison)
    recorder, reset = Recorder(), Outcome[SessionView]()
    snapshot = Outcome[tuple[SessionView, bytes]]()
    bad = rig.send("s", 1, [666], recorder)
    lost = rig.send("s", 2, [2], recorder)
    # Posted behind the chunks, as the driver does.
    rig.scheduler.inbox.put_operation(lambda: rig.operations.export(PRINCIPAL, "s", snapshot))
    rig.scheduler.inbox.put_operation(lambda: rig.operations.reset(PRINCIPAL, "s", reset))
    anew = rig.send("s", 1, [1], recorder)
    rig.run()
    for chunk in (bad, lost):
        assert isinstance(recorder.of(chunk).error, SessionQuarantined)
    assert isinstance(snapshot.error, SessionQuarantined)
    assert reset.result.applied_step == 0
    assert recorder.of(anew).rows == outputs(1)
    assert rig.view().state is SessionState.IDLE


def test_a_token_never_opens_a_new_session_in_the_place_of_an_ended_one() -> None:
    rig = Rig()
    token = rig.open().token
    rig.step("s", 1, [1, 2])
    rig.close()
    with pytest.raises(SessionClosed):
        rig.open(token=token)
    assert rig.open().view.applied_step == 0

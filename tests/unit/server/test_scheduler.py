"""Ticks: what is selected, what fails alone and what fails together."""

import pytest

from conveyor_server.core import OutputMode, Tier
from conveyor_server.errors import (
    ConveyorError,
    DeadlineExceeded,
    DeviceOutOfMemory,
    EngineFailed,
    StepConflict,
    StepGap,
    StepResultNotHeld,
)
from tests.support.engine import straight_through
from tests.support.models import FEATURES, TOKENS
from tests.support.replies import Recorder
from tests.support.rig import Rig, rows_of

ROW = FEATURES.output_row_bytes


def outputs(*values: int) -> bytes:
    return b"".join(straight_through(FEATURES, rows_of(FEATURES, *values))[0])


@pytest.mark.parametrize("quantum", [1, 2, 3, 7, 100])
@pytest.mark.parametrize("cut", [(12,), (1,) * 12, (5, 7), (1, 10, 1), (4, 4, 4)])
def test_outputs_do_not_depend_on_how_the_input_is_cut(quantum: int, cut: tuple[int, ...]) -> None:
    rig, recorder = Rig(quantum_steps=quantum), Recorder()
    rig.open()
    chunks, first_step = [], 1
    for length in cut:
        values = range(first_step, first_step + length)
        chunks.append(rig.send("s", first_step, values, recorder))
        first_step += length
    rig.run()
    assert b"".join(recorder.of(chunk).rows for chunk in chunks) == outputs(*range(1, 13))


def test_one_tick_runs_one_chunk_of_each_session() -> None:
    rig, recorder = Rig(batch_sessions_max=8), Recorder()
    for name in "abc":
        rig.open(name)
        for step in (1, 2):
            rig.send(name, step, [step], recorder)
    assert rig.scheduler.tick()
    assert [len(works) for _, works in rig.engine.runs] == [3]
    rig.run()
    assert [len(works) for _, works in rig.engine.runs] == [3, 3]


def test_a_batch_is_of_one_model() -> None:
    rig, recorder = Rig((FEATURES, TOKENS)), Recorder()
    rig.open("f")
    rig.open("t", model=TOKENS.key.name)
    rig.send("f", 1, [1], recorder)
    rig.send("t", 1, [1], recorder, model=TOKENS)
    rig.run()
    assert {key for key, _ in rig.engine.runs} == {FEATURES.key, TOKENS.key}


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        (OutputMode.ALL, outputs(1, 2, 3, 4, 5)),
        (OutputMode.LAST, outputs(1, 2, 3, 4, 5)[-ROW:]),
        (OutputMode.NONE, b""),
    ],
)
def test_only_the_wanted_rows_are_computed(mode: OutputMode, expected: bytes) -> None:
    rig = Rig(quantum_steps=2)
    rig.open()
    assert rig.step("s", 1, [1, 2, 3, 4, 5], output=mode) == expected
    wanted = sum(work.outputs for _, works in rig.engine.runs for work in works)
    assert wanted == len(expected) // ROW


@pytest.mark.parametrize(
    "error",
    [EngineFailed("broken"), DeviceOutOfMemory("fake")],
)
def test_a_failed_batch_changes_no_carry_and_can_be_sent_again(error: ConveyorError) -> None:
    rig, recorder = Rig(quantum_steps=2), Recorder()
    for name in "ab":
        rig.open(name)
        rig.step(name, 1, [1])
    chunks = [rig.send(name, 2, [2, 3, 4], recorder) for name in "ab"]
    behind = rig.send("a", 5, [5], recorder)
    rig.scheduler.tick()
    rig.engine.fail_next.append(error)
    rig.run()
    for chunk in chunks:
        answer = recorder.of(chunk)
        assert answer.error is error
        assert answer.failed_step == 4
        assert answer.rows == outputs(1, 2, 3)[ROW:]
    assert isinstance(recorder.of(behind).error, StepGap)
    for name in "ab":
        assert rig.view(name).applied_step == 3
        assert rig.step(name, 4, [4]) == outputs(1, 2, 3, 4)[-ROW:]


def test_a_chunk_has_to_begin_in_time_but_may_end_later() -> None:
    rig, recorder = Rig(quantum_steps=1), Recorder()
    rig.open("a")
    rig.open("b")
    now = rig.clock.monotonic()
    begun = rig.send("a", 1, [1, 2], recorder, deadline=now + 1)
    rig.scheduler.tick()
    rig.clock.advance(1)
    exact = rig.send("b", 1, [1], recorder, deadline=now + 1)
    rig.scheduler.tick()
    rig.clock.advance(0.001)
    late = rig.send("b", 2, [2], recorder, deadline=now + 1)
    rig.run()
    assert recorder.of(begun).rows == outputs(1, 2)
    assert recorder.of(exact).rows == outputs(1)
    assert isinstance(recorder.of(late).error, DeadlineExceeded)
    assert rig.view("b").applied_step == 1
    assert rig.step("b", 2, [2]) == outputs(1, 2)[ROW:]


def test_a_step_sent_again_is_answered_and_not_run() -> None:
    rig, recorder = Rig(), Recorder()
    rig.open()
    first = rig.step("s", 1, [1, 2])
    ran = len(rig.engine.runs)
    chunk = rig.send("s", 1, [1, 2], recorder)
    rig.run()
    assert recorder.of(chunk).rows == first
    assert recorder.of(chunk).pieces[0].duplicate
    assert len(rig.engine.runs) == ran
    partly = rig.send("s", 2, [2, 3], recorder)
    rig.run()
    assert [piece.duplicate for piece in recorder.of(partly).pieces] == [True, False]
    assert recorder.of(partly).rows == outputs(1, 2, 3)[ROW:]


def test_the_same_step_sent_twice_at_once_runs_once() -> None:
    rig, recorder = Rig(), Recorder()
    rig.open()
    chunks = [rig.send("s", 1, [1, 2, 3], recorder) for _ in range(3)]
    rig.run()
    assert {recorder.of(chunk).rows for chunk in chunks} == {outputs(1, 2, 3)}
    assert rig.view().applied_step == 3


def test_a_refused_chunk_does_not_hold_up_the_next() -> None:
    rig, recorder = Rig(), Recorder()
    rig.open()
    first = rig.send("s", 1, [1], recorder)
    gap = rig.send("s", 3, [3], recorder)
    conflict = rig.send("s", 1, [9], recorder)
    last = rig.send("s", 2, [2], recorder)
    rig.run()
    assert recorder.of(first).rows + recorder.of(last).rows == outputs(1, 2)
    assert isinstance(recorder.of(gap).error, StepGap)
    assert isinstance(recorder.of(conflict).error, StepConflict)


def test_a_fork_goes_its_own_way_and_leaves_its_source_alone() -> None:
    rig = Rig(slots=1)
    rig.open(labels=(("kind", "source"),))
    rig.step("s", 1, [1, 2])
    one, two = rig.fork("s", "one", "")
    assert (one.session_id, one.applied_step, one.labels) == ("one", 2, (("kind", "source"),))
    assert one.tier is Tier.HOST
    assert two.session_id not in ("", "s", "one")
    assert rig.step("one", 3, [30]) == outputs(1, 2, 30)[-ROW:]
    assert rig.step("s", 3, [3]) == outputs(1, 2, 3)[-ROW:]
    assert rig.step(two.session_id, 3, [3]) == outputs(1, 2, 3)[-ROW:]
    with pytest.raises(StepResultNotHeld):
        rig.step("one", 1, [1])


def test_a_fork_takes_the_newest_result_along() -> None:
    rig = Rig()
    rig.open()
    rig.step("s", 1, [1, 2, 3])
    rig.fork("s", "copy")
    assert rig.session("copy").held.newest_output() == outputs(1, 2, 3)[-ROW:]
    assert rig.step("copy", 3, [3]) == outputs(1, 2, 3)[-ROW:]
    with pytest.raises(StepResultNotHeld):
        rig.step("copy", 2, [2])
    assert rig.scheduler.held.size_bytes == sum(
        rig.session(name).held.size_bytes for name in ("s", "copy")
    )


def test_a_fork_of_a_session_never_stepped_begins_at_its_beginning() -> None:
    rig = Rig()
    rig.open()
    (copy,) = rig.fork("s", "copy")
    assert copy.tier is Tier.UNSET
    assert rig.step("copy", 1, [1]) == outputs(1)


def test_a_fork_names_the_step_it_wants_or_takes_the_last() -> None:
    rig = Rig()
    rig.open()
    rig.step("s", 1, [1, 2])
    with pytest.raises(ConveyorError) as caught:
        rig.fork("s", "t", at_step=1)
    assert caught.value.reason == "CHECKPOINT_NOT_RETAINED"
    assert rig.fork("s", "t", at_step=2)[0].applied_step == 2
    with pytest.raises(ConveyorError) as caught:
        rig.fork("s", "u", "t")
    assert caught.value.reason == "SESSION_EXISTS"
    assert len(rig.scheduler.sessions) == 2  # all copies or none


def test_nothing_to_do_is_not_a_tick() -> None:
    rig = Rig()
    assert rig.scheduler.begin() is None
    assert not rig.scheduler.has_work
    assert rig.scheduler.next_wakeup() is None
    rig.open(idle_seconds=5.0)
    assert rig.scheduler.next_wakeup() == rig.clock.monotonic() + 5
    assert not rig.scheduler.tick()


def test_nobody_is_let_in_while_the_server_stops() -> None:
    rig = Rig()
    rig.open()
    rig.step("s", 1, [1])
    snapshot = rig.export()
    rig.operations.draining = True
    for call in (
        lambda: rig.open("t"),
        lambda: rig.open("s"),
        lambda: rig.operations.import_("ann", snapshot, "t", 1.0),
        lambda: rig.fork("s", "t"),
    ):
        with pytest.raises(ConveyorError) as caught:
            call()
        assert caught.value.reason == "SERVER_DRAINING"
    assert rig.step("s", 2, [2]) == outputs(1, 2)[ROW:]

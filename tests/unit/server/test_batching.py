"""Which sessions run next."""

from hypothesis import given
from hypothesis import strategies as st

from conveyor_server.core import ModelInfo
from conveyor_server.scheduler.batching import ReadyQueues
from conveyor_server.sessions.held import HeldResults
from conveyor_server.sessions.session import Session
from tests.support.models import FEATURES, TOKENS
from tests.support.replies import Recorder
from tests.support.rig import Rig


def session(name: str, model: ModelInfo = FEATURES) -> Session:
    return Session(name, "ann", model, 1.0, 1.0, 0.0, 0.0, HeldResults(0, 0))


def names(taken: tuple[object, list[Session]] | None) -> list[str]:
    assert taken is not None
    return [each.session_id for each in taken[1]]


def test_first_come_first_served_up_to_the_bound() -> None:
    ready = ReadyQueues(2, 4)
    for name in "abc":
        ready.add(session(name))
    assert names(ready.take()) == ["a", "b"]
    assert names(ready.take()) == ["c"]
    assert ready.take() is None
    assert not ready


def test_the_models_take_turns() -> None:
    ready = ReadyQueues(1, 4)
    for name in "abc":
        ready.add(session(name))
    for name in "xy":
        ready.add(session(name, TOKENS))
    assert [names(ready.take()) for _ in range(5)] == [["a"], ["x"], ["b"], ["y"], ["c"]]


def test_a_session_stands_in_the_queue_once() -> None:
    ready = ReadyQueues(4, 4)
    each = session("a")
    ready.add(each)
    ready.add(each)
    assert names(ready.take()) == ["a"]
    assert not each.ready
    ready.add(each)
    assert names(ready.take()) == ["a"]


def test_a_session_taken_out_is_passed_over() -> None:
    ready = ReadyQueues(2, 4)
    sessions = {name: session(name) for name in "abc"}
    for each in sessions.values():
        ready.add(each)
    ready.discard(sessions["a"])
    assert names(ready.take()) == ["b", "c"]


def test_a_session_put_back_runs_once_for_each_time_it_is_due() -> None:
    ready = ReadyQueues(4, 4)
    each = session("a")
    ready.add(each)
    ready.discard(each)
    ready.add(each)
    assert names(ready.take()) == ["a"]
    taken = ready.take()
    assert taken is None or not taken[1]


@given(left=st.integers(1, 10**6), quantum=st.integers(1, 64))
def test_no_more_than_a_quantum_runs(left: int, quantum: int) -> None:
    assert ReadyQueues(1, quantum).quantum(left) == min(left, quantum)


def test_ten_thousand_steps_delay_one_step_by_one_quantum() -> None:
    rig = Rig(batch_sessions_max=1, quantum_steps=16, slots=4)
    rig.open("long")
    rig.open("short")
    recorder = Recorder()
    long = rig.send("long", 1, range(10_000), recorder)
    rig.scheduler.tick()
    short = rig.send("short", 1, [7], recorder)
    rig.engine.runs.clear()
    while not recorder.of(short).settled:
        rig.scheduler.tick()
    before = sum(work.length for _, works in rig.engine.runs[:-1] for work in works)
    assert before <= 16
    assert not recorder.of(long).settled
    rig.run()
    assert recorder.of(long).settled


def test_a_session_without_a_slot_gets_its_turn() -> None:
    """More sessions in a batch than slots: those left over must not wait for ever."""
    rig = Rig(slots=2, batch_sessions_max=4, quantum_steps=1)
    recorder = Recorder()
    sent = {}
    for name in "abcdef":
        rig.open(name)
        sent[name] = rig.send(name, 1, range(100), recorder)
    for _ in range(30):
        rig.scheduler.tick()
    progress = {name: len(recorder.of(chunk).pieces) for name, chunk in sent.items()}
    assert max(progress.values()) - min(progress.values()) <= 1, progress

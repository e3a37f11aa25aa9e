"""Paging: which carries lie on the device."""

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conveyor_server.core import SessionState, Tier
from conveyor_server.errors import (
    EngineFailed,
    SessionEvicted,
    SessionQuarantined,
    SessionsLimit,
    SnapshotCorrupt,
)
from conveyor_server.scheduler.residency import Residency
from conveyor_server.sessions.session import Session
from conveyor_server.store.checkpoint import decode
from tests.support.engine import straight_through
from tests.support.models import FEATURES
from tests.support.replies import Recorder
from tests.support.rig import PRINCIPAL, Rig, rows_of


def carry_after(*values: int) -> bytes:
    return straight_through(FEATURES, rows_of(FEATURES, *values))[1]


def resident(rig: Rig) -> list[str]:
    sessions = [session for session in rig.scheduler.sessions if session.slot is not None]
    assert len(sessions) == rig.engine.slots_used(FEATURES.key)
    return sorted(session.session_id for session in sessions)


def rig_with(names: str, slots: int) -> Rig:
    rig = Rig(slots=slots)
    for name in names:
        rig.open(name)
    return rig


def test_a_session_has_no_slot_until_it_is_stepped() -> None:
    rig = rig_with("a", 2)
    assert rig.view("a").tier is Tier.UNSET
    rig.step("a", 1, [1])
    assert rig.view("a").tier is Tier.DEVICE
    assert resident(rig) == ["a"]


def test_the_one_stepped_longest_ago_makes_room() -> None:
    rig = rig_with("abcd", 3)
    for name in "abc":
        rig.step(name, 1, [1])
    rig.step("a", 2, [2])
    rig.step("d", 1, [1])
    assert resident(rig) == ["a", "c", "d"]
    assert rig.view("b").tier is Tier.HOST
    rig.step("b", 2, [2])
    assert resident(rig) == ["a", "b", "d"]


def test_paging_changes_no_bit() -> None:
    rig = rig_with("abc", 1)
    outputs = dict.fromkeys("abc", b"")
    for step in range(1, 6):
        for name in "abc":
            outputs[name] += rig.step(name, step, [step * ord(name)])
    for name in "abc":
        values = [step * ord(name) for step in range(1, 6)]
        rows, carry = straight_through(FEATURES, rows_of(FEATURES, *values))
        assert outputs[name] == b"".join(rows)
        assert rig.scheduler.residency.checkpoint(rig.session(name)).carry == carry
    assert rig.metrics.page_outs.total() == 14
    assert rig.metrics.page_ins.total() == 12


def test_a_carry_is_kept_as_a_checkpoint() -> None:
    rig = rig_with("ab", 1)
    rig.step("a", 1, [1, 2, 3])
    rig.step("b", 1, [1])
    checkpoint = decode(rig.store.get((PRINCIPAL, "a")))
    assert checkpoint.carry == carry_after(1, 2, 3)
    header = checkpoint.header
    assert (header.session_id, header.principal, header.step) == ("a", PRINCIPAL, 3)
    assert (header.model_digest, header.epoch) == (FEATURES.digest, 1)
    assert rig.view("a").tier is Tier.HOST
    rig.step("a", 4, [4])
    assert rig.store.size_bytes > 0  # now it is the other one that is paged out
    assert rig.view("a").tier is Tier.DEVICE
    with pytest.raises(KeyError):
        rig.store.get((PRINCIPAL, "a"))


def test_nothing_of_the_batch_is_paged_out() -> None:
    rig = rig_with("abc", 2)
    residency = rig.scheduler.residency
    a, b, c = (rig.session(name) for name in "abc")

    def bring_in(session: Session, keep: set[Session]) -> bool:
        return residency.bring_in(session, keep, residency.victims(FEATURES.key, [session]))

    assert bring_in(a, set())
    assert bring_in(b, {a})
    assert not bring_in(c, {a, b})
    assert (a.slot, b.slot, c.slot) == (1, 2, None)
    assert bring_in(c, {a})
    assert (a.slot, b.slot, c.slot) == (1, None, 2)


def test_a_running_session_cannot_be_paged_out() -> None:
    rig = rig_with("a", 1)
    session = rig.session("a")
    rig.scheduler.residency.bring_in(session, set(), iter(()))
    session.running = True
    with pytest.raises(AssertionError):
        rig.scheduler.residency.page_out(session)


def test_an_ended_session_leaves_neither_slot_nor_record() -> None:
    rig = rig_with("ab", 1)
    rig.step("a", 1, [1])
    rig.step("b", 1, [1])
    rig.close("a")
    assert rig.store.size_bytes == 0
    rig.close("b")
    assert rig.engine.slots_used(FEATURES.key) == 0
    assert rig.scheduler.residency.resident(FEATURES.key) == 0


def test_a_reset_session_begins_anew_wherever_its_carry_lay() -> None:
    rig = rig_with("ab", 1)
    first = rig.step("a", 1, [1])
    rig.step("b", 1, [1])
    assert rig.view("a").tier is Tier.HOST
    assert rig.reset("a").tier is Tier.UNSET
    assert rig.store.size_bytes == 0
    assert rig.step("a", 1, [1]) == first
    rig.reset("a")
    assert rig.step("a", 1, [1]) == first


def test_a_freed_slot_carries_nothing_over() -> None:
    rig = rig_with("a", 1)
    rig.step("a", 1, [1, 2, 3])
    rig.close("a")
    rig.open("b")
    assert rig.step("b", 1, [5]) == b"".join(straight_through(FEATURES, rows_of(FEATURES, 5))[0])


def _pages_out(rig: Rig, names: str) -> None:
    for name in names:
        rig.open(name)
        rig.step(name, 1, [1])


def test_host_memory_is_bounded_by_evicting_those_idle_longest() -> None:
    probe = Rig(slots=1)
    _pages_out(probe, "ab")
    record_bytes = probe.store.size_bytes
    limit = 4 * record_bytes
    rig = Rig(slots=1, host_state_bytes_max=limit)
    _pages_out(rig, "abcde")
    rig.run()
    assert rig.store.size_bytes == limit  # at the limit nobody has to go
    assert rig.view("a").tier is Tier.HOST
    _pages_out(rig, "f")
    rig.run()
    assert rig.store.size_bytes == limit
    with pytest.raises(SessionEvicted):
        rig.view("a")
    assert rig.view("b").tier is Tier.HOST


def test_the_dummy_slot_is_never_used() -> None:
    rig = rig_with("abc", 2)
    for step in range(1, 4):
        for name in "abc":
            rig.step(name, step, [step])
    assert {work.slot for _, works in rig.engine.runs for work in works} == {1, 2}


def test_models_have_slots_of_their_own() -> None:
    from tests.support.models import TOKENS

    rig = Rig((FEATURES, TOKENS), slots=1)
    rig.open("a")
    rig.open("t", model=TOKENS.key.name)
    rig.step("a", 1, [1])
    rig.step("t", 1, [1], model=TOKENS)
    assert rig.metrics.page_outs.total() == 0
    assert isinstance(rig.scheduler.residency, Residency)
    assert isinstance(rig.session("t"), Session)


def in_turn(sessions: int, slots: int, batch: int, rounds: int) -> tuple[Rig, dict[str, list[int]]]:
    """All sessions send a step, again and again; the ticks in which each of them ran."""
    rig = Rig(slots=slots, batch_sessions_max=batch)
    names = [f"s{number}" for number in range(sessions)]
    for name in names:
        rig.open(name)
    recorder = Recorder()
    ran: dict[str, list[int]] = {name: [] for name in names}
    sent = dict.fromkeys(names, 0)
    for tick in range(rounds):
        for name in names:
            if sent[name] == rig.view(name).applied_step:
                sent[name] += 1
                rig.send(name, sent[name], [sent[name]], recorder)
        before = {name: rig.view(name).applied_step for name in names}
        rig.scheduler.tick()
        for name in names:
            if rig.view(name).applied_step > before[name]:
                ran[name].append(tick)
    return rig, ran


def test_sessions_that_come_up_in_turn_do_not_chase_each_other_out() -> None:
    rig, ran = in_turn(8, slots=7, batch=4, rounds=40)
    assert sum(map(len, ran.values())) == 160
    # One session is always out: it costs one page-out a tick, not one a session.
    assert rig.metrics.page_outs.total() <= 40


@given(
    sessions=st.integers(1, 12),
    slots=st.integers(1, 8),
    batch=st.integers(1, 8),
)
@settings(deadline=None)
def test_every_busy_session_gets_its_turn(sessions: int, slots: int, batch: int) -> None:
    turn = -(-sessions // min(slots, batch))  # ticks in which all could run once
    _, ran = in_turn(sessions, slots, batch, rounds=12 * turn)
    for ticks in ran.values():
        gaps = [later - sooner for sooner, later in pairwise([-1, *ticks, 12 * turn])]
        assert max(gaps) <= 2 * turn + 1, ran


def test_the_idle_make_room_before_the_busy() -> None:
    rig = rig_with("abcd", 3)
    for name in "abc":
        rig.step(name, 1, [1])
    recorder = Recorder()
    for name in "ab":  # stepped longer ago than c, but there is more to come
        rig.send(name, 2, range(2, 12), recorder)
    rig.scheduler.tick()
    rig.step("c", 2, [2])
    for name in "ab":
        rig.send(name, 12, range(12, 30), recorder)
    rig.send("d", 1, [1], recorder)
    rig.scheduler.tick()
    assert resident(rig) == ["a", "b", "d"]


def test_a_damaged_record_costs_its_own_session_only(caplog: pytest.LogCaptureFixture) -> None:
    rig = rig_with("ab", 1)
    rig.step("a", 1, [1])
    b = rig.step("b", 1, [1])
    record = bytearray(rig.store.get((PRINCIPAL, "a")))
    record[-40] ^= 1
    rig.store.put((PRINCIPAL, "a"), bytes(record))
    recorder = Recorder()
    lost = rig.send("a", 2, [2], recorder)
    runs = rig.send("b", 2, [2], recorder)
    rig.run()
    assert isinstance(recorder.of(lost).error, SnapshotCorrupt)
    assert b + recorder.of(runs).rows == b"".join(
        straight_through(FEATURES, rows_of(FEATURES, 1, 2))[0]
    )
    assert rig.view("a").state is SessionState.QUARANTINED
    assert rig.view("a").tier is Tier.HOST  # no slot was spent on it
    with pytest.raises(SessionQuarantined):
        rig.step("a", 2, [2])
    with pytest.raises(SessionQuarantined):
        rig.fork("a", "copy")
    assert any(record.exc_info for record in caplog.records)
    rig.reset("a")
    assert rig.step("a", 1, [1]) == b
    assert rig.engine.slots_used(FEATURES.key) == 1


def test_a_record_of_another_step_is_damaged_too() -> None:
    rig = rig_with("ab", 1)
    rig.step("a", 1, [1])
    rig.step("b", 1, [1])
    old = rig.store.get((PRINCIPAL, "a"))
    rig.step("a", 2, [2])
    rig.step("b", 2, [2])
    rig.store.put((PRINCIPAL, "a"), old)
    with pytest.raises(SnapshotCorrupt):
        rig.step("a", 3, [3])


@pytest.mark.parametrize("broken", ["read", "write", "acquire"])
def test_a_carry_that_cannot_be_moved_fails_one_chunk_and_can_be_sent_again(
    broken: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig = rig_with("abc", 2)
    outputs = {name: rig.step(name, 1, [1]) for name in "abc"}  # a is out

    def fails(*_: object) -> None:
        raise EngineFailed("broken")

    recorder = Recorder()
    with monkeypatch.context() as patch:
        patch.setattr(rig.engine, broken, fails)
        refused = rig.send("a", 2, [2], recorder)
        runs = rig.send("c", 2, [2], recorder)
        rig.run()
    assert isinstance(recorder.of(refused).error, EngineFailed)
    outputs["c"] += recorder.of(runs).rows
    assert rig.view("a").state is SessionState.IDLE
    for name in "ab":
        outputs[name] += rig.step(name, 2, [2])
    expected = b"".join(straight_through(FEATURES, rows_of(FEATURES, 1, 2))[0])
    assert set(outputs.values()) == {expected}
    rig.engine.allocators[FEATURES.key].check()
    assert rig.engine.slots_used(FEATURES.key) == len(resident(rig))


def record_bytes() -> int:
    rig = Rig(slots=1)
    _pages_out(rig, "ab")
    return rig.store.size_bytes


def test_copies_that_do_not_fit_are_refused_and_evict_nobody() -> None:
    rig = Rig(slots=1, host_state_bytes_max=6 * record_bytes())
    _pages_out(rig, "ab")
    snapshot = decode(rig.export("a"))
    rig.open("f", principal="eve")
    rig.step("f", 1, [1], principal="eve")
    for call in (
        lambda: rig.fork("f", *"uvwxyz", principal="eve"),
        lambda: [rig.fork("f", f"x{each}", principal="eve") for each in range(5)],
        lambda: [rig.operations.import_("eve", snapshot, f"y{each}", 60.0) for each in range(5)],
    ):
        with pytest.raises(SessionsLimit) as caught:
            call()
        assert caught.value.metadata["limit"] == "limits.host_state_bytes_max"
        rig.run()
        assert {rig.view(name).applied_step for name in "ab"} == {1}
    assert rig.store.size_bytes <= rig.limits.host_state_bytes_max


def test_nobody_with_something_to_do_is_evicted() -> None:
    rig = Rig(slots=1, host_state_bytes_max=4 * record_bytes() + 100)
    _pages_out(rig, "abcde")  # all but e are out
    recorder = Recorder()
    chunks = [rig.send(name, 2, range(2, 30), recorder) for name in "abcde"]
    rig.open("f")
    chunks.append(rig.send("f", 1, [1], recorder))
    rig.run()
    assert all(recorder.of(chunk).error is None for chunk in chunks)
    assert rig.store.size_bytes <= rig.limits.host_state_bytes_max  # at rest it holds
    assert sum(rig.scheduler.sessions.find((PRINCIPAL, name)) is None for name in "abcdef") == 1

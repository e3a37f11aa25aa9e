"""The session table: who sees what, how many there may be, when they end."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conveyor_server.core import SessionKey
from conveyor_server.errors import (
    PrincipalSessionsLimit,
    SessionClosed,
    SessionEnded,
    SessionEvicted,
    SessionExpired,
    SessionNotFound,
    SessionsLimit,
)
from conveyor_server.sessions.held import HeldResults
from conveyor_server.sessions.session import Session
from conveyor_server.sessions.table import SessionTable
from tests.support.models import FEATURES, TOKENS
from tests.support.rig import Rig


def make_table(**limits: float) -> SessionTable:
    values = {
        "sessions_max": 100,
        "principal_sessions_max": 100,
        "ended_sessions_max": 100,
        "ended_seconds_max": 100.0,
    }
    return SessionTable(**(values | limits))  # type: ignore[arg-type]


def make_session(
    session_id: str,
    principal: str = "ann",
    *,
    now: float = 0.0,
    idle: float = 10.0,
    lifetime: float = 1000.0,
    tokens: bool = False,
    ephemeral: bool = False,
) -> Session:
    return Session(
        session_id=session_id,
        principal=principal,
        model=TOKENS if tokens else FEATURES,
        idle_seconds=idle,
        lifetime_seconds=lifetime,
        created_monotonic=now,
        created_wall=now,
        active_monotonic=now,
        held=HeldResults(0, 0),
        ephemeral=ephemeral,
    )


def end_expired(table: SessionTable, now: float) -> list[str]:
    ended: list[str] = []
    for session in table.expired(now):
        table.remove(session, SessionExpired, now)
        ended.append(session.session_id)
    return ended


def test_every_principal_has_ids_of_its_own() -> None:
    table = make_table()
    anns, bobs = make_session("x", "ann"), make_session("x", "bob")
    table.add(anns)
    table.add(bobs)
    assert table.get(("ann", "x"), 0) is anns
    assert table.get(("bob", "x"), 0) is bobs
    table.remove(anns, SessionClosed, 0)
    assert table.get(("bob", "x"), 0) is bobs


def test_somebody_elses_session_looks_like_none_at_all() -> None:
    table = make_table()
    table.add(make_session("open", "ann"))
    ended = make_session("ended", "ann")
    table.add(ended)
    table.remove(ended, SessionClosed, 0)
    messages: set[str] = set()
    for session_id in ("open", "ended", "never"):
        with pytest.raises(SessionNotFound) as caught:
            table.get(("bob", session_id), 0)
        messages.add(caught.value.message.replace(session_id, "ID"))
        assert not caught.value.metadata
    assert messages == {"there is no session 'ID'"}


@pytest.mark.parametrize("error", [SessionExpired, SessionClosed, SessionEvicted])
def test_the_owner_learns_why_a_session_ended(error: type[SessionEnded]) -> None:
    table = make_table()
    session = make_session("x")
    table.add(session)
    table.remove(session, error, 0)
    with pytest.raises(error, match="'x'"):
        table.get(("ann", "x"), 0)
    table.add(make_session("x"))
    assert table.get(("ann", "x"), 0).session_id == "x"


def test_sessions_are_taken_up_to_the_limit() -> None:
    table = make_table(sessions_max=3)
    for name in "abc":
        table.check_room("ann")
        table.add(make_session(name))
    with pytest.raises(SessionsLimit) as caught:
        table.check_room("bob")
    assert caught.value.metadata == {"limit": "limits.sessions_max", "maximum": "3"}
    table.remove(table.get(("ann", "a"), 0), SessionClosed, 0)
    table.check_room("bob")
    with pytest.raises(SessionsLimit):
        table.check_room("bob", 2)


def test_a_principals_sessions_are_taken_up_to_the_limit() -> None:
    table = make_table(principal_sessions_max=2)
    table.check_room("ann", 2)
    with pytest.raises(PrincipalSessionsLimit):
        table.check_room("ann", 3)
    for name in "ab":
        table.add(make_session(name))
    with pytest.raises(PrincipalSessionsLimit) as caught:
        table.check_room("ann")
    assert caught.value.metadata["limit"] == "limits.principal_sessions_max"
    table.check_room("bob", 2)


def test_the_reasons_of_ended_sessions_are_bounded_in_number() -> None:
    table = make_table(ended_sessions_max=2)
    for name in "abc":
        session = make_session(name)
        table.add(session)
        table.remove(session, SessionClosed, 0)
    with pytest.raises(SessionNotFound):
        table.get(("ann", "a"), 0)
    for name in "bc":
        with pytest.raises(SessionClosed):
            table.get(("ann", name), 0)


def test_the_reasons_of_ended_sessions_are_bounded_in_time() -> None:
    table = make_table(ended_seconds_max=5)
    session = make_session("x")
    table.add(session)
    table.remove(session, SessionClosed, 10.0)
    with pytest.raises(SessionClosed):
        table.get(("ann", "x"), 15.0)
    with pytest.raises(SessionNotFound):
        table.get(("ann", "x"), 15.001)


def test_no_reason_is_remembered_where_none_may_be() -> None:
    table = make_table(ended_sessions_max=0)
    session = make_session("x")
    table.add(session)
    table.remove(session, SessionClosed, 0)
    with pytest.raises(SessionNotFound):
        table.get(("ann", "x"), 0)


def test_ephemeral_sessions_are_neither_listed_nor_remembered() -> None:
    table = make_table(sessions_max=1)
    session = make_session("x", ephemeral=True)
    table.add(session)
    assert table.page("ann", after="", size=10, model="") == ([], False, 0)
    with pytest.raises(SessionsLimit):
        table.check_room("ann")
    table.remove(session, SessionClosed, 0)
    with pytest.raises(SessionNotFound):
        table.get(("ann", "x"), 0)
    table.check_room("ann")


@given(
    mine=st.sets(st.text("ab:", min_size=1, max_size=3), max_size=12),
    others=st.sets(st.text("ab:", min_size=1, max_size=3), max_size=6),
    size=st.integers(1, 5),
    tokens=st.booleans(),
)
def test_pages_together_are_the_principals_sessions_in_order(
    mine: set[str], others: set[str], size: int, tokens: bool
) -> None:
    table = make_table()
    for name in mine:
        table.add(make_session(name, "ann", tokens=name.startswith("a")))
    for principal in ("an", "anna", "ann ", "bob"):
        for name in others:
            table.add(make_session(name, principal, tokens=True))
    wanted = sorted(name for name in mine if not tokens or name.startswith("a"))
    model = TOKENS.key.name if tokens else ""
    seen: list[str] = []
    more, after = True, ""
    while more:
        page, more, total = table.page("ann", after=after, size=size, model=model)
        assert total == len(wanted)
        assert len(page) == size or not more
        seen += [session.session_id for session in page]
        after = seen[-1] if seen else ""
    assert seen == wanted


def test_a_session_ends_when_its_lease_does_and_not_before() -> None:
    table = make_table()
    table.add(make_session("x", now=100.0))
    assert end_expired(table, 109.999) == []
    assert end_expired(table, 110.0) == ["x"]
    assert len(table) == 0


def test_activity_prolongs_a_lease() -> None:
    table = make_table()
    session = make_session("x", now=100.0)
    table.add(session)
    session.active_monotonic = 105.0
    assert end_expired(table, 110.0) == []
    assert table.next_expiry() == 115.0
    assert end_expired(table, 115.0) == ["x"]


def test_a_busy_session_does_not_expire_until_its_lifetime_is_over() -> None:
    table = make_table()
    session = make_session("x", idle=10, lifetime=25)
    table.add(session)
    session.running = True
    assert end_expired(table, 12.0) == []
    assert end_expired(table, 24.0) == []
    assert end_expired(table, 25.0) == ["x"]


def test_a_lifetime_ends_however_active_the_session_is() -> None:
    table = make_table()
    session = make_session("x", idle=10, lifetime=15)
    table.add(session)
    for now in (5.0, 10.0, 14.9):
        session.active_monotonic = now
        assert end_expired(table, now) == []
    assert end_expired(table, 15.0) == ["x"]


def test_a_session_of_the_same_id_has_a_lease_of_its_own() -> None:
    table = make_table()
    first = make_session("x", now=0.0)
    table.add(first)
    table.remove(first, SessionClosed, 1.0)
    table.add(make_session("x", now=5.0))
    assert end_expired(table, 10.0) == []
    assert end_expired(table, 15.0) == ["x"]


def test_leases_of_ended_sessions_take_no_room() -> None:
    table = make_table()
    for number in range(2_000):
        session = make_session(f"s{number}", idle=86_400.0)
        table.add(session)
        table.remove(session, SessionClosed, 0)
        again = make_session("again", idle=86_400.0)
        table.add(again)
        table.remove(again, SessionClosed, 0)
    assert len(table._leases) <= 200


@pytest.mark.parametrize("jump", [-3600.0, 3600.0])
def test_a_jump_of_the_wall_clock_ends_no_lease_and_prolongs_none(jump: float) -> None:
    rig = Rig(idle_seconds_default=10)
    rig.open("x")
    rig.clock.jump_wall(jump)
    rig.clock.advance(9.9)
    rig.run()
    assert rig.view("x").session_id == "x"
    rig.clock.jump_wall(-jump)
    rig.clock.advance(0.1)
    rig.run()
    with pytest.raises(SessionExpired):
        rig.view("x")


def test_a_lease_that_is_shortened_on_resuming_ends_early() -> None:
    rig = Rig(idle_seconds_default=1_000)
    rig.open("x")
    rig.open("x", idle_seconds=5.0)
    assert rig.scheduler.next_wakeup() == rig.clock.monotonic() + 5
    rig.clock.advance(5)
    rig.run()
    with pytest.raises(SessionExpired):
        rig.view("x")


def test_a_page_looks_at_its_own_sessions_only() -> None:
    table = make_table(sessions_max=10_000, principal_sessions_max=10_000)
    for number in range(2_000):
        table.add(make_session(f"s{number:04}"))

    class Watched(dict[SessionKey, Session]):
        looks = 0

        def __getitem__(self, key: SessionKey) -> Session:
            self.looks += 1
            return super().__getitem__(key)

    watched = table._sessions = Watched(table._sessions)
    page, more, total = table.page("ann", after="s0999", size=10, model="")
    assert [session.session_id for session in page] == [f"s{each}" for each in range(1000, 1010)]
    assert (more, total, watched.looks) == (True, 2_000, 10)
    page, more, total = table.page("ann", after="s1989", size=10, model="")
    assert (len(page), more, total) == (10, False, 2_000)


def test_a_refusal_tells_nothing_of_the_others() -> None:
    table = make_table(sessions_max=7)
    for number in range(5):
        table.add(make_session(str(number), principal="bob"))
    with pytest.raises(SessionsLimit) as caught:
        table.check_room("ann", 3)
    assert "5" not in caught.value.message

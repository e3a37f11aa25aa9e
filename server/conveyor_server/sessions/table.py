"""All sessions of this server, who owns them, when they end, and why the last ones ended."""

import bisect
import heapq
from collections import Counter, OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

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
from conveyor_server.sessions.session import Session

_LEASES_SLACK: Final = 64
"""Ends of leases kept beyond two for each session before the outdated ones are thrown out."""

_ENDINGS: Final[dict[type[SessionEnded], str]] = {
    SessionExpired: "has expired",
    SessionClosed: "was closed",
    SessionEvicted: "was evicted to free memory",
}


@dataclass(frozen=True, slots=True)
class _Tombstone:
    error: type[SessionEnded]
    epoch: int
    ended_monotonic: float


class SessionTable:
    """Sessions by principal and id.

    Ids are each principal's own, so nobody can probe for somebody else's.
    """

    def __init__(
        self,
        *,
        sessions_max: int,
        principal_sessions_max: int,
        ended_sessions_max: int,
        ended_seconds_max: float,
    ) -> None:
        """Limits as in `config.LimitsConfig`."""
        self._sessions_max = sessions_max
        self._principal_sessions_max = principal_sessions_max
        self._ended_sessions_max = ended_sessions_max
        self._ended_seconds_max = ended_seconds_max
        self._sessions: dict[SessionKey, Session] = {}
        self._listed: list[SessionKey] = []
        self._per_principal: Counter[str] = Counter()
        self._tombstones: OrderedDict[SessionKey, _Tombstone] = OrderedDict()
        self._leases: list[tuple[float, SessionKey]] = []

    def __len__(self) -> int:
        return len(self._sessions)

    def __iter__(self) -> Iterator[Session]:
        # A copy, made in one step of the interpreter: metrics are read on another thread.
        return iter(list(self._sessions.values()))

    def find(self, key: SessionKey) -> Session | None:
        """The session, or None."""
        return self._sessions.get(key)

    def get(self, key: SessionKey, now: float) -> Session:
        """The session.

        Raises:
            SessionEnded: It ended lately; the class says why.
            SessionNotFound: Anything else.
        """
        session = self._sessions.get(key)
        if session is not None:
            return session
        self._bury(now)
        tombstone = self._tombstones.get(key)
        if tombstone is not None:
            ending = _ENDINGS[tombstone.error]
            raise tombstone.error(f"session {key[1]!r} {ending}; open a new one")
        raise SessionNotFound(key[1])

    def check_room(self, principal: str, sessions: int = 1) -> None:
        """Raises `SessionsLimit` or `PrincipalSessionsLimit` if so many more do not fit."""
        if len(self._sessions) + sessions > self._sessions_max:
            raise SessionsLimit(
                f"the server has no room for {sessions:,} more sessions",
                limit="limits.sessions_max",
                maximum=self._sessions_max,
            )
        held = self._per_principal[principal]
        if held + sessions > self._principal_sessions_max:
            raise PrincipalSessionsLimit(
                f"you hold {held:,} sessions, and {sessions:,} more do not fit; close some",
                limit="limits.principal_sessions_max",
                maximum=self._principal_sessions_max,
            )

    def add(self, session: Session) -> None:
        """Adds a session; there is room and the id is free.

        Under an id that was used lately epochs go on from where they were, so that nothing sent
        under a claim on the earlier session can run on this one.
        """
        assert session.key not in self._sessions, session.key
        self._sessions[session.key] = session
        if not session.ephemeral:
            bisect.insort(self._listed, session.key)
        self._per_principal[session.principal] += 1
        tombstone = self._tombstones.pop(session.key, None)
        if tombstone is not None:
            session.epoch = tombstone.epoch + 1
        self.renew(session)

    def renew(self, session: Session) -> None:
        """Notes when a session's lease ends; called when that may be earlier than it was."""
        heapq.heappush(self._leases, (session.lease_ends, session.key))
        if len(self._leases) > 2 * len(self._sessions) + _LEASES_SLACK:
            # Most are of sessions that ended: many may come and go within one lease.
            self._leases = [(each.lease_ends, key) for key, each in self._sessions.items()]
            heapq.heapify(self._leases)

    def remove(self, session: Session, error: type[SessionEnded], now: float) -> None:
        """Removes a session and remembers why, for its owner."""
        del self._sessions[session.key]
        self._per_principal[session.principal] -= 1
        if not self._per_principal[session.principal]:
            del self._per_principal[session.principal]
        if not session.ephemeral:
            del self._listed[bisect.bisect_left(self._listed, session.key)]
            self._tombstones[session.key] = _Tombstone(error, session.epoch, now)
            self._bury(now)

    def page(
        self, principal: str, *, after: str, size: int, model: str
    ) -> tuple[list[Session], bool, int]:
        """The principal's sessions in order of id, those after `after`, at most `size`.

        Only those of `model`, if that is not empty.

        Returns:
            The page, whether there are more, and how many there are in all.
        """
        start = bisect.bisect_left(self._listed, (principal, ""))
        end = bisect.bisect_left(self._listed, (principal + "\0", ""))
        if not model:
            first = bisect.bisect_right(self._listed, (principal, after), start, end)
            last = min(first + size, end)
            page = [self._sessions[key] for key in self._listed[first:last]]
            return page, last < end, end - start
        mine = [self._sessions[key] for key in self._listed[start:end]]
        mine = [session for session in mine if session.model.key.name == model]
        first = bisect.bisect_right(mine, after, key=lambda session: session.session_id)
        return mine[first : first + size], first + size < len(mine), len(mine)

    def expired(self, now: float) -> Iterator[Session]:
        """Yields each session whose lease is over, for the caller to remove.

        A lease that was prolonged is found so only when its old end comes: prolonging it costs
        nothing.
        """
        while self._leases and self._leases[0][0] <= now:
            _, key = heapq.heappop(self._leases)
            session = self._sessions.get(key)
            if session is None:
                continue
            busy = session.queue or session.running
            if busy and now < session.lifetime_ends:
                session.active_monotonic = now
            if session.lease_ends > now:
                heapq.heappush(self._leases, (session.lease_ends, key))
            else:
                yield session
                assert key not in self._sessions, "an expired session was not removed"

    def prolong(self, seconds: float, now: float) -> None:
        """Makes every lease so much longer; lifetimes stay."""
        for session in self._sessions.values():
            session.active_monotonic = min(now, session.active_monotonic + seconds)

    def next_expiry(self) -> float | None:
        """Monotonic time before which `expired` yields nothing."""
        return self._leases[0][0] if self._leases else None

    def _bury(self, now: float) -> None:
        horizon = now - self._ended_seconds_max
        while self._tombstones:
            oldest = next(iter(self._tombstones.values()))
            if (
                len(self._tombstones) <= self._ended_sessions_max
                and oldest.ended_monotonic >= horizon
            ):
                return
            self._tombstones.popitem(last=False)

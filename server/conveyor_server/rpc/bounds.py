"""How many calls there may be at once: in all, and on one connection."""

from collections import Counter
from collections.abc import Generator
from contextlib import contextmanager

from conveyor_server.config import LimitsConfig
from conveyor_server.errors import CallsLimit


class CallBounds:
    """Counts the calls under way.

    Attributes:
        calls: Those that were let in. Health is not among them, so that it always answers.
        watches: Calls of Health.Watch, which may stay for ever and need no token.
    """

    def __init__(self, limits: LimitsConfig) -> None:
        """Nothing is under way."""
        self.calls = Bound(
            "calls",
            ("limits.concurrent_calls_max", limits.concurrent_calls_max),
            ("limits.connection_calls_max", limits.connection_calls_max),
        )
        self.watches = Bound(
            "calls of Health.Watch",
            ("limits.health_calls_max", limits.health_calls_max),
            ("limits.connection_watches_max", limits.connection_watches_max),
        )


class Bound:
    """Things of one kind, counted in all and for each connection."""

    def __init__(self, what: str, server: tuple[str, int], connection: tuple[str, int]) -> None:
        """Of both bounds the setting and its value."""
        self._what = what
        self._server = server
        self._connection = connection
        self._total = 0
        self._of: Counter[str] = Counter()

    @contextmanager
    def counted(self, connection: str) -> Generator[None]:
        """Counts one while it runs.

        Raises:
            CallsLimit: The server, or this connection, has as many as it may.
        """
        _check(self._total, f"the server handles {self._total} {self._what}", *self._server)
        count = self._of[connection]
        _check(count, f"the connection has {count} {self._what}", *self._connection)
        self._total += 1
        self._of[connection] += 1
        try:
            yield
        finally:
            self._total -= 1
            self._of[connection] -= 1
            if not self._of[connection]:
                del self._of[connection]


def _check(count: int, message: str, limit: str, maximum: int) -> None:
    if count >= maximum:
        raise CallsLimit(message, limit=limit, maximum=maximum)

"""How many calls there may be at once: in all, and of those that need no token."""

from collections import Counter
from collections.abc import Generator
from contextlib import contextmanager

from conveyor_server.config import LimitsConfig
from conveyor_server.errors import CallsLimit


class CallBounds:
    """Counts the calls under way.

    Attributes:
        calls: Those that were let in; health is not among them, so that it always answers.
    """

    def __init__(self, limits: LimitsConfig) -> None:
        """Nothing is under way."""
        self._limits = limits
        self._watches: Counter[str] = Counter()
        self.calls = 0

    @contextmanager
    def call(self) -> Generator[None]:
        """Counts a call while it runs.

        Raises:
            CallsLimit: The server handles as many as it may.
        """
        calls_max = self._limits.concurrent_calls_max
        if self.calls >= calls_max:
            raise CallsLimit(
                f"the server handles {self.calls} calls",
                limit="limits.concurrent_calls_max",
                maximum=calls_max,
            )
        self.calls += 1
        try:
            yield
        finally:
            self.calls -= 1

    @contextmanager
    def watch(self, connection: str) -> Generator[None]:
        """Counts a call of Health.Watch, which may stay for ever and needs no token.

        Raises:
            CallsLimit: The server, or this connection, has as many as it may.
        """
        for count, limit in (
            (self._watches.total(), "health_calls_max"),
            (self._watches[connection], "connection_watches_max"),
        ):
            maximum = getattr(self._limits, limit)
            if count >= maximum:
                raise CallsLimit(
                    f"there are {count} calls of Health.Watch",
                    limit=f"limits.{limit}",
                    maximum=maximum,
                )
        self._watches[connection] += 1
        try:
            yield
        finally:
            self._watches[connection] -= 1
            if not self._watches[connection]:
                del self._watches[connection]

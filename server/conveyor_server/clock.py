"""Time. Nothing else in the server reads a clock."""

import time
from typing import Protocol


class Clock(Protocol):
    """Two readings: one for durations, one for showing to people."""

    def monotonic(self) -> float:
        """Seconds from an arbitrary start; never goes back, whatever happens to the wall clock."""
        ...

    def wall(self) -> float:
        """Seconds since the Unix epoch. For display and records; no decision rests on it."""
        ...


class SystemClock:
    """The machine's clocks."""

    def monotonic(self) -> float:
        """See `Clock.monotonic`."""
        return time.monotonic()

    def wall(self) -> float:
        """See `Clock.wall`."""
        return time.time()

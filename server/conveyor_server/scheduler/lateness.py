"""Notices when the event loop was not there: stopped, or held up by one long turn.

Nothing that arrives is read meanwhile, so what clients did in that time is not known at its end.
"""

from typing import Final

LOOK_SECONDS: Final = 0.2
"""How often to look, at least."""
LATE_SECONDS: Final = 0.5
"""The loop was not there if nobody looked for so long."""


class Lateness:
    """Tells how long the loop was not there."""

    def __init__(self, now: float) -> None:
        """It is there now."""
        self._looked = now

    def look(self, now: float) -> float:
        """Returns the seconds since the last look if the loop was not there, else 0."""
        gap, self._looked = now - self._looked, now
        return gap if gap > LATE_SECONDS else 0.0

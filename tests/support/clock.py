"""Time that moves only when a test says so."""


class FakeClock:
    """Implements `conveyor_server.clock.Clock`; the wall clock can jump without the other one."""

    def __init__(self, monotonic: float = 1_000.0, wall: float = 1_700_000_000.0) -> None:
        self._monotonic = monotonic
        self._wall = wall

    def monotonic(self) -> float:
        return self._monotonic

    def wall(self) -> float:
        return self._wall

    def advance(self, seconds: float) -> None:
        """Time passes."""
        assert seconds >= 0, seconds
        self._monotonic += seconds
        self._wall += seconds

    def jump_wall(self, seconds: float) -> None:
        """Somebody sets the wall clock, forwards or back; no time passes."""
        self._wall += seconds

"""How the client waits, reconnects and limits itself; the unit is in every name."""

import random
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Reconnect:
    """How a broken stream is taken up again: exponential backoff, full jitter, bounded twice."""

    attempts_max: int = 30
    """Attempts in a row without one result in between; 0 never reconnects."""

    seconds_max: float = 60.0
    """Time from the break to the last attempt."""

    backoff_seconds_min: float = 0.1
    """Upper end of the first wait; each further one doubles it."""

    backoff_seconds_max: float = 5.0
    """Upper end of any wait."""

    def wait_seconds(self, attempt: int) -> float:
        """Draws the wait before an attempt.

        Args:
            attempt: From 1.

        Returns:
            Uniform between 0 and the doubled bound, so that many clients do not come back at once.
        """
        bound = min(
            self.backoff_seconds_min * 2.0 ** min(attempt - 1, 30), self.backoff_seconds_max
        )
        return random.uniform(0.0, bound)  # noqa: S311 - jitter, not a secret


@dataclass(frozen=True, slots=True)
class Options:
    """What a client may be told beyond its target."""

    timeout_seconds: float = 30.0
    """For every call and step that names no time of its own."""

    call_attempts_max: int = 5
    """For calls that are safe to repeat, while nobody can answer; backoff as for `reconnect`."""

    message_bytes_max: int = 64 * 1024 * 1024
    """The largest message taken from the server."""

    frame_bytes_max: int = 1024 * 1024
    """Bytes of rows sent in one frame; a server's lower limit counts instead."""

    streams_max: int = 64
    """Connections for stepping, each of many sessions."""

    stream_sessions_max: int = 256
    """Sessions on one stream; a server's lower limit counts instead."""

    replay_steps_max: int = 65_536
    """Steps kept for replay; a server's lower window counts instead."""

    replay_bytes_max: int = 64 * 1024 * 1024
    """Bytes kept for replay; a server's lower window counts instead."""

    heartbeat_seconds: float = 10.0
    """Between heartbeats; a third of the shortest idle time on the stream if that is less."""

    silence_seconds_max: float = 30.0
    """A stream that owes an answer and is silent for so long is broken."""

    drain_seconds_max: float = 10.0
    """Waiting for what a draining server still owes."""

    reconnect: Reconnect = field(default_factory=Reconnect)
    """How broken streams are taken up again."""

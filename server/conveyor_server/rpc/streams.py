"""The long streams under way: how many there may be, and telling all of them."""

from collections.abc import Generator
from contextlib import contextmanager
from typing import Protocol

from conveyor_server.errors import ServerDraining, StreamsLimit


class Stream(Protocol):
    """One call, as far as it concerns the others."""

    def drain(self, reconnect_after_seconds: float) -> None:
        """Tells the client that the server is stopping."""
        ...


class Streams:
    """The calls of StreamSteps and of its like under way."""

    def __init__(self, streams_max: int) -> None:
        """`streams_max` at once."""
        self._streams_max = streams_max
        self._streams: set[Stream] = set()
        self._reconnect_after_seconds: float | None = None

    def __len__(self) -> int:
        return len(self._streams)

    @property
    def draining(self) -> bool:
        """Whether the server is stopping."""
        return self._reconnect_after_seconds is not None

    @contextmanager
    def joined(self, stream: Stream) -> Generator[None]:
        """Counts a stream while it is served.

        Raises:
            StreamsLimit, ServerDraining.
        """
        if self._reconnect_after_seconds is not None:
            raise ServerDraining
        if len(self._streams) >= self._streams_max:
            raise StreamsLimit(
                f"the server has {len(self._streams):,} streams open; share one for many sessions",
                limit="limits.streams_max",
                maximum=self._streams_max,
            )
        self._streams.add(stream)
        try:
            yield
        finally:
            self._streams.remove(stream)

    def drain(self, reconnect_after_seconds: float) -> None:
        """Takes no stream more and tells those there are."""
        self._reconnect_after_seconds = reconnect_after_seconds
        for stream in self._streams:
            stream.drain(reconnect_after_seconds)

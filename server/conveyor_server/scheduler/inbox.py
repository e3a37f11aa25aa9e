"""The only entrance to the scheduler: chunks and operations, in the order they came."""

from collections import deque
from collections.abc import Callable

from conveyor_server.core import Chunk, WholeSequence
from conveyor_server.errors import InboxFull

Operation = Callable[[], None]
"""Something to do between two ticks; it reports to whoever asked by itself."""


class Inbox:
    """A bounded queue.

    The bound covers all chunks accepted and not yet finished, whether they wait here or with their
    session, and whole sequences, each of which counts as a chunk.

    Attributes:
        arrived: Chunks accepted since the server started.
        chunks: Chunks accepted and not yet finished.
        size_bytes: Bytes of their rows.
    """

    def __init__(self, chunks_max: int, bytes_max: int, wake: Callable[[], None]) -> None:
        """`wake` is called when something arrives."""
        self._chunks_max = chunks_max
        self._bytes_max = bytes_max
        self._wake = wake
        self._items: deque[Chunk | Operation] = deque()
        self.chunks = 0
        self.arrived = 0
        self.size_bytes = 0

    def __len__(self) -> int:
        return len(self._items)

    def put(self, chunk: Chunk) -> None:
        """Accepts a chunk.

        Raises:
            InboxFull: See `accept`.
        """
        self.accept(chunk)
        self.arrived += 1
        self._items.append(chunk)
        self._wake()

    def accept(self, chunk: Chunk | WholeSequence) -> None:
        """Counts what is accepted, here or elsewhere.

        Raises:
            InboxFull: Too many chunks, or bytes of them, are not finished.
        """
        if self.chunks >= self._chunks_max:
            raise InboxFull(
                f"the inbox is full: {self.chunks:,} chunks are pending",
                limit="limits.inbox_chunks_max",
                maximum=self._chunks_max,
            )
        if self.size_bytes + len(chunk.rows) > self._bytes_max:
            raise InboxFull(
                f"the inbox is full: {len(chunk.rows):,} more bytes do not fit",
                limit="limits.inbox_bytes_max",
                maximum=self._bytes_max,
            )
        self.chunks += 1
        self.size_bytes += len(chunk.rows)

    def put_operation(self, operation: Operation) -> None:
        """Accepts an operation; callers wait for its end, so there are never more than calls."""
        self._items.append(operation)
        self._wake()

    def finished(self, chunk: Chunk | WholeSequence) -> None:
        """A chunk was answered, refused or dropped."""
        self.chunks -= 1
        self.size_bytes -= len(chunk.rows)
        assert self.chunks >= 0
        assert self.size_bytes >= 0

    def take(self) -> Chunk | Operation | None:
        """The next item, or None."""
        return self._items.popleft() if self._items else None

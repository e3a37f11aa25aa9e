"""What the scheduler asks of the place that keeps paged-out carries."""

from typing import Protocol

from conveyor_server.core import SessionKey


class CarryStore(Protocol):
    """Records by session. Calls are quick: they happen between two engine calls."""

    @property
    def size_bytes(self) -> int:
        """Bytes of all records."""
        ...

    def put(self, key: SessionKey, record: bytes) -> None:
        """Keeps a record in place of any older one."""
        ...

    def get(self, key: SessionKey) -> bytes:
        """The record; there is one."""
        ...

    def delete(self, key: SessionKey) -> None:
        """Drops the record, if there is one."""
        ...

    def oldest_first(self) -> list[SessionKey]:
        """The sessions with a record, in the order in which those were put."""
        ...

"""Records in the server's own memory."""

from collections import OrderedDict

from conveyor_server.core import SessionKey


class MemoryStore:
    """Implements `port.CarryStore`.

    The bound is kept by the caller, who knows which sessions may be ended.
    """

    def __init__(self) -> None:
        """Empty."""
        self._records: OrderedDict[SessionKey, bytes] = OrderedDict()
        self._size_bytes = 0

    @property
    def size_bytes(self) -> int:
        """See `CarryStore.size_bytes`."""
        return self._size_bytes

    def put(self, key: SessionKey, record: bytes) -> None:
        """See `CarryStore.put`."""
        self.delete(key)
        self._records[key] = record
        self._size_bytes += len(record)

    def get(self, key: SessionKey) -> bytes:
        """See `CarryStore.get`."""
        return self._records[key]

    def delete(self, key: SessionKey) -> None:
        """See `CarryStore.delete`."""
        record = self._records.pop(key, None)
        if record is not None:
            self._size_bytes -= len(record)

    def oldest_first(self) -> list[SessionKey]:
        """See `CarryStore.oldest_first`."""
        return list(self._records)

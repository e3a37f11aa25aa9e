"""What sessions attend over: how much there may be, and which of it is on the device."""

from conveyor_server.core import ModelInfo
from conveyor_server.engine.port import Engine
from conveyor_server.errors import SessionsLimit
from conveyor_server.sessions.memory import SharedMemory


class Memories:
    """All memories of this server.

    Each stays in host memory as long as a session attends over it, and is on the device as well
    while one of those sessions has a slot.

    Attributes:
        size_bytes: Of all memories.
        device_bytes: Of those on the device.
    """

    def __init__(self, engine: Engine, bytes_max: int) -> None:
        """`bytes_max` for the whole server."""
        self._engine = engine
        self._bytes_max = bytes_max
        self.size_bytes = 0
        self.device_bytes = 0

    def check_room(self, rows: bytes) -> None:
        """Raises `SessionsLimit` if so many bytes more do not fit."""
        if self.size_bytes + len(rows) > self._bytes_max:
            raise SessionsLimit(
                f"the server has no room for another memory of {len(rows):,} bytes",
                limit="limits.memories_bytes_max",
                maximum=self._bytes_max,
            )

    def make(self, model: ModelInfo, rows: bytes) -> SharedMemory:
        """A memory that no session attends over yet."""
        assert rows
        return SharedMemory(model.key, len(rows) // model.memory_row_bytes, rows)

    def attend(self, memory: SharedMemory | None) -> None:
        """A new session attends over it."""
        if memory is None:
            return
        if not memory.sessions:
            self.size_bytes += len(memory.rows)
        memory.sessions += 1

    def leave(self, memory: SharedMemory | None) -> None:
        """A session ended, its slot given back; with the last one the memory goes."""
        if memory is None:
            return
        memory.sessions -= 1
        assert memory.resident <= memory.sessions
        if not memory.sessions:
            self.size_bytes -= len(memory.rows)

    def bring_in(self, memory: SharedMemory | None) -> None:
        """One of its sessions gets a slot.

        Raises:
            EngineFailed, DeviceOutOfMemory: It could not be moved; nothing was changed.
        """
        if memory is None:
            return
        if not memory.resident:
            memory.number = self._engine.add_memory(memory.model, memory.rows)
            self.device_bytes += len(memory.rows)
        memory.resident += 1

    def release(self, memory: SharedMemory | None) -> None:
        """One of its sessions gave its slot back; with the last one it leaves the device."""
        if memory is None:
            return
        memory.resident -= 1
        assert memory.resident >= 0
        if not memory.resident:
            self._engine.drop_memory(memory.model, memory.number)
            self.device_bytes -= len(memory.rows)
            memory.number = 0

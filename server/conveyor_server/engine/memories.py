"""What sessions attend over, on the device."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from conveyor_server.core import ELEMENT_BYTES


@dataclass(frozen=True, slots=True, eq=False)
class HeldMemory:
    """One memory."""

    rows: Tensor
    """[M, A]"""


class Memories:
    """The memories of one model, by number. Several sessions may share one."""

    def __init__(self, row_size: int, device: torch.device) -> None:
        """`row_size`: numbers in a row."""
        self._row_size = row_size
        self._device = device
        self._held: dict[int, HeldMemory] = {}
        self._made = 0

    def __len__(self) -> int:
        return len(self._held)

    def add(self, rows: bytes) -> int:
        """Takes packed rows, float32. Returns the number."""
        assert rows
        assert len(rows) % (self._row_size * ELEMENT_BYTES) == 0, len(rows)
        values = torch.frombuffer(bytearray(rows), dtype=torch.float32)
        held = HeldMemory(values.view(-1, self._row_size).to(self._device))
        self._made += 1
        self._held[self._made] = held
        return self._made

    def read(self, number: int) -> bytes:
        """The rows that `add` took."""
        return self._held[number].rows.cpu().numpy().tobytes()

    def drop(self, number: int) -> None:
        """Forgets a memory."""
        del self._held[number]

"""What sessions attend over, on the device."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from conveyor_models import AttentionWeights
from conveyor_server.core import ELEMENT_BYTES
from conveyor_server.engine.functions import CANDIDATE
from conveyor_server.engine.packing import LANE, pad_blocks, padded, round_up, spread
from conveyor_server.engine.products import ProductFamily


@dataclass(frozen=True, slots=True, eq=False)
class HeldMemory:
    """One memory, its rows rounded up to a power of two with rows that do not count."""

    length: int
    """Rows that do: M."""
    rows: Tensor
    """a, [width, padded memory size]; zero behind."""
    keys: Tensor
    """2 Ua a, [width, padded attention size]."""

    @property
    def width(self) -> int:
        """Rows with those that do not count."""
        return self.rows.shape[0]


class Memories:
    """The memories of one model, by number. Several sessions may share one."""

    def __init__(
        self, weights: AttentionWeights, family: ProductFamily, device: torch.device
    ) -> None:
        """`weights` of the model's attention."""
        self._size = weights.memory.shape[1]
        self._family = family
        self._device = device
        columns = [(self._size, padded(self._size))]
        self._keys = family.product(pad_blocks(spread(weights.memory, columns), (CANDIDATE,)), None)
        self._held: dict[int, HeldMemory] = {}
        self._made = 0

    def __len__(self) -> int:
        return len(self._held)

    def __getitem__(self, number: int) -> HeldMemory:
        return self._held[number]

    def add(self, rows: bytes) -> int:
        """Takes packed rows, float32. Returns the number."""
        assert rows
        assert len(rows) % (self._size * ELEMENT_BYTES) == 0, len(rows)
        values = torch.frombuffer(bytearray(rows), dtype=torch.float32).view(-1, self._size)
        length = values.shape[0]
        width = max(LANE, 1 << (length - 1).bit_length())
        wide = torch.zeros(round_up(width, self._family.rows_multiple), padded(self._size))
        wide[:length, : self._size] = values
        wide = wide.to(self._device)
        keys = self._keys.linear(wide)[:width]
        self._made += 1
        self._held[self._made] = HeldMemory(length, wide[:width], keys)
        return self._made

    def drop(self, number: int) -> None:
        """Forgets a memory."""
        del self._held[number]

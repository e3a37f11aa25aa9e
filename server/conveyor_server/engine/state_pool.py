"""Carries by slot, on the device."""

from collections.abc import Sequence

import torch
from torch import Tensor

from conveyor_server.core import ELEMENT_BYTES
from conveyor_server.engine.slots import SlotAllocator


class StatePool:
    """For each part of a model's carry (h or c of a layer) a tensor `[slots + 1, width]`.

    Widths are rounded up to what the kernels like; the columns beyond a part's own size are zero
    and stay so. Row 0 is the dummy: always zero, read by padding, never written.
    """

    def __init__(
        self, sizes: Sequence[int], widths: Sequence[int], slots: int, device: torch.device
    ) -> None:
        """`sizes` and `widths` of each part, without and with the padding columns."""
        assert all(size <= width for size, width in zip(sizes, widths, strict=True))
        self._sizes = list(sizes)
        self.parts = [torch.zeros(slots + 1, width, device=device) for width in widths]
        self.allocator = SlotAllocator(slots)

    @property
    def carry_bytes(self) -> int:
        """Bytes of one session's carry, padding not counted."""
        return sum(self._sizes) * ELEMENT_BYTES

    def acquire(self) -> int | None:
        """Takes a slot; its carry is zero."""
        return self.allocator.acquire()

    def release(self, slot: int) -> None:
        """Gives a slot back, scrubbed: nobody ever reads another session's carry."""
        self.reset(slot)
        self.allocator.release(slot)

    def reset(self, slot: int) -> None:
        """Zeroes a slot."""
        assert slot, "the dummy slot is nobody's"
        for part in self.parts:
            part[slot].zero_()

    def gather(self, index: Tensor) -> list[Tensor]:
        """index [n] -> each part's rows [n, width], copied."""
        return [part.index_select(0, index) for part in self.parts]

    def scatter(self, index: Tensor, rows: Sequence[Tensor]) -> None:
        """The opposite of `gather`; index holds no slot twice and not the dummy."""
        for part, new in zip(self.parts, rows, strict=True):
            part.index_copy_(0, index, new)

    def read(self, slot: int) -> bytes:
        """A slot's carry, part after part, without the padding columns."""
        rows = [part[slot, :size] for part, size in zip(self.parts, self._sizes, strict=True)]
        return torch.cat(rows).cpu().numpy().tobytes()

    def write(self, slot: int, carry: bytes) -> None:
        """The opposite of `read`."""
        assert len(carry) == self.carry_bytes, (len(carry), self.carry_bytes)
        assert slot, "the dummy slot is nobody's"
        values = torch.frombuffer(bytearray(carry), dtype=torch.float32).to(self.parts[0].device)
        news = torch.split(values, self._sizes)
        for part, size, new in zip(self.parts, self._sizes, news, strict=True):
            part[slot, :size] = new

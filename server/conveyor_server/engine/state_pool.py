"""Carries by slot, on the device."""

from collections.abc import Sequence

import torch
from torch import Tensor

from conveyor_server.core import ELEMENT_BYTES
from conveyor_server.engine.packing import Columns
from conveyor_server.engine.slots import SlotAllocator


class StatePool:
    """For each part of a model's carry (h or c of a layer) a tensor `[slots + 1, width]`.

    Widths are rounded up to what the kernels like; the columns beyond a part's own size are zero
    and stay so. Row 0 is the dummy: always zero, read by padding, never written.
    """

    def __init__(
        self, parts: Columns, initial: Sequence[Tensor], slots: int, device: torch.device
    ) -> None:
        """`parts` and what each of them is in a new session, [width]."""
        self._sizes = [size for size, _ in parts]
        self.parts = [torch.zeros(slots + 1, width, device=device) for _, width in parts]
        self._initial = [(n, part) for n, part in enumerate(initial) if bool(part.any())]
        self._device = device
        self.allocator = SlotAllocator(slots)

    @property
    def carry_bytes(self) -> int:
        """Bytes of one session's carry, padding not counted."""
        return sum(self._sizes) * ELEMENT_BYTES

    def acquire(self) -> int | None:
        """Takes a slot; its carry is the initial one."""
        slot = self.allocator.acquire()
        if slot is not None:
            self._begin(slot)
        return slot

    def release(self, slot: int) -> None:
        """Gives a slot back, scrubbed: nobody ever reads another session's carry."""
        self._scrub(slot)
        self.allocator.release(slot)

    def reset(self, slot: int) -> None:
        """Makes a slot's carry the initial one."""
        self._scrub(slot)
        self._begin(slot)

    def gather(self, slots: Sequence[int], padding: int) -> list[Tensor]:
        """Each part's rows of some slots, and so many of the dummy's behind, [n, width].

        Not to be written to: those of a single slot are no copy.
        """
        if len(slots) == 1 and not padding:
            (slot,) = slots
            return [part[slot : slot + 1] for part in self.parts]
        index = torch.tensor([*slots, *[0] * padding], device=self._device)
        return [part.index_select(0, index) for part in self.parts]

    def scatter(self, slots: Sequence[int], rows: Sequence[Tensor]) -> None:
        """The opposite of `gather`; no slot twice and not the dummy."""
        if len(slots) == 1:
            for part, new in zip(self.parts, rows, strict=True):
                part[slots[0]] = new[0]
            return
        index = torch.tensor(slots, device=self._device)
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
        values = torch.frombuffer(bytearray(carry), dtype=torch.float32).to(self._device)
        news = torch.split(values, self._sizes)
        for part, size, new in zip(self.parts, self._sizes, news, strict=True):
            part[slot, :size] = new

    def _scrub(self, slot: int) -> None:
        assert slot, "the dummy slot is nobody's"
        for part in self.parts:
            part[slot].zero_()

    def _begin(self, slot: int) -> None:
        """Writes what is not zero at first to a scrubbed slot."""
        for number, row in self._initial:
            self.parts[number][slot] = row

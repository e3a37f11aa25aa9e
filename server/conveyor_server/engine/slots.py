"""Which rows of a state pool are taken."""


class SlotAllocator:
    """A free list over slots 1 .. total.

    Slot 0 is the dummy that padding reads; it is never handed out. The slot given back last is
    handed out first, while it is warm in the cache.
    """

    def __init__(self, total: int) -> None:
        """`total` slots, all free."""
        assert total >= 1, total
        self.total = total
        self._free = list(range(total, 0, -1))
        self._taken = bytearray(total + 1)

    @property
    def used(self) -> int:
        """Slots taken; `used` and the free ones always add up to `total`."""
        return self.total - len(self._free)

    def acquire(self) -> int | None:
        """Takes a free slot, or returns None."""
        if not self._free:
            return None
        slot = self._free.pop()
        self._taken[slot] = 1
        return slot

    def release(self, slot: int) -> None:
        """Gives a slot back."""
        assert 0 < slot <= self.total, f"slot {slot} is not in this pool"
        assert self._taken[slot], f"slot {slot} was freed twice"
        self._taken[slot] = 0
        self._free.append(slot)

    def check(self) -> None:
        """Asserts that every slot is either free or taken, and once."""
        assert len(set(self._free)) == len(self._free)
        assert sum(self._taken) + len(self._free) == self.total
        assert not any(self._taken[slot] for slot in self._free)

"""The free list of a state pool."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conveyor_server.engine.slots import SlotAllocator


@given(total=st.integers(1, 6), choices=st.lists(st.integers(0, 20), max_size=60))
def test_free_and_used_add_up_whatever_is_done(total: int, choices: list[int]) -> None:
    allocator, taken = SlotAllocator(total), set[int]()
    for choice in choices:
        if choice % 2 and taken:
            slot = sorted(taken)[choice % len(taken)]
            allocator.release(slot)
            taken.remove(slot)
        else:
            slot = allocator.acquire()
            assert (slot is None) == (len(taken) == total)
            if slot is not None:
                assert slot not in taken
                assert 1 <= slot <= total  # 0 is the dummy
                taken.add(slot)
        assert allocator.used == len(taken)
        allocator.check()


def test_the_slot_freed_last_is_taken_first() -> None:
    allocator = SlotAllocator(4)
    slots = [allocator.acquire() for _ in range(3)]
    assert slots == [1, 2, 3]
    allocator.release(1)
    allocator.release(3)
    assert [allocator.acquire(), allocator.acquire(), allocator.acquire()] == [3, 1, 4]


@pytest.mark.parametrize("slot", [-1, 0, 3])
def test_a_slot_outside_the_pool_cannot_be_freed(slot: int) -> None:
    with pytest.raises(AssertionError, match="not in this pool"):
        SlotAllocator(2).release(slot)


def test_a_slot_cannot_be_freed_twice() -> None:
    allocator = SlotAllocator(2)
    slot = allocator.acquire()
    assert slot is not None
    allocator.release(slot)
    with pytest.raises(AssertionError, match="twice"):
        allocator.release(slot)

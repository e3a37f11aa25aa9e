"""The ragged layout, against one that pads every work to the longest."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from conveyor_server.engine.port import Work
from conveyor_server.engine.ragged import Layout, lay_out


@st.composite
def batches(draw: st.DrawFn) -> list[Work]:
    lengths = draw(st.lists(st.integers(1, 7), min_size=1, max_size=9))
    return [
        Work(slot, length, b"", draw(st.integers(0, length)))
        for slot, length in enumerate(lengths, start=1)
    ]


def packed_steps(works: list[Work]) -> list[tuple[int, int]]:
    """(position, time) of every row, by padding: longest work first, one time after another."""
    order = sorted(range(len(works)), key=lambda position: -works[position].length)
    times = max(work.length for work in works)
    return [
        (position, time)
        for time in range(times)
        for position in order
        if time < works[position].length
    ]


def session_steps(works: list[Work]) -> list[tuple[int, int]]:
    """(position, time) of every row as payloads arrive."""
    return [(p, time) for p, work in enumerate(works) for time in range(work.length)]


def all_of(layout: Layout, count: int) -> tuple[list[int], list[int], list[int]]:
    """Order, gather and wanted, written out where the layout leaves them implied."""
    return (
        list(range(count)) if layout.order is None else layout.order,
        list(range(layout.rows)) if layout.gather is None else layout.gather.tolist(),
        list(range(layout.rows)) if layout.wanted is None else layout.wanted.tolist(),
    )


@given(batches())
def test_the_layout_equals_the_padded_one(works: list[Work]) -> None:
    layout = lay_out(works)
    order, gather, wanted = all_of(layout, len(works))
    packed, arrived = packed_steps(works), session_steps(works)
    assert layout.rows == len(packed)
    assert [arrived[row] for row in gather] == packed
    assert layout.slots == [works[position].slot for position in order]
    assert sorted(order) == list(range(len(works)))
    lengths = [works[position].length for position in order]
    assert lengths == sorted(lengths, reverse=True)
    assert layout.counts == [
        sum(work.length > time for work in works)
        for time in range(max(work.length for work in works))
    ]
    assert [packed[row] for row in wanted] == [
        (position, time)
        for position, work in enumerate(works)
        for time in range(work.length - work.outputs, work.length)
    ]
    assert layout.wanted_counts == [work.outputs for work in works]


@given(batches())
def test_at_every_time_the_first_works_are_the_running_ones(works: list[Work]) -> None:
    layout = lay_out(works)
    _, gather, _ = all_of(layout, len(works))
    arrived = session_steps(works)
    order = all_of(layout, len(works))[0]
    row = 0
    for time, count in enumerate(layout.counts):
        running = [arrived[index] for index in gather[row : row + count]]
        assert running == [(position, time) for position in order[:count]]
        row += count
    assert row == layout.rows


def test_single_steps_need_no_index() -> None:
    layout = lay_out([Work(3, 1, b"", 1), Work(1, 1, b"", 1)])
    assert (layout.order, layout.gather, layout.wanted) == (None, None, None)
    assert layout.slots == [3, 1]
    assert layout.counts == [2]


def test_outputs_of_some_single_steps() -> None:
    layout = lay_out([Work(1, 1, b"", 0), Work(2, 1, b"", 1), Work(3, 1, b"", 0)])
    assert layout.wanted is not None
    assert layout.wanted.tolist() == [1]
    assert layout.wanted.dtype == np.int64

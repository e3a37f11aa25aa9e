"""Results held for retries, against a plain list of what was added."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conveyor_server.core import OutputMode
from conveyor_server.errors import StepConflict, StepResultNotHeld
from conveyor_server.sessions.held import ENTRY_BYTES, HeldBudget, HeldResults

IN_BYTES, OUT_BYTES = 4, 8


def input_row(step: int) -> bytes:
    return step.to_bytes(IN_BYTES, "little")


def output_row(step: int) -> bytes:
    return (step * 1_000_003).to_bytes(OUT_BYTES, "little")


def inputs(first: int, last: int) -> bytes:
    return b"".join(input_row(step) for step in range(first, last + 1))


def outputs(first: int, last: int) -> bytes:
    return b"".join(output_row(step) for step in range(first, last + 1))


def fill(held: HeldResults, *lengths: int, wanted: int | None = None) -> int:
    """Adds runs of steps that follow one another; returns the last step."""
    step = 0
    for length in lengths:
        count = length if wanted is None else min(wanted, length)
        last = step + length
        held.add(step + 1, length, inputs(step + 1, last), outputs(last - count + 1, last), count)
        step = last
    return step


@st.composite
def added(draw: st.DrawFn) -> list[tuple[int, int]]:
    """Runs of steps: how long each is and how many of its last outputs were computed."""
    lengths = draw(st.lists(st.integers(1, 6), min_size=1, max_size=8))
    return [(length, draw(st.integers(0, length))) for length in lengths]


@given(
    runs=added(),
    steps_max=st.integers(0, 24),
    first=st.integers(1, 30),
    length=st.integers(1, 12),
    wanted=st.sampled_from(OutputMode),
    changed=st.none() | st.integers(0, 11),
)
def test_recall_equals_a_list_of_what_was_added(
    runs: list[tuple[int, int]],
    steps_max: int,
    first: int,
    length: int,
    wanted: OutputMode,
    changed: int | None,
) -> None:
    held = HeldResults(steps_max, 10**9)
    computed: list[bool] = []  # for each step from 1 on: was its output computed
    for run, count in runs:
        step = len(computed)
        last = step + run
        held.add(step + 1, run, inputs(step + 1, last), outputs(last - count + 1, last), count)
        computed += [False] * (run - count) + [True] * count
    applied = len(computed)
    kept = min(applied, steps_max)  # however they were cut into runs
    assert held.steps == kept
    oldest = applied - kept + 1

    last = min(first + length - 1, applied)
    if first > applied:
        return  # not a repetition: settle never asks for it
    steps = range(first, last + 1)
    payload = bytearray(inputs(first, last))
    if changed is not None and changed < len(steps):
        payload[changed * IN_BYTES] ^= 0xFF
    else:
        changed = None
    if changed is not None and first + changed >= oldest:
        with pytest.raises(StepConflict):
            held.recall(first, len(steps), bytes(payload), wanted)
        return
    asked = {OutputMode.ALL: steps, OutputMode.LAST: steps[-1:], OutputMode.NONE: steps[:0]}[wanted]
    if first < oldest or not all(computed[step - 1] for step in asked):
        with pytest.raises(StepResultNotHeld):
            held.recall(first, len(steps), bytes(payload), wanted)
        return
    expected = b"".join(output_row(step) for step in asked)
    assert held.recall(first, len(steps), bytes(payload), wanted) == (expected, len(asked))


def test_a_conflict_is_told_even_where_the_older_part_is_forgotten() -> None:
    held = HeldResults(4, 10**9)
    fill(held, 4, 4)
    payload = bytearray(inputs(3, 6))
    payload[-1] ^= 1
    with pytest.raises(StepConflict) as caught:
        held.recall(3, 4, bytes(payload), OutputMode.ALL)
    assert caught.value.metadata["first_step"] == "5"


def test_steps_are_held_at_the_limit_and_dropped_above_it() -> None:
    held = HeldResults(8, 10**9)
    fill(held, *[1] * 8)
    assert held.recall(1, 1, input_row(1), OutputMode.ALL) == (output_row(1), 1)
    fill_more = 9
    held.add(fill_more, 1, input_row(9), output_row(9), 1)
    assert held.steps == 8
    with pytest.raises(StepResultNotHeld):
        held.recall(1, 1, input_row(1), OutputMode.ALL)
    assert held.recall(2, 1, input_row(2), OutputMode.ALL) == (output_row(2), 1)


def test_bytes_are_held_at_the_limit_and_dropped_above_it() -> None:
    row_bytes = ENTRY_BYTES + IN_BYTES + OUT_BYTES
    held = HeldResults(10**9, 3 * row_bytes)
    fill(held, 1, 1, 1)
    assert held.size_bytes == 3 * row_bytes
    assert held.recall(1, 3, inputs(1, 3), OutputMode.ALL) == (outputs(1, 3), 3)
    held.add(4, 1, input_row(4), output_row(4), 1)
    assert held.size_bytes == 3 * row_bytes
    with pytest.raises(StepResultNotHeld):
        held.recall(1, 1, input_row(1), OutputMode.ALL)


def test_a_run_larger_than_the_limit_leaves_its_newest_steps() -> None:
    held = HeldResults(4, 10**9)
    fill(held, 2, 5)
    assert (held.steps, held.size_bytes) == (4, ENTRY_BYTES + 4 * (IN_BYTES + OUT_BYTES))
    assert held.recall(4, 4, inputs(4, 7), OutputMode.ALL) == (outputs(4, 7), 4)
    with pytest.raises(StepResultNotHeld):
        held.recall(3, 1, input_row(3), OutputMode.NONE)


def test_a_run_of_more_bytes_than_the_limit_leaves_nothing() -> None:
    held = HeldResults(100, ENTRY_BYTES + 3 * (IN_BYTES + OUT_BYTES))
    fill(held, 1, 4)
    assert (held.steps, held.size_bytes) == (0, 0)
    assert held.newest_output() is None


@given(runs=added(), steps_max=st.integers(0, 8))
def test_the_bytes_counted_are_those_held(runs: list[tuple[int, int]], steps_max: int) -> None:
    held, bytes_max, step = HeldResults(steps_max, 3 * ENTRY_BYTES), 3 * ENTRY_BYTES, 0
    for length, wanted in runs:
        last = step + length
        rows = outputs(last - wanted + 1, last)
        held.add(step + 1, length, inputs(step + 1, last), rows, wanted)
        step = last
        entries = list(held._entries)
        assert held.size_bytes == sum(entry.size_bytes for entry in entries) <= bytes_max
        assert held.steps == sum(entry.length for entry in entries) <= steps_max
        for entry in entries:
            assert len(entry.inputs) == entry.length * IN_BYTES
            assert len(entry.outputs) == entry.outputs_length * OUT_BYTES


def test_a_copy_takes_the_newest_step_only() -> None:
    source, copy = HeldResults(8, 10**9), HeldResults(8, 10**9)
    copy.take_newest(source)
    assert copy.steps == 0
    fill(source, 3)
    copy.take_newest(source)
    assert copy.newest_output() == output_row(3)
    assert copy.recall(3, 1, input_row(3), OutputMode.ALL) == (output_row(3), 1)
    with pytest.raises(StepResultNotHeld):
        copy.recall(2, 1, input_row(2), OutputMode.ALL)
    assert source.steps == 3


def test_the_newest_output_is_there_only_if_it_was_asked_for() -> None:
    held = HeldResults(8, 10**9)
    assert held.newest_output() is None
    fill(held, 3)
    assert held.newest_output() == output_row(3)
    held.add(4, 2, inputs(4, 5), output_row(5), 1)
    assert held.newest_output() == output_row(5)
    held.add(6, 1, input_row(6), b"", 0)
    assert held.newest_output() is None


def test_the_budget_makes_those_stepped_longest_ago_forget() -> None:
    size = ENTRY_BYTES + 4 * (IN_BYTES + OUT_BYTES)
    budget = HeldBudget(2 * size)
    held = {name: HeldResults(100, 10**9) for name in "abc"}
    for name in "ab":
        fill(held[name], 4)
        budget.update(("ann", name), held[name])
    assert budget.size_bytes == 2 * size  # at the limit all is kept
    assert [held[name].steps for name in "ab"] == [4, 4]
    held["a"].add(5, 1, input_row(5), b"", 0)
    budget.update(("ann", "a"), held["a"])
    assert held["b"].steps == 0
    assert held["a"].steps == 5
    fill(held["c"], 4)
    budget.update(("ann", "c"), held["c"])
    assert held["a"].steps == 0
    assert budget.size_bytes == size


def test_the_budget_counts_what_ended_no_more() -> None:
    budget = HeldBudget(10**6)
    held = HeldResults(100, 10**9)
    fill(held, 4)
    budget.update(("ann", "a"), held)
    budget.forget(("ann", "a"))
    budget.forget(("ann", "a"))
    assert budget.size_bytes == 0


def test_a_budget_of_nothing_holds_nothing() -> None:
    budget = HeldBudget(0)
    held = HeldResults(100, 10**9)
    fill(held, 4)
    budget.update(("ann", "a"), held)
    assert (held.size_bytes, budget.size_bytes) == (0, 0)

"""The budget of what is owed to clients: what is counted, who waits, who is woken."""

from __future__ import annotations

import asyncio

import pytest

from conveyor_server.config import ConfigError, LimitsConfig, load_config
from conveyor_server.errors import CallsLimit
from conveyor_server.rpc.results import (
    CALL_FREE_BYTES,
    STREAM_FREE_BYTES,
    TRIM_BYTES,
    Account,
    ResultsBudget,
)

MINE, ALL = 10_000, 15_000
FREE = STREAM_FREE_BYTES


class _Streams:
    """A budget and accounts on it; who was woken is written down."""

    def __init__(self) -> None:
        self.woken: list[str] = []
        self.trims = 0
        limits = LimitsConfig(
            result_bytes_max=MINE, principal_results_bytes_max=MINE, results_total_bytes_max=ALL
        )
        self.budget = ResultsBudget(limits, self._trim)

    def account(self, name: str, principal: str = "ann") -> Account:
        return self.budget.account(principal, lambda: self.woken.append(name))

    def _trim(self) -> None:
        self.trims += 1


def test_a_free_share_is_counted_for_nobody() -> None:
    streams = _Streams()
    accounts = [streams.account(str(number)) for number in range(100)]
    for account in accounts:
        assert account.room_for(FREE)
        account.add(FREE)
    assert streams.budget.size_bytes == 0


@pytest.mark.parametrize(("principal", "room"), [("ann", MINE), ("bob", ALL - MINE + 1)])
def test_room_ends_at_each_bound(principal: str, room: int) -> None:
    streams = _Streams()
    if principal == "bob":
        streams.account("other").add(FREE + MINE - 1)
    account = streams.account("a", principal)
    assert account.room_for(FREE + room)
    assert not account.room_for(FREE + room + 1)
    account.add(FREE + room)
    assert not account.room_for(1)
    assert streams.account("b", principal).room_for(FREE)


def test_those_who_wait_are_woken_in_order_and_nobody_passes_them() -> None:
    streams = _Streams()
    first, large, small = (streams.account(name) for name in ("first", "large", "small"))
    first.add(FREE + MINE)
    assert not large.room_for(FREE + MINE)
    assert not small.room_for(FREE + 10)
    first.add(-5_000)
    assert not small.room_for(FREE + 10), "it passed the one before it"
    assert streams.woken == []
    first.add(-5_000)
    assert streams.woken == ["large"]
    assert large.room_for(FREE + MINE)
    large.take(FREE + MINE)
    large.close()
    assert streams.woken[-1] == "small"
    assert small.room_for(FREE + 10)


def test_one_who_goes_lets_the_next_one_on() -> None:
    streams = _Streams()
    first, gone, next_one = (streams.account(name) for name in ("first", "gone", "next"))
    first.add(FREE + 6_000)
    assert not gone.room_for(FREE + 8_000)
    assert not next_one.room_for(FREE + 10)
    gone.close()
    assert streams.woken == ["next"]
    assert next_one.room_for(FREE + 10)


def test_one_who_wants_no_more_lets_the_next_one_on() -> None:
    streams = _Streams()
    first, other, next_one = (streams.account(name) for name in ("first", "other", "next"))
    first.add(FREE + 6_000)
    assert not other.room_for(FREE + 8_000)
    assert not next_one.room_for(FREE + 10)
    other.wait_no_more()
    assert streams.woken == ["next"]


def test_what_comes_after_the_end_is_not_owed() -> None:
    streams = _Streams()
    account = streams.account("a")
    account.add(FREE + 100)
    account.close()
    account.add(5_000)
    account.add(-9_000)
    assert streams.budget.size_bytes == 0
    assert streams.account("b").room_for(FREE + MINE)


def test_memory_is_given_back_once_much_was_read() -> None:
    streams = _Streams()
    account = streams.account("a")
    account.add(FREE + TRIM_BYTES)
    account.add(-TRIM_BYTES // 4)
    assert streams.trims == 0
    account.add(-TRIM_BYTES // 2)
    account.add(-TRIM_BYTES // 8)
    assert streams.trims == 1
    account.add(TRIM_BYTES // 2)
    account.close()
    assert streams.trims == 1, "little was owed since"


async def test_a_call_is_counted_until_its_task_ends() -> None:
    budget = _Streams().budget
    goes_on = asyncio.Event()

    async def call(size: int, response: int) -> None:
        budget.count_for_call("ann", size)
        await goes_on.wait()
        budget.count_response("ann", response)
        await asyncio.sleep(0)
        assert budget.size_bytes == max(size, response) - CALL_FREE_BYTES

    under_way = asyncio.create_task(call(CALL_FREE_BYTES + MINE, CALL_FREE_BYTES + MINE + 99))
    await asyncio.sleep(0)
    assert budget.size_bytes == MINE
    with pytest.raises(CallsLimit, match="principal_results_bytes_max"):
        await asyncio.create_task(call(CALL_FREE_BYTES + 1, 0))
    with pytest.raises(CallsLimit, match="results_total_bytes_max"):
        budget.count_for_call("bob", CALL_FREE_BYTES + ALL - MINE + 1)
    budget.count_for_call("ann", CALL_FREE_BYTES)  # which is free
    goes_on.set()
    await under_way
    await asyncio.sleep(0)
    assert budget.size_bytes == 0


@pytest.mark.parametrize(
    ("smaller", "larger"),
    [
        ("result_bytes_max", "principal_results_bytes_max"),
        ("principal_results_bytes_max", "results_total_bytes_max"),
    ],
)
def test_bounds_that_contradict_each_other_are_refused(smaller: str, larger: str) -> None:
    flags = {f"limits.{smaller}": str(2**20), f"limits.{larger}": str(2**20)}
    if smaller == "principal_results_bytes_max":
        flags["limits.result_bytes_max"] = "1024"
    load_config(None, flags)
    flags[f"limits.{larger}"] = str(2**20 - 1)
    with pytest.raises(ConfigError, match=f"limits.{smaller} is 1048576, more than"):
        load_config(None, flags)

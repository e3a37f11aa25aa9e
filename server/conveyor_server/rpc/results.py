"""Bounds the results that wait for clients: in all, and for each principal.

A result counts from when its steps are taken until it is written to its client or its call has
ended. What a stream or a call owes up to a small share of its own is free, so one that takes its
results goes on however much others leave unread.
"""

import asyncio
import ctypes
import threading
from collections import Counter, OrderedDict
from collections.abc import Callable
from contextvars import ContextVar
from typing import Final

from conveyor_server.config import LimitsConfig
from conveyor_server.errors import CallsLimit

STREAM_FREE_BYTES: Final = 64 * 2**10
"""What each stream may owe without regard to what others owe."""
CALL_FREE_BYTES: Final = 4 * 2**10
"""The same for a unary call."""
TRIM_DELAY_SECONDS: Final = 1.0
TRIM_BYTES: Final = 16 * 2**20
"""Once so many bytes were counted and half of them are gone, free memory is given back."""

_account: ContextVar["Account | None"] = ContextVar("account", default=None)


class ResultsBudget:
    """Counts what is owed.

    Attributes:
        size_bytes: What all accounts owe beyond their free share.
    """

    def __init__(self, limits: LimitsConfig, trim: Callable[[], None] | None = None) -> None:
        """`trim` gives free memory back to the system; by default the C library does."""
        self._total_max = limits.results_total_bytes_max
        self._principal_max = limits.principal_results_bytes_max
        self._of: Counter[str] = Counter()
        self._waiting: dict[str, OrderedDict[Account, int]] = {}
        self._trim = _trim_soon if trim is None else trim
        self._peak_bytes = 0
        self.size_bytes = 0

    def account(
        self, principal: str, wake: Callable[[], None], free_bytes: int = STREAM_FREE_BYTES
    ) -> "Account":
        """A stream's account. `wake` is called when there may be room after `room_for` said no."""
        return Account(self, principal, wake, free_bytes)

    def count_for_call(self, principal: str, size: int) -> None:
        """Counts at least so many bytes of results for the running task's call until it ends.

        Raises:
            CallsLimit: They do not fit.
        """
        account = _account.get()
        if account is None:
            if size <= CALL_FREE_BYTES:
                return
            account = Account(self, principal, lambda: None, CALL_FREE_BYTES)
        more = size - account.size_bytes
        if more > 0:
            self._check_room(account, more)
            account.add(more)
        _keep_until_done(account)

    def count_response(self, principal: str, size: int) -> None:
        """Counts the response of the running task's unary call, room or not, until it is sent."""
        account = _account.get()
        if account is None:
            if size <= CALL_FREE_BYTES:
                return
            account = Account(self, principal, lambda: None, CALL_FREE_BYTES)
        account.add(max(0, size - account.size_bytes))
        _keep_until_done(account)

    def fits(self, account: "Account", wanted: int) -> bool:
        """Whether an account may owe so many bytes more."""
        more = account.charge_of(wanted)
        if not more:
            return True
        waiting = self._waiting.get(account.principal)
        if waiting and next(iter(waiting)) is not account:
            return False
        return self._has_room(account.principal, more)

    def wait(self, account: "Account", wanted: int) -> None:
        """Notes that an account waits for room; those of one principal come up in order."""
        self._waiting.setdefault(account.principal, OrderedDict())[account] = wanted

    def wait_no_more(self, account: "Account") -> None:
        """The account found room, or its stream is over."""
        waiting = self._waiting.get(account.principal)
        if waiting is not None and waiting.pop(account, None) is not None:
            if not waiting:
                del self._waiting[account.principal]
            self._wake_waiting()

    def charge(self, principal: str, change: int) -> None:
        """What an account owes beyond its free share changed."""
        self.size_bytes += change
        self._of[principal] += change
        if not self._of[principal]:
            del self._of[principal]
        if change > 0:
            self._peak_bytes = max(self._peak_bytes, self.size_bytes)
            return
        self._wake_waiting()
        if self._peak_bytes >= TRIM_BYTES and self.size_bytes <= self._peak_bytes // 2:
            self._peak_bytes = self.size_bytes
            self._trim()

    def _has_room(self, principal: str, more: int) -> bool:
        return (
            self._of[principal] + more <= self._principal_max
            and self.size_bytes + more <= self._total_max
        )

    def _check_room(self, account: "Account", wanted: int) -> None:
        more, owed = account.charge_of(wanted), self._of[account.principal]
        if not more or self._has_room(account.principal, more):
            return
        if owed + more > self._principal_max:
            raise CallsLimit(
                f"{owed:,} bytes of your results are not read yet, and {wanted:,} more do not fit;"
                " read them first",
                limit="limits.principal_results_bytes_max",
                maximum=self._principal_max,
            )
        raise CallsLimit(
            f"{self.size_bytes:,} bytes of results are not read yet, and {wanted:,} more do not"
            " fit; try again later",
            limit="limits.results_total_bytes_max",
            maximum=self._total_max,
        )

    def _wake_waiting(self) -> None:
        for waiting in self._waiting.values():
            account, wanted = next(iter(waiting.items()))
            if self.fits(account, wanted):
                account.wake()


class Account:
    """What one stream or call owes.

    Attributes:
        principal: Whose it is.
        size_bytes: What is owed.
        wake: See `ResultsBudget.account`.
    """

    __slots__ = ("_budget", "_closed", "_free_bytes", "principal", "size_bytes", "wake")

    def __init__(
        self,
        budget: ResultsBudget,
        principal: str,
        wake: Callable[[], None],
        free_bytes: int,
    ) -> None:
        """Nothing is owed yet."""
        self._budget = budget
        self._free_bytes = free_bytes
        self._closed = False
        self.principal = principal
        self.wake = wake
        self.size_bytes = 0

    def add(self, change: int) -> None:
        """So much more is owed, or less if it is negative."""
        if self._closed:
            change = max(min(change, 0), -self.size_bytes)
        charged = self.size_bytes - self._free_bytes
        self.size_bytes += change
        charged_now = self.size_bytes - self._free_bytes
        if charged > 0 or charged_now > 0:
            self._budget.charge(self.principal, max(0, charged_now) - max(0, charged))

    def room_for(self, wanted: int) -> bool:
        """Whether so much more may be owed; after False `wake` is called once it may.

        The place in the queue is kept until `take` or `wait_no_more`.
        """
        if self._budget.fits(self, wanted):
            return True
        self._budget.wait(self, wanted)
        return False

    def take(self, wanted: int) -> None:
        """So much more is owed, for which there was room; if it was waited for, no more."""
        self.add(wanted)
        self._budget.wait_no_more(self)

    def wait_no_more(self) -> None:
        """What room was waited for is not wanted any more."""
        self._budget.wait_no_more(self)

    def charge_of(self, wanted: int) -> int:
        """What so much more would count as."""
        charged = self.size_bytes - self._free_bytes
        return max(0, charged + wanted) - max(0, charged)

    def close(self, written_bytes: int = 0) -> None:
        """Nothing more is owed, whatever still comes.

        What is being written counts until `add` takes it off.
        """
        self.add(written_bytes - self.size_bytes)
        self._closed = True
        self._budget.wait_no_more(self)
        self.wake = _nobody_waits  # it keeps the stream, which keeps the account


def _nobody_waits() -> None:
    """The `wake` of an account that is closed."""


def _keep_until_done(account: Account) -> None:
    """Ties an account to the running task: a call's lasts until its response is sent."""
    if _account.get() is account:
        return
    _account.set(account)
    task = asyncio.current_task()
    assert task is not None
    task.add_done_callback(lambda _: account.close())


def _trim_soon() -> None:
    """Gives free memory back, which takes some milliseconds and no interpreter.

    A little later: what is not owed any more is not yet free.
    """
    if _MALLOC_TRIM is None:
        return
    timer = threading.Timer(TRIM_DELAY_SECONDS, _MALLOC_TRIM, (0,))
    timer.daemon = True
    try:
        timer.start()
    except RuntimeError:  # no memory for a thread, so it is needed all the more
        _MALLOC_TRIM(0)


def _malloc_trim() -> Callable[[int], object] | None:
    """The C library's function, which not every C library has."""
    try:
        return ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):
        return None


_MALLOC_TRIM: Final = _malloc_trim()

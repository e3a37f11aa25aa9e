"""Runs the scheduler on an asyncio event loop.

A tick starts as soon as there is work and all that has arrived is read: while each turn of the loop
brings new chunks, the tick is put off to the next turn, a few times at most. No time is waited, and
every turn has something to do. Small batches run on the loop itself; those above
`inline_multiply_adds_max` run on one worker thread while the loop goes on reading and writing.
Either way all session state is touched on the loop's thread only.
"""

import asyncio
import logging
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Final, TypeVar

from conveyor_server.core import Chunk, ModelInfo, SessionView
from conveyor_server.errors import ConveyorError, DeviceOutOfMemory, EngineFailed
from conveyor_server.scheduler.lateness import LOOK_SECONDS, Lateness
from conveyor_server.scheduler.operations import Future, Operations, mistake
from conveyor_server.scheduler.scheduler import Outcome, Scheduler, Turn

A = TypeVar("A")
T = TypeVar("T")
_log = logging.getLogger(__name__)

TURNS_PUT_OFF_MAX: Final = 3
"""How often a tick is put off because chunks are still being read."""


class Driver:
    """Ticks a scheduler whenever it has something to do."""

    def __init__(self, inline_multiply_adds_max: int) -> None:
        """Call `start` before anything else."""
        self._inline_multiply_adds_max = inline_multiply_adds_max
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="engine")
        self._aside = ThreadPoolExecutor(max_workers=1, thread_name_prefix="aside")
        self._due: asyncio.Handle | None = None
        self._running = False
        self._alarm: asyncio.TimerHandle | None = None
        self._alarm_due = 0.0
        self._looking: asyncio.TimerHandle | None = None
        self._arrived_before = 0
        self._turns_put_off = 0
        self._stopped = False

    def start(
        self, scheduler: Scheduler, operations: Operations, broken: Callable[[], None]
    ) -> None:
        """Begins ticking on the running loop.

        `broken` is called if a tick breaks off by a mistake of ours. Sessions may then be half
        changed, so nothing runs any more: wrong outputs would be worse than none.
        """
        self._broken = broken
        self._loop = asyncio.get_running_loop()
        self._scheduler = scheduler
        self._operations = operations
        self._lateness = Lateness(self._loop.time())
        self._look_again()
        self.wake()

    def stop(self) -> None:
        """Ends ticking; waits for a batch on the worker thread."""
        self._stopped = True
        for timer in (self._alarm, self._looking):
            if timer is not None:
                timer.cancel()
        self._aside.shutdown(wait=True, cancel_futures=True)
        self._worker.shutdown(wait=True)

    def submit(self, chunk: Chunk) -> None:
        """Hands a chunk in.

        Raises:
            InboxFull: See `Inbox.put`.
        """
        self._scheduler.inbox.put(chunk)

    def peek(self, principal: str, session_id: str) -> SessionView:
        """Describes a session at once, without waiting for the batch that runs; it changes nothing.

        Raises:
            SessionNotFound, SessionEnded.
        """
        return self._operations.get(principal, session_id)

    def model(self, name: str, version: int) -> ModelInfo:
        """A model in service; 0 means the newest version.

        Raises:
            ModelNotFound: There is none.
        """
        return self._scheduler.models.resolve(name, version)

    async def call(self, operation: Callable[[Operations], T]) -> T:
        """Runs an operation between two ticks and returns its result, or raises what it raised.

        It waits for the batch that runs on the worker thread, if one does, and else for nothing.

        Anything but a `ConveyorError` is a mistake of ours: it is logged, and raised as `Internal`.
        """
        future: asyncio.Future[T] = self._loop.create_future()

        def run() -> None:
            try:
                result = operation(self._operations)
            except ConveyorError as error:
                _settle(future, error=error)
            except Exception as error:  # noqa: BLE001  it fails its caller, not everybody's ticks
                _settle(future, error=mistake(error))
            else:
                _settle(future, result=result)

        self._scheduler.inbox.put_operation(run)
        self._take_in()
        return await future

    async def aside(self, function: Callable[[A], T], argument: A) -> T:
        """Runs something long that touches no session, beside the loop; one after the other.

        Callers wait for its end, so of those that wait there are never more than calls.
        """
        return await self._loop.run_in_executor(self._aside, function, argument)

    async def call_after_queue(self, operation: Callable[[Operations, Future[T]], None]) -> T:
        """Runs an operation that waits for what the session was sent before."""
        future: asyncio.Future[T] = self._loop.create_future()
        gate = _Gate(future)

        def run() -> None:
            try:
                operation(self._operations, gate)
            except Exception as error:  # noqa: BLE001  as in `call`
                gate.set_exception(mistake(error))

        self._scheduler.inbox.put_operation(run)
        self._take_in()
        return await future

    def post(self, operation: Callable[[Operations], None]) -> None:
        """Runs an operation between two ticks; nobody waits for it, so what it raises is logged."""

        def run() -> None:
            try:
                operation(self._operations)
            except Exception as error:  # noqa: BLE001  as in `call`
                mistake(error)

        self._scheduler.inbox.put_operation(run)

    def _take_in(self) -> None:
        """Carries out what is in the inbox now, if no batch is running."""
        if self._running or self._stopped:
            return
        with self._stopping_if_broken():
            self._scheduler.take_in()

    def wake(self) -> None:
        """Something arrived."""
        if self._due is None and not self._running and not self._stopped:
            self._turns_put_off = 0
            self._due = self._loop.call_soon(self._turn_when_read)

    def tick_at_once(self) -> None:
        """Ticks now if a tick is due: for a caller who knows that nobody else is to arrive."""
        if self._due is not None:
            self._due.cancel()
            self._turn()

    def _turn_when_read(self) -> None:
        arrived = self._scheduler.inbox.arrived
        if arrived != self._arrived_before and self._turns_put_off < TURNS_PUT_OFF_MAX:
            self._arrived_before = arrived
            self._turns_put_off += 1
            self._due = self._loop.call_soon(self._turn_when_read)
        else:
            self._turn()

    def _turn(self) -> None:
        self._due = None
        if self._stopped:
            return
        self._look()
        with self._stopping_if_broken():
            turn = self._scheduler.begin()
            if turn is not None:
                self._run(turn)
        if self._scheduler.has_work:
            self.wake()
        else:
            self._set_alarm()

    def _run(self, turn: Turn) -> None:
        if turn.multiply_adds <= self._inline_multiply_adds_max:
            self._scheduler.finish(turn, self._execute(turn))
            return
        self._running = True
        self._loop.run_in_executor(self._worker, self._execute, turn).add_done_callback(
            lambda done: self._finish(turn, done.result())
        )

    def _finish(self, turn: Turn, outcome: Outcome) -> None:
        self._running = False
        if self._stopped:
            return
        with self._stopping_if_broken():
            self._scheduler.finish(turn, outcome)
        self.wake()

    @contextmanager
    def _stopping_if_broken(self) -> Generator[None]:
        try:
            yield
        except Exception:  # noqa: BLE001  whatever it was, sessions may be half changed
            _log.critical("a tick broke off; the server stops", exc_info=True)
            self._stopped = True
            self._broken()

    def _execute(self, turn: Turn) -> Outcome:
        try:
            outcome = self._scheduler.execute(turn)
        except MemoryError as error:
            outcome = DeviceOutOfMemory("the server")
            outcome.__cause__ = error.with_traceback(None)
        except Exception:  # noqa: BLE001  a bug in the engine fails its batch, not the server
            _log.exception("the engine raised", extra={"model": turn.model.name})
            return EngineFailed("the engine failed on this batch; nothing was applied")
        if isinstance(outcome, ConveyorError):
            _log.error("the engine failed", exc_info=outcome, extra={"model": turn.model.name})
        return outcome

    def _look(self) -> None:
        """Sees whether the loop was not there; before leases end, for which that counts."""
        late = self._lateness.look(self._loop.time())
        if late:
            _log.warning("the event loop was not there", extra={"seconds": round(late, 3)})
            self._scheduler.was_late(late)

    def _look_again(self) -> None:
        self._look()
        self._looking = self._loop.call_later(LOOK_SECONDS, self._look_again)

    def _set_alarm(self) -> None:
        """Sees to it that leases end on time even if nothing arrives any more."""
        due = self._scheduler.next_wakeup()
        if due is None or (self._alarm is not None and self._alarm_due <= due):
            return
        if self._alarm is not None:
            self._alarm.cancel()
        self._alarm_due = due
        delay = max(0.0, due - self._scheduler.clock.monotonic())
        self._alarm = self._loop.call_later(delay, self._ring)

    def _ring(self) -> None:
        self._alarm = None
        self.wake()


class _Gate:
    """Passes an outcome on to a future that its caller may have given up."""

    def __init__(self, future: "asyncio.Future[T]") -> None:
        self._future = future

    def set_result(self, result: object) -> None:
        _settle(self._future, result=result)

    def set_exception(self, exception: ConveyorError) -> None:
        _settle(self._future, error=exception)


def _settle(
    future: "asyncio.Future[T]", result: object = None, error: ConveyorError | None = None
) -> None:
    if future.done():  # the call was cancelled or ran out of time
        return
    if error is not None:
        future.set_exception(error)
    else:
        future.set_result(result)  # pyright: ignore[reportArgumentType]

"""The scheduler on an event loop, with small batches on it and heavy ones beside it."""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Sequence

import pytest

from conveyor_server.core import Chunk, ModelKey, SessionView
from conveyor_server.engine.port import Done, Work
from conveyor_server.errors import (
    ConveyorError,
    DeviceOutOfMemory,
    EngineFailed,
    Internal,
    ModelNotFound,
    SessionExpired,
    SessionNotFound,
)
from conveyor_server.scheduler.collected import Collected
from conveyor_server.scheduler.driver import Driver
from tests.support.engine import straight_through
from tests.support.models import FEATURES
from tests.support.rig import PRINCIPAL, Rig, rows_of

INLINE, WORKER = 10**9, 0
WAIT_SECONDS = 10.0


class Server:
    """A driver on a rig."""

    def __init__(self, inline_multiply_adds_max: int) -> None:
        self.rig = Rig(quantum_steps=2)
        self.driver = Driver(inline_multiply_adds_max)
        self.rig.scheduler.inbox._wake = self.driver.wake
        self.broken = asyncio.Event()
        self.threads: set[int] = set()
        self.gate = threading.Event()
        self.gate.set()
        run = self.rig.engine.run

        def watched(key: ModelKey, works: Sequence[Work]) -> list[Done]:
            self.threads.add(threading.get_ident())
            assert self.gate.wait(WAIT_SECONDS)
            return run(key, works)

        self.rig.engine.run = watched  # type: ignore[method-assign]
        self.driver.start(self.rig.scheduler, self.rig.operations, self.broken.set)

    async def step(self, first_step: int, *values: int) -> bytes:
        return await self.send(first_step, *values)[1]

    def send(self, first_step: int, *values: int) -> tuple[Chunk, "asyncio.Future[bytes]"]:
        future: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()

        def settle(error: ConveyorError | None) -> None:
            if error is None:
                future.set_result(b"".join(reply.rows))
            else:
                future.set_exception(error)

        reply = Collected(settle)
        return self.rig.send("s", first_step, values, reply), future


async def until(condition: Callable[[], bool]) -> None:
    """Waits for something that tells nobody when it comes."""
    async with asyncio.timeout(WAIT_SECONDS):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.001)


@pytest.fixture(params=[INLINE, WORKER], ids=["inline", "worker"])
async def server(request: pytest.FixtureRequest) -> AsyncIterator[Server]:
    server = Server(request.param)
    try:
        yield server
    finally:
        server.gate.set()
        server.driver.stop()


async def test_steps_run_inline_or_beside_the_loop(server: Server) -> None:
    await server.driver.call(lambda _: server.rig.open())
    async with asyncio.timeout(WAIT_SECONDS):
        rows = await server.step(1, 1, 2, 3, 4, 5)
    assert rows == b"".join(straight_through(FEATURES, rows_of(FEATURES, 1, 2, 3, 4, 5))[0])
    inline = server.threads == {threading.get_ident()}
    assert len(server.threads) == 1
    assert inline == (server.driver._inline_multiply_adds_max == INLINE)


async def test_operations_return_or_raise(server: Server) -> None:
    opened = await server.driver.call(lambda operations: server.rig.open())
    assert server.driver.peek(PRINCIPAL, "s") == opened.view
    assert server.driver.model(FEATURES.key.name, 0) is FEATURES
    with pytest.raises(ModelNotFound):
        server.driver.model("other", 0)
    with pytest.raises(SessionNotFound):
        await server.driver.call(lambda operations: operations.get(PRINCIPAL, "x"))
    closed: SessionView = await server.driver.call_after_queue(
        lambda operations, future: operations.close(PRINCIPAL, "s", future)
    )
    assert closed.session_id == "s"
    with pytest.raises(ConveyorError):
        await server.driver.call_after_queue(
            lambda operations, future: operations.close(PRINCIPAL, "s", future)
        )


async def test_no_memory_fails_the_batch_and_nothing_else(server: Server) -> None:
    await server.driver.call(lambda _: server.rig.open())
    server.rig.engine.fail_next.append(MemoryError())
    async with asyncio.timeout(WAIT_SECONDS):
        with pytest.raises(DeviceOutOfMemory) as raised:
            await server.step(1, 1, 2)
        assert raised.value.retry_after_seconds
        rows = await server.step(1, 1, 2)
    assert rows == b"".join(straight_through(FEATURES, rows_of(FEATURES, 1, 2))[0])


async def test_no_memory_fails_an_operation_and_nothing_else(server: Server) -> None:
    def fails(*_: object) -> None:
        raise MemoryError

    with pytest.raises(DeviceOutOfMemory, match="out of memory"):
        await server.driver.call(fails)
    with pytest.raises(DeviceOutOfMemory, match="out of memory"):
        await server.driver.call_after_queue(fails)
    server.driver.post(fails)
    await server.driver.call(lambda _: server.rig.open())
    assert not server.broken.is_set()


async def test_operations_wait_for_no_more_than_the_batch_that_runs(server: Server) -> None:
    """However much is queued, and however many chunks still arrive."""
    await server.driver.call(lambda _: server.rig.open())
    server.gate.clear()
    if server.driver._inline_multiply_adds_max == INLINE:
        server.gate.set()
    steps = [server.send(1 + 2 * number, 1, 2)[1] for number in range(50)]
    ran = len(server.rig.engine.runs)
    if server.driver._inline_multiply_adds_max == WORKER:
        await until(lambda: server.driver._running)
    opening = asyncio.ensure_future(server.driver.call(lambda _: server.rig.open("new")))
    await asyncio.sleep(0)
    server.gate.set()
    async with asyncio.timeout(WAIT_SECONDS):
        await opening
    assert len(server.rig.engine.runs) - ran <= 2
    async with asyncio.timeout(WAIT_SECONDS):
        await asyncio.gather(*steps)


async def test_a_caller_that_gave_up_is_not_answered(server: Server) -> None:
    task = asyncio.ensure_future(server.driver.call(lambda _: server.rig.open()))
    await asyncio.sleep(0)
    task.cancel()
    async with asyncio.timeout(WAIT_SECONDS):
        view = await server.driver.call(lambda operations: operations.get(PRINCIPAL, "s"))
    assert view.session_id == "s"
    assert not server.broken.is_set()


async def test_things_arrive_while_a_heavy_batch_runs() -> None:
    server = Server(WORKER)
    try:
        await server.driver.call(lambda _: server.rig.open())
        server.gate.clear()
        _, first = server.send(1, 1)
        await until(lambda: bool(server.threads))
        _, second = server.send(2, 2)
        waiting = asyncio.ensure_future(server.driver.call(lambda ops: ops.get(PRINCIPAL, "s")))
        for _ in range(5):
            await asyncio.sleep(0)
        assert not any(each.done() for each in (first, second, waiting))
        assert server.driver.peek(PRINCIPAL, "s").applied_step == 0
        server.gate.set()
        async with asyncio.timeout(WAIT_SECONDS):
            rows = await first + await second
            assert (await waiting).applied_step >= 1
        assert rows == b"".join(straight_through(FEATURES, rows_of(FEATURES, 1, 2))[0])
    finally:
        server.gate.set()
        server.driver.stop()


async def test_an_engine_that_raises_anything_fails_its_batch_only(server: Server) -> None:
    await server.driver.call(lambda _: server.rig.open())
    server.rig.engine.fail_next.append(ValueError("a bug"))  # type: ignore[arg-type]
    async with asyncio.timeout(WAIT_SECONDS):
        with pytest.raises(EngineFailed) as caught:
            await server.step(1, 1)
        assert "bug" not in caught.value.message
        assert await server.step(1, 1)
    assert not server.broken.is_set()


async def test_a_mistake_of_ours_stops_everything(server: Server) -> None:
    await server.driver.call(lambda _: server.rig.open())
    server.rig.session().held = None  # type: ignore[assignment]
    chunk, future = server.send(1, 1)
    async with asyncio.timeout(WAIT_SECONDS):
        await server.broken.wait()
    assert not future.done()
    server.send(2, 2)
    for _ in range(5):
        await asyncio.sleep(0)
    assert chunk.done == 0
    assert len(server.rig.scheduler.inbox) == 1  # nothing is taken in any more


async def test_an_operation_with_a_bug_fails_its_caller_only(
    server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    def bug(*_: object) -> None:
        raise ZeroDivisionError("a bug")

    await server.driver.call(lambda _: server.rig.open())
    async with asyncio.timeout(WAIT_SECONDS):
        with pytest.raises(Internal):
            await server.driver.call(bug)
        with pytest.raises(Internal):
            await server.driver.call_after_queue(bug)
        server.driver.post(bug)
        server.rig.scheduler.residency.checkpoint = bug  # type: ignore[method-assign]
        _, future = server.send(1, 1)
        with pytest.raises(Internal):  # a bug beyond what the session was sent before
            await server.driver.call_after_queue(
                lambda operations, gate: operations.export(PRINCIPAL, "s", gate)
            )
        assert await future == b"".join(straight_through(FEATURES, rows_of(FEATURES, 1))[0])
        assert await server.step(2, 2)
    assert not server.broken.is_set()
    assert len([record for record in caplog.records if record.exc_info]) == 4


async def test_leases_end_although_nothing_arrives(server: Server) -> None:
    await server.driver.call(lambda _: server.rig.open(idle_seconds=0.01))
    server.rig.clock.advance(0.01)  # the alarm is set by the loop's own clock
    await until(lambda: not len(server.rig.scheduler.sessions))
    with pytest.raises(SessionExpired):
        server.driver.peek(PRINCIPAL, "s")


async def test_a_tick_can_be_taken_at_once() -> None:
    server = Server(INLINE)
    try:
        await server.driver.call(lambda _: server.rig.open())
        _, future = server.send(1, 1)
        assert not future.done()
        server.driver.tick_at_once()
        assert future.done()
        server.driver.tick_at_once()  # nothing is due
        assert len(server.rig.engine.runs) == 1
    finally:
        server.driver.stop()

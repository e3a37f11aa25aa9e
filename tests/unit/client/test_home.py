"""Where a client may be used: in one event loop, in the process that made it, and not after a fork.

What is said of forks is tried in processes of their own, whose threads are counted.
"""

import asyncio
import os
import subprocess
import sys
import textwrap

import pytest

from conveyor_client import NotOpen, _calls, aio
from tests.unit.client.conftest import QUICK
from tests.unit.client.fake.server import FakeServer

ENDS_SECONDS_MAX = 60.0
"""For a program that uses clients; only one that hangs takes so long."""


# --- event loops ---------------------------------------------------------------------------------


def test_a_client_made_where_no_loop_runs_connects_in_the_first_that_does(
    threaded_server: FakeServer,
) -> None:
    client = aio.Client(threaded_server.target, options=QUICK)
    session = client.session("counter")

    async def use() -> list[float]:
        async with client, session:
            return (await session.step([1, 2])).tolist()

    assert asyncio.run(use()) == [1, 2]


def test_in_another_loop_it_says_so(threaded_server: FakeServer) -> None:
    client = aio.Client(threaded_server.target, options=QUICK)
    session = client.session("counter")

    async def begin() -> None:
        await session.open()

    asyncio.run(begin())
    for use in (
        client.healthy,
        lambda: client.model("counter"),
        lambda: session.step([1, 1]),
        session.close,
        lambda: client.session("counter").open(),
    ):
        with pytest.raises(NotOpen, match="event loop"):
            asyncio.run(use())
    asyncio.run(client.aclose())  # its own loop is gone, so it may be closed from any


async def test_in_another_loop_it_is_not_closed_while_its_own_runs(client: aio.Client) -> None:
    assert await client.healthy()
    with pytest.raises(NotOpen, match="event loop"):
        await asyncio.to_thread(lambda: asyncio.run(client.aclose()))
    assert await client.healthy()


async def test_a_client_that_was_never_used_can_be_closed() -> None:
    client = aio.Client("127.0.0.1:1")
    await client.aclose()
    with pytest.raises(NotOpen, match="closed"):
        await client.healthy()


async def test_closing_one_client_does_not_wait_for_another(
    threaded_server: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    waited: list[aio.Client] = []
    calls_ended = _calls.calls_ended

    async def noted() -> None:
        waited.append(closing)
        await calls_ended()

    monkeypatch.setattr(_calls, "calls_ended", noted)
    first, second = (aio.Client(threaded_server.target, options=QUICK) for _ in range(2))
    await first.session("counter").open()  # its stream is under way for as long as it is open
    assert await second.healthy()
    for closing in (second, first):
        await closing.aclose()
    assert waited == [first]


# --- forks ---------------------------------------------------------------------------------------

BEGIN = """
import asyncio, faulthandler, multiprocessing, os, sys, threading, time
faulthandler.enable()
from conveyor_client import Client, ConveyorError, NotOpen, aio

target = sys.argv[1]
fork = multiprocessing.get_context("fork")


def held():
    return len(os.listdir("/proc/self/task")), len(os.listdir("/proc/self/fd"))


def until_held_again(before):
    give_up_at = time.monotonic() + 20
    while held() != before:
        assert time.monotonic() < give_up_at, (before, held())
        time.sleep(0.01)


def in_child(act):
    child = fork.Process(target=act)
    child.start()
    child.join(20)
    assert child.exitcode is not None, "the child hangs"
    assert child.exitcode == 0, child.exitcode


def refused(use, said):
    begun = time.monotonic()
    try:
        answer = use()
    except NotOpen as error:
        assert said in str(error), error
        assert time.monotonic() - begun < 5
    else:
        raise AssertionError(f"not refused: {answer}")


def step_anew():
    with Client(target) as client, client.session("counter") as session:
        assert session.step([2, 3]).tolist() == [2, 3]


async def step_anew_async():
    async with aio.Client(target) as client, client.session("counter") as session:
        assert (await session.step([2, 3])).tolist() == [2, 3]
"""

CLOSED = """
before = held()
for _ in range(2):
    step_anew()
    until_held_again(before)
    asyncio.run(step_anew_async())
    until_held_again(before)

with Client(target) as client:
    session = client.session("counter")
    session.open()
    kept = []
    try:
        session.step([1, 2, 3])
    except ConveyorError as error:
        kept.append(str(error))
    try:
        client.model("nobody")
    except ConveyorError as error:
        kept.append(str(error))
assert len(kept) == 2
until_held_again(before)
in_child(step_anew)
in_child(lambda: asyncio.run(step_anew_async()))
in_child(lambda: refused(client.healthy, "new client"))
in_child(lambda: refused(lambda: session.step([1, 1]), "new client"))
step_anew()
"""

BLOCKING_OPEN = """
client = Client(target)
session = client.session("counter")
session.open()
session.step([1, 1])
for use in (
    client.healthy,
    lambda: session.step([1, 1]),
    lambda: list(session.stream([[1, 1]])),
    lambda: list(client.models()),
    lambda: client.session("counter"),
    session.close,
):
    in_child(lambda use=use: refused(use, "new client in the child"))
in_child(lambda: refused(lambda: Client(target), "spawn"))
in_child(lambda: refused(lambda: aio.Client(target), "spawn"))
in_child(client.close)


def leave_the_blocks():
    session.__exit__(None, None, None)
    client.__exit__(None, None, None)


in_child(leave_the_blocks)
assert session.step([1, 1]).tolist() == [2, 2]
for _ in range(5):  # a child that ends as programs do, with all that it was left
    if (child := os.fork()) == 0:
        sys.exit(0)
    assert os.waitpid(child, 0)[1] == 0
assert session.step([1, 1]).tolist() == [3, 3]
session.close()
client.close()
in_child(step_anew)
"""

ASYNC_OPEN = """
loop = asyncio.new_event_loop()
client = aio.Client(target)
session = client.session("counter")
loop.run_until_complete(session.open())
for use in (
    lambda: client.healthy(),
    lambda: session.step([1, 1]),
    lambda: client.session("counter").open(),
):
    in_child(lambda use=use: refused(lambda: asyncio.run(use()), "new client in the child"))
in_child(lambda: refused(lambda: aio.Client(target), "spawn"))
in_child(lambda: asyncio.run(client.aclose()))


def let_go():
    global client, session, loop
    import gc
    loop = client = session = None
    gc.collect()


in_child(let_go)
assert loop.run_until_complete(session.step([1, 1])).tolist() == [1, 1]
loop.run_until_complete(session.close())
loop.run_until_complete(client.aclose())
in_child(step_anew)
loop.close()
"""

NEVER_USED = """
client = aio.Client(target)
in_child(lambda: refused(lambda: asyncio.run(client.healthy()), "new client in the child"))
in_child(step_anew)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="counts threads and descriptors in /proc")
@pytest.mark.parametrize("support", [None, "0"], ids=["as it is", "without gRPC's handlers"])
@pytest.mark.parametrize(
    "program",
    [CLOSED, BLOCKING_OPEN, ASYNC_OPEN, NEVER_USED],
    ids=["closed", "blocking and open", "asynchronous and open", "never used"],
)
def test_forks(program: str, support: str | None, threaded_server: FakeServer) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "GRPC_ENABLE_FORK_SUPPORT"}
    if support is not None:
        environment["GRPC_ENABLE_FORK_SUPPORT"] = support
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(BEGIN + program), threaded_server.target],
        capture_output=True,
        text=True,
        timeout=ENDS_SECONDS_MAX,
        check=False,
        env=environment,
    )
    assert (done.returncode, done.stderr) == (0, "")

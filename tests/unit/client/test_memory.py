"""Memories: what a model attends over goes to the server once, with whatever opens a session."""

import numpy as np
import pytest

import conveyor_client
from conveyor.v1 import session_pb2
from conveyor_client import InvalidMemory, MessageTooLarge, NonFiniteInput, aio
from tests.unit.client.conftest import QUICK
from tests.unit.client.fake.models import LOOKER
from tests.unit.client.fake.server import FakeServer

MEMORY = np.arange(12.0).reshape(4, 3)
"""Its mean is 5.5, which the model adds to its sums."""


@pytest.fixture
def server(server: FakeServer) -> FakeServer:
    server.models.append(LOOKER)
    return server


def open_frames(server: FakeServer) -> list[session_pb2.OpenSessionRequest]:
    return [frame.open.session for frame in server.world.frames if frame.HasField("open")]


async def test_a_session_attends_over_its_memory(server: FakeServer, client: aio.Client) -> None:
    async with client.session("looker", memory=MEMORY) as session:
        assert (await session.step([1, 2])).tolist() == [6.5, 7.5]
        assert (await session.info()).memory_rows == 4
        assert session.model.memory is not None
        assert session.model.memory.row_elements == 3
    (request,) = open_frames(server)
    assert request.memory.length == 4
    assert np.frombuffer(request.memory.rows, "<f4").reshape(4, 3).tolist() == MEMORY.tolist()


async def test_calls_without_a_session_take_a_memory(client: aio.Client) -> None:
    out = await client.predict("looker", [[1, 1], [1, 1]], memory=MEMORY)
    assert out.tolist() == [[6.5, 6.5], [7.5, 7.5]]
    made = await client.generate("looker", [[1, 1]], steps_max=1, memory=MEMORY)
    assert [row.tolist() async for row in made if not isinstance(row, int)] == [[1, 1]]
    opened = await client.open_session("looker", session_id="one", memory=MEMORY)
    assert opened.info.memory_rows == 4
    assert (await client.step("one", [1, 1], first_step=1)).output.tolist() == [6.5, 6.5]


async def test_forks_and_snapshots_keep_the_memory(client: aio.Client) -> None:
    async with client.session("looker", memory=MEMORY) as session:
        await session.step([1, 1])
        (fork,) = await session.fork()
        snapshot = await session.export()
    async with fork:
        assert (await fork.step([1, 1])).tolist() == [7.5, 7.5]
        assert (await fork.info()).memory_rows == 4
    async with await client.import_session(snapshot, session_id="copy") as copy:
        assert (await copy.step([1, 1])).tolist() == [7.5, 7.5]


async def test_the_memory_is_not_sent_again_when_the_connection_broke(
    server: FakeServer, client: aio.Client
) -> None:
    async with client.session("looker", memory=MEMORY) as session:
        await session.step([1, 1])
        server.break_streams()
        assert (await session.step([1, 1])).tolist() == [7.5, 7.5]
        assert session.epoch == 2
    first, again = open_frames(server)
    assert first.memory.length == 4
    assert not again.HasField("memory")
    assert again.mode == session_pb2.OPEN_MODE_RESUME


async def test_a_session_is_resumed_without_its_memory(
    server: FakeServer, client: aio.Client
) -> None:
    async with client.session("looker", memory=MEMORY) as session:
        await session.step([1, 1])
        await session.detach()
    async with client.resume(session.session_id) as again:
        assert (await again.step([1, 1])).tolist() == [7.5, 7.5]
    assert not open_frames(server)[-1].HasField("memory")


@pytest.mark.parametrize(
    ("model", "memory"),
    [
        ("looker", None),
        ("counter", MEMORY),
        ("looker", np.ones((4, 2))),
        ("looker", np.ones((9, 3))),
    ],
    ids=["missing", "not wanted", "wrong row", "too many rows"],
)
async def test_what_the_server_refuses_is_typed(
    server: FakeServer, client: aio.Client, model: str, memory: np.ndarray | None
) -> None:
    with pytest.raises(InvalidMemory):
        await client.session(model, memory=memory).open()
    with pytest.raises(InvalidMemory):
        await client.open_session(model, memory=memory)
    with pytest.raises(InvalidMemory):
        await client.predict(model, [[1, 1]], memory=memory)
    assert not server.world.sessions
    async with client.session("counter") as session:  # the stream is as good as before
        assert (await session.step([1, 1])).tolist() == [1, 1]
    assert server.streams_seen == 1


async def test_what_is_no_memory_never_leaves(server: FakeServer, client: aio.Client) -> None:
    for memory, error in (([1, 2, 3], InvalidMemory), ([[float("nan")] * 3], NonFiniteInput)):
        with pytest.raises(error):
            client.session("looker", memory=memory)
        with pytest.raises(error):
            await client.predict("looker", [[1, 1]], memory=memory)
        with pytest.raises(error):
            await client.generate("looker", [[1, 1]], steps_max=1, memory=memory)
        with pytest.raises(error):
            await client.open_session("looker", memory=memory)
    calls = server.world.calls
    assert not calls["OpenSession"] + calls["Predict"] + calls["Generate"] + calls["StreamSteps"]


async def test_a_memory_beyond_a_message_is_refused_before_it_ends_the_stream(
    server: FakeServer, client: aio.Client
) -> None:
    server.limits.memory_rows_max = 10_000
    fits = (server.limits.message_bytes_max - 512) // 12
    async with client.session("looker", memory=np.ones((fits, 3))) as session:
        with pytest.raises(MessageTooLarge) as caught:
            await client.session("looker", memory=np.ones((fits + 50, 3))).open()
        assert caught.value.reason == "MESSAGE_TOO_LARGE"
        assert (await session.step([1, 1])).tolist() == [2, 2]
    assert server.streams_seen == 1


def test_the_blocking_twin_takes_memories(threaded_server: FakeServer) -> None:
    threaded_server.models.append(LOOKER)
    with conveyor_client.Client(threaded_server.target, options=QUICK) as client:
        with client.session("looker", memory=MEMORY) as session:
            assert session.step([1, 1]).tolist() == [6.5, 6.5]
            assert session.info().memory_rows == 4
        assert client.predict("looker", [[1, 1]], memory=MEMORY).tolist() == [[6.5, 6.5]]
        made = client.generate("looker", [[1, 1]], steps_max=2, memory=MEMORY)
        assert len(list(made)) == 2
        with pytest.raises(InvalidMemory):
            client.open_session("looker", session_id="one")

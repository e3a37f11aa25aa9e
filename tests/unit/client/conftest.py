from collections.abc import AsyncIterator, Iterator

import pytest

from conveyor_client import Options, Reconnect, aio
from tests.unit.client.fake.server import FakeServer, ServerThread

QUICK = Options(
    timeout_seconds=10.0,
    reconnect=Reconnect(backoff_seconds_min=0.005, backoff_seconds_max=0.05, seconds_max=10.0),
)


@pytest.fixture
async def server() -> AsyncIterator[FakeServer]:
    async with FakeServer() as server:
        yield server


@pytest.fixture
async def client(server: FakeServer) -> AsyncIterator[aio.Client]:
    async with aio.Client(server.target, options=QUICK) as client:
        yield client


@pytest.fixture
def threaded_server() -> Iterator[FakeServer]:
    with ServerThread() as server:
        yield server

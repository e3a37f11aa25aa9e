"""Every call of the contract has a method, with a deadline, metadata and typed errors."""

import numpy as np
import pytest

from conveyor.v1 import model_pb2, session_pb2
from conveyor_client import (
    CheckpointNotRetained,
    ModelNotFound,
    NotOpen,
    SessionExists,
    SessionNotFound,
    SnapshotCorrupt,
    StepGap,
    Unavailable,
    aio,
)
from tests.unit.client.conftest import QUICK
from tests.unit.client.fake.refusals import Refusal
from tests.unit.client.fake.server import FakeServer


async def call_everything(client: aio.Client, server: FakeServer) -> None:
    """Uses every public method that makes a call."""
    opened = await client.open_session("counter", session_id="one", labels={"who": "me"})
    assert opened.info.labels == {"who": "me"}
    assert opened.token
    result = await client.step("one", [1, 2], first_step=1)
    assert result.output.tolist() == [1, 2]
    assert not result.duplicate
    again = await client.step("one", [1, 2], first_step=1)
    assert again.duplicate
    assert again.output.tolist() == [1, 2]
    assert (await client.get_session("one")).applied_step == 1
    server.world.sessions["one"].checkpoint()
    (copy,) = await client.fork_session("one", ["two"], at_step=1)
    assert copy.session_id == "two"
    assert (await client.rewind_session("one", 1)).applied_step == 1
    snapshot = await client.export_session("one")
    imported = await client.import_session(snapshot, session_id="three", idle_seconds=30)
    assert imported.session_id == "three"
    assert [info.session_id async for info in client.sessions()] == ["one", "three", "two"]
    assert (await client.reset_session("one")).applied_step == 0
    assert (await client.close_session("one")).session_id == "one"
    assert (await client.predict("counter", np.ones((2, 2)))).tolist() == [[1, 1], [2, 2]]
    assert (await client.predict("tokens", [1, 2], output="last")).tolist() == [3, 3, 3]
    made = await client.generate("tokens", [1], steps_max=1)
    assert [token async for token in made] == [1]
    assert [model.name async for model in client.models()] == ["counter", "tokens"]
    assert (await client.model("tokens")).version == 2
    async with client.session("counter") as session:
        await session.step([1, 1])


async def test_every_call_of_the_contract_has_a_method(
    server: FakeServer, client: aio.Client
) -> None:
    await call_everything(client, server)
    contract = {
        method.name
        for file in (session_pb2.DESCRIPTOR, model_pb2.DESCRIPTOR)
        for service in file.services_by_name.values()
        for method in service.methods
    }
    assert {name for name, count in server.world.calls.items() if count} == contract


async def test_token_and_metadata_go_with_every_call(server: FakeServer) -> None:
    async with aio.Client(
        server.target, token="secret", metadata=(("x-team", "blue"),), options=QUICK
    ) as client:
        await call_everything(client, server)
    assert server.world.metadata
    for metadata in server.world.metadata:
        assert metadata["authorization"] == "Bearer secret"
        assert metadata["x-team"] == "blue"


async def test_calls_on_one_session_carry_its_key(server: FakeServer, client: aio.Client) -> None:
    await client.open_session("counter", session_id="one")
    await client.get_session("one")
    assert [metadata.get("conveyor-key") for metadata in server.world.metadata] == ["one", "one"]


async def test_lists_are_paged(server: FakeServer, client: aio.Client) -> None:
    for n in range(7):
        await client.open_session("counter", session_id=f"s{n}")
    await client.open_session("tokens", session_id="t")
    found = [info.session_id async for info in client.sessions(model="counter", page_size=3)]
    assert found == [f"s{n}" for n in range(7)]
    assert server.world.calls["ListSessions"] == 3
    assert len([model async for model in client.models(page_size=1)]) == 2


async def test_refusals_are_raised_by_class(server: FakeServer, client: aio.Client) -> None:
    await client.open_session("counter", session_id="one")
    with pytest.raises(ModelNotFound):
        await client.model("nobody")
    with pytest.raises(SessionNotFound):
        await client.get_session("nobody")
    with pytest.raises(SessionExists):
        await client.open_session("counter", session_id="one", mode="create")
    with pytest.raises(StepGap) as gap:
        await client.step("one", [1, 1], first_step=5)
    assert gap.value.expected_step == 1
    with pytest.raises(CheckpointNotRetained):
        await client.rewind_session("one", 3)
    with pytest.raises(SnapshotCorrupt):
        await client.import_session(b"nonsense")
    async with client.resume("one") as session:
        generation = session.generate([[1.0, 1.0]], steps_max=1)
        server.world.sessions["one"].run(1, b"\0" * 8)  # the generation's first step, taken
        with pytest.raises(StepGap):
            await anext(generation)


async def test_health_of_server_and_model(client: aio.Client) -> None:
    assert await client.healthy()
    assert not await client.healthy("counter")
    assert not await client.healthy("unheard of")
    assert await client.wait_healthy(timeout_seconds=1)


async def test_a_repeatable_call_is_repeated(server: FakeServer, client: aio.Client) -> None:
    real = server._model
    failures = 2

    def flaky(name: str, version: int = 0) -> model_pb2.Model:
        nonlocal failures
        if failures:
            failures -= 1
            raise Refusal("SERVER_DRAINING")
        return real(name, version)

    server._model = flaky
    assert (await client.model("counter")).name == "counter"
    assert server.world.calls["GetModel"] == 3


async def test_a_closed_client_says_so(server: FakeServer) -> None:
    client = aio.Client(server.target, options=QUICK)
    session = client.session("counter")
    await session.open()
    await client.aclose()
    for use in (client.model("counter"), client.session("counter").open(), session.step([1, 1])):
        with pytest.raises((NotOpen, Unavailable)):
            await use


async def test_models_are_described_in_full(client: aio.Client) -> None:
    model = await client.model("tokens")
    assert model.input.is_tokens
    assert model.input.encode("abba").tolist() == [0, 1, 1, 0]
    assert model.input.decode([3, 0]) == "da"
    assert model.output.row_elements == 3
    assert model.layers[0].options == {"peephole": "none"}
    assert model.limits.idle_seconds_max == 600
    assert model.memory is None

"""What users read when nothing answers, when inputs are of another kind, or nothing was opened."""

import asyncio
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import numpy as np
import pytest

import conveyor_client
from conveyor_client import (
    ConveyorError,
    InvalidField,
    InvalidShape,
    NotOpen,
    Options,
    TransportError,
    aio,
)
from tests.unit.client.fake.server import FakeServer

OPTIONS = Options(call_attempts_max=1, timeout_seconds=20)
INTERNALS = ("ipv4", "ipv6", "UNKNOWN", "failed to connect", "last error", "Errno", "errors resolv")


async def _listed(client: aio.Client) -> object:
    return [model async for model in client.models()]


async def _opened(client: aio.Client) -> object:
    return await client.session("counter").open()


async def _health(client: aio.Client) -> object:
    return await client.healthy()


async def _predicted(client: aio.Client) -> object:
    return await client.predict("counter", np.ones((2, 2)))


@pytest.fixture(params=[_listed, _opened, _health, _predicted])
def call(request: pytest.FixtureRequest) -> Callable[[aio.Client], Awaitable[object]]:
    return request.param


@pytest.fixture
async def http_address() -> AsyncIterator[str]:
    """Where something answers in HTTP/1.1."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(10)
        writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    async with server:
        yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}"


async def _message(target: str, call: Callable[[aio.Client], Awaitable[object]]) -> str:
    async with aio.Client(target, options=OPTIONS) as client:
        with pytest.raises(TransportError) as caught:
            await call(client)
    for internal in INTERNALS:
        assert internal not in str(caught.value)
    return str(caught.value)


async def test_a_server_that_does_not_run(
    call: Callable[[aio.Client], Awaitable[object]],
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        target = f"127.0.0.1:{free.getsockname()[1]}"
        expected = f"cannot reach {target}: is the server running?"
        assert await _message(target, call) == expected


async def test_a_host_without_an_address() -> None:
    target = "no-such-host.invalid:50051"
    expected = f"cannot reach {target}: its host name cannot be resolved"
    assert await _message(target, _listed) == expected


async def test_a_target_that_is_no_address() -> None:
    expected = "cannot reach 'two words:1': that is not an address; expected host:port"
    assert await _message("two words:1", _listed) == expected


@pytest.mark.parametrize(
    "target",
    ["127.0.0.1:99999", "[::1]:65536", "dns:///localhost:70000", "ipv4:1.2.3.4:1,5.6.7.8:99999"],
)
def test_a_port_that_there_is_not_is_refused_at_once(target: str) -> None:
    """gRPC would take 99999 for 34463, where somebody else may listen."""
    for client in (aio.Client, conveyor_client.Client):
        with pytest.raises(InvalidField, match="expected a port of 0 to 65535") as caught:
            client(target)
        assert repr(target) in str(caught.value)


@pytest.mark.parametrize("target", ["127.0.0.1:65535", "unix:/tmp/a:99999", "localhost"])
async def test_other_targets_are_left_to_grpc(target: str) -> None:
    await aio.Client(target).aclose()


async def test_something_else_answers(http_address: str) -> None:
    expected = f"cannot reach {http_address}: what answers there does not speak gRPC, or one side"
    assert (await _message(http_address, _listed)).startswith(expected)


async def test_a_session_that_was_not_opened_says_how(client: aio.Client) -> None:
    session = client.session("counter")
    steps: list[Callable[[], Any]] = [lambda: session.step([1, 1]), session.reset]
    for step in steps:
        with pytest.raises(
            NotOpen, match=r"call session.open\(\) first, or use it in a with block"
        ):
            await step()
    with pytest.raises(NotOpen, match=r"await session.open\(\), or async with"):
        _ = session.model


def test_a_session_of_the_blocking_client_says_how(threaded_server: FakeServer) -> None:
    with (
        conveyor_client.Client(threaded_server.target) as client,
        pytest.raises(NotOpen, match=r"session.open\(\)"),
    ):
        client.session("counter").step([1, 1])


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        (["a", "b"], "got text of shape (2,); this model takes numbers of shape (2,) for a step"),
        (np.array([1j, 2]), "got complex numbers of shape (2,)"),
        (np.array([{}, {}]), "got values that are not numbers of shape (2,)"),
        (np.ones((2, 3)), "got floats of shape (2, 3)"),
        (np.array("x"), "got text, a single value"),
    ],
)
async def test_inputs_are_described_in_words(
    client: aio.Client, inputs: object, words: str
) -> None:
    async with client.session("counter") as session:
        with pytest.raises(InvalidShape) as caught:
            await session.step(inputs)  # type: ignore[arg-type]
    assert words in str(caught.value)
    assert isinstance(caught.value, ConveyorError)
    for dtype in ("float64", "<U", "dtype", "complex128", "object"):
        assert dtype not in str(caught.value)


async def test_a_word_that_is_none_of_a_parameters_is_refused_with_those_there_are(
    client: aio.Client,
) -> None:
    expected = "output is 'rows'; expected one of 'all', 'last', 'none'"
    with pytest.raises(InvalidField) as caught:
        await client.predict("counter", np.ones((2, 2)), output="rows")  # type: ignore[arg-type]
    assert str(caught.value) == expected
    assert caught.value.field == "output"
    async with client.session("counter") as session:
        with pytest.raises(InvalidField, match="output is 'rows'"):
            await session.step([1, 1], output="rows")  # type: ignore[arg-type]
        assert (await session.step([1, 1])).tolist() == [1, 1]
    with pytest.raises(InvalidField, match="durability is 'forever'"):
        await client.session("counter", durability="forever").open()  # type: ignore[arg-type]

"""The HTTP port by hand: what is answered, what is refused, and what is cut."""

from __future__ import annotations

import asyncio
import gc
import gzip
import socket
import struct
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from dataclasses import dataclass, field

import pytest
from prometheus_client import CollectorRegistry, Gauge
from prometheus_client.registry import Collector

from conveyor_server import monitoring
from conveyor_server.monitoring import CONNECTIONS_MAX, REQUEST_BYTES_MAX, Monitoring


@dataclass
class Service:
    address: str
    registry: CollectorRegistry
    unready: str = ""
    server: Monitoring = field(init=False)

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        host, _, port = self.address.rpartition(":")
        return await asyncio.open_connection(host, int(port))

    async def send(self, request: bytes) -> bytes:
        """All that comes back until the server closes."""
        reader, writer = await self.connect()
        writer.write(request)
        async with asyncio.timeout(30):
            answer = await reader.read()
        writer.close()
        return answer

    async def ask(
        self, target: str, method: str = "GET", **headers: str
    ) -> tuple[int, dict[str, str], bytes]:
        lines = [f"{method} {target} HTTP/1.1", "Host: x"]
        lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
        answer = await self.send("\r\n".join([*lines, "", ""]).encode())
        head, _, body = answer.partition(b"\r\n\r\n")
        first, *rest = head.decode().split("\r\n")
        found = {name.lower(): value for name, _, value in (line.partition(": ") for line in rest)}
        return int(first.split(" ")[1]), found, body


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while True:
            if condition():
                return
            await asyncio.sleep(0.01)


@pytest.fixture
async def service() -> AsyncIterator[Service]:
    registry = CollectorRegistry()
    Gauge("answer", "It is known.", registry=registry).set(42)
    made = Service("", registry)
    made.server = Monitoring(registry, lambda: made.unready)
    made.address = await made.server.start("127.0.0.1:0")
    yield made
    await made.server.stop()


async def test_the_three_pages(service: Service) -> None:
    status, headers, body = await service.ask("/metrics")
    assert (status, headers["content-type"].partition(";")[0]) == (200, "text/plain")
    assert b"answer 42.0\n" in body
    assert int(headers["content-length"]) == len(body)
    for path in ("/healthz", "/readyz", "/healthz?verbose"):
        assert ((await service.ask(path))[0::2]) == (200, b"ok\n")


async def test_readiness_has_its_reason(service: Service) -> None:
    service.unready = "draining"
    assert (await service.ask("/readyz"))[0::2] == (503, b"draining\n")
    assert (await service.ask("/healthz"))[0] == 200
    assert (await service.ask("/metrics"))[0] == 200


async def test_prometheus_chooses_format_and_encoding_and_names(service: Service) -> None:
    openmetrics = "application/openmetrics-text; version=1.0.0"
    _, headers, body = await service.ask("/metrics", Accept=openmetrics)
    assert headers["content-type"].startswith("application/openmetrics-text")
    assert body.endswith(b"# EOF\n")
    _, headers, body = await service.ask("/metrics", Accept_Encoding="gzip")
    assert headers["content-encoding"] == "gzip"
    assert b"answer 42.0" in gzip.decompress(body)
    assert b"answer" not in (await service.ask("/metrics?name[]=other"))[2]


@pytest.mark.parametrize("path", ["/", "/metrics/", "/favicon.ico", "/healthz/x", "//metrics"])
async def test_what_it_does_not_know_is_not_found(service: Service, path: str) -> None:
    status, _, body = await service.ask(path)
    assert status == 404
    assert b"/metrics, /healthz, /readyz" in body


async def test_head_is_answered_without_a_body(service: Service) -> None:
    for path in ("/metrics", "/healthz", "/readyz"):
        status, headers, body = await service.ask(path, "HEAD")
        assert (status, body) == (200, b"")
        assert int(headers["content-length"]) > 0


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS", "TRACE"])
async def test_other_methods_are_not_allowed(service: Service, method: str) -> None:
    for path in ("/metrics", "/healthz"):
        status, headers, _ = await service.ask(path, method)
        assert (status, headers["allow"]) == (405, "GET, HEAD")


async def test_a_body_that_nobody_reads_does_not_cost_the_answer(service: Service) -> None:
    head = b"POST /metrics HTTP/1.1\r\nContent-Length: 1000000\r\n\r\n"
    assert (await service.send(head + bytes(1_000_000))).startswith(b"HTTP/1.1 405 ")


@pytest.mark.parametrize(
    "request_bytes",
    [
        b"\r\n\r\n",
        b"GET\r\n\r\n",
        b"GET /metrics\r\n\r\n",
        b"GET /metrics HTTP/2\r\n\r\n",
        b"GET /a b HTTP/1.1\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"G\xc3\x84T / HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\n" + b"a: b\r\n" * 200 + b"\r\n",
    ],
)
async def test_what_is_no_request_is_a_bad_one(service: Service, request_bytes: bytes) -> None:
    assert (await service.send(request_bytes)).startswith(b"HTTP/1.1 400 ")


async def test_a_request_is_bounded(service: Service) -> None:
    for size, status in ((REQUEST_BYTES_MAX - 100, 404), (2 * REQUEST_BYTES_MAX, 431)):
        answer = await service.send(b"GET /" + b"x" * size + b" HTTP/1.1\r\n\r\n")
        assert answer.startswith(b"HTTP/1.1 %d " % status), size


async def test_who_sends_nothing_is_cut(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(monitoring, "REQUEST_SECONDS_MAX", 0.05)
    for begun in (b"", b"GET /metrics HTTP/1.1\r\n"):
        assert await service.send(begun) == b""


async def test_who_reads_nothing_is_cut(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(monitoring, "ANSWER_SECONDS_MAX", 2.0)
    Gauge("large", "x" * 20_000_000, registry=service.registry).set(1)
    reader, writer = await service.connect()
    writer.write(b"GET /metrics HTTP/1.1\r\n\r\n")
    assert await reader.read(1) == b"H"  # and no more: what the transport holds is bounded
    await until(lambda: service.server.connections == 0)
    received = 0
    with suppress(ConnectionError):
        while data := await reader.read(2**20):
            received += len(data)
    assert received < 20_000_000
    writer.close()


async def test_who_resets_a_connection_leaves_nothing_to_the_garbage_collector(
    service: Service,
) -> None:
    host, _, port = service.address.rpartition(":")

    def reset() -> None:
        with socket.create_connection((host, int(port))) as client:
            client.sendall(b"GET /metrics HTTP/1.1\r\n\r\n")
            assert client.recv(1) == b"H"
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    gc.collect()
    gc.disable()
    try:
        await asyncio.to_thread(reset)
        await until(lambda: service.server.connections == 0)
        await asyncio.sleep(0)  # the transport's own farewell
        gc.set_debug(gc.DEBUG_SAVEALL)
        gc.collect()
        left = [each for each in gc.garbage if isinstance(each, asyncio.StreamReader)]
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()
    assert not left


async def test_one_connection_too_many_is_closed_and_the_others_stay(service: Service) -> None:
    held = [await service.connect() for _ in range(CONNECTIONS_MAX)]
    await until(lambda: service.server.connections == CONNECTIONS_MAX)
    reader, writer = await service.connect()
    with suppress(ConnectionError):
        assert await reader.read() == b""
    writer.close()
    reader, writer = held[0]
    writer.write(b"GET /healthz HTTP/1.1\r\n\r\n")
    assert (await reader.read()).startswith(b"HTTP/1.1 200 ")
    for _, other in held:
        other.close()
    await until(lambda: service.server.connections == 0)
    assert (await service.ask("/healthz"))[0] == 200


async def test_a_metric_that_cannot_be_read_is_an_error_and_logged(
    service: Service, caplog: pytest.LogCaptureFixture
) -> None:
    class Broken(Collector):
        def describe(self):  # type: ignore[no-untyped-def]
            return []

        def collect(self):  # type: ignore[no-untyped-def]
            raise RuntimeError("broken")

    service.registry.register(Broken())
    assert (await service.ask("/metrics"))[0] == 500
    assert "the metrics could not be read" in caplog.text
    assert (await service.ask("/healthz"))[0] == 200


async def test_a_stop_cuts_what_is_under_way_and_the_port_is_free_again() -> None:
    server = Monitoring(CollectorRegistry(), lambda: "")
    address = await server.start("127.0.0.1:0")
    reader, writer = await Service(address, CollectorRegistry()).connect()
    await server.stop()
    async with asyncio.timeout(30):
        with suppress(ConnectionError):
            assert await reader.read() == b""
    writer.close()
    again = Monitoring(CollectorRegistry(), lambda: "")
    assert await again.start(address) == address
    with pytest.raises(OSError, match="in use"):
        await Monitoring(CollectorRegistry(), lambda: "").start(address)
    await again.stop()


async def test_ipv6_too() -> None:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("there is no IPv6 here")
    server = Monitoring(CollectorRegistry(), lambda: "")
    address = await server.start("[::1]:0")
    assert address.startswith("[::1]:")
    reader, writer = await asyncio.open_connection("::1", int(address.rpartition(":")[2]))
    writer.write(b"GET /readyz HTTP/1.1\r\n\r\n")
    assert (await reader.read()).startswith(b"HTTP/1.1 200 ")
    writer.close()
    await server.stop()

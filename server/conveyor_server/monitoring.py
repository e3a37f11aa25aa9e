"""What a supervisor asks over HTTP: /metrics, /healthz and /readyz, on a port of their own.

It runs on the server's own event loop, so an answer to /healthz says that the loop turns. Whoever
reaches the port can at most take all its connections for a few seconds: one request is read from
each, within a time and a size, and what a client does not read in time is dropped.
"""

import asyncio
import io
import logging
import socket
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from email.message import Message
from http import HTTPStatus
from http.client import HTTPException, parse_headers
from typing import Final, cast

from prometheus_client import (
    CollectorRegistry,
    make_wsgi_app,  # pyright: ignore[reportUnknownVariableType]
)

CONNECTIONS_MAX: Final = 32
"""At once; another is closed as it comes."""
REQUEST_BYTES_MAX: Final = 8 * 2**10
"""Request line and headers."""
REQUEST_SECONDS_MAX: Final = 5.0
"""For the request to come."""
ANSWER_SECONDS_MAX: Final = 10.0
"""For the answer to be made, and again for it to be read."""
METRICS_PATH: Final = "/metrics"
_METHODS: Final = ("GET", "HEAD")
_TEXT: Final = "text/plain; charset=utf-8"
_log = logging.getLogger(__name__)

Headers = list[tuple[str, str]]
_Exposition = Callable[[dict[str, str], Callable[[str, Headers], None]], Iterable[bytes]]
"""As WSGI has it."""


@dataclass(frozen=True, slots=True)
class _Answer:
    status: str
    headers: Headers
    body: bytes


@dataclass(frozen=True, slots=True)
class _Request:
    method: str
    path: str
    query: str
    headers: Message


class Monitoring:
    """The HTTP server."""

    def __init__(self, registry: CollectorRegistry, unready: Callable[[], str]) -> None:
        """`unready` says why the server does not serve, or nothing."""
        self._exposition = cast(_Exposition, make_wsgi_app(registry))
        self._unready = unready
        # Reading all metrics takes milliseconds, which a tick on the loop would feel.
        self._scraper = ThreadPoolExecutor(1, thread_name_prefix="metrics")
        self._server: asyncio.Server | None = None
        self._connections = set[asyncio.Task[None]]()

    @property
    def connections(self) -> int:
        """How many there are."""
        return len(self._connections)

    async def start(self, address: str) -> str:
        """Listens on host:port, and returns it with the port that was taken.

        Raises:
            OSError: The address cannot be listened on.
        """
        host, _, port = address.rpartition(":")
        # In an address IPv6 stands in brackets, which the socket does not know.
        found = await asyncio.get_running_loop().getaddrinfo(
            host.strip("[]"), int(port), type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
        family, kind, protocol, _, bound = found[0]
        listening = socket.socket(family, kind, protocol)
        try:
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listening.bind(bound)
            self._server = await asyncio.start_server(
                self._serve, sock=listening, limit=REQUEST_BYTES_MAX
            )
        except BaseException:
            listening.close()
            raise
        return f"{host}:{listening.getsockname()[1]}"

    async def stop(self) -> None:
        """Listens no more; what is being answered is cut."""
        if self._server is not None:
            self._server.close()
            self._server = None
        connections = set(self._connections)
        for connection in connections:
            connection.cancel()
        await asyncio.gather(*connections, return_exceptions=True)
        self._scraper.shutdown(wait=False, cancel_futures=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = cast("asyncio.Task[None]", asyncio.current_task())
        if self.connections >= CONNECTIONS_MAX:
            writer.transport.abort()
            return
        self._connections.add(task)
        try:
            writer.transport.set_write_buffer_limits(0)  # drained means sent
            await self._converse(reader, writer)
        except (TimeoutError, OSError, asyncio.IncompleteReadError) as error:
            # Out of time, or gone: either way there is nobody to tell. The reader keeps the error,
            # whose frames would keep the reader.
            error.__traceback__ = None
        finally:
            self._connections.discard(task)
            writer.transport.abort()

    async def _converse(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        request: _Request | None = None
        try:
            async with asyncio.timeout(REQUEST_SECONDS_MAX):
                head = await reader.readuntil(b"\r\n\r\n")
            request = _parse(head)
            async with asyncio.timeout(ANSWER_SECONDS_MAX):
                answer = await self._answer(request)
        except asyncio.LimitOverrunError:
            answer = _plain(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE)
        except (HTTPException, ValueError):
            answer = _plain(HTTPStatus.BAD_REQUEST)
        async with asyncio.timeout(ANSWER_SECONDS_MAX):
            writer.write(_encode(answer, body=request is None or request.method != "HEAD"))
            await writer.drain()
            writer.write_eof()
            # To close with something unread would take the answer back from whoever sent a body.
            while await reader.read(REQUEST_BYTES_MAX):
                pass

    async def _answer(self, request: _Request) -> _Answer:
        pages = {"/healthz": self._healthz, "/readyz": self._readyz}
        if request.path not in pages and request.path != METRICS_PATH:
            known = ", ".join([METRICS_PATH, *pages])
            return _plain(HTTPStatus.NOT_FOUND, f"there are {known}")
        if request.method not in _METHODS:
            allowed = ", ".join(_METHODS)
            return _plain(HTTPStatus.METHOD_NOT_ALLOWED, headers=[("Allow", allowed)])
        if request.path in pages:
            return pages[request.path]()
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._scraper, self._scrape, request)

    def _healthz(self) -> _Answer:
        return _plain(HTTPStatus.OK, "ok")

    def _readyz(self) -> _Answer:
        why_not = self._unready()
        if why_not:
            return _plain(HTTPStatus.SERVICE_UNAVAILABLE, why_not)
        return _plain(HTTPStatus.OK, "ok")

    def _scrape(self, request: _Request) -> _Answer:
        """Lets prometheus_client choose format and encoding, on the scraper's thread."""
        started = list[tuple[str, Headers]]()

        def start(status: str, headers: Headers) -> None:
            started.append((status, headers))

        environment = {
            "REQUEST_METHOD": "GET",
            "PATH_INFO": request.path,
            "QUERY_STRING": request.query,
            "HTTP_ACCEPT": request.headers.get("Accept", ""),
            "HTTP_ACCEPT_ENCODING": request.headers.get("Accept-Encoding", ""),
        }
        try:
            body = b"".join(self._exposition(environment, start))
        except Exception:  # noqa: BLE001  a bug in one metric ends no connection without an answer
            _log.exception("the metrics could not be read")
            return _plain(HTTPStatus.INTERNAL_SERVER_ERROR)
        ((status, headers),) = started
        return _Answer(status, headers, body)


def _parse(head: bytes) -> _Request:
    """Takes a request apart.

    Raises:
        HTTPException: The headers are none.
        ValueError: It is no HTTP/1 request.
    """
    line, _, rest = head.partition(b"\r\n")
    method, target, version = line.decode("ascii").split(" ")
    if not version.startswith("HTTP/1."):
        raise ValueError("not HTTP/1")
    path, _, query = target.partition("?")
    return _Request(method, path, query, parse_headers(io.BytesIO(rest)))


def _plain(status: HTTPStatus, text: str = "", headers: Iterable[tuple[str, str]] = ()) -> _Answer:
    body = f"{text or status.phrase.lower()}\n".encode()
    return _Answer(
        f"{status.value} {status.phrase}",
        [("Content-Type", _TEXT), ("Cache-Control", "no-store"), *headers],
        body,
    )


def _encode(answer: _Answer, *, body: bool) -> bytes:
    headers = [
        *answer.headers,
        ("Content-Length", str(len(answer.body))),
        ("Connection", "close"),
    ]
    lines = [f"HTTP/1.1 {answer.status}", *(f"{name}: {value}" for name, value in headers)]
    head = "".join(f"{line}\r\n" for line in lines) + "\r\n"
    return head.encode("latin-1") + (answer.body if body else b"")

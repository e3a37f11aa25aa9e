"""A client that minds no manners: one HTTP/2 connection, frame by frame, over a blocking socket."""

from __future__ import annotations

import base64
import contextlib
import socket
import struct
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Self

import grpc
import h2.config
import h2.connection
import h2.events
import hpack
from google.protobuf.message import Message
from google.rpc import status_pb2

from tests.integration.process import ServerProcess
from tests.integration.wire import Refusal, refusal

SECONDS_MAX: Final = 30.0
"""For what has to happen; only a failing test waits so long."""
PREFACE: Final = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])
"""What a client begins with: the words, and settings as they are by default."""
SETTINGS_TAKEN: Final = bytes([0, 0, 0, 4, 1, 0, 0, 0, 0])
_NAMES: Final = {code.value[0]: code.name for code in grpc.StatusCode}
Metadata = Iterable[tuple[str, str]]


def framed(message: Message | bytes) -> bytes:
    """A message as gRPC sends it: not compressed, its length before it."""
    data = message if isinstance(message, bytes) else message.SerializeToString()
    return struct.pack(">BI", 0, len(data)) + data


def headers_of(method: str) -> list[tuple[str, str]]:
    """What a call of gRPC begins with."""
    return [
        (":method", "POST"),
        (":scheme", "http"),
        (":path", method),
        (":authority", "attacker"),
        ("te", "trailers"),
        ("content-type", "application/grpc"),
    ]


@dataclass
class Answer:
    """What the server said to one call so far."""

    refusal: Refusal | None = None
    """Its status, also if it is OK."""
    reset: int | None = None
    data: bytes = b""


@dataclass
class Attacker:
    """One connection."""

    address: str
    answers: dict[int, Answer] = field(default_factory=dict[int, Answer])
    closed: bool = False
    """Whether the server closed the connection, or said that it would."""

    def __post_init__(self) -> None:
        self.socket = connect(self.address)
        config = h2.config.H2Configuration(client_side=True, validate_outbound_headers=False)
        self.h2 = h2.connection.H2Connection(config)
        self.h2.initiate_connection()
        self.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def flush(self) -> None:
        self.socket.sendall(self.h2.data_to_send())

    def call(
        self,
        method: str,
        *messages: Message | bytes,
        metadata: Metadata = (),
        ends: bool = True,
    ) -> int:
        """Puts a call together; `flush` sends it. Returns its stream's number."""
        stream = self.h2.get_next_available_stream_id()
        self.answers[stream] = Answer()
        self.h2.send_headers(stream, [*headers_of(method), *metadata])
        for message in messages:
            self.h2.send_data(stream, framed(message))
        if ends:
            self.h2.end_stream(stream)
        return stream

    def reset(self, stream: int) -> None:
        self.h2.reset_stream(stream, error_code=8)

    def read(self, seconds: float = SECONDS_MAX) -> bool:
        """Takes in what the server sends next; false if that is nothing."""
        self.socket.settimeout(seconds)
        try:
            data = self.socket.recv(2**16)
        except TimeoutError:
            return False
        except ConnectionError:
            data = b""
        if not data:
            self.closed = True
            return False
        for event in self.h2.receive_data(data):
            self._take(event)
        try:
            self.flush()
        except OSError:
            self.closed = True
        return True

    def read_until(self, condition: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + SECONDS_MAX
        while not condition():
            left = deadline - time.monotonic()
            assert left > 0, f"never: {what}"
            assert not self.closed, f"closed before: {what}"
            self.read(left)

    def answer(self, stream: int) -> Answer:
        """The answer to a call when it is whole."""
        answer = self.answers[stream]
        self.read_until(
            lambda: answer.refusal is not None or answer.reset is not None, f"call {stream} ends"
        )
        return answer

    def _take(self, event: Any) -> None:
        if isinstance(event, h2.events.ConnectionTerminated):
            self.closed = True
            return
        answer = self.answers.get(getattr(event, "stream_id", 0) or 0)
        if answer is None:
            return
        if isinstance(event, h2.events.DataReceived):
            answer.data += event.data or b""
            self.h2.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
        elif isinstance(event, h2.events.StreamReset):
            answer.reset = event.error_code
        elif isinstance(event, h2.events.TrailersReceived | h2.events.ResponseReceived):
            headers = {_text(key): _text(value) for key, value in event.headers or ()}
            if "grpc-status" in headers:
                answer.refusal = _refusal(headers)


def connect(address: str) -> socket.socket:
    host, _, port = address.rpartition(":")
    return socket.create_connection((host, int(port)), timeout=SECONDS_MAX)


def is_closed(connection: socket.socket) -> bool:
    """Whether the server ends the connection in time."""
    connection.settimeout(SECONDS_MAX)
    try:
        while connection.recv(2**16):
            pass
    except ConnectionError:
        pass
    except TimeoutError:
        return False
    return True


def resident_bytes(server: ServerProcess) -> int:
    """What the server's process has in memory."""
    status = Path(f"/proc/{server.pid}/status").read_text()
    (line,) = (line for line in status.splitlines() if line.startswith("VmRSS:"))
    return int(line.split()[1]) * 1024


def _text(value: str | bytes) -> str:
    return value.decode("latin-1") if isinstance(value, bytes) else value


def _refusal(headers: dict[str, str]) -> Refusal:
    details = headers.get("grpc-status-details-bin")
    if details is None:
        return Refusal(_NAMES[int(headers["grpc-status"])], "", headers.get("grpc-message", ""))
    data = base64.b64decode(details + "=" * (-len(details) % 4))
    return refusal(status_pb2.Status.FromString(data))


def flood_with_resets(address: str, streams_a_second: int, seconds: float) -> bool:
    """Begins calls and takes each back at once, on one connection, as fast as it is told to.

    Returns whether the other side let it; false if the connection was closed.
    """
    encoder, batch = hpack.Encoder(), 160
    with connect(address) as connection, contextlib.suppress(ConnectionError):
        connection.sendall(PREFACE)
        assert connection.recv(2**16)
        connection.sendall(SETTINGS_TAKEN)  # until then gRPC lets a few streams begin, and no more
        begun = time.monotonic()
        for number in range(int(streams_a_second * seconds) // batch):
            connection.sendall(_resets(1 + 2 * batch * number, batch, encoder))
            due = begun + (number + 1) * batch / streams_a_second
            while (left := due - time.monotonic()) > 0:
                connection.settimeout(left)
                with contextlib.suppress(TimeoutError):
                    if not connection.recv(2**16):
                        return False
            connection.settimeout(SECONDS_MAX)
        return True
    return False


def flood_with_resets_again(address: str, streams_a_second: int, seconds: float) -> int:
    """The same by somebody who connects again when cut off. Returns how often that was."""
    cut_off, end = 0, time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        cut_off += not flood_with_resets(address, streams_a_second, left)
    return cut_off


def _resets(first: int, count: int, encoder: hpack.Encoder) -> bytes:
    frames = bytearray()
    for stream in range(first, first + 2 * count, 2):
        block = encoder.encode(headers_of("/conveyor.v1.SessionService/Step"))
        frames += struct.pack(">I", len(block))[1:] + b"\x01\x04" + struct.pack(">I", stream)
        frames += block + b"\0\0\x04\x03\0" + struct.pack(">II", stream, 8)
    return bytes(frames)

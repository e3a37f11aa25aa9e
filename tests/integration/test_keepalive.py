"""Connections on which nothing is sent but pings, by a client that speaks HTTP/2 by hand."""

from __future__ import annotations

import socket
import struct
import time
from typing import Final, Self

from conveyor_server.rpc.server import PING_SECONDS_MIN, PING_STRIKES_MAX
from tests.integration.process import ServerProcess

PREFACE: Final = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
SETTINGS, PING, GOAWAY, ACK = 4, 6, 7, 1
ENHANCE_YOUR_CALM: Final = 11


class Pinger:
    """An HTTP/2 connection that makes no call."""

    def __init__(self, address: str) -> None:
        host, _, port = address.rpartition(":")
        self._socket = socket.create_connection((host, int(port)), timeout=30)
        self._socket.sendall(PREFACE)
        self._send(SETTINGS, 0, b"")
        self._pings = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def _send(self, kind: int, flags: int, payload: bytes) -> None:
        head = struct.pack(">I", len(payload))[1:] + bytes([kind, flags]) + bytes(4)
        self._socket.sendall(head + payload)

    def _read(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            more = self._socket.recv(size - len(data))
            assert more, "the server closed the connection without a word"
            data += more
        return data

    def ping(self) -> str:
        """Pings and waits for the answer; returns why the server ends the connection, if so."""
        self._pings += 1
        mark = self._pings.to_bytes(8, "big")
        self._send(PING, 0, mark)
        while True:
            head = self._read(9)
            payload = self._read(int.from_bytes(head[:3], "big"))
            kind, flags = head[3], head[4]
            if kind == SETTINGS and not flags & ACK:
                self._send(SETTINGS, ACK, b"")
            elif kind == PING and not flags & ACK:
                self._send(PING, ACK, payload)  # it measures the way, too
            elif kind == PING and payload == mark:
                return ""
            elif kind == GOAWAY:
                assert int.from_bytes(payload[4:8], "big") == ENHANCE_YOUR_CALM
                return payload[8:].decode()


def test_a_client_may_ping_an_idle_connection_once_a_second(server: ServerProcess) -> None:
    with Pinger(server.address) as client:
        # The first is free. The next are too soon, and as many as are forgiven.
        assert [client.ping() for _ in range(1 + PING_STRIKES_MAX)] == [""] * (1 + PING_STRIKES_MAX)
        # So the first of these would end the connection if it counted as too soon.
        for _ in range(3):
            time.sleep(PING_SECONDS_MIN + 0.05)
            assert client.ping() == ""
    assert PING_SECONDS_MIN * 5 <= 10  # what clients and proxies are known to do, with room


def test_a_client_that_pings_without_a_pause_is_cut(server: ServerProcess) -> None:
    with Pinger(server.address) as client:
        answered = 0
        while (ended := client.ping()) == "":
            answered += 1
            assert answered < 10 * PING_STRIKES_MAX, "whoever pings without a pause goes on"
        assert ended == "too_many_pings"
        assert answered >= PING_STRIKES_MAX

"""SIGHUP: a request to reload, or the end of the terminal."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Iterator
from typing import Final

import pytest

from conveyor_server import hangup
from conveyor_server.hangup import HangUp

WAIT_SECONDS: Final = 5.0


class Heard:
    """What a server heard of, with a terminal whose state is given look for look."""

    def __init__(self, *looks: bool) -> None:
        self._looks = iter(looks)
        self._heard: asyncio.Queue[str] = asyncio.Queue()
        self.hang_up = HangUp(
            lambda: self._heard.put_nowait("reload"),
            lambda: self._heard.put_nowait("stop"),
            self._look,
        )
        assert self._heard.get_nowait() == "look"

    def _look(self) -> bool:
        self._heard.put_nowait("look")
        return next(self._looks)

    async def next(self, count: int) -> list[str]:
        async with asyncio.timeout(WAIT_SECONDS):
            return [await self._heard.get() for _ in range(count)]

    @property
    def nothing_else(self) -> bool:
        return self._heard.empty()


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(hangup, "RECHECK_SECONDS", 0.01)
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


async def test_without_a_terminal_it_reloads() -> None:
    heard = Heard(False)
    heard.hang_up.listen()
    for _ in range(2):
        signal.raise_signal(signal.SIGHUP)
        assert await heard.next(1) == ["reload"]


async def test_with_its_terminal_gone_it_stops() -> None:
    heard = Heard(True, False)
    heard.hang_up.listen()
    signal.raise_signal(signal.SIGHUP)
    assert await heard.next(2) == ["look", "stop"]
    assert heard.nothing_else


async def test_with_its_terminal_there_it_reloads() -> None:
    heard = Heard(True, True, True, True, True)
    heard.hang_up.listen()
    for _ in range(2):
        signal.raise_signal(signal.SIGHUP)
        assert await heard.next(3) == ["look", "reload", "look"]
    assert heard.nothing_else


async def test_a_terminal_that_goes_just_after_the_signal_stops_it() -> None:
    heard = Heard(True, True, False)
    heard.hang_up.listen()
    signal.raise_signal(signal.SIGHUP)
    assert await heard.next(4) == ["look", "reload", "look", "stop"]


async def test_an_ignored_signal_stays_ignored() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    heard = Heard(True)
    heard.hang_up.listen()
    assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    signal.raise_signal(signal.SIGHUP)
    assert heard.nothing_else

"""The log has one line for each session that ended."""

import json
import logging
from typing import Any

import pytest

from conveyor_server.logs import JsonFormatter
from tests.support.replies import Recorder
from tests.support.rig import PRINCIPAL, Rig

NASTY = "a\r\nforged: line\x1b[2J\x00\u2028"


@pytest.fixture(autouse=True)
def _everything(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)


def ends(caplog: pytest.LogCaptureFixture) -> list[dict[str, Any]]:
    """What the server would have written of sessions' ends."""
    lines = [JsonFormatter().format(each) for each in caplog.records]
    assert all(line.isascii() and line.isprintable() for line in lines)
    parsed = [json.loads(line) for line in lines]
    return [line for line in parsed if line["message"] == "session ended"]


def test_a_closed_session_is_a_line(caplog: pytest.LogCaptureFixture) -> None:
    rig = Rig()
    rig.open("s", labels=(("site", "north"),))
    rig.step("s", 1, [1, 2, 3])
    rig.clock.advance(2.5)
    assert not ends(caplog)
    rig.close("s")
    (line,) = ends(caplog)
    assert {"level", "time", "logger"} < set(line)
    expected = {
        "reason": "closed",
        "session": "s",
        "principal": PRINCIPAL,
        "model": rig.model.key.name,
        "version": rig.model.key.version,
        "steps": 3,
        "seconds": 2.5,
        "quarantined": False,
        "labels": {"site": "north"},
    }
    assert {key: line[key] for key in expected} == expected


def test_an_expired_session_is_a_line(caplog: pytest.LogCaptureFixture) -> None:
    rig = Rig()
    rig.open("s", idle_seconds=5.0)
    rig.clock.advance(6)
    rig.run()
    assert [line["reason"] for line in ends(caplog)] == ["expired"]


def test_an_evicted_session_is_a_line(caplog: pytest.LogCaptureFixture) -> None:
    rig = Rig(slots=1, host_state_bytes_max=1024)
    for number in range(60):
        rig.open(f"s{number}")
        rig.step(f"s{number}", 1, [1])
    reasons = {line["reason"] for line in ends(caplog)}
    assert reasons == {"evicted"}


def test_a_session_that_goes_on_is_none(caplog: pytest.LogCaptureFixture) -> None:
    rig = Rig(slots=1)
    rig.open("s", Recorder())
    rig.open("s")  # taken over
    rig.open("other")
    rig.step("other", 1, [1])  # and perhaps paged out
    assert not ends(caplog)


def test_a_session_made_for_one_call_is_none(caplog: pytest.LogCaptureFixture) -> None:
    rig = Rig()
    opened = rig.open("", ephemeral=True)
    rig.operations.discard(PRINCIPAL, opened.view.session_id)
    assert not ends(caplog)


def test_a_callers_words_stay_on_the_line(caplog: pytest.LogCaptureFixture) -> None:
    rig = Rig()
    rig.open("s", labels=((NASTY, NASTY),), principal=NASTY)
    rig.close("s", principal=NASTY)
    (line,) = ends(caplog)
    assert line["labels"] == {NASTY: NASTY}
    assert line["principal"] == NASTY

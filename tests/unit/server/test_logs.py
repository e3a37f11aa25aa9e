"""The log: one JSON object a line, whatever is in it."""

import io
import json
import logging
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conveyor_server.logs import JsonFormatter

NASTY = [
    "two\nlines",
    "a\r\nforged\r\nline",
    '"}, {"level": "critical',
    "\x1b[31mred\x1b[0m",
    "\x00\x07\x08\x7f\x9b",
    "\u2028\u2029\u0085",
    "\ud800",
    "\U0001d6fc ünï",
]


def lines_of(message: str, **extra: Any) -> list[str]:
    """What a handler with the formatter writes."""
    stream = io.StringIO()
    logger = logging.Logger("test")
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonFormatter())
    logger.addHandler(handler)
    logger.info(message, extra=extra)
    return stream.getvalue().splitlines()


@pytest.mark.parametrize("text", NASTY, ids=ascii)
def test_a_nasty_value_is_one_readable_line(text: str) -> None:
    for line, key in (
        (lines_of(text), "message"),
        (lines_of("m", session=text), "session"),
    ):
        assert len(line) == 1
        assert line[0].isascii()
        assert all(character >= " " and character != "\x7f" for character in line[0])
        assert json.loads(line[0])[key] == text


@given(message=st.text(), value=st.text(), key=st.from_regex(r"x[\w ]{0,9}", fullmatch=True))
def test_any_text_is_one_readable_line(message: str, value: str, key: str) -> None:
    stream = io.StringIO()
    record = logging.makeLogRecord({"msg": message, key: value, "levelname": "INFO", "name": "n"})
    stream.write(JsonFormatter().format(record))
    (line,) = stream.getvalue().splitlines()
    parsed = json.loads(line)
    assert parsed["message"] == message
    assert parsed[key] == value


def test_a_line_has_time_level_and_logger() -> None:
    record = logging.LogRecord("conveyor_server.x", logging.WARNING, "f", 1, "a %s", ("b",), None)
    record.created = 1_700_000_000.25
    line = json.loads(JsonFormatter().format(record))
    assert line == {
        "time": "2023-11-14T22:13:20.250+00:00",
        "level": "warning",
        "logger": "conveyor_server.x",
        "message": "a b",
    }


def test_an_exception_stays_on_the_line() -> None:
    try:
        raise ValueError("broken\nin two")
    except ValueError as error:
        info = (type(error), error, error.__traceback__)
    record = logging.LogRecord("n", logging.ERROR, "f", 1, "m", (), info)
    text = JsonFormatter().format(record)
    assert "\n" not in text
    assert "ValueError: broken" in json.loads(text)["exception"]


def test_a_value_that_json_does_not_know_is_shown_as_text() -> None:
    (line,) = lines_of("m", thing={1})
    assert json.loads(line)["thing"] == "{1}"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), {"deep": [-float("inf")]}], ids=str)
def test_a_number_that_json_has_no_word_for_is_shown_as_text(value: Any) -> None:
    (line,) = lines_of("m", number=value, other=1.5)

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is no JSON")

    parsed = json.loads(line, parse_constant=refuse)
    assert parsed["number"] == str(value)
    assert parsed["other"] == 1.5

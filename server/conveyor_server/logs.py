"""The log: one JSON object a line on standard error, whatever is in the message."""

import atexit
import json
import logging
import traceback
from datetime import UTC, datetime
from typing import Final

from conveyor_server.standard_error import StandardError, replace_standard_error

_STANDARD: Final = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


class JsonFormatter(logging.Formatter):
    """Time, level, logger and message, then what was given as `extra`.

    The traceback, if there is one, comes last.
    """

    def format(self, record: logging.LogRecord) -> str:
        """Writes one line.

        JSON escapes control characters, so no caller's text can forge a line or drive a terminal.
        """
        line: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        line |= {key: value for key, value in vars(record).items() if key not in _STANDARD}
        if record.exc_info and record.exc_info[1] is not None:
            line["exception"] = "".join(traceback.format_exception(record.exc_info[1]))
        try:
            return json.dumps(line, default=str, allow_nan=False)
        except ValueError:  # infinite or NaN, for which JSON has no word
            return json.dumps({key: _spelt(value) for key, value in line.items()}, default=str)


def _spelt(value: object) -> object:
    """A number that JSON has no word for as text, and so whatever holds one."""
    try:
        json.dumps(value, default=str, allow_nan=False)
    except ValueError:
        return str(value)
    return value


def configure_logging(level: str) -> StandardError:
    """Sends everything from `level` up to standard error, Python's own warnings included.

    Nothing that is logged, nor any traceback, waits for who reads it. At the end of the process
    what is queued is passed on.
    """
    stream, standard_error = replace_standard_error(_dropped)
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonFormatter())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    logging.captureWarnings(True)
    atexit.register(standard_error.drain)
    return standard_error


def _dropped(lines: int) -> bytes:
    record = logging.makeLogRecord(
        {
            "name": __name__,
            "levelno": logging.WARNING,
            "levelname": "WARNING",
            "msg": "log lines dropped: standard error was not read",
            "lines": lines,
        }
    )
    return JsonFormatter().format(record).encode() + b"\n"

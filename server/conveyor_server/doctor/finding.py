"""What a check found."""

import enum
from collections.abc import Iterable
from dataclasses import dataclass


class Status(enum.IntEnum):
    """How bad it is; the worse, the larger."""

    OK = 0
    WARN = 1
    """It would start, and something about it is likely not what is wanted."""
    FAIL = 2
    """It would not start, or not keep its promises."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the report."""

    check: str
    """What was looked at, in a word."""
    status: Status
    found: str
    advice: str = ""
    """What to do; empty if there is nothing to do."""


def ok(check: str, found: str) -> Finding:
    """All is well."""
    return Finding(check, Status.OK, found)


def warn(check: str, found: str, advice: str) -> Finding:
    """Something to think about."""
    return Finding(check, Status.WARN, found, advice)


def fail(check: str, found: str, advice: str) -> Finding:
    """Something to put right."""
    return Finding(check, Status.FAIL, found, advice)


def worst(findings: Iterable[Finding]) -> Status:
    """The worst status among them; OK if there are none."""
    return max((finding.status for finding in findings), default=Status.OK)

"""The report of the doctor, for people and for programs."""

import json
from collections.abc import Callable, Iterable

from conveyor_server.doctor.finding import Finding, Status, worst

_CHECK_WIDTH = 13
"""Of the longest name of a check."""


def show(findings: Iterable[Finding], *, as_json: bool, say: Callable[[str], None]) -> bool:
    """Says what was found: line by line as it comes, or in the end as one JSON object.

    Returns whether nothing failed.
    """
    seen: list[Finding] = []
    for finding in findings:
        seen.append(finding)
        if not as_json:
            say(_line(finding))
    status = worst(seen)
    if as_json:
        say(json.dumps({"status": status.name.lower(), "checks": [_object(each) for each in seen]}))
    else:
        counts = {each: sum(seen_one.status is each for seen_one in seen) for each in Status}
        say(f"{counts[Status.FAIL]} failed, {counts[Status.WARN]} warnings, {len(seen)} checks")
    return status is not Status.FAIL


def _line(finding: Finding) -> str:
    line = f"{finding.status.name.lower():<5} {finding.check:<{_CHECK_WIDTH}} {finding.found}"
    return f"{line}\n{'':<6}{'':<{_CHECK_WIDTH}} -> {finding.advice}" if finding.advice else line


def _object(finding: Finding) -> dict[str, str]:
    return {
        "check": finding.check,
        "status": finding.status.name.lower(),
        "found": finding.found,
        "advice": finding.advice,
    }

"""A few seconds of `make soak`."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.integration.process import command_environment


@pytest.mark.timeout(220)
def test_seconds_of_abuse_leave_nothing_behind() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.soak", "10", "--no-fuzzing", "--seed", "1"],
        capture_output=True,
        text=True,
        check=False,
        timeout=200,
        env=command_environment(),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    said = " ".join(done.stdout.split())
    for what in ("sessions checked", "streams cancelled", "connections: reset", "clients killed"):
        assert what in said
    assert said.endswith("passed")

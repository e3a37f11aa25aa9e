"""A few seconds of `make soak`."""

from __future__ import annotations

import subprocess
import sys

from tests.integration.process import command_environment


def test_seconds_of_abuse_leave_nothing_behind() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.soak", "10", "--no-fuzzing", "--seed", "1"],
        capture_output=True,
        text=True,
        check=False,
        timeout=110,
        env=command_environment(),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for what in ("sessions checked", "streams cancelled", "connections: reset", "clients killed"):
        assert what in done.stdout
    assert done.stdout.rstrip().endswith("passed")

"""Checks Prometheus' configuration and rules with promtool, and runs the unit tests of the alerts.

    python scripts/rules.py check              do so where promtool is installed, else say so
    python scripts/rules.py check --require    fail where it is not

promtool is a part of Prometheus (on Debian of the package `prometheus`); there is no wheel of it.
The test suite parses every query without it.
"""

import argparse
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Final

FOLDER: Final = Path(__file__).resolve().parent.parent / "deploy" / "prometheus"


def check(*, require: bool) -> None:
    """Exits with a message where something is wrong."""
    promtool = shutil.which("promtool")
    if promtool is None:
        message = "promtool is not installed: the unit tests of the alerts were not run"
        if require:
            sys.exit(message)
        print(message)
        return
    rules = [str(file) for file in sorted((FOLDER / "rules").glob("*.yml"))]
    tests = [str(file) for file in sorted((FOLDER / "tests").glob("*.yml"))]
    for arguments in (
        ["check", "config", str(FOLDER / "prometheus.yml")],
        ["check", "rules", *rules],
        ["test", "rules", *tests],
    ):
        done = subprocess.run(
            [promtool, *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        if done.returncode != 0:
            sys.exit(f"{done.stdout}failed: promtool {' '.join(arguments)}")
    print(f"promtool: {len(rules)} files of rules, {len(tests)} of unit tests: sound")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("action", choices=["check"])
    parser.add_argument("--require", action="store_true", help="fail where promtool is missing")
    check(require=parser.parse_args().require)

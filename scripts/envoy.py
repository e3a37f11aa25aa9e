"""Checks deploy/envoy/envoy.yaml with Envoy itself.

    python scripts/envoy.py check    do so where Envoy is installed, else say so

Envoy is a wheel on Linux with glibc. tests/attacks/test_envoy.py runs it with this file.
"""

import argparse
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Final

FILE: Final = Path(__file__).resolve().parent.parent / "deploy" / "envoy" / "envoy.yaml"


def check() -> None:
    """Exits with a message where Envoy does not take the file, or calls a part of it deprecated."""
    envoy = shutil.which("envoy", path=sysconfig.get_path("scripts")) or shutil.which("envoy")
    if envoy is None:
        print("Envoy is not installed: deploy/envoy/envoy.yaml was not checked")
        return
    done = subprocess.run(
        [envoy, "--mode", "validate", "--config-path", str(FILE)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if done.returncode != 0 or "deprecated" in done.stdout.lower():
        sys.exit(f"{done.stdout}failed: envoy --mode validate --config-path {FILE}")
    print("envoy: deploy/envoy/envoy.yaml is sound")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("action", choices=["check"])
    parser.parse_args()
    check()

"""Runs `conveyor-server` again and again in processes forked from one that has imported it all.

`python -m tests.attacks.commands` reads a JSON list of arguments from each line of its input and
answers each with a line: exit status, standard error, the most memory it took over what the
commands begin with, and its seconds. A command that takes `ADDRESS_BYTES_MAX` or `SECONDS_MAX`
fails, so that a test that fails takes no machine down.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from typing import Any, Final, Self

from tests.integration.process import command_environment

ADDRESS_BYTES_MAX: Final = 12 * 2**30
SECONDS_MAX: Final = 60


@dataclass(frozen=True)
class Done:
    """How a command ended."""

    status: int
    """Negative: it was killed by that signal."""
    said: str
    """Its standard error."""
    memory_bytes: int
    """At most, beyond what it began with."""
    seconds: float


class Commands:
    """The process that forks them."""

    def __enter__(self) -> Self:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.attacks.commands"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=command_environment() | {"COLUMNS": "200"},
        )
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        self._process.communicate(timeout=SECONDS_MAX)

    def run(self, *arguments: object) -> Done:
        """Runs one command to its end."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps([str(each) for each in arguments]) + "\n")
        self._process.stdin.flush()
        return Done(**json.loads(self._process.stdout.readline()))


def _resident_bytes() -> int:
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _run(arguments: list[str]) -> dict[str, Any]:
    with tempfile.TemporaryFile() as said:
        begun, before = time.monotonic(), _resident_bytes()
        child = os.fork()
        if not child:
            _become(arguments, said.fileno())
        _, status, usage = os.wait4(child, 0)
        said.seek(0)
        return {
            "status": os.waitstatus_to_exitcode(status),
            "said": said.read().decode(),
            "memory_bytes": usage.ru_maxrss * 1024 - before,
            "seconds": time.monotonic() - begun,
        }


def _become(arguments: list[str], said: int) -> None:
    from conveyor_server.cli import main

    status = 70
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(said, 2)
        resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_BYTES_MAX, ADDRESS_BYTES_MAX))
        signal.alarm(SECONDS_MAX)
        sys.argv = ["conveyor-server", *arguments]
        main()
    except SystemExit as ended:
        status = ended.code if isinstance(ended.code, int) else 1
    except BaseException:  # noqa: BLE001 - what would end the process
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _serve() -> None:
    import h5py  # noqa: F401
    import onnx  # noqa: F401
    import torch

    from conveyor_models.importers import keras_file, onnx_file, torch_file  # noqa: F401

    torch.set_num_threads(1)  # a pool of threads would not live in a fork
    for line in sys.stdin:
        print(json.dumps(_run(json.loads(line))), flush=True)


if __name__ == "__main__":
    _serve()

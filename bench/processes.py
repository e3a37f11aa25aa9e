"""Servers in processes of their own: started, watched and stopped."""

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from types import TracebackType
from typing import Final, Self

START_SECONDS_MAX: Final = 60.0
STOP_SECONDS_MAX: Final = 20.0
_POLL_SECONDS: Final = 0.02


class ServerProcess:
    """A Python module that serves, and says where in a ready file.

    Attributes:
        address: host:port of its gRPC services.
        metrics_address: host:port of its metrics; empty if it has none.
    """

    def __init__(self, name: str, folder: Path, arguments: list[str], ready_file: Path) -> None:
        """``arguments`` follow the interpreter; logs go to ``folder/name.log``."""
        self.name = name
        self.address = ""
        self.metrics_address = ""
        self._ready_file = ready_file
        self._log_file = folder / f"{name}.log"
        self._arguments = arguments
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        # Settings that happen to stand in the environment would make another server of it.
        environment = {k: v for k, v in os.environ.items() if not k.startswith("CONVEYOR_")}
        with self._log_file.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, *self._arguments],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        try:
            self._wait_until_ready()
        except BaseException:
            self._process.kill()
            self._process.wait()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    def stop(self) -> int:
        """Asks it to stop, waits, and returns its exit status; kills it if it does not listen."""
        assert self._process is not None
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
        try:
            return self._process.wait(STOP_SECONDS_MAX)
        except subprocess.TimeoutExpired:
            self._process.kill()
            return self._process.wait()

    def cpu_seconds(self) -> float | None:
        """Processor time it has taken so far; None where the system does not tell."""
        assert self._process is not None
        try:
            stat = Path(f"/proc/{self._process.pid}/stat").read_text(encoding="ascii")
        except OSError:
            return None
        fields = stat.rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def metrics(self) -> dict[str, float]:
        """Its metrics now: series as the exposition names them -> value."""
        url = f"http://{self.metrics_address}/metrics"
        with urllib.request.urlopen(url, timeout=5) as response:
            text = response.read().decode("utf-8")
        lines = (line for line in text.splitlines() if line and not line.startswith("#"))
        return {name: float(value) for name, _, value in (each.rpartition(" ") for each in lines)}

    def _wait_until_ready(self) -> None:
        assert self._process is not None
        deadline = time.monotonic() + START_SECONDS_MAX
        while not self._ready_file.exists():
            if self._process.poll() is not None or time.monotonic() > deadline:
                said = self._log_file.read_text(encoding="utf-8", errors="replace")[-2000:]
                raise RuntimeError(f"{self.name} does not serve:\n{said}")
            time.sleep(_POLL_SECONDS)
        ready = json.loads(self._ready_file.read_text(encoding="utf-8"))
        self.address = ready["address"]
        self.metrics_address = ready.get("metrics_address", "")


def conveyor_server(folder: Path, models: Path, settings: dict[str, str]) -> ServerProcess:
    """The real server on free ports, its default settings but for ``settings``."""
    ready_file = folder / "conveyor.ready"
    settings = {"listen.ready_file": str(ready_file), **settings}
    flags = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
    arguments = ["-m", "conveyor_server.cli", "serve", "--models", str(models)]
    arguments += ["--listen", "127.0.0.1:0", "--metrics", "127.0.0.1:0", *flags]
    return ServerProcess("conveyor", folder, arguments, ready_file)


def null_server(folder: Path, bundle: Path | None = None) -> ServerProcess:
    """The same server stack around handlers that compute nothing or, given a bundle, only that."""
    name = "null" if bundle is None else "null-engine"
    ready_file = folder / f"{name}.ready"
    arguments = ["-m", "bench.null_server", str(ready_file)]
    if bundle is not None:
        arguments.append(str(bundle))
    return ServerProcess(name, folder, arguments, ready_file)


def total(metrics: dict[str, float], name: str) -> float:
    """A metric summed over its labels."""
    return sum(v for series, v in metrics.items() if series.partition("{")[0] == name)

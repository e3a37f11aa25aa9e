"""A real server process: started, watched and stopped."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

START_SECONDS_MAX: Final = 60.0
STOP_SECONDS_MAX: Final = 30.0


def command_environment() -> dict[str, str]:
    """Ours without settings of the server and of gRPC, and with one thread for the arithmetic.

    What this process imports sets some of gRPC's for itself.
    """
    settings = ("CONVEYOR_", "GRPC_")
    kept = {key: value for key, value in os.environ.items() if not key.startswith(settings)}
    return kept | {"OMP_NUM_THREADS": "1"}


class ServerProcess:
    """One ``conveyor-server serve`` on free ports of the loopback interface."""

    def __init__(
        self,
        folder: Path,
        models: Path,
        settings: Mapping[str, object],
        config: str = "",
        program: Sequence[str] = ("-m", "conveyor_server.cli"),
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """``settings``: section.key -> value; ``config``: text of a configuration file;
        ``program``: what Python runs; ``environment``: variables besides the usual ones."""
        folder.mkdir(parents=True, exist_ok=True)
        self._log_file = folder / "log.jsonl"
        self._ready_file = folder / "ready.json"
        command = [sys.executable, *program, "serve", "--models", str(models)]
        command += ["--listen", "127.0.0.1:0", "--metrics", "127.0.0.1:0", "--device", "cpu"]
        for key, value in {"listen.ready_file": self._ready_file, **settings}.items():
            command += ["--set", f"{key}={value}"]
        if config:
            (folder / "server.toml").write_text(config, encoding="utf-8")
            command += ["--config", str(folder / "server.toml")]
        with self._log_file.open("wb") as log:
            self._process = subprocess.Popen(
                command,
                stdout=subprocess.DEVNULL,
                stderr=log,
                env=command_environment() | {**(environment or {})},
            )
        try:
            self._await_ready()
        except BaseException:
            self._process.kill()
            self._process.wait()
            raise

    def _await_ready(self) -> None:
        deadline = time.monotonic() + START_SECONDS_MAX
        while not self._ready_file.exists():
            assert self._process.poll() is None, f"the server ended:\n{self.log_text()}"
            assert time.monotonic() < deadline, f"the server is not ready:\n{self.log_text()}"
            time.sleep(0.02)
        ready = json.loads(self._ready_file.read_text())
        self.address: str = ready["address"]
        self.metrics_address: str = ready["metrics_address"]

    def log_text(self) -> str:
        return self._log_file.read_text(encoding="utf-8", errors="replace")

    def log(self) -> list[dict[str, Any]]:
        """Every line so far, each of which has to be JSON."""
        text = self.log_text()
        try:
            return [json.loads(line) for line in text.splitlines()]
        except json.JSONDecodeError as error:
            raise AssertionError(f"a line of the log is not JSON:\n{text}") from error

    def problems(self) -> list[dict[str, Any]]:
        return [line for line in self.log() if line["level"] in ("error", "critical")]

    def scrape(self) -> str:
        with urllib.request.urlopen(f"http://{self.metrics_address}/metrics", timeout=10) as page:
            return page.read().decode()

    def metric(self, name: str, **labels: str) -> float:
        """The sum over all series of that name with those labels."""
        total = 0.0
        for line in self.scrape().splitlines():
            series, _, value = line.rpartition(" ")
            base, _, shown = series.partition("{")
            if base == name and all(f'{k}="{v}"' in shown for k, v in labels.items()):
                total += float(value)
        return total

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def running(self) -> bool:
        return self._process.poll() is None

    def signal(self, number: signal.Signals) -> None:
        self._process.send_signal(number)

    def wait(self) -> int:
        return self._process.wait(STOP_SECONDS_MAX)

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()

    def stop(self) -> int:
        """SIGTERM and the exit status."""
        if self.running:
            self.signal(signal.SIGTERM)
        try:
            return self.wait()
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"the server did not stop:\n{self.log_text()}") from None


def run_command(arguments: Sequence[str], **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs ``conveyor-server`` to its end."""
    return subprocess.run(
        [sys.executable, "-m", "conveyor_server.cli", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env=command_environment() | {"COLUMNS": "200"} | environment,
    )

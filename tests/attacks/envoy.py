"""A real Envoy with the file that is shipped, in front of one server."""

from __future__ import annotations

import json
import shutil
import subprocess
import sysconfig
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, Self

import yaml

from tests.integration.certificates import Certificate

SHIPPED: Final = Path(__file__).parents[2] / "deploy" / "envoy" / "envoy.yaml"
START_SECONDS_MAX: Final = 30.0
STOP_SECONDS_MAX: Final = 10.0
Edit = Callable[[dict[str, Any]], None]


def find_envoy() -> str | None:
    """The program of the wheel, which not every system has, else one on the path."""
    return shutil.which("envoy", path=sysconfig.get_path("scripts")) or shutil.which("envoy")


def manager(config: dict[str, Any]) -> dict[str, Any]:
    """The part of a configuration that speaks HTTP with clients."""
    (chain,) = config["static_resources"]["listeners"][0]["filter_chains"]
    return chain["filters"][0]["typed_config"]


def with_tls(text: str, certificate: Certificate) -> str:
    """What the file becomes for somebody who does what it says of TLS."""
    before, sign, after = text.partition("          # TLS, and")
    assert sign, "the file says nothing of TLS"
    lines, ended = after.splitlines()[1:], False
    for number, line in enumerate(lines):
        ended = ended or not line.lstrip().startswith("# ")
        lines[number] = line if ended else line.replace("# ", "", 1)
    text = before + "\n".join(lines)
    for name, file in (("chain", certificate.chain), ("key", certificate.key)):
        assert f"/etc/envoy/tls/{name}.pem" in text
        text = text.replace(f"/etc/envoy/tls/{name}.pem", str(file))
    return text


def shipped(address: str, edit: Edit | None = None, text: str = "") -> dict[str, Any]:
    """The shipped file, or ``text``, for a server at ``address`` and with free ports of its own."""
    config: dict[str, Any] = yaml.safe_load(text or SHIPPED.read_text(encoding="utf-8"))
    (listener,) = config["static_resources"]["listeners"]
    (cluster,) = config["static_resources"]["clusters"]
    (endpoint,) = cluster["load_assignment"]["endpoints"][0]["lb_endpoints"]
    host, _, port = address.rpartition(":")
    endpoint["endpoint"]["address"]["socket_address"] = {"address": host, "port_value": int(port)}
    listener["address"]["socket_address"] = {"address": "127.0.0.1", "port_value": 0}
    config["admin"]["address"]["socket_address"]["port_value"] = 0
    if edit:
        edit(config)
    return config


class EnvoyProcess:
    """One Envoy on free ports of the loopback interface.

    It has one thread for connections, which so meet each other, and share one to the server.
    """

    def __init__(self, folder: Path, config: dict[str, Any]) -> None:
        program = find_envoy()
        assert program
        file, self._admin_file = folder / "envoy.json", folder / "admin"
        self._log_file = folder / "envoy.log"
        file.write_text(json.dumps(config), encoding="utf-8")
        command = [program, "--config-path", str(file), "--admin-address-path"]
        command += [str(self._admin_file), "--disable-hot-restart", "--concurrency", "1"]
        with self._log_file.open("wb") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            self._await_ready()
        except BaseException:
            self._process.kill()
            self._process.wait()
            raise

    def _await_ready(self) -> None:
        deadline = time.monotonic() + START_SECONDS_MAX
        while not self._is_ready():
            assert self._process.poll() is None, f"Envoy ended:\n{self.log_text()}"
            assert time.monotonic() < deadline, f"Envoy is not ready:\n{self.log_text()}"
            time.sleep(0.02)
        listeners = json.loads(self._ask("listeners?format=json"))
        bound = listeners["listener_statuses"][0]["local_address"]["socket_address"]
        self.address = f"{bound['address']}:{bound['port_value']}"

    def _is_ready(self) -> bool:
        try:
            return self._ask("ready").strip() == "LIVE"
        except OSError:  # also where it answers 503
            return False

    def _ask(self, path: str) -> str:
        admin = self._admin_file.read_text()
        with urllib.request.urlopen(f"http://{admin}/{path}", timeout=10) as page:
            return page.read().decode()

    def statistic(self, name: str) -> int:
        """A counter or gauge of Envoy's."""
        (line,) = self._ask(f"stats?filter=^{name}$").splitlines()
        return int(line.rpartition(" ")[2])

    def log_text(self) -> str:
        return self._log_file.read_text(encoding="utf-8", errors="replace")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(STOP_SECONDS_MAX)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
            raise AssertionError(f"Envoy did not stop:\n{self.log_text()}") from None

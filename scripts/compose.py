"""Checks the image and docker-compose.yml.

    python scripts/compose.py lint     lint the Dockerfile, validate the compose file
    python scripts/compose.py check    build and start it, stream a session through it, stop it

`lint` needs no Docker engine: hadolint and docker compose are wheels. `check` needs one, and exits
with status 2 where none answers. What it builds and starts can be changed with the variables of the
compose file (BASE_IMAGE, TORCH_INDEX, PROMETHEUS_IMAGE, GRAFANA_IMAGE), and COMPOSE_CHECK_SERVICES
names the services to start: "server prometheus" leaves Grafana out.
"""

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import numpy as np

from conveyor_client import Client, ConveyorError

REPOSITORY: Final = Path(__file__).resolve().parent.parent
SCRIPTS: Final = Path(sysconfig.get_path("scripts"))
COMPOSE_FILE: Final = REPOSITORY / "docker-compose.yml"
DOCKERFILE: Final = REPOSITORY / "server" / "Dockerfile"
PROFILES: Final = ("gpu",)
SERVICES: Final = "server prometheus grafana"
DASHBOARDS: Final = REPOSITORY / "deploy" / "grafana" / "dashboards"
NO_ENGINE: Final = 2
UP_SECONDS_MAX: Final = 300
WAIT_SECONDS_MAX: Final = 60.0
MODEL: Final = "temperature"
STEPS: Final = 48


class CheckFailed(Exception):
    """What was started does not do what it has to; the message says what."""


def lint() -> None:
    """Exits with a message where the Dockerfile or the compose file is not sound."""
    commands = [[_tool("hadolint"), str(DOCKERFILE)]]
    for profiles in ((), PROFILES):
        flags = [flag for profile in profiles for flag in ("--profile", profile)]
        compose = [_tool("docker-compose"), "--file", str(COMPOSE_FILE), *flags]
        commands.append([*compose, "config", "--quiet"])
    for command in commands:
        if subprocess.run(command, cwd=REPOSITORY, check=False).returncode != 0:
            sys.exit(f"failed: {' '.join(command)}")


def check() -> None:
    """Exits with a message where what the compose file starts does not work."""
    problem = _engine_problem()
    if problem:
        print(f"no Docker engine answers, so nothing was built or started:\n{problem}")
        sys.exit(NO_ENGINE)
    services = os.environ.get("COMPOSE_CHECK_SERVICES", SERVICES).split()
    stack = Stack(services)
    try:
        with stack.running():
            stack.check()
            stack.check_stop()
    except (CheckFailed, ConveyorError) as error:
        sys.exit(f"compose check failed: {error}")
    print("compose check passed:", *services)


class Stack:
    """The services under a project name of their own, on free ports of the loopback interface."""

    def __init__(self, services: list[str]) -> None:
        """Starts nothing yet."""
        self._services = services
        name = f"conveyor-check-{os.getpid()}"
        self._command = [*_compose(), "--file", str(COMPOSE_FILE), "--project-name", name]
        ports = dict.fromkeys(("GRPC_PORT", "PROMETHEUS_PORT", "GRAFANA_PORT"), "0")
        self._environment = os.environ | ports

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Builds, starts and waits until all is healthy; in the end nothing of it is left."""
        try:
            _say("building")
            self._run("build", "server")
            _say("starting")
            self._run(
                "up", "--detach", "--no-build", "--wait", *self._wait_limit(), *self._services
            )
            yield
        except Exception:
            self._run("logs", "--tail", "50", check=False)
            raise
        finally:
            _say("removing")
            self._run("down", "--volumes", "--timeout", "60", check=False)

    def check(self) -> None:
        """What has to hold while it runs."""
        self._check_confinement()
        _say("streaming a session")
        _stream(self._address("server", 50051))
        if "prometheus" in self._services:
            self._check_prometheus(f"http://{self._address('prometheus', 9090)}")
        if "grafana" in self._services:
            self._check_grafana(f"http://{self._address('grafana', 3000)}")

    def check_stop(self) -> None:
        """The server drains on SIGTERM and ends with status 0."""
        _say("stopping the server")
        container = self._output("ps", "--quiet", "server").strip()
        self._run("stop", "server")
        inspect = ["docker", "inspect", "--format", "{{.State.ExitCode}}", container]
        status = _output(inspect, self._environment).strip()
        _expect(status == "0", f"the server stopped with status {status}")

    def _check_confinement(self) -> None:
        _say("checking that the server is confined")
        user = self._output("exec", "-T", "server", "id", "-u").strip()
        _expect(user == "10001", f"the server runs as user {user}")
        for folder, writable in (
            ("/", False),
            ("/opt/conveyor", False),
            ("/var/lib/conveyor", True),
        ):
            touch = ("exec", "-T", "server", "touch", f"{folder}/written")
            done = self._run(*touch, check=False, stderr=subprocess.DEVNULL)
            _expect(
                (done.returncode == 0) == writable,
                f"{folder} of the server is {'not ' if writable else ''}writable",
            )

    def _check_prometheus(self, address: str) -> None:
        _say("waiting for Prometheus to scrape")

        def scraped() -> bool:
            query = urllib.parse.urlencode({"query": f'conveyor_steps_total{{model="{MODEL}"}}'})
            found = _get(f"{address}/api/v1/query?{query}")["data"]["result"]
            return any(float(series["value"][1]) >= STEPS for series in found)

        _wait_for(scraped, f"Prometheus does not show the {STEPS} steps of {MODEL}")
        rules: list[dict[str, Any]] = []

        def evaluated() -> bool:
            groups = _get(f"{address}/api/v1/rules")["data"]["groups"]
            rules[:] = [rule for group in groups for rule in group["rules"]]
            return bool(rules) and all(rule["health"] != "unknown" for rule in rules)

        _wait_for(evaluated, "Prometheus does not evaluate the rules")
        broken = [rule["name"] for rule in rules if rule["health"] != "ok"]
        _expect(not broken, f"rules that cannot be evaluated: {broken}")
        print(f"  {len(rules)} rules, none of them broken")

    def _check_grafana(self, address: str) -> None:
        _say("waiting for Grafana's dashboards")
        wanted = {json.loads(file.read_text())["uid"] for file in DASHBOARDS.glob("*.json")}

        def provisioned() -> bool:
            return wanted <= {found["uid"] for found in _get(f"{address}/api/search")}

        _wait_for(provisioned, f"Grafana does not show the dashboards {sorted(wanted)}")

    def _address(self, service: str, port: int) -> str:
        return self._output("port", service, str(port)).strip()

    @staticmethod
    def _wait_limit() -> list[str]:
        return ["--wait-timeout", str(UP_SECONDS_MAX)]

    def _run(
        self, *arguments: str, check: bool = True, stderr: int | None = None
    ) -> subprocess.CompletedProcess[bytes]:
        command = [*self._command, *arguments]
        done = subprocess.run(
            command, cwd=REPOSITORY, env=self._environment, stderr=stderr, check=False
        )
        _expect(not check or done.returncode == 0, f"{' '.join(arguments)}: see above")
        return done

    def _output(self, *arguments: str) -> str:
        return _output([*self._command, *arguments], self._environment)


def _stream(address: str) -> None:
    """Streams one session from outside, cut in three; it has to give the bits of one whole run."""
    with Client(address) as client:
        size = client.model(MODEL).input.row_elements
        rows = np.random.default_rng(0).standard_normal((STEPS, size)).astype(np.float32)
        with client.session(MODEL) as session:
            cut = [session.step(part) for part in np.split(rows, [1, 20])]
        whole = client.predict(MODEL, rows)
    _expect(
        np.concatenate(cut).tobytes() == np.asarray(whole).tobytes(),
        "the streamed outputs are not those of one whole run",
    )
    print(f"  {STEPS} steps of {MODEL}, bit for bit those of one whole run")


def _engine_problem() -> str:
    """Why no engine can be used; empty if one answers."""
    if shutil.which("docker") is None:
        return "there is no docker command"
    command = ["docker", "version", "--format", "{{.Server.Version}}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return "" if done.returncode == 0 else done.stderr.strip()


def _compose() -> list[str]:
    """Docker's own plugin where it is installed, else the wheel."""
    plugin = ["docker", "compose"]
    done = subprocess.run([*plugin, "version"], capture_output=True, check=False)
    return plugin if done.returncode == 0 else [_tool("docker-compose")]


def _tool(name: str) -> str:
    tool = SCRIPTS / name
    if not tool.exists():
        sys.exit(f"{name} is not installed here: run `make check` once, then .venv/bin/python")
    return str(tool)


def _get(url: str) -> Any:
    with urllib.request.urlopen(url, timeout=10) as page:  # noqa: S310  always http, to loopback
        return json.load(page)


def _wait_for(condition: Callable[[], bool], otherwise: str) -> None:
    deadline = time.monotonic() + WAIT_SECONDS_MAX
    while True:
        with contextlib.suppress(OSError):  # it does not listen yet
            if condition():
                return
        _expect(time.monotonic() < deadline, f"{otherwise} within {WAIT_SECONDS_MAX:.0f} seconds")
        time.sleep(0.5)


def _output(command: list[str], environment: dict[str, str]) -> str:
    done = subprocess.run(
        command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False
    )
    _expect(done.returncode == 0, f"{' '.join(command)}: {done.stderr.strip()}")
    return done.stdout


def _expect(holds: bool, otherwise: str) -> None:
    if not holds:
        raise CheckFailed(otherwise)


def _say(what: str) -> None:
    print(f"== {what}", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("action", choices=["lint", "check"])
    {"lint": lint, "check": check}[parser.parse_args().action]()

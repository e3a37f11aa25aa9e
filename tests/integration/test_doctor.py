"""`conveyor-server doctor`, the command."""

import json
from pathlib import Path

import pytest

from tests.integration.process import ServerProcess, run_command

FREE = ["--set", "listen.address=127.0.0.1:0", "--set", "listen.metrics_address=127.0.0.1:0"]
CPU = ["--set", "engine.device=cpu"]


def test_a_machine_that_is_well(repository: Path) -> None:
    done = run_command(["doctor", "--models", str(repository), *FREE, *CPU])
    assert done.returncode == 0, done.stdout + done.stderr
    assert "ok    models" in done.stdout
    assert done.stdout.splitlines()[-1].startswith("0 failed, ")


def test_what_is_wrong_fails_with_what_to_do(tmp_path: Path) -> None:
    done = run_command(["doctor", "--models", str(tmp_path / "absent"), *FREE, *CPU])
    assert done.returncode == 1
    assert "fail  models" in done.stdout
    assert "-> set models.folder" in done.stdout
    assert "Traceback" not in done.stderr


def test_for_programs_it_is_one_object(repository: Path) -> None:
    done = run_command(["doctor", "--json", "--models", str(repository), *FREE, *CPU])
    report = json.loads(done.stdout)
    assert report["status"] in ("ok", "warn")
    assert {"check", "status", "found", "advice"} == set(report["checks"][0])


def test_beside_the_running_server_its_ports_are_no_failure(
    server: ServerProcess, repository: Path
) -> None:
    addresses = {"listen.address": server.address, "listen.metrics_address": server.metrics_address}
    flags = [flag for key, value in addresses.items() for flag in ("--set", f"{key}={value}")]
    done = run_command(["doctor", "--models", str(repository), *flags, *CPU])
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("is in use") == 2


@pytest.mark.parametrize("settings", [["--set", "engine.slots=0"], ["--set", "nothing"]])
def test_settings_that_cannot_be_used(repository: Path, settings: list[str]) -> None:
    done = run_command(["doctor", "--models", str(repository), *settings])
    assert done.returncode in (1, 2)
    assert "Traceback" not in done.stderr

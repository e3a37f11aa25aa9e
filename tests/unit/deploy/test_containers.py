"""The image and the compose file: what their linters do not look at.

`scripts/compose.py lint` holds them to their schemas, and `make compose-check` runs them.
"""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, Final

import pytest
import yaml

REPOSITORY: Final = Path(__file__).parents[3]
COMPOSE: Final[dict[str, Any]] = yaml.safe_load((REPOSITORY / "docker-compose.yml").read_text())
SERVICES: Final[dict[str, dict[str, Any]]] = COMPOSE["services"]
DOCKERFILE: Final = (REPOSITORY / "server" / "Dockerfile").read_text()
UNPRIVILEGED = pytest.mark.parametrize("service", SERVICES.values(), ids=SERVICES)


def run_script(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(REPOSITORY / "scripts" / "compose.py"), *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env=os.environ | environment,
    )


def test_the_services_of_the_plan_are_there() -> None:
    assert set(SERVICES) == {"server", "server-gpu", "prometheus", "grafana"}
    assert [name for name, service in SERVICES.items() if "profiles" in service] == ["server-gpu"]


@UNPRIVILEGED
def test_every_image_is_a_variable_with_a_pinned_default(service: dict[str, Any]) -> None:
    found = re.fullmatch(r"\$\{[A-Z_]+:-(.+)\}", service["image"])
    assert found is not None, service["image"]
    built = "build" in service
    assert built or re.search(r":v?\d+\.\d+\.\d+$", found[1]), found[1]


@UNPRIVILEGED
def test_every_service_is_confined(service: dict[str, Any]) -> None:
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["user"].partition(":")[0] not in ("", "0", "root")


@UNPRIVILEGED
def test_every_port_is_on_loopback_and_can_be_moved(service: dict[str, Any]) -> None:
    for port in service["ports"]:
        assert re.fullmatch(r"127\.0\.0\.1:\$\{[A-Z_]+:-\d+\}:\d+", port), port


def test_no_variable_of_the_compose_file_is_a_setting_of_the_server() -> None:
    # A shell that has one set could start no server by hand: unknown settings are refused.
    text = (REPOSITORY / "docker-compose.yml").read_text()
    variables = re.findall(r"\$\{(\w+)", text)
    assert variables
    assert not [name for name in variables if name.startswith("CONVEYOR_")]


def test_the_gpu_profile_reserves_a_device_and_insists_on_it() -> None:
    gpu = SERVICES["server-gpu"]
    (device,) = gpu["deploy"]["resources"]["reservations"]["devices"]
    assert device == {"driver": "nvidia", "count": 1, "capabilities": ["gpu"]}
    assert gpu["environment"]["CONVEYOR_ENGINE__DEVICE"] == "cuda"
    assert "/whl/cu" in gpu["build"]["args"]["TORCH_INDEX"]
    assert gpu["build"]["dockerfile"] == SERVICES["server"]["build"]["dockerfile"]


def test_what_is_mounted_from_here_is_here() -> None:
    mounts = [mount for service in SERVICES.values() for mount in service.get("volumes", ())]
    folders = [mount.split(":") for mount in mounts if mount.startswith("./")]
    assert folders
    for folder, _, mode in folders:
        assert mode == "ro"
        assert (REPOSITORY / folder).is_dir(), folder
    volumes = {mount.partition(":")[0] for mount in mounts} - {folder for folder, *_ in folders}
    assert volumes == set(COMPOSE["volumes"])


def test_prometheus_scrapes_the_port_that_the_image_exposes() -> None:
    config = yaml.safe_load((REPOSITORY / "deploy" / "prometheus" / "prometheus.yml").read_text())
    (job,) = config["scrape_configs"]
    (found,) = job["dns_sd_configs"]
    assert job["job_name"] == "conveyor"  # the alerts name it
    assert set(found["names"]) == {"server", "server-gpu"} <= set(SERVICES)
    assert f"CONVEYOR_LISTEN__METRICS_ADDRESS=0.0.0.0:{found['port']}" in DOCKERFILE


def test_both_stages_stand_on_one_replaceable_pinned_base() -> None:
    stages = re.findall(r"^FROM (\S+)", DOCKERFILE, re.MULTILINE)
    assert stages == ["${BASE_IMAGE}"] * 2
    (default,) = re.findall(r"^ARG BASE_IMAGE=(\S+)$", DOCKERFILE, re.MULTILINE)
    assert re.fullmatch(r"python:3\.\d+\.\d+-slim-\w+", default)
    assert default in SERVICES["server"]["build"]["args"]["BASE_IMAGE"]


def test_the_image_ends_unprivileged_with_a_health_check() -> None:
    final = DOCKERFILE.rpartition("\nFROM ")[2]
    user = re.findall(r"^USER (\S+)$", final, re.MULTILINE)[-1]
    assert user == SERVICES["server"]["user"] == "10001:10001"
    assert re.search(r"^HEALTHCHECK .*\\\n\s+CMD \[", final, re.MULTILINE)
    assert re.search(r'^ENTRYPOINT \["conveyor-server"\]$', final, re.MULTILINE)


def test_what_the_server_writes_lies_where_a_volume_is_mounted() -> None:
    (folder,) = re.findall(r"^ +&& install --directory .* (\S+)$", DOCKERFILE, re.MULTILINE)
    for name in ("server", "server-gpu"):
        assert f"{name}-data:{folder}" in SERVICES[name]["volumes"]
    assert f"NUMBA_CACHE_DIR={folder}/" in DOCKERFILE


def test_the_linters_pass() -> None:
    done = run_script("lint")
    assert done.returncode == 0, done.stdout + done.stderr


def test_without_an_engine_the_check_says_so(tmp_path: Path) -> None:
    for environment in (
        {"DOCKER_HOST": f"unix://{tmp_path}/none.sock", "DOCKER_CONTEXT": ""},
        {"PATH": str(tmp_path)},
    ):
        done = run_script("check", **environment)
        assert done.returncode == 2, done.stdout + done.stderr
        assert "no Docker engine answers" in done.stdout
        assert "Traceback" not in done.stderr

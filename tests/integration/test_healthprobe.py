"""The container's health check, run as the image runs it."""

from __future__ import annotations

import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.integration.bundles import TINY, add_model
from tests.integration.certificates import Authority, settings_of
from tests.integration.conftest import StartServer
from tests.integration.process import ServerProcess, command_environment
from tests.integration.wire import until

PROBE = Path(__file__).parents[2] / "server" / "healthprobe.py"


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(PROBE), *arguments],
        timeout=30,
        check=False,
        capture_output=True,
        text=True,
        env=command_environment() | environment,
    )


def probe(*arguments: str, **environment: str) -> int:
    done = run(*arguments, **environment)
    assert len(done.stderr.splitlines()) == (done.returncode != 0), done.stderr
    return done.returncode


def port_of(server: ServerProcess) -> str:
    return server.address.rpartition(":")[2]


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("certificates"))


def test_a_server_that_serves_is_healthy(server: ServerProcess) -> None:
    assert probe(server.address) == 0


@pytest.mark.parametrize("host", ["0.0.0.0", "[::]", "127.0.0.1", "localhost"])
def test_the_port_is_taken_from_the_environment(server: ServerProcess, host: str) -> None:
    assert probe(CONVEYOR_LISTEN__ADDRESS=f"{host}:{port_of(server)}") == 0


def test_the_port_is_taken_from_the_configuration_file(
    server: ServerProcess, tmp_path: Path
) -> None:
    file = tmp_path / "conveyor.toml"
    file.write_text(f'[listen]\naddress = "0.0.0.0:{port_of(server)}"\n')
    assert probe(CONVEYOR_CONFIG=str(file)) == 0
    nobody = "127.0.0.1:1"
    assert probe(CONVEYOR_CONFIG=str(file), CONVEYOR_LISTEN__ADDRESS=nobody) == 1
    assert probe(CONVEYOR_CONFIG=str(file) + ".absent") == 1


def test_the_port_is_taken_from_a_section_in_one_variable(server: ServerProcess) -> None:
    section = f'{{"address": "0.0.0.0:{port_of(server)}"}}'
    assert probe(CONVEYOR_LISTEN=section) == 0
    assert probe(CONVEYOR_LISTEN=section, CONVEYOR_LISTEN__ADDRESS="127.0.0.1:1") == 1
    assert probe(CONVEYOR_LISTEN="{") == 1


def test_where_nobody_answers_it_is_not() -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        assert probe(f"127.0.0.1:{closed.getsockname()[1]}") == 1


async def test_a_server_without_a_model_is_not(start_server: StartServer, tmp_path: Path) -> None:
    add_model(tmp_path, "tiny", TINY)
    server = start_server(models=tmp_path)
    shutil.rmtree(tmp_path / "tiny")
    server.signal(signal.SIGHUP)
    await until(lambda: probe(server.address) == 1)
    assert "NOT_SERVING" in run(server.address).stderr


@pytest.mark.parametrize(
    "names",
    [("models.example",), ("*.models.example", "models.example"), ("192.0.2.7",)],
    ids=["a name", "any name below one", "an address"],
)
def test_over_tls_the_server_beside_is_asked_whatever_its_certificate_is_for(
    start_server: StartServer, authority: Authority, names: tuple[str, ...]
) -> None:
    certificate = authority.issue(*names)
    server = start_server(settings_of(certificate))
    beside = {
        "CONVEYOR_LISTEN__ADDRESS": f"0.0.0.0:{port_of(server)}",
        "CONVEYOR_LISTEN__TLS_CERTIFICATE_FILE": str(certificate.chain),
        "CONVEYOR_LISTEN__TLS_KEY_FILE": str(certificate.key),
    }
    assert probe(**beside) == 0
    # The file is renewed; the server goes on with what it read.
    assert probe(**beside | {"CONVEYOR_LISTEN__TLS_CERTIFICATE_FILE": "/renewed"}) == 0
    # Without a word of TLS it is asked in plain, and does not answer.
    assert probe(CONVEYOR_LISTEN__ADDRESS=beside["CONVEYOR_LISTEN__ADDRESS"]) == 1


def test_over_tls_whoever_is_named_is_verified(
    start_server: StartServer, authority: Authority, tmp_path: Path
) -> None:
    here, elsewhere = authority.issue("127.0.0.1"), authority.issue("elsewhere.example")
    other = Authority(tmp_path)
    server, renamed = start_server(settings_of(here)), start_server(settings_of(elsewhere))
    ca, stranger = str(authority.ca), str(other.ca)
    assert probe(server.address, "--ca", ca) == 0
    assert probe(server.address, "--tls", CONVEYOR_CA=ca) == 0
    assert probe(server.address, CONVEYOR_TLS="true", CONVEYOR_CA=ca) == 0
    assert probe(server.address, "--tls") == 1  # the system's roots
    assert probe(server.address, "--ca", stranger) == 1
    assert probe(server.address) == 1
    assert probe(renamed.address, "--ca", ca) == 1
    assert probe(server.address, "--ca", str(tmp_path / "absent")) == 1


def test_a_server_that_asks_for_certificates_is_shown_one(
    start_server: StartServer, authority: Authority, tmp_path: Path
) -> None:
    own, client = authority.issue("127.0.0.1"), authority.issue("probe@models.example")
    server = start_server({**settings_of(own), "listen.tls_client_ca_file": authority.ca})
    ca, shown = str(authority.ca), ("--cert", str(client.chain), "--key", str(client.key))
    assert probe(server.address, "--ca", ca, *shown) == 0
    assert probe(server.address, "--ca", ca) == 1
    stranger = Authority(tmp_path).issue("probe@models.example")
    shown = ("--cert", str(stranger.chain), "--key", str(stranger.key))
    assert probe(server.address, "--ca", ca, *shown) == 1
    assert probe(server.address, "--ca", ca, "--cert", str(client.chain)) == 1
    beside = {
        "CONVEYOR_LISTEN__ADDRESS": server.address,
        "CONVEYOR_LISTEN__TLS_CERTIFICATE_FILE": str(own.chain),
        "CONVEYOR_LISTEN__TLS_KEY_FILE": str(own.key),
        "CONVEYOR_LISTEN__TLS_CLIENT_CA_FILE": ca,
    }
    assert probe(**beside) == 0

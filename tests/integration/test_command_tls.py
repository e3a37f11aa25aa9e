"""The ``conveyor`` command over TLS: what it takes, and what it says where it does not work."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.integration.certificates import Authority, Certificate, settings_of
from tests.integration.conftest import StartServer
from tests.integration.process import ServerProcess, command_environment

ENCRYPTED_KEY_COMMAND = ("openssl", "pkcs8", "-topk8", "-v2", "aes-128-cbc", "-passout", "pass:x")


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("certificates"))


@pytest.fixture(scope="module")
def certificate(authority: Authority) -> Certificate:
    return authority.issue("127.0.0.1", "models.example")


@pytest.fixture(scope="module")
def server(start_server: StartServer, certificate: Certificate) -> ServerProcess:
    return start_server(settings_of(certificate))


@pytest.fixture(scope="module")
def plain(start_server: StartServer) -> ServerProcess:
    return start_server()


@pytest.fixture(scope="module")
def closed(
    start_server: StartServer, certificate: Certificate, authority: Authority
) -> ServerProcess:
    """It asks for a certificate."""
    return start_server({**settings_of(certificate), "listen.tls_client_ca_file": authority.ca})


def conveyor(
    server: ServerProcess, *arguments: object, **environment: object
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [
            *(sys.executable, "-c", "from conveyor_client.cli import main; main()"),
            *map(str, arguments),
            *("--target", server.address, "--timeout", "5"),
        ],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        stdin=subprocess.DEVNULL,
        env=command_environment() | {key: str(value) for key, value in environment.items()},
    )


def complaint(done: subprocess.CompletedProcess[str]) -> str:
    """The one line of a command that failed."""
    assert (done.returncode, done.stdout) == (1, ""), done
    (line,) = done.stderr.splitlines()
    return line


def listed(done: subprocess.CompletedProcess[str]) -> set[str]:
    assert (done.returncode, done.stderr) == (0, ""), done
    return {model["name"] for model in json.loads(done.stdout)}


LIST = ("models", "list", "--json")


def test_the_options_and_the_variables(server: ServerProcess, authority: Authority) -> None:
    assert "tiny" in listed(conveyor(server, *LIST, "--tls", "--ca", authority.ca))
    assert "tiny" in listed(conveyor(server, *LIST, "--ca", authority.ca))
    assert "tiny" in listed(conveyor(server, *LIST, CONVEYOR_CA=authority.ca))
    both = {"CONVEYOR_TLS": "1", "CONVEYOR_CA": authority.ca}
    assert "tiny" in listed(conveyor(server, *LIST, **both))


def test_no_tls_goes_over_the_variables(plain: ServerProcess, authority: Authority) -> None:
    both = {"CONVEYOR_TLS": "1", "CONVEYOR_CA": authority.ca}
    assert "tiny" in listed(conveyor(plain, *LIST, "--no-tls", **both))
    assert "tiny" in listed(conveyor(plain, *LIST, CONVEYOR_TLS="0", CONVEYOR_CA=authority.ca))


@pytest.mark.parametrize(
    "command",
    [
        ("models", "show", "tiny"),
        ("sessions", "list"),
        ("run", "tiny"),
        ("generate", "words", "--prompt", "a", "--steps", "2"),
        ("top", "--once"),
        ("bench", "tiny", "--duration", "0.2", "--warmup", "0", "--json"),
        ("watch", "words", "--text", "a"),
    ],
    ids=lambda command: command[0],
)
def test_every_command_speaks_it(
    command: tuple[str, ...], server: ServerProcess, authority: Authority
) -> None:
    done = conveyor(server, *command, "--ca", authority.ca)
    assert "TRANSPORT" not in done.stderr
    assert done.returncode == 0 or "no labels" in done.stderr, done.stderr
    assert "try --tls" in complaint(conveyor(server, *command))


def test_a_client_certificate_is_shown(
    closed: ServerProcess, authority: Authority, tmp_path: Path
) -> None:
    trusted = ("--ca", authority.ca)
    client = authority.issue("me@models.example")
    shown = ("--cert", client.chain, "--key", client.key)
    assert "tiny" in listed(conveyor(closed, *LIST, *trusted, *shown))
    variables = {
        "CONVEYOR_CA": authority.ca,
        "CONVEYOR_CERT": client.chain,
        "CONVEYOR_KEY": client.key,
    }
    assert "tiny" in listed(conveyor(closed, *LIST, **variables))
    assert "--cert and --key" in complaint(conveyor(closed, *LIST, *trusted))
    stranger = Authority(tmp_path).issue("me@models.example")
    shown = ("--cert", stranger.chain, "--key", stranger.key)
    assert "does not accept the client certificate" in complaint(
        conveyor(closed, *LIST, *trusted, *shown)
    )


def test_the_wrong_protocol_is_named_and_what_to_try(
    server: ServerProcess, plain: ServerProcess, authority: Authority
) -> None:
    said = complaint(conveyor(server, *LIST))
    assert f"{server.address} speaks TLS: try --tls" in said
    assert "--ca FILE" in said
    said = complaint(conveyor(plain, *LIST, "--ca", authority.ca))
    assert f"{plain.address} does not speak TLS: leave out --tls" in said


def test_a_certificate_that_is_not_accepted_is_told_apart(
    server: ServerProcess, start_server: StartServer, authority: Authority, tmp_path: Path
) -> None:
    assert "name whom to trust with --ca FILE" in complaint(conveyor(server, *LIST, "--tls"))
    stranger = Authority(tmp_path)
    said = complaint(conveyor(server, *LIST, "--ca", stranger.ca))
    assert "name whom to trust with --ca FILE" in said
    renamed = start_server(settings_of(authority.issue("elsewhere.example")))
    said = complaint(conveyor(renamed, *LIST, "--ca", authority.ca))
    assert "is not for 127.0.0.1: use a name that is in it" in said


def test_a_server_that_is_not_there_is_not_blamed_on_tls(
    plain: ServerProcess, authority: Authority
) -> None:
    for flags in ((), ("--ca", authority.ca)):
        done = subprocess.run(
            [
                *(sys.executable, "-c", "from conveyor_client.cli import main; main()"),
                *(*LIST, "--target", "127.0.0.1:1", "--timeout", "2", *map(str, flags)),
            ],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
            env=command_environment(),
        )
        assert "TLS" not in complaint(done)


def test_files_that_cannot_be_used_are_named_with_their_option(
    server: ServerProcess, authority: Authority, certificate: Certificate, tmp_path: Path
) -> None:
    client, other = authority.issue("a@models.example"), authority.issue("b@models.example")
    empty, absent, locked = tmp_path / "empty", tmp_path / "absent", tmp_path / "locked.key"
    empty.write_text("")
    subprocess.run(
        [*ENCRYPTED_KEY_COMMAND, "-in", str(client.key), "-out", str(locked)],
        check=True,
        capture_output=True,
    )
    refused = {
        ("--ca", absent): f"--ca {absent}: no such file or directory",
        ("--ca", tmp_path): f"--ca {tmp_path}: is a directory",
        ("--ca", empty): f"--ca {empty}: there is no certificate in PEM",
        ("--ca", client.key): f"--ca {client.key}: there is no certificate in PEM",
        ("--cert", client.chain): "--cert needs --key",
        ("--key", client.key): "--key needs --cert",
        ("--cert", absent, "--key", client.key): f"--cert {absent}: no such file",
        ("--cert", client.chain, "--key", absent): f"--key {absent}: no such file",
        ("--cert", client.chain, "--key", other.key): "do not belong together",
        ("--cert", empty, "--key", client.key): "both in PEM",
        ("--cert", client.key, "--key", client.chain): "both in PEM",
        ("--cert", client.chain, "--key", locked): "the key is encrypted",
    }
    for flags, said in refused.items():
        assert said in complaint(conveyor(server, *LIST, *flags)), flags

"""What somebody reads whose server does not start: one clear line, with the setting's name."""

from __future__ import annotations

import re
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Final

import pytest
import torch

from tests.integration.bundles import TINY, add_model
from tests.integration.process import run_command
from tests.support.certificates import CERTIFICATE, OTHER_KEY

INTERNALS: Final = re.compile(
    r"\[Errno|\[SSL|_ssl\.c|Input should|should match|pattern|dtype|Traceback|pydantic|float64"
)
"""Words of the libraries beneath, which say nothing to whoever set a setting."""

Settings = dict[str, object]
Case = tuple[Callable[[Path], Settings], str]


def _tls(certificate: str | None, key: str | None) -> Callable[[Path], Settings]:
    def settings(folder: Path) -> Settings:
        files = {"certificate": folder / "chain.pem", "key": folder / "key.pem"}
        for file, text in zip(files.values(), (certificate, key), strict=True):
            if text is not None:
                file.write_text(text)
        return {f"listen.tls_{name}_file": file for name, file in files.items()}

    return settings


REFUSED: dict[str, Case] = {
    "a key of another certificate": (
        _tls(CERTIFICATE, OTHER_KEY),
        "listen.tls_key_file: {folder}/key.pem is not the key of the certificate in"
        " {folder}/chain.pem",
    ),
    "a ready file in no folder": (
        lambda folder: {"listen.ready_file": folder / "absent" / "ready.json"},
        "listen.ready_file: {folder}/absent/ready.json: no such file or directory",
    ),
    "a certificate that is not there": (
        _tls(None, OTHER_KEY),
        "listen.tls_certificate_file: {folder}/chain.pem: no such file or directory",
    ),
    "a device that is not there": (
        lambda _: {"engine.device": "cuda:99"},
        "engine.device: cuda:99 is not there; CUDA devices found: {devices}",
    ),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    add_model(folder, "tiny", TINY)
    return folder


def _last_line(arguments: list[str]) -> str:
    """The last thing that a command that fails says, after it said nothing unfit for users."""
    done = run_command(arguments)
    assert done.returncode == 2, done.stderr
    said = [line for line in done.stderr.splitlines() if not line.startswith("{")]
    assert said
    for line in said:
        assert not INTERNALS.search(line), line
    return said[-1]


def _arguments(command: str, models: Path, settings: Settings) -> list[str]:
    arguments = [command, "--models", str(models)]
    addresses = {"listen.address": "127.0.0.1:0", "listen.metrics_address": ""}
    for name, value in (addresses | {"engine.device": "cpu"} | settings).items():
        arguments += ["--set", f"{name}={value}"]
    return arguments


@pytest.mark.parametrize("command", ["serve", "check"])
@pytest.mark.parametrize(("case", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_a_setting_that_cannot_be_used_is_one_line(
    command: str, case: Callable[[Path], Settings], message: str, models: Path, tmp_path: Path
) -> None:
    said = _last_line(_arguments(command, models, case(tmp_path)))
    devices = torch.cuda.device_count()
    assert said == f"conveyor-server: {message.format(folder=tmp_path, devices=devices)}"


def test_a_disk_that_is_full_in_the_end_is_one_line(models: Path, tmp_path: Path) -> None:
    # What is written first is this file, and it goes where there is never any room.
    (tmp_path / "ready.json.partial").symlink_to("/dev/full")
    file = tmp_path / "ready.json"
    said = _last_line(_arguments("serve", models, {"listen.ready_file": file}))
    assert said == f"conveyor-server: listen.ready_file: {file}: no space left on device"


def test_check_tells_every_problem_and_changes_nothing(models: Path, tmp_path: Path) -> None:
    settings = _tls(CERTIFICATE, OTHER_KEY)(tmp_path) | {"engine.device": "cuda:99"}
    (tmp_path / "ready.json").write_text("of a server that runs")
    before = sorted(tmp_path.iterdir())
    settings |= {"listen.ready_file": tmp_path / "ready.json"}
    done = run_command(_arguments("check", models, settings))
    assert done.returncode == 2
    assert "sound" not in done.stdout
    assert "tiny" in done.stdout
    device, key = done.stderr.splitlines()
    assert device.startswith("conveyor-server: engine.device: cuda:99")
    assert key.startswith("conveyor-server: listen.tls_key_file: ")
    assert sorted(tmp_path.iterdir()) == before


def test_ports_in_use_name_their_setting(models: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        for flags, setting, flag in (
            (["--listen", address, "--metrics", ""], "listen.address", "--listen"),
            (
                ["--listen", "127.0.0.1:0", "--metrics", address],
                "listen.metrics_address",
                "--metrics",
            ),
        ):
            said = _last_line(["serve", "--models", str(models), *flags])
            expected = f"{setting}: cannot listen on {address}: address already in use"
            assert said == f"conveyor-server: {expected}; choose another address with {flag}"


UNREADABLE: list[tuple[Callable[[Path], object], str]] = [
    (lambda path: path.mkdir(), "is a directory"),
    (lambda path: path.write_bytes(b"\xff\xfe"), "not text in UTF-8"),
]


@pytest.mark.parametrize(("make", "why"), UNREADABLE)
def test_a_configuration_file_that_cannot_be_read(
    make: Callable[[Path], object], why: str, tmp_path: Path
) -> None:
    file = tmp_path / "server.toml"
    make(file)
    said = _last_line(["check", "--config", str(file)])
    assert said.startswith(f"conveyor-server: {file}: {why}")


def test_a_models_folder_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for name, why in (("absent", "no such file or directory"), ("file", "not a directory")):
        said = _last_line(["check", "--models", str(tmp_path / name)])
        assert said == f"conveyor-server: {tmp_path / name}: cannot be listed: {why}"

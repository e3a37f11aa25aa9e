"""``conveyor-server check``, ``models`` and what keeps ``serve`` from starting."""

from __future__ import annotations

import socket
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from conveyor.install import install_command
from conveyor_models import Bundle
from tests.integration.bundles import TINY, add_model
from tests.integration.process import ServerProcess, command_environment, run_command


def test_check_says_what_would_be_served(repository: Path, bundles: dict[str, Bundle]) -> None:
    done = run_command(["check", "--models", str(repository)])
    assert done.returncode == 0, done.stderr
    assert "configuration: sound" in done.stdout
    for name, bundle in bundles.items():
        assert name in done.stdout
        assert bundle.digest[:19] in done.stdout


def test_check_fails_on_a_broken_bundle(tmp_path: Path) -> None:
    add_model(tmp_path, "sound", TINY)
    add_model(tmp_path, "broken", TINY)
    (tmp_path / "broken" / "weights.safetensors").write_bytes(b"x" * 100)
    done = run_command(["check", "--models", str(tmp_path)])
    assert done.returncode == 1
    assert "sound" in done.stdout
    assert "problem:" in done.stderr
    assert "broken" in done.stderr


def test_check_fails_on_an_empty_repository(tmp_path: Path) -> None:
    done = run_command(["check", "--models", str(tmp_path)])
    assert done.returncode == 1
    assert "no bundle" in done.stderr
    assert "digest" not in done.stdout  # no table without rows


UNUSABLE = {
    "unknown section in a file": (["--config", "FILE"], "[surprise]\nkey = 1\n", "surprise"),
    "unknown key in a file": (["--config", "FILE"], "[limits]\nsurprise = 1\n", "surprise"),
    "value out of range in a file": (
        ["--config", "FILE"],
        "[limits]\nsessions_max = 0\n",
        "sessions_max",
    ),
    "value of another type in a file": (
        ["--config", "FILE"],
        '[limits]\nsessions_max = "many"\n',
        "sessions_max",
    ),
    "not TOML": (["--config", "FILE"], "[limits", "TOML"),
    "a file that is not there": (["--config", "FILE.absent"], "", "absent"),
    "unknown key in a flag": (["--set", "limits.surprise=1"], "", "surprise"),
    "unknown section in a flag": (["--set", "surprise.key=1"], "", "surprise"),
    "a flag without a value": (["--set", "limits.sessions_max"], "", "sessions_max"),
    "a flag without a section": (["--set", "sessions_max=1"], "", "sessions_max"),
    "a token too short": (["--config", "FILE"], '[auth.tokens]\nshort = "anna"\n', "token"),
}


@pytest.mark.parametrize("command", ["check", "serve"])
@pytest.mark.parametrize(("arguments", "text", "named"), UNUSABLE.values(), ids=UNUSABLE.keys())
def test_an_unusable_configuration_is_refused_and_the_key_named(
    command: str, arguments: list[str], text: str, named: str, repository: Path, tmp_path: Path
) -> None:
    file = tmp_path / "server.toml"
    file.write_text(text)
    given = [argument.replace("FILE", str(file)) for argument in arguments]
    done = run_command([command, "--models", str(repository), *given])
    assert done.returncode == 2
    assert named in done.stderr
    assert "Traceback" not in done.stderr
    assert "short" not in done.stderr


@pytest.mark.parametrize(
    "variable", ["CONVEYOR_SURPRISE", "CONVEYOR_LIMITS__SURPRISE", "CONVEYOR_SURPRISE__KEY"]
)
def test_an_unknown_variable_is_refused(variable: str, repository: Path) -> None:
    done = run_command(["check", "--models", str(repository)], **{variable: "1"})
    assert done.returncode == 2
    assert "surprise" in done.stderr.lower()


@pytest.mark.parametrize(
    "variable",
    [
        "conveyor_auth__tokens",
        "conveyor_outh__tokens",
        "Conveyor_Auth__Tokens",
        "CONVEYOR_AUTH_TOKENS",
        "CONVEYER_AUTH__TOKENS",
    ],
)
def test_a_misspelt_variable_leaves_no_server_open(variable: str, repository: Path) -> None:
    tokens = '{"0123456789abcdef": "ann"}'
    done = run_command(["serve", "--models", str(repository)], **{variable: tokens})
    assert done.returncode == 2
    assert done.stderr.endswith(
        f"{variable}: unknown environment variable; did you mean CONVEYOR_AUTH__TOKENS?\n"
    )


def test_a_token_as_part_of_a_variable_is_refused_and_not_shown(repository: Path) -> None:
    variable = {"CONVEYOR_AUTH__TOKENS__MySecretToken0123": "ann"}
    done = run_command(["serve", "--models", str(repository)], **variable)
    assert done.returncode == 2
    assert "JSON object: CONVEYOR_AUTH__TOKENS=" in done.stderr
    assert "secrettoken" not in (done.stdout + done.stderr).lower()


def test_a_service_named_conveyor_disturbs_neither_server_nor_client(
    repository: Path, tmp_path: Path
) -> None:
    kubernetes = {
        "CONVEYOR_SERVICE_HOST": "10.96.12.7",
        "CONVEYOR_SERVICE_PORT": "50051",
        "CONVEYOR_SERVICE_PORT_GRPC": "50051",
        "CONVEYOR_PORT": "tcp://10.96.12.7:50051",
        "CONVEYOR_PORT_50051_TCP": "tcp://10.96.12.7:50051",
        "CONVEYOR_PORT_50051_TCP_PROTO": "tcp",
        "CONVEYOR_PORT_50051_TCP_PORT": "50051",
        "CONVEYOR_PORT_50051_TCP_ADDR": "10.96.12.7",
        "CONVEYOR_METRICS_SERVICE_HOST": "10.96.12.8",
        "CONVEYOR_METRICS_PORT": "tcp://10.96.12.8:9464",
    }
    clients = {"CONVEYOR_METRICS": "http://127.0.0.1:9464/metrics", "CONVEYOR_TIMEOUT": "5"}
    server = ServerProcess(tmp_path, repository, {}, environment=kubernetes | clients)
    try:
        listed = subprocess.run(
            [Path(sys.executable).with_name("conveyor"), "models", "list", "--json"],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
            env=command_environment() | kubernetes | {"CONVEYOR_TARGET": server.address},
        )
        assert '"tiny"' in listed.stdout, listed.stderr
    finally:
        assert server.stop() == 0


def test_flags_go_over_variables_and_variables_over_the_file(
    repository: Path, tmp_path: Path
) -> None:
    file = tmp_path / "server.toml"
    file.write_text('[models]\nfolder = "absent-of-file"\n')
    arguments = ["check", "--config", str(file)]
    assert "absent-of-file" in run_command(arguments).stderr
    variable = {"CONVEYOR_MODELS__FOLDER": "absent-of-variable"}
    assert "absent-of-variable" in run_command(arguments, **variable).stderr
    flagged = run_command([*arguments, "--models", str(repository)], **variable)
    assert flagged.returncode == 0, flagged.stderr


def test_models_are_listed_and_shown(repository: Path, bundles: dict[str, Bundle]) -> None:
    listed = run_command(["models", "list", "--models", str(repository)])
    assert listed.returncode == 0
    assert all(name in listed.stdout for name in bundles)
    assert "-> 17" in listed.stdout
    shown = run_command(["models", "show", str(repository / "deep")])
    assert shown.returncode == 0
    assert bundles["deep"].digest in shown.stdout
    assert "projection = 17" in shown.stdout
    assert f"{bundles['deep'].spec.weight_values:,} parameters" in shown.stdout
    version = bundles["deep"].spec.version
    for name in ("deep", f"deep/{version}"):
        named = run_command(["models", "show", name, "--models", str(repository)])
        assert named.stdout == shown.stdout


def test_models_show_shows_the_latest_version_of_a_name(tmp_path: Path) -> None:
    for version in (2, 10):
        add_model(tmp_path, "several", TINY, version=version)
    for name, version in (("several", 10), ("several/2", 2)):
        done = run_command(["models", "show", name, "--models", str(tmp_path)])
        assert f"version = {version}\n" in done.stdout, done.stderr


def test_models_show_says_what_a_repository_has_not(repository: Path) -> None:
    for name, said in (("absent", "no sound bundle absent"), ("deep/99", "no version 99 of deep")):
        done = run_command(["models", "show", name, "--models", str(repository)])
        assert done.returncode == 2
        assert said in done.stderr


def test_the_tables_show_whole_digests_in_80_columns(
    repository: Path, bundles: dict[str, Bundle]
) -> None:
    done = run_command(["models", "list", "--models", str(repository)], COLUMNS="80")
    assert max(len(line) for line in done.stdout.splitlines()) <= 80
    assert all(bundle.digest[:19] in done.stdout for bundle in bundles.values())


def test_the_version_is_said() -> None:
    done = run_command(["--version"])
    assert done.returncode == 0
    assert done.stdout == f"conveyor-server {metadata.version('conveyor')}\n"


@pytest.mark.parametrize("missing", ["pydantic_settings", "torch", "prometheus_client"])
def test_without_the_server_extra_one_line_says_what_to_install(missing: str) -> None:
    code = (
        f"import sys; sys.modules[{missing!r}] = None; sys.argv = ['conveyor-server', 'serve'];"
        "from conveyor_server.cli import main; main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert install_command("server") in done.stderr


def test_models_show_refuses_what_is_no_bundle(tmp_path: Path) -> None:
    done = run_command(["models", "show", str(tmp_path)])
    assert done.returncode == 2
    assert "missing" in done.stderr


def test_models_list_refuses_what_is_no_folder(tmp_path: Path) -> None:
    done = run_command(["models", "list", "--models", str(tmp_path / "absent")])
    assert done.returncode == 2
    assert "Traceback" not in done.stderr


def test_serve_needs_a_model(tmp_path: Path) -> None:
    done = run_command(
        ["serve", "--models", str(tmp_path), "--listen", "127.0.0.1:0", "--metrics", ""]
    )
    assert done.returncode == 2
    assert "no model" in done.stderr


def test_serve_needs_a_free_port(repository: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        for flags in (
            ["--listen", address, "--metrics", ""],
            ["--listen", "127.0.0.1:0", "--metrics", address],
        ):
            done = run_command(["serve", "--models", str(repository), *flags])
            assert done.returncode == 2
            assert f"cannot listen on {address}" in done.stderr
            assert "address already in use" in done.stderr.lower()
            assert "GRPC_VERBOSITY" not in done.stderr
            assert "Traceback" not in done.stderr


def test_serve_says_why_an_address_cannot_be_bound(repository: Path) -> None:
    address = "192.0.2.1:50051"  # kept for documentation, so no machine's own
    flags = ["--listen", address, "--metrics", ""]
    done = run_command(["serve", "--models", str(repository), *flags])
    assert done.returncode == 2
    assert f"conveyor-server: listen.address: cannot listen on {address}: " in done.stderr
    assert "assign requested address" in done.stderr
    assert "GRPC_VERBOSITY" not in done.stderr


def test_serve_needs_the_device_it_is_given(repository: Path) -> None:
    done = run_command(["serve", "--models", str(repository), "--device", "cuda:63"])
    assert done.returncode == 2
    assert "engine.device" in done.stderr

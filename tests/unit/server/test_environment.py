"""Environment variables: what is a setting, what is refused, what is passed over."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import click
import pytest
import typer.main

from conveyor_client.cli._app import app as client_app
from conveyor_server.cli import app as server_app
from conveyor_server.config import Config, ConfigError, load_config
from conveyor_server.environment import RESERVED

ROOT: Final = Path(__file__).parents[3]
SECRET: Final = "MySecretToken0123"
KUBERNETES: Final = {
    "SERVICE_HOST": "10.96.12.7",
    "SERVICE_PORT": "50051",
    "SERVICE_PORT_GRPC": "50051",
    "SERVICE_PORT_HTTP_METRICS": "9464",
    "PORT": "tcp://10.96.12.7:50051",
    "PORT_50051_TCP": "tcp://10.96.12.7:50051",
    "PORT_50051_TCP_ADDR": "10.96.12.7",
    "PORT_50051_TCP_PROTO": "tcp",
    "PORT_50051_TCP_PORT": "50051",
    "PORT_53_UDP": "udp://[fd00::c]:53",
    "PORT_53_UDP_ADDR": "fd00::c",
}
"""What Kubernetes sets in a pod for each Service of its namespace, after the Service's name."""


@pytest.fixture(autouse=True)
def no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in list(os.environ):
        if variable.upper().startswith("CONVEY"):
            monkeypatch.delenv(variable)


def refusal(monkeypatch: pytest.MonkeyPatch, variable: str, value: str = "1") -> str:
    monkeypatch.setenv(variable, value)
    with pytest.raises(ConfigError) as caught:
        load_config()
    return str(caught.value)


@pytest.mark.parametrize(
    ("variable", "meant"),
    [
        ("conveyor_auth__tokens", "CONVEYOR_AUTH__TOKENS"),
        ("Conveyor_Limits__Sessions_Max", "CONVEYOR_LIMITS__SESSIONS_MAX"),
        ("CONVEYOR_LIMITS__sessions_max", "CONVEYOR_LIMITS__SESSIONS_MAX"),
        ("conveyor_LOG__LEVEL", "CONVEYOR_LOG__LEVEL"),
        ("conveyor_limits", "CONVEYOR_LIMITS"),
        ("conveyor_target", "CONVEYOR_TARGET"),
        ("conveyor_outh__tokens", "CONVEYOR_AUTH__TOKENS"),
        ("Conveyor_Limit__Streams", "CONVEYOR_LIMITS__STREAMS_MAX"),
        ("CONVEYOR_AUTH_TOKENS", "CONVEYOR_AUTH__TOKENS"),
        ("CONVEYOR__AUTH__TOKENS", "CONVEYOR_AUTH__TOKENS"),
        ("CONVEYOR_AUTH___TOKENS", "CONVEYOR_AUTH__TOKENS"),
        ("CONVEYOR_TOKENS", "CONVEYOR_AUTH__TOKENS"),
        ("CONVEYOR_AUTH__TOKNES", "CONVEYOR_AUTH__TOKENS"),
        ("CONVEYOR_AUTH__TOKEN", "CONVEYOR_AUTH__TOKENS"),
        ("CONVEYOR_SLOTS", "CONVEYOR_ENGINE__SLOTS"),
        ("CONVEYOR_AUTH-TOKENS", "CONVEYOR_AUTH__TOKENS"),
        ("CONVEYER_AUTH__TOKENS", "CONVEYOR_AUTH__TOKENS"),
        ("conveyer_auth__tokens", "CONVEYOR_AUTH__TOKENS"),
        ("CONVEYOUR_LIMITS__SESSIONS_MAX", "CONVEYOR_LIMITS__SESSIONS_MAX"),
        ("CONVEYORS_LOG__LEVEL", "CONVEYOR_LOG__LEVEL"),
        ("CONVEYORAUTH__TOKENS", "CONVEYOR_AUTH__TOKENS"),
        ("CONVEYER_OUTH__TOKENS", "CONVEYOR_AUTH__TOKENS"),
    ],
)
def test_another_spelling_is_refused_with_the_right_one(
    monkeypatch: pytest.MonkeyPatch, variable: str, meant: str
) -> None:
    said = refusal(monkeypatch, variable)
    assert said == f"{variable}: unknown environment variable; did you mean {meant}?"


@pytest.mark.parametrize(
    ("variable", "shown"),
    [
        (f"CONVEYOR_AUTH__TOKENS__{SECRET}", "CONVEYOR_AUTH__TOKENS__..."),
        (f"conveyor_auth__tokens__{SECRET}", "conveyor_auth__tokens__..."),
        (f"CONVEYOR_OUTH__TOKENS__{SECRET}", "CONVEYOR_OUTH__TOKENS__..."),
        (f"CONVEYOR_AUTH_TOKENS_{SECRET}", "CONVEYOR_AUTH_TOKENS_..."),
        (f"CONVEYOR_AUTH__{SECRET}", "CONVEYOR_AUTH__..."),
        ("CONVEYOR_AUTH__TOKENS__my_auth_tokens_1", "CONVEYOR_AUTH__TOKENS__..."),
        (f"CONVEYOR_OUTH__TKNS__{SECRET}", "CONVEYOR_OUTH__TKNS__..."),
        (f"CONVEYER_AUTH__TOKENS__{SECRET}", "CONVEYER_AUTH__TOKENS__..."),
        (f"CONVEYOR_TOKEN_{SECRET}", "CONVEYOR_TOKEN_..."),
    ],
)
def test_a_token_in_a_name_is_refused_and_not_shown(
    monkeypatch: pytest.MonkeyPatch, variable: str, shown: str
) -> None:
    said = refusal(monkeypatch, variable, "alice")
    assert said.startswith(f"{shown}: unknown environment variable")
    assert "CONVEYOR_AUTH__TOKENS" in said
    for secret in (SECRET, "my_auth", "alice"):
        assert secret.lower() not in said.lower()


@pytest.mark.parametrize(
    "value", [SECRET, f"{SECRET}=alice", f'{{"{SECRET}"', f'["{SECRET}"]', f'"{SECRET}"']
)
@pytest.mark.parametrize("variable", ["CONVEYOR_AUTH", "CONVEYOR_AUTH__TOKENS"])
def test_a_token_in_a_value_is_not_shown(
    monkeypatch: pytest.MonkeyPatch, variable: str, value: str
) -> None:
    assert SECRET not in refusal(monkeypatch, variable, value)


def test_a_token_under_auth_itself_is_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    said = refusal(monkeypatch, "CONVEYOR_AUTH", f'{{"{SECRET}": "alice"}}')
    assert said.startswith("auth: unknown key")
    assert SECRET not in said


@pytest.mark.parametrize(
    ("variable", "value", "said"),
    [
        ("CONVEYOR_AUTH", f'{{"tokens": {{}}, "Tokens": {{"{SECRET}": "a"}}}}', "Tokens"),
        ("CONVEYOR_LIMITS", '{"SESSIONS_MAX": 3}', "SESSIONS_MAX"),
    ],
)
def test_a_key_in_another_case_is_refused_in_json_too(
    monkeypatch: pytest.MonkeyPatch, variable: str, value: str, said: str
) -> None:
    assert refusal(monkeypatch, variable, value) == (
        f"{variable}: unknown key {said}; did you mean {said.lower()}?"
    )


def test_tokens_as_json_keep_their_case(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CONVEYOR_AUTH__TOKENS", f'{{"{SECRET}": "Alice"}}')
    assert load_config().auth.tokens == {SECRET: "Alice"}


def test_every_variable_is_named_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("conveyor_log__level", "debug")
    said = refusal(monkeypatch, "CONVEYOR_LIMITS__STREAM_MAX")
    assert [line.partition(":")[0] for line in said.splitlines()] == [
        "CONVEYOR_LIMITS__STREAM_MAX",
        "conveyor_log__level",
    ]


# --- what is passed over -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "service", ["CONVEYOR", "CONVEYOR_METRICS", "CONVEYOR_EU_1", "CONVEYOR_LIMITS"]
)
def test_variables_that_kubernetes_makes_of_a_service_are_passed_over(
    monkeypatch: pytest.MonkeyPatch, service: str
) -> None:
    for name, value in KUBERNETES.items():
        monkeypatch.setenv(f"{service}_{name}", value)
    assert load_config() == Config()


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("CONVEYOR_PORT", "50051"),
        ("CONVEYOR_LISTEN_PORT", "50051"),
        ("CONVEYOR_LISTEN__PORT", "tcp://10.0.0.1:50051"),
        ("CONVEYOR_SERVICE_HOST", "models.example"),
        ("CONVEYOR_SERVICE_PORT", "grpc"),
        ("CONVEYOR_PORT_50051", "tcp://10.0.0.1:50051"),
        ("CONVEYOR_PORT_50051_TCP", "50051"),
        ("CONVEYOR_PORT_50051_TCP_PROTO", "http"),
        ("CONVEYOR_PORT_50051_TCP_HOST", "10.0.0.1"),
        ("conveyor_service_host", "10.0.0.1"),
        ("CONVEYOR_SERVICES_HOST", "10.0.0.1"),
        ("CONVEYOR_SERVICE_HOST_MAX", "10.0.0.1"),
    ],
)
def test_what_only_resembles_them_is_refused(
    monkeypatch: pytest.MonkeyPatch, variable: str, value: str
) -> None:
    assert refusal(monkeypatch, variable, value).startswith(
        f"{variable}: unknown environment variable"
    )


@pytest.mark.parametrize(
    "variable",
    [
        "AUTH__TOKENS",  # many programs have settings of that name
        "LOG__LEVEL",
        "CONVERTER_LOG__LEVEL",
        "CONVERGE_LOG__LEVEL",
        "CONVEYOR2_LOG__LEVEL",
        "CONVEYER_HOME",
        "CONVEYORS_AUTH",
        "CONVEYOR",
        "MY_CONVEYOR_LOG__LEVEL",
    ],
)
def test_variables_of_other_programs_are_passed_over(
    monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    monkeypatch.setenv(variable, "x")
    assert load_config() == Config()


def test_variables_of_the_commands_are_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in RESERVED:
        monkeypatch.setenv(variable, "x")
    assert load_config() == Config()


def read_by(command: click.Command) -> Iterator[str]:
    """The variables that a command and those below it read."""
    for parameter in command.params:
        given = parameter.envvar or ()
        yield from [given] if isinstance(given, str) else given
    for below in getattr(command, "commands", {}).values():
        yield from read_by(below)


def test_the_list_of_the_commands_variables_is_whole() -> None:
    read = {
        name for app in (client_app, server_app) for name in read_by(typer.main.get_command(app))
    }
    for source in (*ROOT.glob("client/**/*.py"), *ROOT.glob("server/*.py")):
        read |= set(re.findall(r"environ\S*?[\[(]\"(CONVEYOR_\w+)\"", source.read_text("utf-8")))
    settings = {
        f"CONVEYOR_{section}__{key}".upper()
        for section, model in Config.model_fields.items()
        for key in getattr(model.annotation, "model_fields", {})
    }
    settings |= {f"CONVEYOR_{section}".upper() for section in Config.model_fields}
    assert read - settings <= RESERVED
    # The flags of TLS and their variables come with another change.
    assert RESERVED - read <= {f"CONVEYOR_{name}" for name in ("CA", "CERT", "KEY", "TLS")}

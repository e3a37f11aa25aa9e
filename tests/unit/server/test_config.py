"""Settings: their sources, their bounds and every way to misspell one."""

import os
import typing
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from conveyor_server.config import Config, ConfigError, EngineConfig, LimitsConfig, load_config


@pytest.fixture(autouse=True)
def no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in list(os.environ):
        if variable.startswith("CONVEYOR_"):
            monkeypatch.delenv(variable)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "conveyor.toml"
    path.write_text("[limits]\nsessions_max = 11\nstreams_max = 12\n[engine]\nslots = 13\n")
    return path


def sections() -> list[tuple[str, type[BaseModel]]]:
    found = [(name, field.annotation) for name, field in Config.model_fields.items()]
    return [(name, section) for name, section in found if section is not None]


def test_the_defaults_stand_without_any_source() -> None:
    assert load_config() == Config()
    assert load_config().limits == LimitsConfig()


def test_flags_win_over_environment_wins_over_file(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CONVEYOR_LIMITS__STREAMS_MAX", "22")
    monkeypatch.setenv("CONVEYOR_LIMITS__SESSIONS_MAX", "21")
    config = load_config(file, {"limits.sessions_max": "31"})
    assert config.limits.sessions_max == 31
    assert config.limits.streams_max == 22
    assert config.engine.slots == 13
    assert config.engine.quantum_steps == EngineConfig().quantum_steps


def test_true_and_false_are_no_numbers(tmp_path: Path) -> None:
    path = tmp_path / "conveyor.toml"
    for section, kind in sections():
        for key, field in kind.model_fields.items():
            if field.annotation not in (int, float):
                continue
            for word in ("true", "false"):
                path.write_text(f"[{section}]\n{key} = {word}\n")
                with pytest.raises(ConfigError, match=f"{section}.{key}: found {word}; expected a"):
                    load_config(path)


def test_all_of_them_can_be_set_by_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CONVEYOR_LISTEN__ADDRESS", "[::1]:7")
    monkeypatch.setenv("CONVEYOR_LISTEN__REFLECTION", "true")
    monkeypatch.setenv("CONVEYOR_LIMITS__IDLE_SECONDS_DEFAULT", "1.5")
    monkeypatch.setenv("CONVEYOR_LOG__LEVEL", "debug")
    monkeypatch.setenv("CONVEYOR_AUTH__TOKENS", '{"0123456789abcdef": "ann"}')
    config = load_config()
    assert config.listen.address == "[::1]:7"
    assert config.listen.reflection is True
    assert config.limits.idle_seconds_default == 1.5
    assert config.log.level == "debug"
    assert config.auth.tokens == {"0123456789abcdef": "ann"}


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("[limits]\nsesions_max = 1\n", "limits.sesions_max"),
        ("[limit]\nsessions_max = 1\n", "limit"),
        ("sessions_max = 1\n", "sessions_max"),
        ("[limits.sessions_max]\nvalue = 1\n", "limits.sessions_max"),
        ("limits = 3\n", "limits"),
    ],
)
def test_an_unknown_key_in_the_file_is_refused(tmp_path: Path, text: str, named: str) -> None:
    path = tmp_path / "conveyor.toml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert named in str(caught.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "[limits]\nsessions_mx = 1\n",
            "limits.sessions_mx: unknown key; did you mean sessions_max?",
        ),
        ("[limits]\nslots = 1\n", "limits.slots: unknown key; did you mean engine.slots?"),
        ("[limits]\nxyz = 1\n", "limits.xyz: unknown key"),
        ("[engin]\nslots = 1\n", "engin: unknown section; did you mean engine?"),
        ("[xyz]\nslots = 1\n", "xyz: unknown section"),
        ("slots = 1\n", "slots: unknown section; did you mean engine.slots?"),
        ("limits = 3\n", "limits: is a section, which has keys and no value of its own"),
        ("[Limits]\nslots = 1\n", "Limits: unknown section; did you mean limits?"),
        (
            '[auth]\n[AUTH.tokens]\n"0123456789abcdef" = "ann"\n',
            "AUTH: unknown section; did you mean auth?",
        ),
    ],
)
def test_a_misspelt_name_is_said_plainly_with_the_closest_known(
    tmp_path: Path, text: str, said: str
) -> None:
    path = tmp_path / "conveyor.toml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert str(caught.value) == said


@pytest.mark.parametrize(
    ("variable", "said"),
    [
        (
            "CONVEYOR_LIMIT__SESSIONS_MAX",
            "CONVEYOR_LIMIT__SESSIONS_MAX: unknown environment variable;"
            " did you mean CONVEYOR_LIMITS__SESSIONS_MAX?",
        ),
        (
            "CONVEYOR_LIMITS__SESSIONS_MX",
            "CONVEYOR_LIMITS__SESSIONS_MX: unknown environment variable;"
            " did you mean CONVEYOR_LIMITS__SESSIONS_MAX?",
        ),
        ("CONVEYOR_XYZ", "CONVEYOR_XYZ: unknown environment variable"),
    ],
)
def test_a_misspelt_variable_is_said_plainly(
    monkeypatch: pytest.MonkeyPatch, variable: str, said: str
) -> None:
    monkeypatch.setenv(variable, "1")
    with pytest.raises(ConfigError) as caught:
        load_config()
    assert str(caught.value) == said


@pytest.mark.parametrize("value", ["", "many", "3", "null", "[1]", '{"sessions_max": 1'])
@pytest.mark.parametrize("variable", ["CONVEYOR_LIMITS", "CONVEYOR_AUTH", "CONVEYOR_AUTH__TOKENS"])
def test_a_variable_for_many_values_has_to_be_a_json_object(
    monkeypatch: pytest.MonkeyPatch, variable: str, value: str
) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(ConfigError, match=f"^{variable}: not a JSON object; expected "):
        load_config()


def test_a_whole_section_can_be_one_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CONVEYOR_LIMITS", '{"sessions_max": 7}')
    monkeypatch.setenv("CONVEYOR_LIMITS__STREAMS_MAX", "8")
    assert load_config().limits == LimitsConfig(sessions_max=7, streams_max=8)


@pytest.mark.parametrize(
    "variable",
    [
        "CONVEYOR_LIMITS__SESIONS_MAX",
        "CONVEYOR_LIMIT__SESSIONS_MAX",
        "CONVEYOR_SESSIONS_MAX",
        "CONVEYOR_LIMITS_SESSIONS_MAX",
        "CONVEYOR_",
    ],
)
def test_an_unknown_environment_variable_is_refused(
    monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    monkeypatch.setenv(variable, "1")
    with pytest.raises(ConfigError) as caught:
        load_config()
    assert variable in str(caught.value)


@pytest.mark.parametrize(
    ("flag", "named"),
    [
        ("limits.sesions_max", "limits.sesions_max"),
        ("limit.sessions_max", "limit"),
        ("sessions_max", "sessions_max"),
        ("Limits.sessions_max", "did you mean limits?"),
        ("limits.Sessions_Max", "limits.Sessions_Max"),
        ("limits.", "limits."),
        (".sessions_max", ""),
        ("", "SECTION.KEY"),
    ],
)
def test_an_unknown_flag_is_refused(flag: str, named: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(flags={flag: "1"})
    assert named in str(caught.value)


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("limits.sessions_max", "0"),
        ("limits.sessions_max", "many"),
        ("limits.sessions_max", "1.5"),
        ("limits.idle_seconds_max", "0"),
        ("limits.idle_seconds_max", "-1"),
        ("limits.message_bytes_max", "1023"),
        ("limits.message_bytes_max", str(2**30 + 1)),
        ("engine.device", "gpu"),
        ("engine.device", "cuda:"),
        ("engine.cpu_threads", "0"),
        ("engine.slots", "0"),
        ("engine.quantum_steps", "65537"),
        ("log.level", "loud"),
        ("shutdown.grace_seconds", "-0.1"),
        ("listen.reflection", "maybe"),
        ("listen.address", ""),
        ("listen.address", "50051"),
        ("listen.address", "127.0.0.1:"),
        ("listen.address", "127.0.0.1:65536"),
        ("listen.metrics_address", ":9464"),
    ],
)
def test_a_value_out_of_its_range_is_refused(flag: str, value: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(flags={flag: value})
    assert flag in str(caught.value)


@pytest.mark.parametrize(
    ("tokens", "problem"),
    [
        ({"0123456789abcdef": 7}, "auth.tokens: expected text"),
        ({"0123456789abcde": "ann"}, "fewer than 16"),
        ({"0123456789abcdef": ""}, "principal"),
        ({"0123456789abcdef": "a\nb"}, "principal"),
    ],
)
def test_an_unusable_token_is_refused_without_being_shown(
    tmp_path: Path, tokens: dict[str, object], problem: str
) -> None:
    import json

    path = tmp_path / "conveyor.toml"
    entries = ", ".join(f"{json.dumps(key)} = {json.dumps(tokens[key])}" for key in tokens)
    path.write_text(f"[auth]\ntokens = {{ {entries} }}\n")
    with pytest.raises(ConfigError, match=problem) as caught:
        load_config(path)
    assert not any(token in str(caught.value) for token in tokens)


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ({"limits.chunk_steps_max": "8"}, ()),
        (
            {"limits.chunk_steps_max": "9", "limits.steps_in_flight_max": "8"},
            ("limits.chunk_steps_max is 9", "limits.steps_in_flight_max, which is 8"),
        ),
        (
            {"limits.idle_seconds_default": "7", "limits.idle_seconds_max": "6.5"},
            ("limits.idle_seconds_default is 7", "limits.idle_seconds_max, which is 6.5"),
        ),
        ({"listen.tls_key_file": "key.pem"}, ("tls_certificate_file", "tls_key_file")),
        ({"listen.tls_certificate_file": "c.pem", "listen.tls_key_file": "key.pem"}, ()),
        ({"listen.tls_client_ca_file": "ca.pem"}, ("tls_client_ca_file", "tls_certificate_file")),
    ],
)
def test_settings_that_contradict_one_another_are_refused(
    flags: dict[str, str], named: tuple[str, ...]
) -> None:
    if not named:
        assert load_config(flags=flags)
        return
    with pytest.raises(ConfigError) as caught:
        load_config(flags=flags)
    assert all(each in str(caught.value) for each in named)


@pytest.mark.parametrize(
    ("text", "flags"),
    [
        ('[auth]\n"0123456789abcdef" = "ann"\n', {}),
        ("", {"auth.0123456789abcdef": "ann"}),
        ("", {"auth.tokens.0123456789abcdef": "ann"}),
    ],
)
def test_a_token_in_the_wrong_place_is_refused_without_being_shown(
    tmp_path: Path, text: str, flags: dict[str, str]
) -> None:
    path = tmp_path / "conveyor.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match="auth: unknown key, not shown") as caught:
        load_config(path, flags)
    assert "0123456789abcdef" not in str(caught.value)


def test_one_principal_cannot_take_all_sessions_by_default() -> None:
    limits = load_config().limits
    assert limits.principal_sessions_max < limits.sessions_max


def test_every_problem_is_named_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(flags={"limits.sessions_max": "0", "engine.slots": "0", "log.level": "x"})
    assert len(str(caught.value).splitlines()) == 3


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"missing\.toml"):
        load_config(tmp_path / "missing.toml")
    broken = tmp_path / "broken.toml"
    broken.write_text("[limits\n")
    with pytest.raises(ConfigError, match=r"broken\.toml: not valid TOML"):
        load_config(broken)
    broken.write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match=r"broken\.toml"):
        load_config(broken)


def test_nothing_can_be_changed_afterwards() -> None:
    config: Any = load_config()
    with pytest.raises(ValueError, match="frozen"):
        config.limits.sessions_max = 1
    with pytest.raises(ValueError, match="frozen"):
        config.limits = LimitsConfig()


UNITS = ("_seconds", "_bytes", "_steps", "_sessions", "_chunks", "_entries", "_rows", "_adds")
COUNTS = {
    "sessions_max", "streams_max", "labels_max", "steps_in_flight_max", "concurrent_calls_max",
    "slots", "cpu_threads", "predictions_max", "running_predictions_max", "events_max",
    "spans_queued_max", "sample_ratio", "connections_max", "connection_calls_max",
    "connection_watches_max", "health_calls_max",
}  # fmt: skip


def test_every_number_has_its_unit_in_its_name_and_every_setting_a_description() -> None:
    for section, model in sections():
        for name, field in model.model_fields.items():
            where = f"{section}.{name}"
            assert field.description, where
            if field.annotation in (int, float):
                stem = name.removesuffix("_default").removesuffix("_max")
                assert stem.endswith(UNITS) or name in COUNTS, where


def test_every_number_has_a_lower_bound() -> None:
    for section, model in sections():
        for name, field in model.model_fields.items():
            if field.annotation in (int, float):
                bounds = [type(each).__name__ for each in field.metadata]
                assert {"Ge", "Gt"} & set(bounds), f"{section}.{name}"


def test_every_section_refuses_unknown_keys() -> None:
    assert {name for name, _ in sections()} >= {"listen", "models", "engine", "limits", "log"}
    for name, model in sections():
        assert typing.cast("dict[str, Any]", model.model_config)["extra"] == "forbid", name

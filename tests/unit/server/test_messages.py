"""What is wrong with settings and TLS files, in words for whoever set them."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import pytest

from conveyor.os_errors import os_error_text
from conveyor_models import SpecError, parse_spec
from conveyor_models.problems import expected
from conveyor_server.config import ConfigError, load_config
from conveyor_server.rpc.tls import TlsFilesError, read_pair
from tests.support.certificates import CERTIFICATE, KEY, OTHER_KEY

INTERNALS: Final = re.compile(
    r"\[Errno|\[SSL|_ssl\.c|Input should|should match|pattern|dtype|pydantic|float64"
)
"""Words of the libraries beneath, which say nothing to whoever set a setting."""

REFUSED: dict[str, tuple[dict[str, str], str]] = {
    "a device": (
        {"engine.device": "gpu"},
        "engine.device: found 'gpu'; expected auto, cpu, cuda or cuda:N",
    ),
    "an endpoint": (
        {"tracing.endpoint": "collector:4317"},
        "tracing.endpoint: found 'collector:4317'; expected http://HOST:PORT, https://HOST:PORT or"
        " nothing",
    ),
    "a word": (
        {"limits.sessions_max": "many"},
        "limits.sessions_max: found 'many'; expected a whole number",
    ),
    "a fraction": (
        {"limits.sessions_max": "1.5"},
        "limits.sessions_max: found '1.5'; expected a whole number",
    ),
    "too little": (
        {"limits.message_bytes_max": "7"},
        "limits.message_bytes_max: found '7'; expected at least 1,024",
    ),
    "too much": (
        {"engine.cpu_threads": "999"},
        "engine.cpu_threads: found '999'; expected at most 256",
    ),
    "none": (
        {"limits.idle_seconds_max": "0"},
        "limits.idle_seconds_max: found '0'; expected more than 0",
    ),
    "no truth": (
        {"listen.reflection": "maybe"},
        "listen.reflection: found 'maybe'; expected true or false",
    ),
    "a level": (
        {"log.level": "loud"},
        "log.level: found 'loud'; expected 'debug', 'info', 'warning' or 'error'",
    ),
    "an address": (
        {"listen.address": "50051"},
        "listen.address: found '50051'; expected host:port, the port 0 to 65535",
    ),
    "half of TLS": (
        {"listen.tls_key_file": "key.pem"},
        "listen.tls_key_file is set, but listen.tls_certificate_file is not; set both or none",
    ),
}


@pytest.mark.parametrize(("flags", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_a_setting_is_refused_with_what_was_found_and_what_was_expected(
    flags: dict[str, str], message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(flags=flags)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    "text",
    [
        "[limits]\nsessions_max = 1.5\n",
        "[limits]\nsessions_max = []\n",
        "[limits]\nidle_seconds_max = 'x'\n",
        "[limits]\nidle_seconds_max = nan\n",
        "[limits]\nidle_seconds_max = {}\n",
        "[listen]\nready_file = 3\n",
        "[listen]\naddress = 3\n",
        "[listen]\nreflection = []\n",
        "[log]\nlevel = 1\n",
        "[auth]\ntokens = 3\n",
        "[auth.tokens]\n0123456789abcdef = 3\n",
        "[tracing]\nservice_name = ''\n",
        "[tracing]\nsample_ratio = 7\n",
        "engine = 3\n",
        "engine = [1]\n",
    ],
)
def test_no_value_of_a_file_brings_out_the_words_of_a_library(text: str, tmp_path: Path) -> None:
    file = tmp_path / "server.toml"
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_config(file)
    assert not INTERNALS.search(str(caught.value))
    assert "0123456789abcdef" not in str(caught.value)
    assert "another kind" not in str(caught.value), "a type of error without words of its own"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("schema", "2"),
        ("name", '"A b"'),
        ("name", "3"),
        ("version", '"one"'),
        ("description", "3"),
        ("description", f'"{"x" * 5000}"'),
        ("input", "3"),
        ("input.kind", '"bytes"'),
        ("input.size", "0.5"),
        ("input.labels", "3"),
        ("input.labels", "[1, 2]"),
        ("layers", "3"),
        ("layers", "[]"),
        ("layers", "[3]"),
        ("layers", '[{ cell = "lstm", size = "x" }]'),
        ("layers", '[{ cell = "lstm", size = 3, peepholes = "input" }]'),
        ("layers", '[{ cell = "lstm", size = 3, peepholes = ["x"] }]'),
        ("layers", '[{ cell = "lstm", size = 3, hard_sigmoid_slope = -1.0 }]'),
        ("layers", '[{ cell = "gru", size = 3, reset = "x" }]'),
        ("head", "3"),
        ("head", '{ size = 3, bias = "no" }'),
        ("output", '{ activation = "relu" }'),
        ("limits", "{ chunk_steps_max = 0 }"),
    ],
)
def test_no_value_of_a_model_toml_brings_out_the_words_of_a_library(key: str, value: str) -> None:
    lines = {
        "schema": "1",
        "name": '"tiny"',
        "input": '{ kind = "features", size = 2 }',
        "layers": '[{ cell = "rnn", size = 2 }]',
    }
    if key.startswith("input."):
        rest = {"kind": '"features"', "size": "2"} | {key.removeprefix("input."): value}
        value = f"{{ {', '.join(f'{name} = {each}' for name, each in rest.items())} }}"
    lines[key.partition(".")[0]] = value
    with pytest.raises(SpecError) as caught:
        parse_spec("\n".join(f"{name} = {each}" for name, each in lines.items()))
    assert not INTERNALS.search(str(caught.value))
    assert "found" in str(caught.value)
    assert "another kind" not in str(caught.value), "a type of error without words of its own"


def test_an_unknown_kind_of_error_is_not_shown_either() -> None:
    context: Mapping[str, Any] = {"pattern": "[a-z]"}
    assert expected("brand_new", {}, {}) == "a value of another kind"
    assert expected("string_pattern_mismatch", context, {}) == "another form"


TLS: dict[str, tuple[str | None, str | None, str]] = {
    "no certificate": (
        None,
        KEY,
        "listen.tls_certificate_file: {folder}/chain.pem: no such file or directory",
    ),
    "no key": (
        CERTIFICATE,
        None,
        "listen.tls_key_file: {folder}/key.pem: no such file or directory",
    ),
    "not a certificate": (
        "words",
        KEY,
        "listen.tls_certificate_file: {folder}/chain.pem holds no certificate in PEM",
    ),
    "not a key": (
        CERTIFICATE,
        "words",
        "listen.tls_key_file: {folder}/key.pem holds no private key in PEM",
    ),
    "a damaged certificate": (
        CERTIFICATE.replace("MII", "XYZ", 1),
        KEY,
        "listen.tls_certificate_file and listen.tls_key_file: {folder}/chain.pem or"
        " {folder}/key.pem is damaged",
    ),
    "a key of another certificate": (
        CERTIFICATE,
        OTHER_KEY,
        "listen.tls_key_file: {folder}/key.pem is not the key of the certificate in"
        " {folder}/chain.pem",
    ),
}


@pytest.mark.parametrize(("certificate", "key", "message"), TLS.values(), ids=TLS.keys())
def test_tls_files_that_cannot_be_used_name_their_setting(
    certificate: str | None, key: str | None, message: str, tmp_path: Path
) -> None:
    files = (tmp_path / "chain.pem", tmp_path / "key.pem")
    for file, text in zip(files, (certificate, key), strict=True):
        if text is not None:
            file.write_text(text)
    with pytest.raises(TlsFilesError) as caught:
        read_pair(*files)
    assert str(caught.value) == message.format(folder=tmp_path)


def test_tls_files_that_belong_together_are_read(tmp_path: Path) -> None:
    (tmp_path / "chain.pem").write_text(CERTIFICATE)
    (tmp_path / "key.pem").write_text(KEY)
    pair = read_pair(tmp_path / "chain.pem", tmp_path / "key.pem")
    assert pair == (CERTIFICATE.encode(), KEY.encode())


def test_errors_of_the_operating_system_are_told_without_their_number() -> None:
    with pytest.raises(FileNotFoundError) as caught:
        Path("/nowhere/at-all").read_bytes()
    assert os_error_text(caught.value) == "/nowhere/at-all: no such file or directory"
    assert os_error_text(caught.value, "other") == "other: no such file or directory"
    assert os_error_text(OSError("Broken")) == "broken"
    assert os_error_text(OSError()) == "the operating system gave no reason"
